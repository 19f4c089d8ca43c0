"""Where a pushed tensor goes in the engine."""

from dataclasses import dataclass

Region = tuple[tuple[int, int], ...]
"""(start, stop) per dim of a tensor."""


@dataclass(frozen=True)
class Placement:
    """One copy that vLLM makes while it loads: `source` of a pushed tensor becomes `target` of an engine parameter.

    Attributes:
        tensor: name of the pushed tensor.
        module, parameter: path of the engine's module and name of its tensor, as checkpoints see it.
        target, source: rectangles of the parameter and of the pushed tensor.
        is_plain: values arrive unchanged; False where a loader computes with them first, or transposes.
        constant: what `target` is filled with where `source` is empty.
    """

    tensor: str
    module: str
    parameter: str
    target: Region
    source: Region
    is_plain: bool = True
    constant: float = 0.0
