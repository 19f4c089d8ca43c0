"""Inside the engine: where each pushed tensor goes, and a push through vLLM's own loaders.

All of this runs in the process of the engine's worker and sees vLLM's own modules.

vLLM does not say which tensors it expects. A missing sibling of a fused matrix is uninitialized memory, a tensor that
is too tall is cut, a name it does not know is skipped, all without an error. So before the first push we watch vLLM's
own loaders place tensors without data (``place_tensors``): that gives the exact region of an engine parameter that each
pushed tensor fills, under any fusion, renaming and tensor parallelism. The regions must tile the parameters.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from textwrap import shorten
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_nvfp4_qat.checkpoint.origins import ExpertPart
from hf_nvfp4_qat.formats.names import BLOCK_SCALE, GLOBAL_ENCODE_SCALE, PACKED
from hf_nvfp4_qat.rollout.placement import Placement, Region
from hf_nvfp4_qat.rollout.plan import TensorLayout
from hf_nvfp4_qat.rollout.stream import NamedTensor
from hf_nvfp4_qat.rollout.vllm.experts import StackedExperts
from hf_nvfp4_qat.rollout.vllm.versions import (
    abandon_reload,
    current_config,
    reloading,
    unprocessed_loaders,
)


def _num_elements(region: Region) -> int:
    return math.prod(stop - start for start, stop in region)


def place_tensors(
    worker: Any, layout: Sequence[TensorLayout], experts: Mapping[str, Sequence[ExpertPart]] | None = None
) -> list[Placement]:
    """Let vLLM's loaders place tensors of `layout` that hold no data, and check the result.

    Args:
        worker: vLLM's worker.
        layout: what will be pushed, in order.
        experts: of stacked weights among it, the parts under whose names vLLM's loaders know them.

    Returns:
        Every copy that loading will make.

    Raises:
        ValueError: a tensor that the engine has no place for, that does not fit, or that is pushed twice; a part of an
            engine parameter that no tensor fills. The engine is unchanged.
    """
    model = worker.model_runner.get_model()
    tied = _tied_parameters(model)
    stacked = StackedExperts(layout, experts or {})
    with current_config(worker):
        try:
            loaders = unprocessed_loaders(model)
            expected = {key: stand_in.shape for key, (_, stand_in, _) in loaders.items() if key not in tied}
            placements = stacked.placements(_watch_loading(model, loaders, stacked.probes))
        finally:
            abandon_reload(model, worker.model_config)
    _check_tiling(placements, expected, layout, is_whole=worker.parallel_config.tensor_parallel_size == 1)
    return placements


def load_tensors(worker: Any, tensors: Iterable[NamedTensor], layout: Sequence[TensorLayout]) -> None:
    """Push `tensors`, which must be exactly those of `layout`, into the running engine.

    Raises:
        ValueError: a tensor that differs from what `layout` announces.
        Exception: whatever `tensors` or vLLM raises. The engine then holds some new and some old weights.
    """
    model = worker.model_runner.get_model()
    with reloading(worker, model):
        worker.reload_weights(weights_iterator=as_announced(tensors, layout))


def as_announced(tensors: Iterable[NamedTensor], layout: Sequence[TensorLayout]) -> Iterator[NamedTensor]:
    """Pass `tensors` on as long as they are what was announced.

    Raises:
        ValueError: they are not.
    """
    expected = iter(layout)
    for name, tensor in tensors:
        announced = next(expected, None)
        came = TensorLayout(name, tensor.dtype, tuple(tensor.shape))
        if came != announced:
            raise ValueError(f"The push must bring what it announced, in order: {announced}; {came} came.")
        yield name, tensor
    if missing := next(expected, None):
        raise ValueError(f"The push must bring what it announced; it ended before {missing}.")


def _tied_parameters(model: nn.Module) -> set[tuple[str, str]]:
    """Second and further names of parameters that several modules share: filled through the first."""
    seen: set[int] = set()
    tied = set()
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.numel():
                if parameter.data_ptr() in seen:
                    tied.add((path, name))
                seen.add(parameter.data_ptr())
    return tied


class _CopyWatcher(TorchDispatchMode):
    """Notes what is written while it is active: (target, source) of copies, (target, constant), (target, None) else."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[tuple[torch.Tensor, torch.Tensor | float | None]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.writes.append((args[0], args[1]))
        elif func is torch.ops.aten.fill_.Scalar:
            self.writes.append((args[0], float(args[1])))
        elif func is torch.ops.aten.zero_.default:
            self.writes.append((args[0], 0.0))
        elif func._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
            self.writes.append((args[0], None))
        return func(*args, **(kwargs or {}))


_NOT_PACKED = (
    " If it is, and vLLM does not load the saved checkpoint either, this loader takes no packed tensors for this "
    "layer: add the layer to `exclude`."
)


