"""Which code computes the numbers on which device. All of it gives the reference's, bit for bit.

"reference"   one formula a line (reference.py), any device
"eager"       plain PyTorch, about ten times faster (eager.py), any device
"triton"      one pass over the memory (triton_kernels.py), NVIDIA GPUs
"auto"        "triton" where it was checked, else "eager"
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

logger = logging.getLogger(__name__)

Impl = Literal["auto", "reference", "eager", "triton"]

_NAMES = ("reference", "eager", "triton")

# The lowest compute capability with E4M3, and the range in which the kernels were checked against the reference.
_TRITON_MIN_CAPABILITY = (8, 9)


@cache
def _pick(device: torch.device) -> str:
    """What "auto" means on a device; picked and logged once."""
    if device.type != "cuda":
        logger.info('NVFP4 quantization on %s: impl="auto" picked "eager".', device)
        return "eager"
    if torch.version.cuda is None:
        missing = "no NVIDIA GPU"
    elif find_spec("triton") is None:
        missing = "Triton is not installed"
    elif (capability := torch.cuda.get_device_capability(device)) < _TRITON_MIN_CAPABILITY:
        missing = f"compute capability {capability} is below {_TRITON_MIN_CAPABILITY}"
    else:
        logger.info('NVFP4 quantization on %s: impl="auto" picked "triton".', device)
        return "triton"
    logger.warning('NVFP4 quantization on %s: impl="auto" picked "eager", same numbers, slower: %s.', device, missing)
    return "eager"


def resolve(impl: str, device: torch.device) -> str:
    """The implementation that `impl` stands for on `device`: one of "reference", "eager", "triton".

    Raises:
        ValueError: an unknown name, or "triton" for a tensor that is not on a GPU.
    """
    if impl == "auto":
        return _pick(device)
    if impl not in _NAMES:
        raise ValueError(f"`impl` is one of auto, {', '.join(_NAMES)}; got {impl!r}.")
    if impl == "triton" and device.type != "cuda":
        raise ValueError(f'`impl="triton"` needs the weight on an NVIDIA GPU; it is on {device}. Use impl="auto".')
    return impl


def launching_on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current GPU; on a CPU, only its interpreter runs kernels."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
