"""Sharded weights made whole: what packing and rollouts read when FSDP2 or DeepSpeed ZeRO-3 holds a part of each."""

import torch
from torch.distributed.tensor import DTensor


def full_shape(weight: torch.Tensor) -> tuple[int, ...]:
    """Shape of the whole weight, of which `weight` may be this process' part."""
    # ZeRO-3 leaves an empty tensor in place of a partitioned parameter and notes its shape beside it.
    return tuple(getattr(weight, "ds_shape", weight.shape))


def full_tensor(weight: torch.Tensor) -> torch.Tensor:
    """The whole weight on this process; a collective for a sharded one, so every process must ask, in the same order.

    Args:
        weight: a plain tensor (returned as it is), a DTensor (FSDP2, tensor parallelism) or a ZeRO-3 parameter.
    """
    if isinstance(weight, DTensor):
        return weight.full_tensor().detach()
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            # Outside this context the storage is given back.
            return weight.detach().clone()
    return weight.detach()
