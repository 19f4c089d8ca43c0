"""How from_pretrained sees NVFP4 QAT."""
