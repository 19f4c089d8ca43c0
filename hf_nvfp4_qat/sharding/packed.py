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
from hf_nvfp4_qat.sharding.wire import encode_rows, packed_rows, part_num_rows


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
        axis = row_axis(weight)
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
