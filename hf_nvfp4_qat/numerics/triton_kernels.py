"""The reference's numbers on a GPU in one pass over the weight: read 2 bytes an element, write what is kept.

No division decides a code. Where the reference compares ``x / (s * g)`` with a tie, these kernels compare ``x`` with
``tie * s * g``: 7 significant bits, exact in fp32, so the comparison is exact too. Block scales are rounded to E4M3 on
their bits, which needs no conversion instruction.
"""

import torch
import triton
import triton.language as tl

# Blocks of 16 elements that one program handles: 8,192 elements, 64 a thread.
_BLOCKS_PER_PROGRAM = 512
_NUM_WARPS = 4


@triton.jit
def _block_scale_bits(x_bits, global_decode_scale):
    """Block scales of int16 `x_bits` [R, 16]: (E4M3 code int32 [R], value times the global scale fp32 [R])."""
    # Positive bf16 values sort like their bits, and NaN sorts last.
    block_max = tl.max((x_bits & 0x7FFF).to(tl.int32), axis=1)
    block_max = (block_max << 16).to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.div_rn(block_max, 6.0), global_decode_scale)
    is_nan = scale != scale
    scale = tl.minimum(tl.maximum(scale, 0.015625), 448.0)
    # Round to 4 significant bits, ties to even; within the normal range that is E4M3 with another exponent bias.
    bits = scale.to(tl.int32, bitcast=True)
    top = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    value = (top << 20).to(tl.float32, bitcast=True) * global_decode_scale
    code = tl.where(is_nan, 0x7F, top - ((127 - 7) << 3))
    return code, tl.where(is_nan, float("nan"), value)


@triton.jit
def _magnitude_codes(magnitude, scale):
    """E2M1 codes 0-7 of fp32 `magnitude` [R, 16] over `scale` [R, 1], ties to the even code."""
    code = (magnitude > 0.25 * scale).to(tl.int32)
    code += (magnitude >= 0.75 * scale).to(tl.int32)
    code += (magnitude > 1.25 * scale).to(tl.int32)
    code += (magnitude >= 1.75 * scale).to(tl.int32)
    code += (magnitude > 2.5 * scale).to(tl.int32)
    code += (magnitude >= 3.5 * scale).to(tl.int32)
    code += (magnitude > 5.0 * scale).to(tl.int32)
    return code


@triton.jit
def _quantize_kernel(x_ptr, global_scale_ptr, packed_ptr, block_scale_ptr, num_blocks, R: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = rows < num_blocks
    offsets = rows[:, None] * 16 + tl.arange(0, 16)[None, :]
    x_bits = tl.load(x_ptr + offsets, mask=inside[:, None], other=0)
    scale_code, scale = _block_scale_bits(x_bits, tl.load(global_scale_ptr))
    magnitude = ((x_bits & 0x7FFF).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    code = _magnitude_codes(magnitude, scale[:, None])
    code |= tl.where((x_bits < 0) & (code > 0), 8, 0)
    even, odd = tl.split(tl.reshape(code, (R, 8, 2)))
    packed_offsets = rows[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(packed_ptr + packed_offsets, (even | (odd << 4)).to(tl.uint8), mask=inside[:, None])
    tl.store(block_scale_ptr + rows, scale_code.to(tl.uint8), mask=inside)


@triton.jit
def _fake_quantize_kernel(x_ptr, global_scale_ptr, out_ptr, num_blocks, R: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = rows < num_blocks
    offsets = rows[:, None] * 16 + tl.arange(0, 16)[None, :]
    x_bits = tl.load(x_ptr + offsets, mask=inside[:, None], other=0)
    _, scale = _block_scale_bits(x_bits, tl.load(global_scale_ptr))
    magnitude = ((x_bits & 0x7FFF).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    code = _magnitude_codes(magnitude, scale[:, None])
    # Codes 0-4 are halves, 5 and 6 are 3 and 4, 7 is 6.
    value = tl.where(code <= 4, code.to(tl.float32) * 0.5, tl.where(code == 7, 6.0, code.to(tl.float32) - 2.0))
    value = tl.where((x_bits < 0) & (code > 0), -value, value) * scale[:, None]
    tl.store(out_ptr + offsets, value.to(tl.bfloat16), mask=inside[:, None])


def quantize(blocks: torch.Tensor, global_decode_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to packed codes and block scales.

    Args:
        blocks: bfloat16 ``[B, 16]``, contiguous, on a GPU.
        global_decode_scale: float32 ``[]``, a power of two, on the same GPU.

    Returns:
        packed: uint8 ``[B, 8]``, the even column in the low nibble.
        block_scale: float8_e4m3fn ``[B, 1]``.
    """
    num_blocks = blocks.shape[0]
    packed = torch.empty(num_blocks, 8, dtype=torch.uint8, device=blocks.device)
    block_scale = torch.empty(num_blocks, 1, dtype=torch.uint8, device=blocks.device)
    grid = (triton.cdiv(num_blocks, _BLOCKS_PER_PROGRAM),)
    with torch.cuda.device(blocks.device):
        _quantize_kernel[grid](
            blocks.view(torch.int16), global_decode_scale, packed, block_scale, num_blocks,
            R=_BLOCKS_PER_PROGRAM, num_warps=_NUM_WARPS,
        )  # fmt: skip
    return packed, block_scale.view(torch.float8_e4m3fn)


def fake_quantize(blocks: torch.Tensor, global_decode_scale: torch.Tensor) -> torch.Tensor:
    """Quantize and decode: bfloat16 ``[B, 16]``, exact. Args as ``quantize``."""
    out = torch.empty_like(blocks)
    grid = (triton.cdiv(blocks.shape[0], _BLOCKS_PER_PROGRAM),)
    with torch.cuda.device(blocks.device):
        _fake_quantize_kernel[grid](
            blocks.view(torch.int16), global_decode_scale, out, blocks.shape[0],
            R=_BLOCKS_PER_PROGRAM, num_warps=_NUM_WARPS,
        )  # fmt: skip
    return out
