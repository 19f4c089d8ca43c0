"""Inside the engine: where each pushed tensor goes, the push itself, and reading weights back through the GEMM.

All of this runs in the process of the engine's worker and sees vLLM's own modules.

vLLM does not say which tensors it expects. A missing sibling of a fused matrix is uninitialized memory, a tensor that
is too tall is cut, a name it does not know is skipped, all without an error. So before the first push we watch vLLM's
own loaders place tensors without data (``place_tensors``): that gives the exact region of an engine parameter that each
pushed tensor fills, under any fusion, renaming and tensor parallelism. The regions must tile the parameters.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_nvfp4_qat.checkpoint.origins import ExpertPart
from hf_nvfp4_qat.formats.names import BLOCK_SCALE, GLOBAL_ENCODE_SCALE, INPUT_GLOBAL_SCALE, PACKED
from hf_nvfp4_qat.rollout.expert_weights import expert_weights
from hf_nvfp4_qat.rollout.placement import Placement, Region
from hf_nvfp4_qat.rollout.stacked_experts import StackedExperts
from hf_nvfp4_qat.rollout.stream import NamedTensor, TensorLayout
from hf_nvfp4_qat.rollout.vllm_versions import (
    abandon_reload,
    begin_module,
    can_replay,
    convolution_weight,
    current_config,
    finish_module,
    is_kept_as_loaded,
    refresh_copies,
    stable_addresses,
    unprocessed_loaders,
)


def _num_elements(region: Region) -> int:
    return math.prod(stop - start for start, stop in region)


def slices(region: Region, *, widen: int = 1) -> tuple[slice, ...]:
    """`region` as an index; `widen` multiplies the last dim, from packed bytes to the two values in each."""
    factors = [1] * (len(region) - 1) + [widen]
    return tuple(slice(factor * start, factor * stop) for factor, (start, stop) in zip(factors, region, strict=False))


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
    with current_config(worker), stable_addresses(model), torch.no_grad():
        try:
            worker.reload_weights(weights_iterator=_as_announced(tensors, layout))
            refresh_copies(model)
        except BaseException:
            abandon_reload(model, worker.model_config)
            raise


class Replay:
    """Later pushes into an engine that has taken one: the copies that vLLM's loaders made, without asking them again.

    Routing 900 tensors by name through those loaders is Python, and takes longer than everything the GPU does. Their
    copies are known, so they are made directly: per module, raw tensors are filled, vLLM processes them for its kernel,
    and the results go where the kernel reads them. Tensors that kernels use as loaded (norms, embeddings) are
    written in place.
    """

    def __init__(self, worker: Any, by_tensor: Mapping[str, Sequence[Placement]]) -> None:
        """Plan it; ``is_possible`` says whether it would be the same as vLLM's own loading."""
        self._worker = worker
        self._model = worker.model_runner.get_model()
        self._by_tensor = by_tensor
        placements = [placement for group in by_tensor.values() for placement in group]
        self._num_expected = Counter(placement.module for placement in placements)
        self._modules = {path: self._model.get_submodule(path) for path in self._num_expected}
        self._in_place = {path for path, module in self._modules.items() if is_kept_as_loaded(module)}
        self.is_possible = can_replay(worker, self._model) and all(placement.is_plain for placement in placements)

    def load(self, tensors: Iterable[NamedTensor], layout: Sequence[TensorLayout]) -> None:
        """As ``load_tensors``."""
        raw: dict[str, dict[str, torch.Tensor]] = {}
        num_missing = self._num_expected.copy()
        with current_config(self._worker), stable_addresses(self._model), torch.no_grad():
            try:
                for name, tensor in _as_announced(tensors, layout):
                    for placement in self._by_tensor[name]:
                        path = placement.module
                        module = self._modules[path]
                        if path in self._in_place:
                            target = getattr(module, placement.parameter).data
                        else:
                            if path not in raw:
                                raw[path] = begin_module(module)
                            target = raw[path][placement.parameter].data
                        if placement.source is not None:
                            part = tensor[slices(placement.source)]
                            target[slices(placement.target)].view(part.shape).copy_(part)
                        else:
                            target[slices(placement.target)].fill_(placement.constant)
                        num_missing[path] -= 1
                        if not num_missing[path] and path in raw:
                            finish_module(module)
                            del raw[path]
                refresh_copies(self._model)
            except BaseException:
                abandon_reload(self._model, self._worker.model_config)
                raise


