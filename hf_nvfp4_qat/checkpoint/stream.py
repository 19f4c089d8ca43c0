"""A model as a stream of checkpoint tensors, one weight at a time: what saving writes and rollouts push.

A module's name is not always its checkpoint name (Transformers renames and regroups weights while loading), so each
``<module>.weight`` goes through the reversed conversions of the model, and the quantized ones are counted on
arrival: a packer keyed on module names once packed nothing and wrote a packed config all the same.
"""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_nvfp4_qat.checkpoint.origins import ExpertPart, checkpoint_origins
from hf_nvfp4_qat.distributed.gather import reshard
from hf_nvfp4_qat.formats.names import SERVED_DTYPE, checkpoint_layout, ignored_in_vllm, layer_of, to_checkpoint
from hf_nvfp4_qat.modules.calibration import check_calibrated
from hf_nvfp4_qat.modules.global_scale import scales_of
from hf_nvfp4_qat.modules.linear import refuse_computed_weight
from hf_nvfp4_qat.modules.swap import qat_modules, qat_weights
from hf_nvfp4_qat.numerics.quantize import global_amax, global_decode_scale_of_amax, quantize_nvfp4
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor
from hf_nvfp4_qat.selection.fused_groups import fused_group_key
from hf_nvfp4_qat.sharding.packed import gather_packed
from hf_nvfp4_qat.sharding.parts import full_tensor, is_sharded


@dataclass(frozen=True)
class CheckpointEntry:
    """A checkpoint tensor and what it is made of.

    Attributes:
        module_name: name in the model's state dict; None if it is computed from several weights.
        shape: of the tensor.
        load: reads it, whole; gathers it if it is sharded.
        parts: of a fused weight that is one entry with all its parts, these.
    """

    module_name: str | None
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]
    parts: tuple[ExpertPart, ...] = ()


