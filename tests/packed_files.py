"""Changes to the files of a packed checkpoint."""

import json

import torch
from safetensors.torch import save_file

UP = "model.layers.0.mlp.up_proj"


def rewrite(path, tensors) -> None:
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"].update(changes)
    (path / "config.json").write_text(json.dumps(config))


def other_tools_checkpoint(path, tensors) -> None:
    """As another tool writes it: global scales 2688 / amax, not powers of two, and a W4A4 activation scale."""
    for name in list(tensors):
        if name.endswith("weight_global_scale"):
            tensors[name] = tensors[name] * 1.37
            tensors[name.replace("weight_global_scale", "input_global_scale")] = torch.ones(1)
    rewrite(path, tensors)
