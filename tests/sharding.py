"""What the tests of sharded models share."""

import tempfile
from contextlib import contextmanager

import accelerate.state
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_nvfp4_qat import NVFP4FSDPCallback


def spread(model: nn.Module) -> nn.Module:
    """Weights of unlike sizes, so that fused siblings have unlike largest magnitudes."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.mul_(1 + 0.37 * (number % 5))
    return model


def exact_sums(model: nn.Module) -> None:
    """Divide sums after they are taken, not before: exact on two processes."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def largest_difference(first, second) -> float:
    pairs = zip(first, second, strict=True)
    return max(float((whole(a).detach().float() - whole(b).detach().float()).abs().max()) for a, b in pairs)


@contextmanager
def fsdp_on_cpus():
    """Accelerate takes its FSDP branch on accelerators only; here it takes it on CPUs. The rest is Accelerate's own."""
    original = accelerate.state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()
    accelerate.state.AcceleratorState.__init__ = init
    try:
        yield
    finally:
        accelerate.state.AcceleratorState.__init__ = original


def shared_folder() -> str:
    path = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(path)
    return path[0]


class ExactSums(NVFP4FSDPCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        exact_sums(model)
        super().on_train_begin(args, state, control, model=model, **kwargs)
