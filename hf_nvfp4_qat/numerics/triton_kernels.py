"""The reference's numbers on a GPU, in one pass over the memory: what is read is read once, what is kept written once.

A weight is a row of blocks of 16; a program takes some of them, two threads a block. What makes the numbers
exact although no division decides them:

    multiply by the reciprocal of the scale, then keep 12 significant bits
        A bf16 value that is not exactly a tie of E2M1 is 2**-8 of itself away from one, so an error of some 2**-24
        decides nothing, and one that is exactly a tie is exactly a tie again after the rounding to 12 bits.
    add and subtract 1.5 * 2**22 * p, with p = 1, 2, 4 for magnitudes below 2, 4, 8
        fp32 rounds to the last bit of the sum, p / 2: the spacing of E2M1 there, ties to the even code (see eager.py).
    round the block scale to 4 significant bits on its bits
        Within E4M3's normal range that is E4M3 with another exponent bias, and no conversion instruction is needed.
"""

import torch
import triton
import triton.language as tl

from hf_nvfp4_qat.numerics import format as nvfp4
from hf_nvfp4_qat.numerics.format import BLOCK_SIZE, SCALE_RULES, block_scale_shape, packed_shape
from hf_nvfp4_qat.numerics.implementations import launching_on

# As kernels see them.
NUM_SCALE_STEPS = tl.constexpr(nvfp4.NUM_SCALE_STEPS)
TOP_SCALE_MIN = tl.constexpr(nvfp4.TOP_SCALE_MIN)
TOP_VALUE_MIN = tl.constexpr(nvfp4.TOP_VALUE_MIN)

# Blocks of 16 elements a program takes, and its warps; the fastest of twelve pairs on an H100.
_FAKE_QUANTIZE_SHAPE = (64, 4)
_QUANTIZE_SHAPE = (256, 8)


def _encode_pair(number: int) -> str:
    """PTX: the scaled elements of one byte, even in operand 1 + number and odd in 5 + number, into register w.

    Two fp16 lanes at once: 11 significant bits decide ties as 12 do, and 768 * p plays 1.5 * 2**22 * p. The rounded
    value times 2**-14 has its E2M1 code in bits 9-11, since 1/2, E2M1's one subnormal value, becomes one of fp16's,
    and its sign in bit 15; zero is never negative, as a difference.
    """
    return f"""
        cvt.rn.f16x2.f32 h, ${5 + number}, ${1 + number};
        max.f16x2 h, h, minus_6;
        min.f16x2 h, h, plus_6;
        and.b32 p, h, 0x7C007C00;
        max.f16x2 p, p, one;
        fma.rn.f16x2 h, p, steps, h;
        mul.rn.f16x2 p, p, steps_back;
        fma.rn.f16x2 w{number}, h, tiny, p;
    """


# Four bytes of codes from eight scaled elements.
_ENCODE = tl.constexpr(
    f"""{{
        .reg .b32 h, p, w0, w1, w2, w3, low, high, a, b, minus_6, plus_6, one, steps, steps_back, tiny;
        mov.b32 minus_6, 0xC600C600;
        mov.b32 plus_6, 0x46004600;
        mov.b32 one, 0x3C003C00;
        mov.b32 steps, 0x62006200;                // 768
        mov.b32 steps_back, 0xAA00AA00;           // -768 * 2**-14
        mov.b32 tiny, 0x04000400;                 // 2**-14
        {"".join(_encode_pair(number) for number in range(4))}
        prmt.b32 w0, w0, w1, 0x7351;              // upper bytes of the even lanes, then of the odd ones
        prmt.b32 w2, w2, w3, 0x7351;
        prmt.b32 low, w0, w2, 0x5410;
        prmt.b32 high, w0, w2, 0x7632;
        shr.b32 a, low, 1;
        shr.b32 b, low, 4;
        lop3.b32 low, a, b, 0x07070707, 0xE4;     // (a & mask) | (b & ~mask)
        shl.b32 a, high, 3;
        lop3.b32 high, a, high, 0x70707070, 0xE4;
        lop3.b32 $0, low, high, 0x0F0F0F0F, 0xE4;
    }}"""
)


@triton.jit
def _keep_12_bits(x):
    """Round fp32 to 12 significant bits."""
    return ((x.to(tl.int32, bitcast=True) + 0x800) & ~0xFFF).to(tl.float32, bitcast=True)


