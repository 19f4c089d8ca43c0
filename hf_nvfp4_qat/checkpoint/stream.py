"""A model as a stream of checkpoint tensors, one weight at a time: what saving writes and rollouts push.

A module's name is not always its checkpoint name (Transformers renames and regroups weights while loading), so each
``<module>.weight`` goes through the reversed conversions of the model, and the quantized ones are counted on
arrival: a packer keyed on module names once packed nothing and wrote a packed config all the same.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_nvfp4_qat.checkpoint.origins import ExpertPart, checkpoint_origins, computed_tensors
from hf_nvfp4_qat.checkpoint.sources import (
    ExpertsSource,
    LinearSource,
    PlainSource,
    ShardedExpertsSource,
    ShardedSource,
    Source,
)
from hf_nvfp4_qat.distributed.gather import reshard
from hf_nvfp4_qat.formats.names import SERVED_DTYPE, ignored_in_vllm, layer_of
from hf_nvfp4_qat.modules.calibration import check_calibrated
from hf_nvfp4_qat.modules.global_scale import scales_of
from hf_nvfp4_qat.modules.swap import qat_modules, qat_weights
from hf_nvfp4_qat.modules.weights import refuse_computed_weight
from hf_nvfp4_qat.numerics.quantize import global_amax, global_decode_scale_of_amax
from hf_nvfp4_qat.selection.fused_groups import fused_group_key
from hf_nvfp4_qat.sharding.parts import full_tensor, is_sharded


def packed_sources(
    model: nn.Module,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    live: bool = False,
) -> list[Source]:
    """Every tensor of a packed checkpoint of `model`, in checkpoint order, still to be read and packed.

    Reads the global scales of the model, after refreshing them; for given weights they are computed from those.

    Args:
        model: a QAT model; a ``PreTrainedModel`` for checkpoint names other than its module names.
        state_dict: full master weights by module name, if they are not to be taken from the model: FSDP gathers them,
            and an average of weights is none of the model's.
        live: take parameters and buffers as they are, without the state dict that Transformers would save. Sources
            then read what the model holds at the time, so they can be read again after each step.

    Raises:
        ValueError: the number of quantized tensors is not the number of QAT weights; a weight is computed from other
            tensors; inputs are to be quantized, and some layer has seen none; the model has PEFT adapters.
    """
    make_ready(model, refresh=state_dict is None)
    quantized = {plain_name(name): weight for name, weight in qat_weights(model).items()}
    weights: Mapping[str, torch.Tensor]
    if live:
        weights = LiveWeights(model)
    else:
        weights = unique_weights(model, model.state_dict() if state_dict is None else state_dict)
    for name, weight in quantized.items():
        if state_dict is None and name not in weights and not isinstance(weight.master, nn.Parameter):
            refuse_computed_weight(layer_of(name))
    given = state_dict or {}
    scales = shared_scales({layer_of(name): partial(given.__getitem__, name) for name in quantized if name in given})
    amaxes: dict[str, Callable[[], Any]] = {}
    for name, weight in quantized.items():
        if weight.input_amax is not None:
            key = f"{layer_of(name)}.input_amax"
            amaxes[key] = partial(given.__getitem__, key) if key in given else partial(getattr, weight, "input_amax")
    # What a weight is made of beside its master goes with it.
    parts_of = {f"{layer_of(name)}.{part}" for name, weight in quantized.items() for _, part in weight.places[1:]}
    tensors = {name: tensor for name, tensor in weights.items() if name not in amaxes and name not in parts_of}
    origins = checkpoint_origins(model, tensors)
    computed = computed_tensors(model, tensors, origins)
    whole = _WholeExperts(weights)

    def packed_source(kinds: tuple[type, type], name: str, module_name: str, *parts: tuple[ExpertPart, ...]) -> Source:
        weight, tensor, layer = quantized[module_name], tensors[module_name], layer_of(module_name)
        sharded = is_sharded(tensor)
        read = weight.trained if live and not sharded else partial(weights.__getitem__, module_name)
        own_scale = partial(getattr, weight, "global_decode_scale")
        scale = own_scale if state_dict is None else partial(scales.__getitem__, layer)
        packing = (read, scale, weight.scale_rule, amaxes.get(f"{layer}.input_amax"))
        return kinds[sharded](name, tuple(tensor.shape), module_name, *packing, *parts)

    parts: dict[str, list[ExpertPart]] = {}
    for part in origins.values():
        if isinstance(part, ExpertPart):
            parts.setdefault(part.module_name or "", []).append(part)
    sources: dict[str, Source] = {}
    for name, part in origins.items():
        module_name = part.module_name
        if module_name is None:
            tensor = computed[name]
            dtype = served_dtype(model, name, tensor.dtype)
            sources[name] = PlainSource(name, tuple(tensor.shape), None, partial(computed.__getitem__, name), dtype)
        elif module_name not in quantized:
            dtype = served_dtype(model, name, tensors[module_name].dtype)
            own = partial(weights.__getitem__, module_name)
            read = partial(whole.read, part) if isinstance(part, ExpertPart) else own
            sources[name] = PlainSource(name, part.shape, module_name, read, dtype)
        elif not isinstance(part, ExpertPart):
            sources[name] = packed_source((LinearSource, ShardedSource), name, module_name)
        elif module_name not in sources:
            kinds = (ExpertsSource, ShardedExpertsSource)
            sources[module_name] = packed_source(kinds, module_name, module_name, tuple(parts[module_name]))
    check_packed_count(list(sources.values()), len({id(weight.master) for weight in quantized.values()}))
    return list(sources.values())


def make_ready(model: nn.Module, *, refresh: bool = True) -> None:
    """Refuse what cannot be packed, and bring the rest into the state in which it is read: before each reading.

    Args:
        model: a QAT model.
        refresh: its global scales; every process that holds a part of it must call then.

    Raises:
        ValueError: the model has PEFT adapters, or inputs are to be quantized and some layer has seen none.
    """
    _refuse_adapters(model)
    reshard(model)
    check_calibrated(qat_modules(model))
    if refresh:
        for scales in scales_of(qat_weights(model).values()):
            scales.refresh()


def _refuse_adapters(model: nn.Module) -> None:
    """Refuse a model whose weights are not all its own yet: an adapter's product is in no tensor until it is merged."""
    if "peft" not in sys.modules:
        return
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in model.named_modules():
        if isinstance(module, (PeftModel, BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise ValueError(
                "Checkpoints and rollouts hold whole weights, and a PEFT adapter is in none before it is merged; "
                f"{name or 'the model'} has one. Save `model.merge_and_unload()`; for rollouts, train without "
                "`peft_config`."
            )


def plain_name(name: str) -> str:
    """`name` without what activation checkpointing puts into the paths of the modules it wraps."""
    return name.replace("_checkpoint_wrapped_module.", "")


class LiveWeights(Mapping[str, torch.Tensor]):
    """The parameters themselves, tied ones once, and the persistent buffers, by module name; shards where sharded.

    Each is read when asked for, past ``getattr``, which may gather it. Modules may hold this object: it holds none.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters: dict[str, tuple[dict[str, Any], str]] = {}
        buffers: dict[str, tuple[dict[str, Any], str]] = {}
        seen: set[int] = set()
        for path, module in model.named_modules():
            prefix = plain_name(f"{path}.").lstrip(".")
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    parameters[prefix + name] = module._parameters, name
            for name, _ in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    buffers[prefix + name] = module._buffers, name
        self._places = parameters | buffers

    def __getitem__(self, name: str) -> torch.Tensor:
        tensors, local_name = self._places[name]
        return tensors[local_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def shared_scales(
    weights: Mapping[str, Callable[[], torch.Tensor]], *, progress: Callable[[int], None] = lambda num_done: None
) -> dict[str, torch.Tensor]:
    """Global decode scale of each weight, shared within its fused group; weights are loaded one at a time.

    Args:
        weights: layer name (of modules or of the checkpoint) to a loader of its weight ``[N, K]``.
        progress: called with the number of weights read.

    Returns:
        Layer name to float32 ``[]``.
    """
    group_amax: dict[str, torch.Tensor] = {}
    for num_done, (layer, load) in enumerate(weights.items(), start=1):
        group, amax = fused_group_key(layer), global_amax(load())
        group_amax[group] = torch.maximum(group_amax.get(group, amax), amax)
        progress(num_done)
    return {layer: global_decode_scale_of_amax(group_amax[fused_group_key(layer)]) for layer in weights}


def check_packed_count(sources: list[Source], expected: int) -> None:
    """Refuse a stream that would pack more or fewer weights than are trained in NVFP4.

    Raises:
        ValueError: the counts differ.
    """
    for source in sources:
        if isinstance(source, ExpertsSource):
            num_rows = sum(part.shape[0] for part in source.parts)
            if num_rows != torch.Size(source.shape[:-1]).numel():
                raise ValueError(
                    f"All rows of {source.name} {list(source.shape)} must go into the checkpoint; {num_rows} were "
                    "found under the names of single experts. Nothing was written."
                )
        elif source.is_quantized and len(source.shape) > 2:
            raise ValueError(_FUSED_ON_DISK.format(name=source.name))
    num_packed = sum(source.is_quantized for source in sources)
    if num_packed != expected:
        raise ValueError(
            f"All weights trained in NVFP4 must be packed; {num_packed} of {expected} were found by their checkpoint "
            "names. Nothing was written. A `state_dict` must hold every parameter under its module name."
        )


_FUSED_ON_DISK = (
    "Packed checkpoints hold experts one by one, as vLLM reads them; published checkpoints of this architecture hold "
    "{name} in one piece. To train only the other layers in NVFP4, add 're:.*experts$' to `exclude`."
)


def check_expert_names(model: nn.Module) -> None:
    """Refuse, before training, fused experts that could not be published.

    Raises:
        ValueError: checkpoints of this architecture do not hold their experts one by one.
    """
    fused = {name: weight.master for name, weight in qat_weights(model).items() if weight.master.ndim == 3}
    for part in checkpoint_origins(model, fused).values():
        if not isinstance(part, ExpertPart):
            raise ValueError(_FUSED_ON_DISK.format(name=part.module_name or next(iter(fused))))


def unique_weights(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state_dict` without what Transformers does not save: tied copies and `_keys_to_ignore_on_save`.

    FSDP2's full state dicts hold a tensor for each name of a tied weight, so equal values count as well as one storage.
    """
    from transformers.modeling_utils import PreTrainedModel, remove_tied_weights_from_state_dict

    if not isinstance(model, PreTrainedModel):
        return dict(state_dict)
    ignored = model._keys_to_ignore_on_save or ()
    kept = {name: tensor for name, tensor in state_dict.items() if name not in ignored}
    kept = remove_tied_weights_from_state_dict(kept, model)
    first_name: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_name.setdefault(id(parameter), name)
        if first != name and first in kept and name in kept and torch.equal(kept[first], kept[name]):
            del kept[name]
    return kept


class _WholeExperts:
    """Fused experts that are not packed, and go into a checkpoint part by part."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights
        self._last: tuple[str | None, torch.Tensor] | None = None

    def read(self, part: ExpertPart) -> torch.Tensor:
        """A part; of a sharded weight, the whole of which is kept until the last part was asked for."""
        tensor = self._weights[part.module_name or ""]
        if not is_sharded(tensor):
            return part.of(tensor)
        whole = self._last[1] if self._last and self._last[0] == part.module_name else full_tensor(tensor)
        is_last = part.expert == len(whole) - 1 and part.rows.stop == whole.shape[1]
        self._last = None if is_last else (part.module_name, whole)
        return part.of(whole)


def ignored_layers(model: nn.Module, sources: list[Source]) -> list[str]:
    """Names for `ignore`: every matrix that a loader may run as a linear and that is not packed.

    Under both its names where they differ: vLLM compares with checkpoint names, Transformers with module names, and
    builds a layer that it does not find there as packed, uninitialized. Routers are among them even where they are
    no nn.Linear here, since vLLM's are, and output embeddings tied to the input embedding, which no file holds.
    """
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    matrices = [
        layer_of(source.name)
        for source in sources
        if not source.is_quantized
        and len(source.shape) == 2
        and source.name.endswith(".weight")
        and source.module_name not in embeddings
    ]
    excluded = getattr(model, "nvfp4_excluded", {})
    packed = [layer_of(source.module_name or source.name) for source in sources if source.is_quantized]
    return sorted({*matrices, *excluded, *ignored_in_vllm(excluded, packed).values()})


# State of recurrent layers and biases of routers: published checkpoints have these in float32, and vLLM 0.31 keeps
# A_log, routers' biases and KDA's dt_bias so. Cutting a decay to bfloat16 moves it by up to 0.4 percent.
_FLOAT32_STATE = re.compile(
    r"(^|\.)(A_log|D|dt_bias|e_score_correction_bias|expert_bias)$|(^|\.)linear_attn\.(o_)?norm\.weight$"
)


def is_tied(model: nn.Module) -> bool | None:
    """Whether the input embedding is the output embedding too; None for a model that lacks one of them."""
    from transformers.modeling_utils import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or (head := model.get_output_embeddings()) is None:
        return None
    embedding = model.get_input_embeddings()
    return head.weight is embedding.weight if hasattr(head, "weight") and hasattr(embedding, "weight") else None


def wrong_tied_settings(config: Any, tied: bool | None) -> dict[str, Any]:
    """What `config`, and its part for the language model, should say of `tie_word_embeddings` and does not.

    Loaders ask either of the two. What is tied by the one setting need not be by the other.

    Args:
        config: a ``PretrainedConfig``.
        tied: as ``is_tied`` says.
    """
    if tied is None or (tied and config.tie_word_embeddings):
        return {}
    wrong: dict[str, Any] = {} if config.tie_word_embeddings == tied else {"tie_word_embeddings": tied}
    for name in ("text_config", "llm_config", "language_config", "decoder"):
        if getattr(getattr(config, name, None), "tie_word_embeddings", tied) != tied:
            wrong[name] = {"tie_word_embeddings": tied}
    return wrong


def served_dtype(model: nn.Module, name: str, dtype: torch.dtype, *, keeps_float32: bool = False) -> torch.dtype:
    """The dtype an unquantized tensor is written in: bfloat16, but for state that is kept in float32.

    Args:
        model: the model or its skeleton, whose class may name modules that Transformers keeps in float32 regardless.
        name: checkpoint name.
        dtype: what the tensor is in now.
        keeps_float32: whether whoever made the tensor chose float32 for it, among others in 16 bits.
    """
    if dtype not in (torch.float64, torch.float32, torch.float16):
        return dtype
    keep_fp32 = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    is_kept = _FLOAT32_STATE.search(name) or any(re.search(rf"(^|\.){key}($|\.)", name) for key in keep_fp32)
    return torch.float32 if is_kept or (keeps_float32 and dtype == torch.float32) else SERVED_DTYPE
