"""The NVFP4 format as data: element values, scale ranges and the shapes that follow. FORMAT.md tells the story.

An element of a weight ``[..., N, K]`` (N = out_features, K = in_features) is

    E2M1[code] * block_scale * global_decode_scale

with one 4-bit code per element, one E4M3 block scale per 16 columns of K, and one fp32 global decode
scale per ``[N, K]`` matrix. This file holds constants and shape arithmetic; it computes no values.
"""

import torch

BLOCK_SIZE = 16
"""Consecutive columns of K that share one block scale."""

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Value of codes 0-7. Codes 8-15 are the same with the sign bit (bit 3) set; 8 is negative zero, never written."""

E2M1_VALUES = E2M1_MAGNITUDES + tuple(-value for value in E2M1_MAGNITUDES)
"""Value of codes 0-15, in code order."""

E2M1_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Midpoints between neighbouring magnitudes: tie ``i`` lies between codes ``i`` and ``i + 1``."""

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN_NORMAL = 2.0**-6
"""Smallest block scale we write: Marlin, vLLM's kernel, flushes subnormal E4M3 scales to zero."""

GLOBAL_SCALE_MIN_EXPONENT = -100
GLOBAL_SCALE_MAX_EXPONENT = 100
"""The global decode scale is a power of two within ``[2**-100, 2**100]``."""

SCALE_RULES: tuple[str, ...] = ("amax", "four_over_six", "mse")
"""How a block scale is chosen: the one that maps the block's maximum to 6; of that and the one that maps it to 4,
or of that and the next `NUM_SCALE_STEPS` E4M3 values, the one with the least squared error."""

NUM_SCALE_STEPS = 5
TOP_SCALE_MIN = 240.0
TOP_VALUE_MIN = 1408.0
"""A block whose first scale is `TOP_SCALE_MIN` or more may hold the largest magnitude of its matrix: under another
scale it must decode to `TOP_VALUE_MIN` or more, in units of the global scale, so that the global scale stays."""

BITS_PER_WEIGHT = 4 + 8 / BLOCK_SIZE
"""4.5 bits: the code plus one sixteenth of an E4M3 byte (the global scale is 4 bytes a matrix)."""


def packed_shape(weight_shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the packed codes of a weight ``[..., N, K]``: uint8 ``[..., N, K / 2]``."""
    return (*weight_shape[:-1], weight_shape[-1] // 2)


def block_scale_shape(weight_shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the block scales of a weight ``[..., N, K]``: float8_e4m3fn ``[..., N, K / 16]``."""
    return (*weight_shape[:-1], weight_shape[-1] // BLOCK_SIZE)


def global_scale_shape(weight_shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the global decode scale: ``[]`` for a linear ``[N, K]``, ``[E]`` for experts ``[E, N, K]``."""
    return tuple(weight_shape[:-2])


def check_weight(weight: torch.Tensor, *, name: str = "weight") -> None:
    """Refuse a tensor that has no NVFP4 form.

    Raises:
        ValueError: not floating point, fewer than two dims, or a last dim that 16 does not divide.
    """
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(
            f"NVFP4 quantizes bfloat16, float16, float32 or float64 weights; {name} is {weight.dtype}. "
            "Load or convert it in one of those dtypes."
        )
    if weight.ndim < 2:
        raise ValueError(
            f"NVFP4 quantizes matrices [N, K] or stacks of them [E, N, K]; {name} has shape "
            f"{list(weight.shape)}. Reshape it, or leave it unquantized."
        )
    if weight.shape[-1] % BLOCK_SIZE:
        raise ValueError(
            f"NVFP4 needs in_features divisible by {BLOCK_SIZE}; {name} has {weight.shape[-1]}. Add it to `exclude`."
        )