@triton.jit
def _load_blocks(
    x_ptr, num_blocks, blocks_per_row, stride_e, stride_n, stride_k, programs_per_matrix,
    DENSE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """This program's blocks, and where they are.

    Returns:
        the blocks rounded to bf16, as fp32 [R, 16]; the number of their matrix; the number of the first in the output,
        int64; which of them there are, bool [R].
    """
    matrix = tl.program_id(0) // programs_per_matrix
    first = (tl.program_id(0) % programs_per_matrix).to(tl.int64) * R
    block = tl.arange(0, R)
    inside = first + block < num_blocks
    column = tl.arange(0, 16)
    x_ptr += matrix.to(tl.int64) * stride_e
    if DENSE:
        x_ptr += first * 16
        offsets = block[:, None] * 16 + column[None, :]
    else:
        row = (first + block) // blocks_per_row
        start = ((first + block) % blocks_per_row) * 16
        offsets = row[:, None] * stride_n + (start[:, None] + column[None, :]) * stride_k
    x = tl.load(x_ptr + offsets, mask=inside[:, None], other=0.0)
    return x.to(tl.bfloat16).to(tl.float32), matrix, matrix.to(tl.int64) * num_blocks + first, inside


@triton.jit
def round_to_e2m1(scaled):
    """E2M1 values, as fp32, of fp32 that has 12 significant bits."""
    scaled = tl.minimum(tl.maximum(scaled, -6.0), 6.0)
    p = tl.maximum(scaled.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)
    constant = (p + 0x0B400000).to(tl.float32, bitcast=True)  # the bits of 1.5 * 2**22 * p
    return (scaled + constant) - constant


@triton.jit
def _e4m3(scale):
    """Positive fp32 to E4M3: the bits of an fp32 from the last of 4 significant ones on."""
    scale = tl.minimum(tl.maximum(_keep_12_bits(scale), 0.015625), 448.0)
    bits = scale.to(tl.int32, bitcast=True)
    return (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20  # ties to even


@triton.jit
def _value(top):
    """fp32 of what ``_e4m3`` returns."""
    return (top << 20).to(tl.float32, bitcast=True)


@triton.jit
def _squared_error(relative, top, R: tl.constexpr):
    """As ``reference.squared_error``, in the same order, of fp32 `relative` [R, 16]."""
    scale = _value(top)[:, None]
    difference = relative - round_to_e2m1(_keep_12_bits(relative * (1.0 / scale))) * scale
    even, odd = tl.split(tl.reshape(difference * difference, (R, 8, 2)))
    even, odd = tl.split(tl.reshape(even + odd, (R, 4, 2)))
    even, odd = tl.split(tl.reshape(even + odd, (R, 2, 2)))
    even, odd = tl.split(even + odd)
    return even + odd


@triton.jit
def _block_scales(x, global_decode_scale, RULE: tl.constexpr, R: tl.constexpr):
    """Block scales of fp32 `x` [R, 16]: (E4M3 code int32 [R], its value times the global scale, fp32 [R])."""
    # Positive fp32 values sort like their bits, and NaN sorts last.
    block_max = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    # The reciprocals: of a power of two, exact; of 6, rounded, and the rounding to 12 bits takes that back.
    scale = block_max * (1.0 / 6.0) * (1.0 / global_decode_scale)
    is_nan = scale != scale
    top = _e4m3(scale)
    if RULE != 0:
        relative = x * (1.0 / global_decode_scale)
        block_max = block_max * (1.0 / global_decode_scale)
        is_at_top = _value(top) >= TOP_SCALE_MIN
        least = _squared_error(relative, top, R)
        first = top
        for step in tl.static_range(1, 2 if RULE == 1 else NUM_SCALE_STEPS + 1):
            if RULE == 1:
                other = _e4m3(block_max * 0.25)
            else:
                other = tl.minimum(first + step, 1086)  # 448
            error = _squared_error(relative, other, R)
            e2m1_max = round_to_e2m1(_keep_12_bits(block_max * (1.0 / _value(other))))
            is_better = (error < least) & (e2m1_max >= 4.0)
            is_better = is_better & ((e2m1_max * _value(other) >= TOP_VALUE_MIN) | (is_at_top == 0))
            top = tl.where(is_better, other, top)
            least = tl.where(is_better, error, least)
    code = tl.where(is_nan, 0x7F, top - ((127 - 7) << 3))
    return code, tl.where(is_nan, float("nan"), _value(top) * global_decode_scale)


@triton.jit
def _fake_quantize_kernel(
    x_ptr, global_scale_ptr, out_ptr, num_blocks, blocks_per_row, stride_e, stride_n, stride_k, programs_per_matrix,
    DENSE: tl.constexpr, RULE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    x, matrix, first, inside = _load_blocks(
        x_ptr, num_blocks, blocks_per_row, stride_e, stride_n, stride_k, programs_per_matrix, DENSE, R
    )
    _, scale = _block_scales(x, tl.load(global_scale_ptr + matrix), RULE, R)
    value = round_to_e2m1(_keep_12_bits(x * (1.0 / scale)[:, None])) * scale[:, None]
    offsets = tl.arange(0, R)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + first * 16 + offsets, value.to(tl.bfloat16), mask=inside[:, None])


@triton.jit
def _quantize_kernel(
    x_ptr, global_scale_ptr, packed_ptr, block_scale_ptr, num_blocks, blocks_per_row, stride_e, stride_n, stride_k,
    programs_per_matrix, DENSE: tl.constexpr, RULE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    x, matrix, first, inside = _load_blocks(
        x_ptr, num_blocks, blocks_per_row, stride_e, stride_n, stride_k, programs_per_matrix, DENSE, R
    )
    scale_code, scale = _block_scales(x, tl.load(global_scale_ptr + matrix), RULE, R)
    even, odd = tl.split(tl.reshape(x * (1.0 / scale)[:, None], (R, 8, 2)))
    packed = tl.inline_asm_elementwise(_ENCODE, "=r" + ",r" * 8, [even, odd], dtype=tl.int8, is_pure=True, pack=4)
    block = tl.arange(0, R)
    offsets = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    # Each thread stores the 4 bytes it has; left alone, the compiler trades them for 8 through shared memory.
    offsets = tl.max_contiguous(offsets, (1, 4))
    tl.store(packed_ptr + first * 8 + offsets, packed.to(tl.uint8, bitcast=True), mask=inside[:, None])
    tl.store(block_scale_ptr + first + block, scale_code.to(tl.uint8), mask=inside)


def quantize(
    weight: torch.Tensor,
    global_decode_scale: torch.Tensor,
    scale_rule: str = "amax",
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to packed codes and block scales.

    Args:
        weight: ``[..., N, K]`` on a GPU, bfloat16, float16 or float32, any strides, K % 16 == 0, not empty.
        global_decode_scale: float32 ``[...]``, powers of two, contiguous, on the same GPU.
        scale_rule: how block scales are chosen.
        out: uint8 tensors of the right number of bytes, contiguous, to write both results into.

    Returns:
        packed: uint8 ``[..., N, K / 2]``, the even column in the low nibble.
        block_scale: float8_e4m3fn ``[..., N, K / 16]``.
    """
    if out is None:
        packed = torch.empty(packed_shape(weight.shape), dtype=torch.uint8, device=weight.device)
        block_scale = torch.empty(block_scale_shape(weight.shape), dtype=torch.uint8, device=weight.device)
    else:
        packed, block_scale = out
    _launch(_quantize_kernel, _QUANTIZE_SHAPE, weight, global_decode_scale, scale_rule, packed, block_scale)
    return packed, block_scale.view(torch.float8_e4m3fn)


def fake_quantize(weight: torch.Tensor, global_decode_scale: torch.Tensor, scale_rule: str = "amax") -> torch.Tensor:
    """Quantize and decode: bfloat16 ``[..., N, K]``, contiguous, exact. Args as ``quantize``."""
    out = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    _launch(_fake_quantize_kernel, _FAKE_QUANTIZE_SHAPE, weight, global_decode_scale, scale_rule, out)
    return out


def _launch(
    kernel,
    shape: tuple[int, int],
    weight: torch.Tensor,
    global_decode_scale: torch.Tensor,
    scale_rule: str,
    *outputs: torch.Tensor,
) -> None:
    blocks, num_warps = shape
    weight = weight if weight.ndim <= 3 else weight.flatten(0, -3)
    stride_e = weight.stride(0) if weight.ndim == 3 else 0
    stride_n, stride_k = weight.stride()[-2:]
    num_rows, num_columns = weight.shape[-2:]
    num_blocks = num_rows * num_columns // BLOCK_SIZE
    programs = triton.cdiv(num_blocks, blocks)
    dense = stride_k == 1 and stride_n == num_columns
    with launching_on(weight.device):
        kernel[(programs * global_decode_scale.numel(),)](
            weight, global_decode_scale, *outputs, num_blocks, num_columns // BLOCK_SIZE, stride_e, stride_n, stride_k,
            programs, DENSE=dense, RULE=SCALE_RULES.index(scale_rule), R=blocks, num_warps=num_warps,
        )  # fmt: skip
