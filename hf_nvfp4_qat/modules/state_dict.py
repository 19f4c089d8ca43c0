"""What `load_state_dict` must not take, or leave, in silence: codes where a master weight belongs."""

import re
from typing import Any

import torch

_WEIGHTS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_master_weight(state_dict: dict[str, Any], prefix: str, name: str) -> None:
    """Refuse a state dict that has codes, or single experts, in the place of a weight that trains in NVFP4.

    A weight that is not there at all is no error here: a part of a model, or one file of several, may be loaded.

    Args:
        state_dict: as ``load_state_dict`` was given it.
        prefix: path of the module, with a dot at its end unless it is empty.
        name: of its parameter.

    Raises:
        ValueError: the weight is one of codes, or only its codes or its single experts are there.
    """
    weight = state_dict.get(f"{prefix}{name}")
    if weight is None:
        # `weight_packed` and its scales, or the experts that checkpoints hold one by one.
        instead = re.compile(rf"{name}_|[0-9]+\.")
        found = next((key for key in state_dict if key.startswith(prefix) and instead.match(key, len(prefix))), None)
    else:
        found = None if weight.dtype in _WEIGHTS else f"{prefix}{name}"
    if found is not None:
        raise ValueError(
            f"Training goes on from master weights; the state dict has no {prefix}{name} in 16 or 32 bits, but {found} "
            f"{str(state_dict[found].dtype).removeprefix('torch.')}. Start from such a folder with `load_nvfp4(path)`, "
            'or `from_pretrained` if nothing in it is packed. Trainer resumes from `save_format="auto"` or "master".'
        )
