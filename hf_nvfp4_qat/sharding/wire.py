"""How quantized rows travel between processes: one buffer of bytes a process, 4.5 bits a weight.

    one process's part      codes of its rows, then their block scales, each padded to the rows of the largest part
    gathered                the parts one behind the other, in the order of the processes

No value depends on another row, so a weight cut into rows is encoded piece by piece with the scale of the whole.
"""

import math

import torch

from hf_nvfp4_qat.numerics.format import BLOCK_SIZE, block_scale_shape, packed_shape
from hf_nvfp4_qat.numerics.implementations import resolve
from hf_nvfp4_qat.numerics.quantize import quantize_into
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor


def part_num_rows(num_rows: int, num_parts: int) -> int:
    """Rows of the largest part: as torch.chunk cuts, and with it FSDP2 and DTensor."""
    return math.ceil(num_rows / num_parts)


def part_num_bytes(num_rows: int, row_shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """Bytes of codes and of block scales for `num_rows` slices of dim 0, each of shape `row_shape` ``[..., K]``."""
    num_elements = num_rows * torch.Size(row_shape).numel()
    return num_elements // 2, num_elements // BLOCK_SIZE


def encode_rows(
    weight: torch.Tensor, global_decode_scale: torch.Tensor, *, num_rows: int, scale_rule: str = "amax"
) -> torch.Tensor:
    """This process's part.

    Args:
        weight: its rows, ``[R, K]`` or experts ``[R, N, K]``, any floating dtype, R <= `num_rows`, may be empty.
        global_decode_scale: float32 ``[]``, or ``[R]`` for experts, of the whole weight's.
        num_rows: rows of the largest part.
        scale_rule: how block scales are chosen.

    Returns:
        uint8 of ``sum(part_num_bytes(num_rows, weight.shape[1:]))`` bytes; padding is not written.
    """
    assert len(weight) <= num_rows, (weight.shape, num_rows)
    codes_bytes, scales_bytes = part_num_bytes(num_rows, weight.shape[1:])
    part = torch.empty(codes_bytes + scales_bytes, dtype=torch.uint8, device=weight.device)
    if not weight.numel():
        return part
    codes, scales = part[: weight.numel() // 2], part[codes_bytes : codes_bytes + weight.numel() // BLOCK_SIZE]
    quantize_into(weight, global_decode_scale, codes, scales, scale_rule=scale_rule)
    return part


def decode_rows(parts: torch.Tensor, global_decode_scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Decode gathered parts into a whole weight.

    Args:
        parts: uint8 ``[P, B]``, what the P processes got from ``encode_rows``.
        global_decode_scale: float32 ``[]``, or ``[E]`` for experts ``[E, N, K]``.
        out: the weight ``[..., N, K]``, any floating dtype, contiguous.
    """
    if resolve("auto", out.device) == "triton" and out.numel():
        from hf_nvfp4_qat.numerics import triton_decode

        codes, scales = _split(parts)
        return triton_decode.dequantize(codes, scales, global_decode_scale.contiguous(), out)
    return out.copy_(packed_rows(parts, global_decode_scale, out.shape).dequantize(out.dtype))


def packed_rows(
    parts: torch.Tensor, global_decode_scale: torch.Tensor, shape: torch.Size | tuple[int, ...]
) -> NVFP4Tensor:
    """Gathered parts as the whole weight in NVFP4; args as ``decode_rows``, `shape` of the weight."""
    codes, scales = _split(parts)
    packed, block_scale = packed_shape(shape), block_scale_shape(shape)
    return NVFP4Tensor(
        codes.reshape(-1)[: torch.Size(packed).numel()].view(packed),
        scales.reshape(-1)[: torch.Size(block_scale).numel()].view(block_scale).view(torch.float8_e4m3fn),
        global_decode_scale.clone(),
    )


def _split(parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and the block scales of all parts, as views ``[P, ...]``."""
    scales_bytes = parts.shape[1] // 9  # 1 byte of scale on 8 of codes
    return parts[:, :-scales_bytes], parts[:, -scales_bytes:]
