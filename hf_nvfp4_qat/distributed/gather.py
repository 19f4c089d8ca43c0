"""Sharded weights made whole, for packing and rollouts: where they are quantized, only packed bytes are gathered.

Every process must call, with the same weights in the same order.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from hf_nvfp4_qat.modules.global_scale import own_experts, own_part, own_slice
from hf_nvfp4_qat.numerics.quantize import quantize_unchecked
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor
from hf_nvfp4_qat.numerics.wire import encode_rows, packed_rows, part_num_rows

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def is_sharded(weight: Any) -> bool:
    """Whether this process may hold a part of the weight only."""
    return isinstance(weight, DTensor)


def reshard(model: nn.Module) -> None:
    """Put the shards in place of the weights that FSDP2 has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(weight: torch.Tensor) -> torch.Tensor:
    """The whole weight on this process.

    Args:
        weight: a plain tensor (returned as it is) or a DTensor (FSDP2, tensor parallelism).
    """
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach()


def own_rows(weight: torch.Tensor, packed: NVFP4Tensor) -> tuple[torch.Tensor, NVFP4Tensor]:
    """What of a weight sharded by rows, or by experts, this process holds, and the same part of it in NVFP4.

    A weight that is sharded otherwise is gathered.
    """
    if _row_axis(weight) is None:
        return full_tensor(weight), packed
    own = own_part(weight).detach()
    rows = own_slice(weight)
    scale = packed.global_decode_scale[own_experts(weight)]
    return own, NVFP4Tensor(packed.packed[rows], packed.block_scale[rows], scale)


def gather_packed(
    weights: Sequence[torch.Tensor], global_decode_scales: Sequence[torch.Tensor], scale_rule: str
) -> list[NVFP4Tensor]:
    """The whole weights in NVFP4: each process encodes its rows, one all-gather moves them all, in 4.5 bits a weight.

    What is not sharded by rows alone (tensor parallelism besides) is gathered whole and then quantized.

    Args:
        weights: ``[N, K]``, or experts ``[E, N, K]``, sharded or not.
        global_decode_scales: float32 ``[]``, or ``[E]``, each; powers of two or NaN.
        scale_rule: how block scales are chosen.
    """
    packed: dict[int, NVFP4Tensor] = {}
    by_place: dict[tuple[Any, int], list[int]] = {}
    for number, weight in enumerate(weights):
        axis = _row_axis(weight)
        if axis is None:
            scale = global_decode_scales[number]
            packed[number] = quantize_unchecked(full_tensor(weight), scale, scale_rule=scale_rule)
        else:
            assert isinstance(weight, DTensor)
            by_place.setdefault((weight.device_mesh, axis), []).append(number)
    for (mesh, axis), numbers in by_place.items():
        num_parts = mesh.size(axis)
        parts = []
        for number in numbers:
            num_rows = part_num_rows(weights[number].shape[0], num_parts)
            scale = global_decode_scales[number][own_experts(weights[number])]
            parts.append(encode_rows(own_part(weights[number]), scale, num_rows=num_rows, scale_rule=scale_rule))
        mine = torch.cat(parts)
        gathered = mine.new_empty(num_parts * len(mine))
        dist.all_gather_into_tensor(gathered, mine, group=mesh.get_group(axis))
        per_weight = gathered.view(num_parts, -1).split([len(part) for part in parts], dim=1)
        for number, columns in zip(numbers, per_weight, strict=True):
            packed[number] = packed_rows(columns, global_decode_scales[number], weights[number].shape)
    return [packed[number] for number in range(len(weights))]


def on_main_process(write: Callable[[Iterator[_Item]], list[_Result]], items: Iterator[_Item]) -> list[_Result]:
    """Let the first process write what all processes of the default group make together.

    An error that one process alone meets while it makes an item (it ran out of memory, say) leaves the others waiting
    for it, as any collective does.

    Args:
        write: consumes the items, on the first process.
        items: each takes all processes to make, so all of them go through it to the end, whatever happens to `write`.

    Returns:
        What `write` returns; an empty list on the other processes.

    Raises:
        Exception: on the first process what `write` raised, on the others a RuntimeError that says so; on any process
            what making an item raised.
    """
    error: Exception | None = None
    written: list[_Result] = []
    try:
        if dist.get_rank() == 0:
            written = write(items)
    except Exception as raised:
        error = raised
    try:
        for _ in items:
            pass
    except Exception as raised:
        error = error or raised
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if failed := [(rank, message) for rank, message in enumerate(messages) if message]:
        raise RuntimeError(f"Nothing was saved: process {failed[0][0]} failed with {failed[0][1]}")
    return written


def _row_axis(weight: torch.Tensor) -> int | None:
    """The one axis of its mesh over which a weight is sharded, if that is by rows; else None."""
    if not isinstance(weight, DTensor):
        return None
    sharded = [axis for axis, placement in enumerate(weight.placements) if not isinstance(placement, Replicate)]
    return sharded[0] if len(sharded) == 1 and weight.placements[sharded[0]] == Shard(0) else None