def _watch_loading(
    model: Any,
    loaders: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor, Any]],
    layout: Sequence[TensorLayout],
) -> list[Placement]:
    placements: list[Placement] = []
    changed: set[str] = set()
    # Kept alive, so that a storage tells which tensor it is of.
    tensors = [(item.name, torch.empty(item.shape, dtype=item.dtype, device="meta")) for item in layout]
    name_of = {_storage(tensor): name for name, tensor in tensors}
    current = [""]

    def watched(key: tuple[str, str], tensor: torch.Tensor, stand_in: torch.Tensor, loader: Any) -> Any:
        def load(*args: Any, **kwargs: Any) -> Any:
            args = tuple(stand_in if arg is tensor else arg for arg in args)
            kwargs = {name: stand_in if arg is tensor else arg for name, arg in kwargs.items()}
            with _CopyWatcher() as watcher:
                result = loader(*args, **kwargs)
            for target, source in watcher.writes:
                if _storage(target) == _storage(stand_in):
                    placements.append(_placement(key, stand_in, target, source, name_of, current[0]))
                elif _storage(target) in name_of:
                    # The loader works on the pushed tensor itself before it copies.
                    changed.add(name_of[_storage(target)])
            return result

        return load

    for key, (tensor, stand_in, loader) in loaders.items():
        tensor.weight_loader = watched(key, tensor, stand_in, loader)  # type: ignore[attr-defined]

    def announced() -> Iterator[NamedTensor]:
        for name, tensor in tensors:
            current[0] = name
            yield name, tensor

    try:
        model.load_weights(announced())
    except Exception as error:
        item = next((item for item in layout if item.name == current[0]), current[0])
        is_packed = current[0].endswith((PACKED, BLOCK_SCALE, GLOBAL_ENCODE_SCALE))
        raise ValueError(
            f"The engine cannot take {item}: vLLM's loader of {type(model).__name__} says {type(error).__name__} "
            f"{shorten(str(error), 400, placeholder=' …')}. Make the engine from the trainer's model, with its "
            "NVFP4 configuration (`engine_arguments`)."
            f"{_NOT_PACKED if is_packed else ''} Nothing was sent."
        ) from error
    finally:
        for tensor, _, loader in loaders.values():
            tensor.weight_loader = loader  # type: ignore[attr-defined]
    return [
        replace(placement, is_plain=False) if placement.tensor in changed else placement for placement in placements
    ]


def _placement(
    key: tuple[str, str],
    parameter: torch.Tensor,
    target: torch.Tensor,
    source: torch.Tensor | float | None,
    name_of: dict[int, str],
    current: str,
) -> Placement:
    if not isinstance(source, torch.Tensor):
        # A constant: zeros in the rows of an embedding beyond the vocabulary. Anything else is not repeated here.
        return Placement(current, *key, _region(parameter, target), None, is_plain=source == 0.0)
    is_own = _storage(source) in name_of
    name = name_of.get(_storage(source), current)
    if source.dtype != target.dtype and not (source.dtype.itemsize > 1 and target.dtype.itemsize > 1):
        raise TypeError(f"expected {target.dtype}, got {source.dtype}")
    whole = source._base if source._base is not None else source
    in_order = sorted(source.stride(), reverse=True) == list(source.stride())
    return Placement(name, *key, _region(parameter, target), _region(whole, source), is_plain=is_own and in_order)


def _region(whole: torch.Tensor, part: torch.Tensor) -> Region:
    """Which rectangle of contiguous `whole` its view `part` is."""
    if not part.numel():
        return ((0, 0),) * whole.ndim
    # Its two corners. Strides are of no use to tell dims apart: a dim of size 1 has the stride of its neighbour.
    first = part.storage_offset()
    last = first + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
    return tuple(
        (first // stride % size, last // stride % size + 1)
        for size, stride in zip(whole.shape, whole.stride(), strict=True)
    )


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


_OWN_CONFIG = (
    "Compare the engine's config.json with the trainer's model (layers, sizes, tied embeddings), and start the engine "
    "with the trainer's NVFP4 configuration (`engine_arguments`)."
)


def _check_tiling(
    placements: list[Placement],
    expected: dict[tuple[str, str], torch.Size],
    layout: Sequence[TensorLayout],
    *,
    is_whole: bool,
) -> None:
    """Every pushed tensor arrives, whole; every element of every engine parameter is filled, by one tensor."""
    sent: dict[str, int] = dict.fromkeys((item.name for item in layout), 0)
    filled: dict[tuple[str, str], dict[Region, str]] = {}
    for placement in placements:
        regions = filled.setdefault((placement.module, placement.parameter), {})
        for region, other in regions.items():
            if other != placement.tensor and _overlap(region, placement.target):
                raise ValueError(
                    f"Each part of an engine parameter is filled by one tensor; {other} and {placement.tensor} both "
                    f"fill {placement.module}.{placement.parameter}. Nothing was sent."
                )
        regions[placement.target] = placement.tensor
    # By source: a loader may copy the same part twice.
    num_copied = {
        (copy.tensor, copy.source): _num_elements(copy.target) for copy in placements if copy.source is not None
    }
    for (tensor, _), num_elements in num_copied.items():
        sent[tensor] = sent.get(tensor, 0) + num_elements
    if len(sent) != len(layout):
        raise ValueError("Each tensor is pushed once; some name comes twice. Nothing was sent.")
    if unplaced := [name for name, numel in sent.items() if not numel]:
        raise ValueError(
            f"The engine must take every tensor; vLLM's loader took nothing of {_listed(unplaced)}, without an error. "
            f"{_OWN_CONFIG} Nothing was sent."
        )
    for item in layout:
        if is_whole and sent[item.name] != torch.Size(item.shape).numel():
            raise ValueError(
                f"The engine must take tensors whole; vLLM's loader took {sent[item.name]} of "
                f"{torch.Size(item.shape).numel()} elements of {item}. {_OWN_CONFIG} Nothing was sent."
            )
    for (module, parameter), shape in expected.items():
        regions = filled.get((module, parameter), {})
        num_filled = sum(map(_num_elements, regions))
        if num_filled != shape.numel():
            came = sorted(set(regions.values()))
            raise ValueError(
                f"Every part of the engine's weights must be pushed; {module}.{parameter} {list(shape)} gets "
                f"{num_filled} of {shape.numel()} elements, from {_listed(came) or 'no tensor'}. {_OWN_CONFIG} "
                "Nothing was sent."
            )


def _overlap(one: Region, other: Region) -> bool:
    return all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(one, other, strict=True))


def _listed(names: list[str], limit: int = 5) -> str:
    more = f" (and {len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
