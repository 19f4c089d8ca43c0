"""The definition of NVFP4 quantization: plain PyTorch, any device, one formula a line.

Everything faster (``eager.py``, kernels) must equal these functions with ``torch.equal``. They are written to be
read, and to be checked against exact rational arithmetic; nothing here is tuned.

Blocks are rows here: ``[B, 16]``, one block scale each.
"""

import torch

from hf_nvfp4_qat.numerics.format import (
    E2M1_MAX,
    E2M1_TIES,
    E2M1_VALUES,
    E4M3_MAX,
    E4M3_MIN_NORMAL,
    NUM_SCALE_STEPS,
    TOP_SCALE_MIN,
    TOP_VALUE_MIN,
)


def block_scales(blocks: torch.Tensor, global_decode_scale: torch.Tensor, scale_rule: str = "amax") -> torch.Tensor:
    """Block scale of each block: ``e4m3(blockmax / 6 / g)``, to nearest even, within the normal range.

    The divisions are in fp32 and cannot move a rounding: a bf16 maximum has 8 significant bits and an E4M3
    midpoint 5, so a quotient that is not exactly a midpoint is at least 2**-9 away from it.

    Args:
        blocks: bfloat16 ``[B, 16]``.
        global_decode_scale: float32 ``[]``, a power of two.
        scale_rule: "amax" stays with that scale. The others take another one of ``_other_scales`` where its squared
            error is less; of equal ones the first.

    Returns:
        float8_e4m3fn ``[B, 1]``, within ``[2**-6, 448]``; NaN for a block that holds NaN.
    """
    block_max = blocks.float().abs().amax(dim=-1, keepdim=True)
    first = _e4m3(block_max / E2M1_MAX / global_decode_scale)
    if scale_rule == "amax":
        return first
    chosen, least = first, squared_error(blocks, first, global_decode_scale)
    for other in _other_scales(block_max, first, global_decode_scale, scale_rule):
        error = squared_error(blocks, other, global_decode_scale)
        is_better = (error < least) & _keeps_global_scale(block_max, first, other, global_decode_scale)
        chosen = torch.where(is_better, other.float(), chosen.float()).to(torch.float8_e4m3fn)
        least = torch.where(is_better, error, least)
    return chosen


def _e4m3(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(E4M3_MIN_NORMAL, E4M3_MAX).to(torch.float8_e4m3fn)


def _other_scales(
    block_max: torch.Tensor, first: torch.Tensor, global_decode_scale: torch.Tensor, scale_rule: str
) -> list[torch.Tensor]:
    if scale_rule == "four_over_six":
        return [_e4m3(block_max / 4 / global_decode_scale)]
    code = first.view(torch.uint8)  # E4M3 values are in the order of their codes, and 126 is 448
    steps = range(1, NUM_SCALE_STEPS + 1)
    return [(code + step).clamp(max=126).view(torch.float8_e4m3fn) for step in steps]


def _keeps_global_scale(
    block_max: torch.Tensor, first: torch.Tensor, other: torch.Tensor, global_decode_scale: torch.Tensor
) -> torch.Tensor:
    """Whether a decoded weight with `other` scales has the same global scale, and the same values, once more."""
    e2m1_max = _e2m1(block_max, other, global_decode_scale)
    is_top = first.float() >= TOP_SCALE_MIN
    return (e2m1_max >= 4) & (~is_top | (e2m1_max * other.float() >= TOP_VALUE_MIN))


def squared_error(blocks: torch.Tensor, block_scale: torch.Tensor, global_decode_scale: torch.Tensor) -> torch.Tensor:
    """Squared error of each block under a scale, in units of the squared global scale: float32 ``[B, 1]``.

    The differences and their squares are exact in fp32; neighbours are added in pairs, pairs of pairs and so on, so
    that the sum is the same in every implementation.
    """
    values = _e2m1(blocks, block_scale, global_decode_scale) * block_scale.float()
    error = (blocks.float() / global_decode_scale - values).square()
    while error.shape[-1] > 1:
        error = error[:, 0::2] + error[:, 1::2]
    return error


def _e2m1(blocks: torch.Tensor, block_scale: torch.Tensor, global_decode_scale: torch.Tensor) -> torch.Tensor:
    """float32 E2M1 value of each element."""
    e2m1_values = torch.tensor(E2M1_VALUES, device=blocks.device)
    return e2m1_values[codes(blocks, block_scale, global_decode_scale).int()]


def codes(blocks: torch.Tensor, block_scale: torch.Tensor, global_decode_scale: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 code of each element, ties to the even code, saturating at 6; zero is code 0, never -0.

    Args:
        blocks: bfloat16 or float32 holding bfloat16 values, ``[B, n]``.
        block_scale: float8_e4m3fn ``[B, 1]``.
        global_decode_scale: float32 ``[]``, a power of two.

    Returns:
        uint8 ``[B, n]``, 0-15.
    """
    scaled = blocks.float() / (block_scale.float() * global_decode_scale)
    magnitude = scaled.abs()
    code = torch.zeros_like(scaled, dtype=torch.uint8)
    for lower_code, tie in enumerate(E2M1_TIES):
        # Tie `i` goes to the even one of codes i and i + 1: down where i is even, up where it is odd.
        code += (magnitude > tie) if lower_code % 2 == 0 else (magnitude >= tie)
    negative = (scaled < 0) & (code > 0)
    return code + 8 * negative.to(torch.uint8)


def quantize(
    blocks: torch.Tensor, global_decode_scale: torch.Tensor, scale_rule: str = "amax"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to packed codes uint8 ``[B, 8]`` (even column in the low nibble) and block scales ``[B, 1]``."""
    block_scale = block_scales(blocks, global_decode_scale, scale_rule)
    code = codes(blocks, block_scale, global_decode_scale)
    return code[:, 0::2] | (code[:, 1::2] << 4), block_scale


def fake_quantize(blocks: torch.Tensor, global_decode_scale: torch.Tensor, scale_rule: str = "amax") -> torch.Tensor:
    """Quantize and decode: bfloat16 ``[B, 16]``, exact; NaN in a block without a scale."""
    block_scale = block_scales(blocks, global_decode_scale, scale_rule)
    values = _e2m1(blocks, block_scale, global_decode_scale)
    return (values * (block_scale.float() * global_decode_scale)).to(torch.bfloat16)
