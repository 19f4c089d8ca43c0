"""Which weight of a model each tensor of its checkpoint is, found by reversing what Transformers does while loading.

Transformers renames weights while it loads them, and puts the experts of a layer together. The way back runs on
stand-ins. What comes out as the very tensor that went in was only renamed. Fused experts go in as the numbers of their
rows, which then tell what part of them comes out under which name.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch
from torch import nn

from hf_nvfp4_qat.sharding.parts import full_tensor


@dataclass(frozen=True)
class Part:
    """What a checkpoint holds under one name.

    Attributes:
        name: checkpoint name.
        module_name: name of the weight in the model's state dict; None if it is computed from several weights.
        shape: of the tensor; of a computed one, that of what the stand-ins gave.
    """

    name: str
    module_name: str | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ExpertPart(Part):
    """Some rows of one of the fused experts ``[E, N, K]``.

    Attributes:
        expert, rows: which.
    """

    expert: int
    rows: slice

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """This part of all experts; a view."""
        return weight[self.expert, self.rows]


# By model: shapes, conversions, and what they led to.
_known: "WeakKeyDictionary[nn.Module, tuple[dict, object, dict[str, Part]]]" = WeakKeyDictionary()


def checkpoint_origins(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, Part]:
    """Checkpoint name to where it comes from; worked out once for a model and the names and shapes of its weights.

    Args:
        model: only a ``PreTrainedModel`` has checkpoint names other than its module names.
        weights: by module name; not read.
    """
    from transformers.modeling_utils import PreTrainedModel

    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if not isinstance(model, PreTrainedModel):
        return {name: Part(name, name, shape) for name, shape in shapes.items()}
    # Loading notes the conversions that it used.
    conversions = getattr(model, "_weight_conversions", None)
    known_shapes, known_conversions, origins = _known.get(model, ({}, None, {}))
    if known_shapes != shapes or known_conversions is not conversions:
        origins = _reversed_loading(model, weights)
        _known[model] = (shapes, conversions, origins)
    return origins


def computed_tensors(
    model: nn.Module, weights: Mapping[str, torch.Tensor], origins: dict[str, Part]
) -> dict[str, torch.Tensor]:
    """Checkpoint name to value of what is computed from several weights; sharded ones are gathered for it.

    Args:
        model, weights: as ``checkpoint_origins``, whose answer `origins` is.
    """
    found = {part.module_name for part in origins.values()}
    computed_from = {name: full_tensor(weights[name]) for name in weights if name not in found}
    if not computed_from:
        return {}
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, computed_from)  # type: ignore[arg-type]


def _reversed_loading(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, Part]:
    from transformers.core_model_loading import revert_weight_conversion

    stand_ins = {name: torch.empty(w.shape, dtype=w.dtype, device="meta") for name, w in weights.items()}
    module_names = {id(tensor): name for name, tensor in stand_ins.items()}
    rows = _RowNumbers({name: tuple(tensor.shape) for name, tensor in stand_ins.items() if tensor.ndim == 3})
    origins = {}
    for name, tensor in revert_weight_conversion(model, {**stand_ins, **rows.stand_ins}).items():  # type: ignore[arg-type]
        part = rows.locate(name, tensor)
        origins[name] = part or Part(name, module_names.get(id(tensor)), tuple(tensor.shape))
    return origins


class _RowNumbers:
    """Stand-ins for fused weights ``[E, N, K]`` that say of any part of them where it comes from."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._names = list(shapes)
        ends = list(accumulate(shape[0] * shape[1] for shape in shapes.values()))
        self._starts = [0, *ends][:-1]
        # Two columns: Transformers drops dims of size 1 when it takes experts apart.
        self._numbers = torch.arange(ends[-1] if ends else 0, device="cpu")[:, None].repeat(1, 2)
        self.stand_ins = {
            name: self._numbers[start:end].view(*shapes[name][:2], 2)
            for name, start, end in zip(shapes, self._starts, ends, strict=True)
        }

    def locate(self, name: str, tensor: torch.Tensor) -> Part | None:
        """Where what came out under `name` comes from; None if it is made of other tensors."""
        if tensor.device.type == "meta" or tensor.dtype != torch.int64 or not self._names:
            return None
        first = int(tensor.view(-1)[0]) if tensor.is_contiguous() else -1
        if first < 0:
            return Part(name, None, tuple(tensor.shape))
        index = bisect_right(self._starts, first) - 1
        module_name = self._names[index]
        num_experts, num_rows, num_columns = self._shapes[module_name]
        if tensor is self.stand_ins[module_name]:
            return Part(name, module_name, (num_experts, num_rows, num_columns))
        expert, row = divmod(first - self._starts[index], num_rows)
        rows = self._numbers[first : first + len(tensor)]
        if tensor.shape != rows.shape or row + len(tensor) > num_rows or not torch.equal(tensor, rows):
            return Part(name, None, tuple(tensor.shape))
        return ExpertPart(name, module_name, (len(tensor), num_columns), expert, slice(row, row + len(tensor)))
