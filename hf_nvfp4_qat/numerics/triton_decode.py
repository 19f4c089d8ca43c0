"""Decoding on a GPU, in one pass: 0.5625 bytes an element in, 2 out."""

import torch
import triton
import triton.language as tl

from hf_nvfp4_qat.numerics.format import BLOCK_SIZE
from hf_nvfp4_qat.numerics.implementations import launching_on

# Blocks of 16 elements a program takes, and its warps.
_SHAPE = (512, 4)


@triton.jit
def _decode_magnitude(code):
    """fp32 of E2M1 codes int32: as fp32 bits, they are those of a number 2**126 times smaller."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def _dequantize_kernel(
    packed_ptr, block_scale_ptr, global_scale_ptr, out_ptr, num_blocks, blocks_per_part, blocks_per_matrix,
    packed_stride, block_scale_stride, programs_per_part, ONE_MATRIX: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Parts lie `..._stride` bytes apart and follow each other in the output; the last may be cut short there."""
    part = (tl.program_id(0) // programs_per_part).to(tl.int64)
    start = (tl.program_id(0) % programs_per_part).to(tl.int64) * R  # within the part
    first = part * blocks_per_part + start  # within the output
    block = tl.arange(0, R)
    inside = (start + block < blocks_per_part) & (first + block < num_blocks)
    scale_offset = part * block_scale_stride + start
    scale = tl.load(block_scale_ptr + scale_offset + block, mask=inside, other=0).to(tl.int32)
    # E4M3 as fp32 with the exponent bias made up for; another tool's subnormal scales come out right as well.
    is_nan = (scale & 0x7F) == 0x7F
    scale = (((scale & 0x7F) << 20) | ((scale & 0x80) << 24)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    scale = tl.where(is_nan, float("nan"), scale)
    packed_offsets = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    packed_ptr += part * packed_stride + start * 8
    packed = tl.load(packed_ptr + packed_offsets, mask=inside[:, None], other=0).to(tl.int32)
    code = tl.reshape(tl.join(packed & 0xF, packed >> 4), (R, 16))
    if ONE_MATRIX:
        value = _decode_magnitude(code) * scale[:, None] * tl.load(global_scale_ptr)
    else:
        matrix = (first + block) // blocks_per_matrix
        global_scale = tl.load(global_scale_ptr + matrix, mask=inside, other=1.0)
        value = _decode_magnitude(code) * scale[:, None] * global_scale[:, None]
    offsets = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + first * 16 + offsets, value.to(out_ptr.dtype.element_ty), mask=inside[:, None])


def dequantize(
    packed: torch.Tensor, block_scale: torch.Tensor, global_decode_scale: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Decode into `out`.

    Args:
        packed: uint8, as ``quantize`` gives it, or ``[P, ...]`` with the rows of `out` in P equal parts, each of them
            contiguous; padding behind the last row of `out` is not read.
        block_scale: uint8 or float8_e4m3fn, in parts likewise.
        global_decode_scale: float32 of ``global_scale_shape(out.shape)``, contiguous.
        out: ``[..., N, K]``, any floating dtype, contiguous.
    """
    num_parts = 1 if packed.is_contiguous() and block_scale.is_contiguous() else len(packed)
    num_blocks, blocks_per_part = out.numel() // BLOCK_SIZE, block_scale.numel() // num_parts
    blocks, num_warps = _SHAPE
    programs_per_part = triton.cdiv(blocks_per_part, blocks)
    with launching_on(out.device):
        _dequantize_kernel[(programs_per_part * num_parts,)](
            packed, block_scale.view(torch.uint8), global_decode_scale, out, num_blocks, blocks_per_part,
            out.shape[-2] * out.shape[-1] // BLOCK_SIZE, packed.stride(0), block_scale.stride(0), programs_per_part,
            ONE_MATRIX=global_decode_scale.numel() == 1, R=blocks, num_warps=num_warps,
        )  # fmt: skip
    return out
