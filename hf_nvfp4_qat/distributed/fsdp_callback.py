"""NVFP4FSDPCallback: the NVFP4 gather under Trainer and TRL, which build Accelerate's plugin themselves."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_nvfp4_qat.distributed.gather_mode import apply_gather_mode, gather_mode


class NVFP4FSDPCallback(TrainerCallback):
    """``Trainer(..., callbacks=[NVFP4FSDPCallback()])`` with FSDP2, from `fsdp` in the arguments or a YAML file.

    Args:
        gather: "packed", "bf16" or "auto", as in ``gather_mode.py``; None takes the environment variable
            NVFP4_QAT_GATHER, else "auto".

    Raises:
        ValueError: an unknown mode; at the start of training, "packed" where it cannot be.
    """

    def __init__(self, gather: str | None = None) -> None:
        self.gather = gather_mode(gather)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """The model is sharded by now, a checkpoint is loaded, and nothing has run."""
        if model is not None:
            apply_gather_mode(model, self.gather)
