"""The largest magnitudes of many weights in one launch, and the global scales that follow from them in another."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hf_nvfp4_qat.numerics.implementations import launching_on

# Elements that one program looks at, and how many of them at a time; its warps.
_CHUNK = 65536
_TILE = 8192
_NUM_WARPS = 4


@triton.jit
def _amax_kernel(
    chunk_ptr, size_ptr, group_ptr, amax_ptr, ELEMENT: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr
):
    """Largest magnitude of one chunk of one weight, by its bits: they sort like the values, NaN last."""
    chunk = tl.program_id(0)
    pointer = tl.multiple_of(tl.load(chunk_ptr + chunk).to(tl.pointer_type(ELEMENT)), 16)
    size = tl.multiple_of(tl.load(size_ptr + chunk), 16)
    index = tl.arange(0, TILE)
    largest = tl.zeros([TILE], tl.int32)
    for start in tl.static_range(0, CHUNK, TILE):
        bits = tl.load(pointer + start + index, mask=start + index < size, other=0).to(tl.int32)
        largest = tl.maximum(largest, bits & (0x7FFF if ELEMENT == tl.int16 else 0x7FFFFFFF))
    result = tl.max(largest)
    tl.atomic_max(amax_ptr + tl.load(group_ptr + chunk), result << 16 if ELEMENT == tl.int16 else result)


@triton.jit
def _decode_scale_kernel(amax_ptr, scale_ptr, num, SIZE: tl.constexpr):
    """``global_decode_scale_of_amax``, step by step as there."""
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    amax = tl.load(amax_ptr + index, mask=index < num, other=0.0)
    bits = tl.div_rn(amax, 6.0).to(tl.int32, bitcast=True)
    top = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    exponent = (top >> 3) - 127 - 8 + ((top & 7) == 7).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    scale = tl.where(amax == 0, 1.0, scale)
    scale = tl.where(amax < float("inf"), scale, float("nan"))
    tl.store(scale_ptr + index, scale, mask=index < num)


def decode_scales(amax: torch.Tensor) -> torch.Tensor:
    """``global_decode_scale_of_amax`` in one launch: float32 on a GPU, any shape."""
    scales = torch.empty_like(amax)
    with launching_on(amax.device):
        _decode_scale_kernel[(triton.cdiv(amax.numel(), 256),)](amax, scales, amax.numel(), SIZE=256)
    return scales


@dataclass(frozen=True)
class AmaxPlan:
    """Where the chunks of many weights lie on one GPU, and which group each counts for.

    Attributes:
        chunks: by dtype of the bits (int16 for bfloat16, int32 for float32): addresses int64 ``[C]``, elements
            int32 ``[C]`` and groups int32 ``[C]``.
        num_groups: how many amaxes there are.
        device: of the weights.
    """

    chunks: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    num_groups: int
    device: torch.device

    @classmethod
    def of(cls, weights: Sequence[torch.Tensor], first_groups: Sequence[int], num_groups: int) -> "AmaxPlan | None":
        """The plan for weights ``[..., N, K]`` whose matrices count for consecutive groups, from the first one given.

        None if one of them is not bfloat16 or float32, contiguous and aligned to 16 bytes. Valid while no weight moves.
        """
        parts: dict[torch.dtype, list[torch.Tensor]] = {}
        for weight, first_group in zip(weights, first_groups, strict=True):
            element = {torch.bfloat16: torch.int16, torch.float32: torch.int32}.get(weight.dtype)
            if element is None or not weight.is_contiguous() or weight.data_ptr() % 16:
                return None
            size = weight.shape[-2:].numel()
            num_matrices = weight.numel() // max(size, 1)
            starts = torch.arange(0, size, _CHUNK)
            matrix = torch.arange(num_matrices)[:, None]
            address = weight.data_ptr() + (matrix * size + starts) * weight.element_size()
            sizes = (size - starts).clamp(max=_CHUNK).expand_as(address)
            groups = (first_group + matrix).expand_as(address)
            parts.setdefault(element, []).append(torch.stack([part.flatten() for part in (address, sizes, groups)]))
        device = weights[0].device
        chunks = {}
        for element, rows in parts.items():
            address, sizes, groups = torch.cat(rows, dim=1).to(device)
            chunks[element] = (address, sizes.int(), groups.int())
        return cls(chunks, num_groups, device)

    def run(self) -> torch.Tensor:
        """Largest magnitude of each group, before any rounding: float32 ``[num_groups]``, 0 for an empty one."""
        amax = torch.zeros(self.num_groups, dtype=torch.int32, device=self.device)
        elements = {torch.int16: tl.int16, torch.int32: tl.int32}
        with launching_on(self.device):
            for element, (address, sizes, groups) in self.chunks.items():
                if not len(address):
                    continue  # an empty shard
                _amax_kernel[(len(address),)](
                    address, sizes, groups, amax, ELEMENT=elements[element], CHUNK=_CHUNK, TILE=_TILE,
                    num_warps=_NUM_WARPS,
                )  # fmt: skip
        return amax.view(torch.float32)
