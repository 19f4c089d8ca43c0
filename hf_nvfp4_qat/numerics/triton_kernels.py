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

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hf_nvfp4_qat.numerics.format import BLOCK_SIZE, block_scale_shape, packed_shape

# Blocks of 16 elements a program takes, and its warps; the fastest of twelve pairs on an H100.
_FAKE_QUANTIZE_SHAPE = (64, 4)
_QUANTIZE_SHAPE = (256, 8)
_DEQUANTIZE_SHAPE = (512, 4)
_AMAX_WARPS = 4

# Elements whose largest magnitude one program finds, and how many of them at a time.
_AMAX_CHUNK = 65536
_AMAX_TILE = 8192


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
def _load_blocks(x_ptr, program, num_blocks, blocks_per_row, stride_n, stride_k, DENSE: tl.constexpr, R: tl.constexpr):
    """The program's blocks, rounded to bf16, as fp32 [R, 16]."""
    first = program.to(tl.int64) * R
    block = tl.arange(0, R)
    inside = first + block < num_blocks
    column = tl.arange(0, 16)
    if DENSE:
        x_ptr += first * 16
        offsets = block[:, None] * 16 + column[None, :]
    else:
        row = (first + block) // blocks_per_row
        start = ((first + block) % blocks_per_row) * 16
        offsets = row[:, None] * stride_n + (start[:, None] + column[None, :]) * stride_k
    x = tl.load(x_ptr + offsets, mask=inside[:, None], other=0.0)
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _block_scales(x, global_decode_scale):
    """Block scales of fp32 `x` [R, 16]: (E4M3 code int32 [R], its value times the global scale, fp32 [R])."""
    # Positive fp32 values sort like their bits, and NaN sorts last.
    block_max = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    # The reciprocals: of a power of two, exact; of 6, rounded, and the rounding to 12 bits takes that back.
    scale = block_max * (1.0 / 6.0) * (1.0 / global_decode_scale)
    is_nan = scale != scale
    scale = tl.minimum(tl.maximum(_keep_12_bits(scale), 0.015625), 448.0)
    bits = scale.to(tl.int32, bitcast=True)
    top = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20  # ties to even
    value = (top << 20).to(tl.float32, bitcast=True) * global_decode_scale
    code = tl.where(is_nan, 0x7F, top - ((127 - 7) << 3))
    return code, tl.where(is_nan, float("nan"), value)


@triton.jit
def _fake_quantize_kernel(
    x_ptr, global_scale_ptr, out_ptr, num_blocks, blocks_per_row, stride_e, stride_n, stride_k, programs_per_matrix,
    DENSE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(0) // programs_per_matrix
    program = tl.program_id(0) % programs_per_matrix
    x_ptr += matrix.to(tl.int64) * stride_e
    x = _load_blocks(x_ptr, program, num_blocks, blocks_per_row, stride_n, stride_k, DENSE, R)
    _, scale = _block_scales(x, tl.load(global_scale_ptr + matrix))
    scaled = tl.minimum(tl.maximum(_keep_12_bits(x * (1.0 / scale)[:, None]), -6.0), 6.0)
    p = tl.maximum(scaled.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)
    constant = (p + 0x0B400000).to(tl.float32, bitcast=True)  # the bits of 1.5 * 2**22 * p
    value = ((scaled + constant) - constant) * scale[:, None]
    first = program.to(tl.int64) * R
    out_ptr += (matrix.to(tl.int64) * num_blocks + first) * 16
    block = tl.arange(0, R)
    offsets = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + offsets, value.to(tl.bfloat16), mask=(first + block < num_blocks)[:, None])


