"""Activations in NVFP4 on a GPU, in one pass over the memory: the numbers of activations.py, bit for bit.

Unlike a weight's, these numbers are defined by their rounding errors (a multiplication by the reciprocal, and no
rounding to 12 bits behind it), so reciprocals are divisions that round correctly.
"""

import torch
import triton
import triton.language as tl

from hf_nvfp4_qat.numerics.format import BLOCK_SIZE
from hf_nvfp4_qat.numerics.implementations import launching_on
from hf_nvfp4_qat.numerics.triton_kernels import round_to_e2m1

_BLOCKS_PER_PROGRAM = 64


@triton.jit
def _fake_quantize_kernel(x_ptr, global_scale_ptr, out_ptr, num_blocks, R: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * R
    offsets = tl.arange(0, R)[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = (first + tl.arange(0, R) < num_blocks)[:, None]
    x = tl.load(x_ptr + first * 16 + offsets, mask=inside, other=0.0).to(tl.float32)
    global_scale = tl.load(global_scale_ptr)
    # Positive fp32 values sort like their bits, and NaN sorts last.
    block_max = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    is_finite = block_max < float("inf")
    scale = tl.minimum(tl.div_rn(1.0, global_scale) * (block_max * (1.0 / 6.0)), 448.0)
    # E4M3: 4 significant bits, or, below 2**-6, multiples of 2**-9. 1.5 * 2**14 has 2**-9 as its last bit.
    bits = scale.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
    subnormal = (scale + 24576.0) - 24576.0
    scale = tl.where(scale < 0.015625, subnormal, normal) * global_scale
    inverse = tl.where(scale == 0.0, 0.0, tl.div_rn(1.0, tl.where(scale == 0.0, 1.0, scale)))
    scale = tl.where(is_finite, scale, float("nan"))
    value = round_to_e2m1(x * inverse[:, None]) * scale[:, None]
    tl.store(out_ptr + first * 16 + offsets, value.to(out_ptr.dtype.element_ty), mask=inside)


def fake_quantize(x: torch.Tensor, global_decode_scale: torch.Tensor) -> torch.Tensor:
    """As ``activations.fake_quantize_activation``, of a contiguous tensor on a GPU that is not empty."""
    out = torch.empty_like(x)
    num_blocks = x.numel() // BLOCK_SIZE
    with launching_on(x.device):
        _fake_quantize_kernel[(triton.cdiv(num_blocks, _BLOCKS_PER_PROGRAM),)](
            x, global_decode_scale, out, num_blocks, R=_BLOCKS_PER_PROGRAM, num_warps=4
        )
    return out
