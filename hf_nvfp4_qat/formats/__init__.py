"""How NVFP4 lies on disk: names and directions of tensors, safetensors files, and the form that ModelOpt gives them."""