@dataclass(frozen=True)
class TensorSource:
    """One weight on its way to a checkpoint.

    Attributes:
        name: checkpoint name, ``....weight`` for a quantized one; of fused experts, which have many, the module's name.
        shape: of the unquantized tensor.
        dtype: the dtype it is written in, if not quantized.
        module_name: its name in the model's state dict; None if it was computed from several weights.
        load: reads the unquantized tensor, whole; gathers it if it is sharded.
        global_decode_scale: reads the float32 ``[]`` or ``[E]`` scale to quantize with; None for what stays as it is.
        shard: reads the DTensor of a quantized weight that is sharded; None for one that is not.
        parts: of quantized fused experts, the checkpoint's parts of it.
        scale_rule: how block scales are chosen.
        input_amax: of a layer with NVFP4 inputs, reads the largest, float32 ``[]``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    module_name: str | None
    load: Callable[[], torch.Tensor]
    global_decode_scale: Callable[[], torch.Tensor] | None = None
    shard: Callable[[], torch.Tensor] | None = None
    parts: tuple[ExpertPart, ...] = ()
    scale_rule: str = "amax"
    input_amax: Callable[[], torch.Tensor] | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether this weight is packed."""
        return self.global_decode_scale is not None

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Checkpoint name to (dtype, shape) of what this weight becomes."""
        if not self.is_quantized:
            return {self.name: (self.dtype, self.shape)}
        if not self.parts:
            return checkpoint_layout(layer_of(self.name), self.shape, quantizes_input=self.input_amax is not None)
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for part in self.parts:
            layout |= checkpoint_layout(layer_of(part.name), (part.num_rows, self.shape[-1]))
        return layout

    @property
    def nbytes(self) -> int:
        """Bytes in the checkpoint."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.layout().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Load and, if quantized, pack: checkpoint name to tensor, on the device of the weight.

        Of a sharded weight every process gets all of it.

        Raises:
            ValueError: infinities or NaNs in a weight to be quantized; the message names it.
        """
        if self.global_decode_scale is None:
            return {self.name: self.load().detach().to(self.dtype).contiguous()}
        scale = self.global_decode_scale()
        if self.shard is not None:
            # Its amax was taken over all shards, so every process comes to the same verdict.
            if not scale.isfinite().all():
                raise ValueError(
                    f"{self.name} cannot be packed. It, or a fused sibling, holds an infinity or a NaN: go back to an "
                    "earlier checkpoint."
                )
            return self.under_checkpoint_names(gather_packed([self.shard()], [scale], self.scale_rule)[0])
        try:
            packed = quantize_nvfp4(self.load().detach(), global_decode_scale=scale, scale_rule=self.scale_rule)
        except ValueError as error:
            raise ValueError(f"{self.name} cannot be packed. {error}") from error
        return self.under_checkpoint_names(packed)

    def under_checkpoint_names(self, packed: NVFP4Tensor) -> dict[str, torch.Tensor]:
        """Checkpoint name to tensor of this weight in NVFP4; views, of fused experts."""
        if not self.parts:
            input_scale = None if self.input_amax is None else global_decode_scale_of_amax(self.input_amax())
            return to_checkpoint(layer_of(self.name), packed, input_scale)
        tensors: dict[str, torch.Tensor] = {}
        for part in self.parts:
            place = (part.expert, part.rows)
            weight = NVFP4Tensor(
                packed.packed[place], packed.block_scale[place], packed.global_decode_scale[part.expert]
            )
            tensors |= to_checkpoint(layer_of(part.name), weight)
        return tensors


def packed_sources(
    model: nn.Module,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    live: bool = False,
) -> list[TensorSource]:
    """Every tensor of a packed checkpoint of `model`, in checkpoint order, still to be loaded and packed.

    Reads the global scales of the model, after refreshing them; for given weights they are computed from those.

    Args:
        model: a QAT model; a ``PreTrainedModel`` for checkpoint names other than its module names.
        state_dict: full master weights by module name, if they are not to be taken from the model: FSDP gathers them,
            and an average of weights is none of the model's.
        live: take parameters and buffers as they are, without the state dict that Transformers would save.

    Raises:
        ValueError: the number of quantized tensors is not the number of QAT weights; a weight is computed from other
            tensors; inputs are to be quantized, and some layer has seen none; the model has PEFT adapters.
    """
    _refuse_adapters(model)
    quantized = {plain_name(name): weight for name, weight in qat_weights(model).items()}
    reshard(model)
    if live:
        weights = live_weights(model)
    else:
        weights = unique_weights(model, model.state_dict() if state_dict is None else state_dict)
    for name, weight in quantized.items():
        if state_dict is None and name not in weights and not isinstance(weight.weight, nn.Parameter):
            refuse_computed_weight(layer_of(name))
    layers = qat_modules(model)
    check_calibrated(layers)
    input_amaxes = {
        f"{plain_name(name)}.weight": weights.pop(f"{plain_name(name)}.input_amax", layer.input_amax)
        for name, layer in layers.items()
        if layer.input_amax is not None
    }
    if state_dict is None:
        for groups in scales_of(quantized.values()):
            groups.refresh()
        scales = {layer_of(name): weight.global_decode_scale for name, weight in quantized.items()}
    else:
        given = {layer_of(name): partial(state_dict.__getitem__, name) for name in quantized if name in state_dict}
        scales = shared_scales(given)
    sources = []
    for name, entry in checkpoint_entries(model, weights, together=set(quantized)).items():
        module_name = entry.module_name or ""
        dtype = weights[module_name].dtype if module_name else entry.load().dtype
        is_quantized = module_name in quantized
        shard = None
        if is_quantized and is_sharded(weights[module_name]):
            shard = partial(weights.__getitem__, module_name)
        sources.append(
            TensorSource(
                name=name,
                shape=entry.shape,
                dtype=served_dtype(model, name, dtype),
                module_name=entry.module_name,
                load=entry.load,
                global_decode_scale=partial(scales.__getitem__, layer_of(module_name)) if is_quantized else None,
                shard=shard,
                parts=entry.parts,
                scale_rule=quantized[module_name].scale_rule if is_quantized else "amax",
                input_amax=partial(input_amaxes.__getitem__, module_name) if module_name in input_amaxes else None,
            )
        )
    check_packed_count(sources, len({id(weight.weight) for weight in quantized.values()}))
    return sources


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


def live_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters themselves, tied ones once, and the persistent buffers, by module name; shards where sharded."""
    buffers = {}
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                buffers[f"{path}.{name}".lstrip(".")] = buffer
    return {plain_name(name): tensor for name, tensor in (*model.named_parameters(), *buffers.items())}


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


