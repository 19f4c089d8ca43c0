"""NVFP4FSDPPlugin: Accelerate's FSDP plugin that also switches the NVFP4 gather on.

Accelerate calls one method of the plugin with the model, `set_auto_wrap_policy`, and that is before sharding. So the
method waits for the model's first forward: global hooks run before FSDP2's own, hence before the first gather.
"""

from dataclasses import dataclass, field
from typing import Any
from weakref import finalize, ref

from accelerate import FullyShardedDataParallelPlugin
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from hf_nvfp4_qat.distributed.gather_mode import apply_gather_mode, gather_mode, unwrapped
from hf_nvfp4_qat.modules.swap import qat_weights


@dataclass
class NVFP4FSDPPlugin(FullyShardedDataParallelPlugin):
    """``Accelerator(fsdp_plugin=NVFP4FSDPPlugin())``, under ``accelerate launch`` or not; YAML files stay as they are.

    Every other field is Accelerate's, and is filled from its environment variables where it is not given.

    Attributes:
        nvfp4_gather: "packed", "bf16" or "auto", as in ``gather_mode.py``; None takes the environment variable
            NVFP4_QAT_GATHER, else "auto".

    Raises:
        ValueError: an unknown mode, or "packed" with ``fsdp_version`` 1.
    """

    nvfp4_gather: str | None = field(
        default=None, metadata={"help": "How QAT weights are gathered: packed (NVFP4), bf16, or auto."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.nvfp4_gather = gather_mode(self.nvfp4_gather)
        if self.fsdp_version == 1 and self.nvfp4_gather == "packed":
            raise ValueError(
                "The NVFP4 gather needs FSDP2; fsdp_version is 1. Set `fsdp_version: 2`, or NVFP4_QAT_GATHER=bf16: "
                "weights are fake-quantized in forward then."
            )

    def set_auto_wrap_policy(self, model: nn.Module) -> None:
        """Accelerate's, and from the model's first forward on, the gather.

        Raises:
            ValueError: persistent buffers with `cpu_ram_efficient_loading`, which takes all tensors of a state dict for
                sharded ones.
        """
        super().set_auto_wrap_policy(model)
        if self.cpu_ram_efficient_loading and (buffers := _undistributed(model, fsdp_version=self.fsdp_version)):
            raise ValueError(
                "Accelerate's efficient loading distributes parameters, and takes persistent buffers for some; "
                f"{type(model).__name__} has {len(buffers)} of these, the first {buffers[0]}. Set "
                "`fsdp_cpu_ram_efficient_loading: false`."
            )
        if self.fsdp_version == 1 or not qat_weights(model):
            return
        model_ref = ref(model)

        def before_first_forward(module: nn.Module, args: Any) -> None:
            if unwrapped(module) is model_ref():
                handle.remove()
                apply_gather_mode(module, self.nvfp4_gather or "auto")

        handle = register_module_forward_pre_hook(before_first_forward)
        finalize(model, handle.remove).atexit = False  # of a model that never runs


def _undistributed(model: nn.Module, *, fsdp_version: int) -> list[str]:
    """Persistent buffers that no process but the first would get; FSDP1 distributes all but measured inputs."""
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name, _ in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set and (fsdp_version != 1 or name == "input_amax")
    ]