@triton.jit
def _quantize_kernel(
    x_ptr, global_scale_ptr, packed_ptr, block_scale_ptr, num_blocks, blocks_per_row, stride_e, stride_n, stride_k,
    programs_per_matrix, DENSE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(0) // programs_per_matrix
    program = tl.program_id(0) % programs_per_matrix
    x_ptr += matrix.to(tl.int64) * stride_e
    x = _load_blocks(x_ptr, program, num_blocks, blocks_per_row, stride_n, stride_k, DENSE, R)
    scale_code, scale = _block_scales(x, tl.load(global_scale_ptr + matrix))
    even, odd = tl.split(tl.reshape(x * (1.0 / scale)[:, None], (R, 8, 2)))
    packed = tl.inline_asm_elementwise(_ENCODE, "=r" + ",r" * 8, [even, odd], dtype=tl.int8, is_pure=True, pack=4)
    first = program.to(tl.int64) * R
    block = tl.arange(0, R)
    inside = first + block < num_blocks
    first += matrix.to(tl.int64) * num_blocks
    offsets = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    # Each thread stores the 4 bytes it has; left alone, the compiler trades them for 8 through shared memory.
    offsets = tl.max_contiguous(offsets, (1, 4))
    tl.store(packed_ptr + first * 8 + offsets, packed.to(tl.uint8, bitcast=True), mask=inside[:, None])
    tl.store(block_scale_ptr + first + block, scale_code.to(tl.uint8), mask=inside)


@triton.jit
def _decode_magnitude(code):
    """fp32 of E2M1 codes int32: as fp32 bits, they are those of a number 2**126 times smaller."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def _dequantize_kernel(
    packed_ptr, block_scale_ptr, global_scale_ptr, out_ptr, num_blocks, programs_per_matrix, R: tl.constexpr
):
    matrix = tl.program_id(0) // programs_per_matrix
    first = (tl.program_id(0) % programs_per_matrix).to(tl.int64) * R
    block = tl.arange(0, R)
    inside = first + block < num_blocks
    first += matrix.to(tl.int64) * num_blocks
    scale = tl.load(block_scale_ptr + first + block, mask=inside, other=0).to(tl.int32)
    # E4M3 as fp32 with the exponent bias made up for; another tool's subnormal scales come out right as well.
    is_nan = (scale & 0x7F) == 0x7F
    scale = (((scale & 0x7F) << 20) | ((scale & 0x80) << 24)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    scale = tl.where(is_nan, float("nan"), scale)
    packed_offsets = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    packed = tl.load(packed_ptr + first * 8 + packed_offsets, mask=inside[:, None], other=0).to(tl.int32)
    code = tl.reshape(tl.join(packed & 0xF, packed >> 4), (R, 16))
    value = _decode_magnitude(code) * scale[:, None] * tl.load(global_scale_ptr + matrix)
    offsets = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + first * 16 + offsets, value.to(out_ptr.dtype.element_ty), mask=inside[:, None])


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


def _on(device: torch.device) -> AbstractContextManager:
    """Launches go to the current GPU; on a CPU, only Triton's interpreter runs them."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def quantize(weight: torch.Tensor, global_decode_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to packed codes and block scales.

    Args:
        weight: ``[..., N, K]`` on a GPU, bfloat16, float16 or float32, any strides, K % 16 == 0, not empty.
        global_decode_scale: float32 ``[...]``, powers of two, contiguous, on the same GPU.

    Returns:
        packed: uint8 ``[..., N, K / 2]``, the even column in the low nibble.
        block_scale: float8_e4m3fn ``[..., N, K / 16]``.
    """
    packed = torch.empty(packed_shape(weight.shape), dtype=torch.uint8, device=weight.device)
    block_scale = torch.empty(block_scale_shape(weight.shape), dtype=torch.uint8, device=weight.device)
    _launch(_quantize_kernel, _QUANTIZE_SHAPE, weight, global_decode_scale, packed, block_scale)
    return packed, block_scale.view(torch.float8_e4m3fn)


def fake_quantize(weight: torch.Tensor, global_decode_scale: torch.Tensor) -> torch.Tensor:
    """Quantize and decode: bfloat16 ``[..., N, K]``, contiguous, exact. Args as ``quantize``."""
    out = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    _launch(_fake_quantize_kernel, _FAKE_QUANTIZE_SHAPE, weight, global_decode_scale, out)
    return out


def _launch(
    kernel, shape: tuple[int, int], weight: torch.Tensor, global_decode_scale: torch.Tensor, *outputs: torch.Tensor
) -> None:
    blocks, num_warps = shape
    weight = weight if weight.ndim <= 3 else weight.flatten(0, -3)
    stride_e = weight.stride(0) if weight.ndim == 3 else 0
    stride_n, stride_k = weight.stride()[-2:]
    num_rows, num_columns = weight.shape[-2:]
    num_blocks = num_rows * num_columns // BLOCK_SIZE
    programs = triton.cdiv(num_blocks, blocks)
    dense = stride_k == 1 and stride_n == num_columns
    with _on(weight.device):
        kernel[(programs * global_decode_scale.numel(),)](
            weight, global_decode_scale, *outputs, num_blocks, num_columns // BLOCK_SIZE, stride_e, stride_n, stride_k,
            programs, DENSE=dense, R=blocks, num_warps=num_warps,
        )  # fmt: skip


def dequantize(
    packed: torch.Tensor, block_scale: torch.Tensor, global_decode_scale: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Decode into `out`, ``[..., N, K]`` of any floating dtype, contiguous; the parts as ``quantize`` returns them."""
    num_blocks = out.shape[-2] * out.shape[-1] // BLOCK_SIZE
    blocks, num_warps = _DEQUANTIZE_SHAPE
    programs_per_matrix = triton.cdiv(num_blocks, blocks)
    with _on(out.device):
        _dequantize_kernel[(programs_per_matrix * global_decode_scale.numel(),)](
            packed, block_scale.view(torch.uint8), global_decode_scale, out, num_blocks, programs_per_matrix,
            R=blocks, num_warps=num_warps,
        )  # fmt: skip
    return out


def decode_scales(amax: torch.Tensor) -> torch.Tensor:
    """``global_decode_scale_of_amax`` in one launch: float32 on a GPU, any shape."""
    scales = torch.empty_like(amax)
    with _on(amax.device):
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
    def of(cls, weights: list[torch.Tensor], first_groups: list[int], num_groups: int) -> "AmaxPlan | None":
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
            starts = torch.arange(0, size, _AMAX_CHUNK)
            matrix = torch.arange(num_matrices)[:, None]
            address = weight.data_ptr() + (matrix * size + starts) * weight.element_size()
            sizes = (size - starts).clamp(max=_AMAX_CHUNK).expand_as(address)
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
        with _on(self.device):
            for element, (address, sizes, groups) in self.chunks.items():
                if not len(address):
                    continue  # an empty shard
                _amax_kernel[(len(address),)](
                    address, sizes, groups, amax, ELEMENT=elements[element], CHUNK=_AMAX_CHUNK, TILE=_AMAX_TILE,
                    num_warps=_AMAX_WARPS,
                )  # fmt: skip
        return amax.view(torch.float32)
