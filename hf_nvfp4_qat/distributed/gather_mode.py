"""How FSDP2 gathers QAT weights: the setting, and what it does to a model.

    "packed"   in 4 bits (packed_gather.py); an error where that cannot be
    "bf16"     whole, and fake-quantized in forward
    "auto"     packed where it can be; else the reason is logged and weights are gathered whole

It comes from the argument of the plugin or callback, else from the environment variable NVFP4_QAT_GATHER (Accelerate
drops what it does not know from its YAML files without a word), else it is "auto".
"""

import logging
import os
from typing import Any

from torch import nn

from hf_nvfp4_qat.distributed.packed_gather import stop_packed_gather, use_packed_gather

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "NVFP4_QAT_GATHER"
MODES = ("auto", "packed", "bf16")


def gather_mode(given: str | None) -> str:
    """The mode to use.

    Raises:
        ValueError: not one of "auto", "packed", "bf16".
    """
    mode = given or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if mode not in MODES:
        raise ValueError(f"QAT weights are gathered as one of {', '.join(MODES)}; got {mode!r}.")
    return mode


def apply_gather_mode(model: nn.Module, mode: str) -> None:
    """Put `mode` into force on a prepared model, before its first forward.

    Args:
        model: what a trainer or Accelerate trains, sharded or not, compiled or not.
        mode: as ``gather_mode`` gives it.

    Raises:
        ValueError: "packed" where it cannot be.
    """
    root = unwrapped(model)
    if mode == "bf16":
        stop_packed_gather(root)
        return
    try:
        report = use_packed_gather(root)
    except ValueError as error:
        if mode == "packed":
            raise
        logger.warning("QAT weights are gathered whole and fake-quantized in forward. %s", error)
    else:
        logger.log(logging.WARNING if report.left_out else logging.INFO, "%s.", report)


def unwrapped(model: Any) -> nn.Module:
    """Without what torch.compile puts around a model."""
    return getattr(model, "_orig_mod", model)
