"""The architecture of a checkpoint without its weights: a model on the meta device, made from config.json."""

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel

from hf_nvfp4_qat.checkpoint.origins import Part, checkpoint_origins, computed_tensors
from hf_nvfp4_qat.checkpoint.stream import unique_weights
from hf_nvfp4_qat.formats.files import CONFIG_FILE, read_json_object
from hf_nvfp4_qat.formats.names import OF_AN_EXPERT, layer_of, packed_tensors, quantized_layers

CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale")
SKIPPED = ("rotary_emb.inv_freq", *CACHE_SCALES)
"""Ends of names that loaders skip, whatever the model is."""


class CannotBuildError(ValueError):
    """An architecture that Transformers has cannot be built from the settings in config.json."""


def model_class(config: Any, directory: Path, *, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """The class that config.json names in `architectures`.

    Args:
        config: of the checkpoint.
        directory: of the checkpoint.
        trust_remote_code: take the class from the code beside the weights, if config.json has an `auto_map` for it.

    Raises:
        ValueError: none is named, or this version of Transformers does not have it, or it is no model.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    named = config.architectures
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    found = getattr(transformers, name, None) if name else None
    for auto_class, reference in (getattr(config, "auto_map", None) or {}).items():
        if trust_remote_code and isinstance(reference, str) and reference.rpartition(".")[2] == name:
            found = get_class_from_dynamic_module(reference, directory)
            found.register_for_auto_class(auto_class)  # so that a save brings the code along
    # Transformers has other classes too, and what config.json names is called with what config.json holds.
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise ValueError(
            f"config.json must name an architecture of Transformers {transformers.__version__} in `architectures`; it "
            f"names {name!r}. {_CUSTOM_CODE}"
        )
    return found


_CUSTOM_CODE = (
    "For code that lies beside the weights, and that you have read: `trust_remote_code=True` of `load_nvfp4`, or "
    "`--trust-remote-code` of `nvfp4-qat quantize`. Other commands run no such code."
)


def unquantized_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The ``PretrainedConfig`` of a checkpoint directory, without its `quantization_config`.

    Args:
        directory: of the checkpoint.
        trust_remote_code: run the code beside the weights, if config.json names some.

    Raises:
        ValueError: config.json is missing, of an unknown model type, or needs code that is not to be run.
    """
    stored = read_json_object(directory / CONFIG_FILE) if (directory / CONFIG_FILE).is_file() else {}
    is_custom = "auto_map" in stored and stored.get("model_type") not in CONFIG_MAPPING
    if is_custom and not trust_remote_code:
        # Transformers' own message names an argument that commands do not have.
        model_type = stored.get("model_type")
        raise ValueError(
            f"The model type {model_type!r} of {directory} is custom code, and none was run. {_CUSTOM_CODE}"
        )
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a wrong value leads to
        raise ValueError(f"Transformers cannot read the config of {directory}: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def skeleton(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a checkpoint directory with all parameters on the meta device.

    Args:
        directory: of the checkpoint.
        trust_remote_code: run the code beside the weights, if config.json names some.

    Raises:
        ValueError: the architecture is unknown.
        CannotBuildError: it cannot be built from these settings.
    """
    try:
        config = unquantized_config(directory, trust_remote_code=trust_remote_code)
    except ValueError as error:
        stored = read_json_object(directory / CONFIG_FILE)
        if "auto_map" not in stored and stored.get("model_type") in (None, *CONFIG_MAPPING):
            raise CannotBuildError(str(error)) from error
        raise
    architecture = model_class(config, directory, trust_remote_code=trust_remote_code)
    # A name here may be that of code on the Hub, or of a package that is not installed; nothing is computed anyway.
    config._attn_implementation = config._experts_implementation = "eager"
    try:
        with torch.device("meta"):
            return architecture(config)
    except Exception as error:
        raise CannotBuildError(
            f"Transformers cannot build {architecture.__name__} from the config of {directory} "
            f"({type(error).__name__}: {error}). Take config.json from the checkpoint's source again."
        ) from error


def checkpoint_names(model: PreTrainedModel, stored: Collection[str]) -> dict[str, str]:
    """Checkpoint name to module name of every saved tensor that is a weight, or a part of fused experts.

    Args:
        model: on the meta device or not.
        stored: names of the tensors in its checkpoint. Loaders read a weight under its module name too, and what is
            stored so has that name here.
    """
    parts = _parts(model, stored)
    return {name: part.module_name for name, part in parts.items() if part.module_name is not None}


def checkpoint_shapes(model: PreTrainedModel, stored: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Checkpoint name to shape of every tensor an unquantized checkpoint has; arguments as for ``checkpoint_names``."""
    return {name: part.shape for name, part in _parts(model, stored).items()}


def linear_weights(model: PreTrainedModel, stored: Collection[str]) -> dict[str, str]:
    """Checkpoint name of each linear's weight to its module path; arguments as for ``checkpoint_names``."""
    linears = {f"{name}.weight": name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = checkpoint_names(model, stored)
    return {name: linears[module_name] for name, module_name in names.items() if module_name in linears}


def missing_tensors(model: PreTrainedModel, stored: Collection[str]) -> list[str]:
    """Checkpoint names of what a loader of this model would draw at random, since no tensor of `stored` gives it.

    Of tensors tied to each other one is enough. Arguments as for ``checkpoint_names``.
    """
    known = {*stored, *(f"{layer}.weight" for layer in quantized_layers(list(stored)))}
    tied: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        tied.setdefault(source, {source}).add(target)
    families = {name: family for family in tied.values() for name in family}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return [
        name
        for name, part in _parts(model, stored).items()
        if name not in known
        and not known & families.get(part.module_name or name, set())
        and not any(pattern.search(part.module_name or name) for pattern in ignored)
    ]


def tied_copies(model: PreTrainedModel, stored: Collection[str]) -> dict[str, str]:
    """Stored names of tensors that config.json says are tied to others, each with the stored name of the other.

    Files may hold both: copies, or matrices that were trained apart. Arguments as for ``checkpoint_names``.
    """
    names = {module_name: name for name, module_name in checkpoint_names(model, stored).items()}
    copies = {}
    for target, source in model.all_tied_weights_keys.items():
        for name in stored:
            # A checkpoint may have the head of its language model under a longer path.
            if name not in names.values() and (name == target or name.endswith(f".{target}")):
                copies[name] = names.get(source, source)
    return {name: other for name, other in copies.items() if other in set(stored)}


def tied_heads(model: PreTrainedModel) -> list[str]:
    """Paths of linears that are tied to an embedding, so that no tensor of a checkpoint has their name."""
    modules = dict(model.named_modules())
    return [
        layer_of(target)
        for target, source in model.all_tied_weights_keys.items()
        if isinstance(modules.get(layer_of(target)), nn.Linear)
        and isinstance(modules.get(layer_of(source)), nn.Embedding)
    ]


def unused_tensors(model: PreTrainedModel, stored: Collection[str]) -> list[str]:
    """The names among `stored` that no weight of this model is made of, codes counting as the weight they stand for.

    Copies of tied tensors and what old tools stored beside weights are left out. Arguments as for ``checkpoint_names``.
    """
    layers = quantized_layers(list(stored))
    tied = {*model.all_tied_weights_keys, *tied_copies(model, stored)}
    known = {*_parts(model, stored), *tied, *packed_tensors(layers)}
    weights = [*(name for name in stored if name not in known), *(f"{layer}.weight" for layer in layers)]
    return [name for name in weights if name not in known and not name.endswith(SKIPPED)]


def _parts(model: PreTrainedModel, stored: Collection[str]) -> dict[str, Part]:
    known = {*stored, *(f"{layer}.weight" for layer in quantized_layers(list(stored)))}
    found = {}
    weights = unique_weights(model, model.state_dict())
    parts = checkpoint_origins(model, weights)
    computed = computed_tensors(model, weights, parts)
    for name, part in parts.items():
        if name in computed:
            part = replace(part, shape=tuple(computed[name].shape))
        other = part.module_name or name
        if expert := OF_AN_EXPERT.fullmatch(name):
            other = f"{other.rpartition('.')[0]}.{expert[2]}.{expert[3]}"
        found[other if other in known and name not in known else name] = part
    return found
