"""Where a pushed tensor goes in the engine."""

from dataclasses import dataclass

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
