"""Sharded weights made whole in NVFP4: each process encodes what it has, and only packed bytes are gathered.

Every process must call, with the same weights in the same order.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hf_nvfp4_qat.numerics.quantize import quantize_unchecked
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor
from hf_nvfp4_qat.sharding.parts import full_tensor, own_experts, own_part, row_axis
from hf_nvfp4_qat.sharding.wire import encode_rows, packed_rows, part_num_bytes, part_num_rows


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
        axis = row_axis(weight)
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
