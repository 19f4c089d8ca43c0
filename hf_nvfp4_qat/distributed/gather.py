"""Sharded weights made whole: what packing and rollouts read when FSDP2 holds a part of each."""

import torch
from torch.distributed.tensor import DTensor


def full_tensor(weight: torch.Tensor) -> torch.Tensor:
    """The whole weight on this process; a collective for a sharded one, so every process must ask, in the same order.

    Args:
        weight: a plain tensor (returned as it is) or a DTensor (FSDP2, tensor parallelism).
    """
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach()
