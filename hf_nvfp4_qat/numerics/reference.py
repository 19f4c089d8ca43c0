"""The definition of NVFP4 quantization: plain PyTorch, any device, one formula a line.

Everything faster (``eager.py``, kernels) must equal these functions with ``torch.equal``. They are written to be
read, and to be checked against exact rational arithmetic; nothing here is tuned.

Blocks are rows here: ``[B, 16]``, one block scale each.
"""

import torch

from hf_nvfp4_qat.numerics.format import E2M1_MAX, E2M1_TIES, E2M1_VALUES, E4M3_MAX, E4M3_MIN_NORMAL


def block_scales(blocks: torch.Tensor, global_decode_scale: torch.Tensor) -> torch.Tensor:
    """Block scale of each block: ``e4m3(blockmax / 6 / g)``, to nearest even, within the normal range.

    The divisions are in fp32 and cannot move a rounding: a bf16 maximum has 8 significant bits and an E4M3
    midpoint 5, so a quotient that is not exactly a midpoint is at least 2**-9 away from it.

    Args:
        blocks: bfloat16 ``[B, 16]``.
        global_decode_scale: float32 ``[]``, a power of two.

    Returns:
        float8_e4m3fn ``[B, 1]``, within ``[2**-6, 448]``; NaN for a block that holds NaN.
    """
    block_max = blocks.float().abs().amax(dim=-1, keepdim=True)
    scale = block_max / E2M1_MAX / global_decode_scale
    return scale.clamp(E4M3_MIN_NORMAL, E4M3_MAX).to(torch.float8_e4m3fn)


def codes(blocks: torch.Tensor, block_scale: torch.Tensor, global_decode_scale: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 code of each element, ties to the even code, saturating at 6; zero is code 0, never -0.

    Args:
        blocks: bfloat16 ``[B, 16]``.
        block_scale: float8_e4m3fn ``[B, 1]``.
        global_decode_scale: float32 ``[]``, a power of two.

    Returns:
        uint8 ``[B, 16]``, 0-15.
    """
    scaled = blocks.float() / (block_scale.float() * global_decode_scale)
    magnitude = scaled.abs()
    code = torch.zeros_like(scaled, dtype=torch.uint8)
    for lower_code, tie in enumerate(E2M1_TIES):
        # Tie `i` goes to the even one of codes i and i + 1: down where i is even, up where it is odd.
        code += (magnitude > tie) if lower_code % 2 == 0 else (magnitude >= tie)
    negative = (scaled < 0) & (code > 0)
    return code + 8 * negative.to(torch.uint8)


def quantize(blocks: torch.Tensor, global_decode_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to packed codes uint8 ``[B, 8]`` (even column in the low nibble) and block scales ``[B, 1]``."""
    block_scale = block_scales(blocks, global_decode_scale)
    code = codes(blocks, block_scale, global_decode_scale)
    return code[:, 0::2] | (code[:, 1::2] << 4), block_scale


def fake_quantize(blocks: torch.Tensor, global_decode_scale: torch.Tensor) -> torch.Tensor:
    """Quantize and decode: bfloat16 ``[B, 16]``, exact; NaN in a block without a scale."""
    block_scale = block_scales(blocks, global_decode_scale)
    e2m1_values = torch.tensor(E2M1_VALUES, device=blocks.device)
    values = e2m1_values[codes(blocks, block_scale, global_decode_scale).int()]
    return (values * (block_scale.float() * global_decode_scale)).to(torch.bfloat16)