def check_packed_count(sources: list[TensorSource], expected: int) -> None:
    """Refuse a stream that would pack more or fewer weights than are trained in NVFP4.

    Raises:
        ValueError: the counts differ.
    """
    for source in sources:
        num_rows = sum(part.num_rows for part in source.parts)
        if source.parts and num_rows != torch.Size(source.shape[:-1]).numel():
            raise ValueError(
                f"All rows of {source.name} {list(source.shape)} must go into the checkpoint; {num_rows} were found "
                "under the names of single experts. Nothing was written."
            )
        if source.is_quantized and len(source.shape) > 2 and not source.parts:
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
    fused = {name: weight.weight for name, weight in qat_weights(model).items() if weight.weight.ndim == 3}
    for origin in checkpoint_origins(model, fused).values():
        if origin.part is None:
            raise ValueError(_FUSED_ON_DISK.format(name=origin.module_name or next(iter(fused))))


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


def checkpoint_entries(
    model: nn.Module, weights: dict[str, torch.Tensor], *, together: set[str] | frozenset[str] = frozenset()
) -> dict[str, CheckpointEntry]:
    """Checkpoint name to what is stored under it.

    What is computed from several weights is computed from the real ones here; all else is read when asked for.

    Args:
        model, weights: as ``checkpoint_origins``.
        together: fused weights whose parts make one entry, under the weight's own name.
    """
    from transformers.core_model_loading import revert_weight_conversion

    whole = _WholeWeights(weights)
    origins = checkpoint_origins(model, weights)
    parts: dict[str, list[ExpertPart]] = {}
    for origin in origins.values():
        if origin.part is not None and origin.module_name and origin.module_name in together:
            parts.setdefault(origin.module_name, []).append(origin.part)
    found = {origin.module_name for origin in origins.values()}
    computed_from = {name: whole[name] for name in weights if name not in found}
    computed = revert_weight_conversion(model, computed_from) if computed_from else {}  # type: ignore[arg-type]
    entries = {}
    for name, origin in origins.items():
        module_name, part = origin.module_name, origin.part
        if module_name is None:
            load = partial(computed.__getitem__, name)
            entries[name] = CheckpointEntry(None, tuple(computed[name].shape), load)
        elif part is None:
            entries[name] = CheckpointEntry(module_name, origin.shape, partial(whole.__getitem__, module_name))
        elif module_name not in together:
            entries[name] = CheckpointEntry(module_name, origin.shape, partial(whole.part, module_name, part))
        elif module_name not in entries:
            load, shape = partial(whole.__getitem__, module_name), tuple(weights[module_name].shape)
            entries[module_name] = CheckpointEntry(module_name, shape, load, tuple(parts[module_name]))
    return entries


class _WholeWeights:
    """Weights by module name; sharded ones are gathered when asked for."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights
        self._last: tuple[str, torch.Tensor] | None = None

    def __getitem__(self, module_name: str) -> torch.Tensor:
        return full_tensor(self._weights[module_name])

    def part(self, module_name: str, part: ExpertPart) -> torch.Tensor:
        """A part of fused experts, the whole of which is kept until the last part was asked for."""
        weight = self._last[1] if self._last and self._last[0] == module_name else self[module_name]
        is_last = part.expert == len(weight) - 1 and part.rows.stop == weight.shape[1]
        self._last = (module_name, weight) if is_sharded(self._weights[module_name]) and not is_last else None
        return weight[part.expert, part.rows]


def ignored_layers(model: nn.Module, sources: list[TensorSource]) -> list[str]:
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
