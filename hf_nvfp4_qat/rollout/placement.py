"""Where a pushed tensor goes in the engine."""

from dataclasses import dataclass

from hf_nvfp4_qat.formats.names import BLOCK_SCALE, GLOBAL_ENCODE_SCALE

Region = tuple[tuple[int, int], ...]
"""(start, stop) per dim of a tensor; empty for a tensor without dims, which is one value."""


@dataclass(frozen=True)
class Placement:
    """One copy that vLLM makes while it loads: `source` of a pushed tensor becomes `target` of an engine parameter.

    Attributes:
        tensor: name of the pushed tensor.
        module, parameter: path of the engine's module and name of its tensor, as checkpoints see it.
        target, source: rectangles of the parameter and of the pushed tensor.
        is_plain: values arrive unchanged; False where a loader computes with them first, or transposes.
        constant: what `target` is filled with where there is no `source`.
    """

    tensor: str
    module: str
    parameter: str
    target: Region
    source: Region | None
    is_plain: bool = True
    constant: float = 0.0


def slices(region: Region, *, widen: int = 1) -> tuple[slice, ...]:
    """`region` as an index; `widen` multiplies the last dim, from packed bytes to the two values in each."""
    factors = [1] * (len(region) - 1) + [widen]
    return tuple(slice(factor * start, factor * stop) for factor, (start, stop) in zip(factors, region, strict=False))


def is_compared(placement: Placement) -> bool:
    """Whether a placement holds values of its own to compare: not a constant, and not the scales, which codes imply."""
    return placement.source is not None and not placement.parameter.endswith((BLOCK_SCALE, GLOBAL_ENCODE_SCALE))
