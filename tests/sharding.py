"""What the tests of sharded models share."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


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