class EngineReader:
    """What the engine computes with, region by region.

    A linear layer is asked through its own GEMM, whatever layout its kernel keeps the weight in: the identity goes in,
    the transposed weight comes out, exact since each output is one product. Other parameters are read as they are.

    A kernel that quantizes its inputs gets 6 times their global scale instead of ones: that is a value it has, alone in
    its block. And 6 times a weight, which has 6 significant bits, is exact in bfloat16.
    """

    def __init__(self, worker: Any) -> None:
        self._model = worker.model_runner.get_model()
        self._last: tuple[str, torch.Tensor] | None = None

    def read(self, placement: Placement) -> torch.Tensor:
        """The values at the `target` of a placement; of packed codes the decoded values, twice as wide."""
        module = self._model.get_submodule(placement.module)
        if placement.parameter == INPUT_GLOBAL_SCALE:
            # Of fused siblings one is left, turned around; the kernel keeps both directions.
            return module.input_global_scale_inv.detach().reshape(1)
        name = placement.parameter.removesuffix(f"_{PACKED}")
        if name != placement.parameter:
            weight = self._decoded(f"{placement.module}.{name}", partial(expert_weights, module, name))
            return weight[slices(placement.target, widen=2)]
        convolution = convolution_weight(module)
        if convolution is not None and placement.parameter == "weight":
            return convolution.detach()[slices(placement.target)]
        if convolution is not None or not _is_linear(module) or placement.parameter not in ("weight", PACKED, "bias"):
            return getattr(module, placement.parameter).detach()[slices(placement.target)]
        if placement.parameter == "bias":
            return _linear_bias(module)[slices(placement.target)]
        weight = self._decoded(placement.module, partial(_linear_weight, module))
        return weight[slices(placement.target, widen=1 + (placement.parameter == PACKED))]

    def _decoded(self, name: str, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        """One at a time: decoded, a weight is four times its packed size."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, read())
        return self._last[1]


def is_compared(placement: Placement) -> bool:
    """Whether a placement holds values of its own to compare: not a constant, and not the scales, which codes imply."""
    return placement.source is not None and not placement.parameter.endswith((BLOCK_SCALE, GLOBAL_ENCODE_SCALE))


_WEIGHT_ONLY_KERNELS = ("Marlin", "Humming", "W4A16", "Reference")


def check_kernel(worker: Any) -> None:
    """Refuse an engine that would leave out the quantization of inputs that training has.

    Raises:
        ValueError: its kernel computes W4A16.
    """
    kernel = kernel_name(worker)
    if any(name in kernel for name in _WEIGHT_ONLY_KERNELS):
        raise ValueError(
            f"The model trains with NVFP4 inputs (W4A4), and this engine would compute with 16-bit ones: its kernel is "
            f"{kernel}, as on all GPUs before Blackwell. Train with `activations='bf16'`, roll out on Blackwell, or "
            "have vLLM emulate W4A4, slowly: linear_backend='emulation' (`engine_kwargs` of NVFP4RolloutCallback)."
        )


def kernel_name(worker: Any) -> str:
    """The class that multiplies with NVFP4 weights in this engine; empty if none does."""
    for module in worker.model_runner.get_model().modules():
        kernel = getattr(getattr(module, "scheme", None), "kernel", None)
        if kernel is not None:
            return type(kernel).__name__
        if hasattr(module, "w13_weight") and hasattr(module, "w13_weight_scale"):
            return type(module.quant_method).__name__
    return ""


def _is_linear(module: nn.Module) -> bool:
    from vllm.model_executor.layers.linear import LinearBase

    # A router that has a kernel of its own is no linear in this sense, unless a CPU's kernel has taken its weight away.
    return isinstance(module, LinearBase) and (hasattr(module, "input_size_per_partition") or not module.weight.numel())


def _in_features(module: Any) -> int:
    return module.input_size_per_partition if hasattr(module, "input_size_per_partition") else module.input_size


def _linear_weight(module: Any, *, rows_at_once: int = 1024) -> torch.Tensor:
    """The weight ``[N, K]`` that a linear layer multiplies with, in the dtype of its inputs."""
    in_features, device, dtype = _in_features(module), _device(module), module.params_dtype
    input_scale = getattr(module, INPUT_GLOBAL_SCALE, None)
    one = 1.0 if input_scale is None else 6.0 * float(input_scale)
    parts = []
    for start in range(0, in_features, rows_at_once):
        rows = min(rows_at_once, in_features - start)
        identity = torch.zeros(rows, in_features, dtype=dtype, device=device)
        identity.view(-1)[start :: in_features + 1] = one
        parts.append((module.quant_method.apply(module, identity, None).t() / one).to(dtype))
    return torch.cat(parts, dim=1)


def _linear_bias(module: Any) -> torch.Tensor:
    zeros = torch.zeros(1, _in_features(module), dtype=module.params_dtype, device=_device(module))
    return module.quant_method.apply(module, zeros, module.bias)[0]


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _as_announced(tensors: Iterable[NamedTensor], layout: Sequence[TensorLayout]) -> Iterator[NamedTensor]:
    """Pass `tensors` on as long as they are what was announced."""
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
