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

from hf_nvfp4_qat.distributed.failures import failures_of_all
from hf_nvfp4_qat.modules.global_scale import own_experts, own_part, own_slice
from hf_nvfp4_qat.numerics.quantize import quantize_unchecked
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor
from hf_nvfp4_qat.numerics.wire import encode_rows, packed_rows, part_num_bytes, part_num_rows

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

    A process that fails to quantize takes part in all gathers before it raises, so that the others do not wait for it.

    Args:
        weights: ``[N, K]``, or experts ``[E, N, K]``, sharded or not.
        global_decode_scales: float32 ``[]``, or ``[E]``, each; powers of two or NaN.
        scale_rule: how block scales are chosen.
    """
    packed: dict[int, NVFP4Tensor] = {}
    by_place: dict[tuple[Any, int], list[int]] = {}
    failure: Exception | None = None
    for number, weight in enumerate(weights):
        axis = _row_axis(weight)
        if axis is None:
            whole = full_tensor(weight)
            try:
                packed[number] = quantize_unchecked(whole, global_decode_scales[number], scale_rule=scale_rule)
            except Exception as error:
                failure = failure or error
        else:
            assert isinstance(weight, DTensor)
            by_place.setdefault((weight.device_mesh, axis), []).append(number)
    for (mesh, axis), numbers in by_place.items():
        num_parts = mesh.size(axis)
        num_rows = [part_num_rows(weights[number].shape[0], num_parts) for number in numbers]
        num_bytes = [
            sum(part_num_bytes(rows, weights[number].shape[1:])) for number, rows in zip(numbers, num_rows, strict=True)
        ]
        mine = torch.empty(sum(num_bytes), dtype=torch.uint8, device=own_part(weights[numbers[0]]).device)
        try:
            for number, rows, part in zip(numbers, num_rows, mine.split(num_bytes), strict=True):
                scale = global_decode_scales[number][own_experts(weights[number])]
                part.copy_(encode_rows(own_part(weights[number]), scale, num_rows=rows, scale_rule=scale_rule))
        except Exception as error:
            failure = failure or error
        gathered = mine.new_empty(num_parts * len(mine))
        dist.all_gather_into_tensor(gathered, mine, group=mesh.get_group(axis))
        if failure is None:
            per_weight = gathered.view(num_parts, -1).split(num_bytes, dim=1)
            for number, columns in zip(numbers, per_weight, strict=True):
                packed[number] = packed_rows(columns, global_decode_scales[number], weights[number].shape)
    if failure is not None:
        raise failure
    return [packed[number] for number in range(len(weights))]


def on_main_process(write: Callable[[Iterator[_Item]], list[_Result]], items: Iterator[_Item]) -> list[_Result]:
    """Let the first process write what all processes of the default group make together.

    Args:
        write: consumes the items to their end, on the first process, before it makes anything final: the end raises if
            another process failed to make an item, which is garbage on all of them then.
        items: each takes all processes to make, so all of them go through it to the end, whatever happens to `write` or
            to an item. So it must go on after an error, as ``map`` does and a generator does not, and what makes an
            item must take part in every collective before it raises.

    Returns:
        What `write` returns; an empty list on the other processes.

    Raises:
        Exception: on a process that failed, what `write` or the making of an item raised; on the others a RuntimeError
            that says which process failed and why.
    """
    world = [dist.group.WORLD]
    error: Exception | None = None
    written: list[_Result] = []
    failures: list[str] | None = None

    def until_all_are_made() -> Iterator[_Item]:
        nonlocal failures
        yield from items
        failures = failures_of_all(None, world)
        if failures:
            raise RuntimeError(f"Nothing was saved, because a process failed. It is {failures[0]}")

    try:
        if dist.get_rank() == 0:
            written = write(until_all_are_made())
    except Exception as raised:
        error = raised
    if failures is None:
        while True:
            try:
                next(items)
            except StopIteration:
                break
            except Exception as raised:
                error = error or raised
        failures = failures_of_all(error, world)
    failures = failures or failures_of_all(error, world)  # the first process may fail after all are made
    if error is not None:
        raise error
    if failures:
        raise RuntimeError(f"Nothing was saved, because a process failed. It is {failures[0]}")
    return written


def _row_axis(weight: torch.Tensor) -> int | None:
    """The one axis of its mesh over which a weight is sharded, if that is by rows; else None."""
    if not isinstance(weight, DTensor):
        return None
    sharded = [axis for axis, placement in enumerate(weight.placements) if not isinstance(placement, Replicate)]
    return sharded[0] if len(sharded) == 1 and weight.placements[sharded[0]] == Shard(0) else None
