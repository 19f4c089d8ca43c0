"""The architecture of a checkpoint without its weights: a model on the meta device, made from config.json."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel

from hf_nvfp4_qat.checkpoint.files import CONFIG_FILE, read_json_object
from hf_nvfp4_qat.checkpoint.names import OF_AN_EXPERT, quantized_layers
from hf_nvfp4_qat.checkpoint.stream import CheckpointEntry, checkpoint_entries, unique_weights


class CannotBuildError(ValueError):
    """An architecture that Transformers has cannot be built from the settings in config.json."""


def model_class(config: Any) -> type[PreTrainedModel]:
    """The Transformers class that config.json names in `architectures`.

    Raises:
        ValueError: none is named, or this version of Transformers does not have it, or it is no model.
    """
    import transformers

    named = config.architectures
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    found = getattr(transformers, name, None) if name else None
    # Transformers has other classes too, and what config.json names is called with what config.json holds.
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise ValueError(
            f"config.json must name an architecture of Transformers {transformers.__version__} in `architectures`; it "
            f"names {name!r}. Custom architectures: load the model yourself and call `prepare_qat`."
        )
    return found


def unquantized_config(directory: Path) -> Any:
    """The ``PretrainedConfig`` of a checkpoint directory, without its `quantization_config`.

    Raises:
        ValueError: config.json is missing or of an unknown model type.
    """
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # whatever a wrong value leads to
        raise ValueError(f"Transformers cannot read the config of {directory}: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def skeleton(directory: Path) -> PreTrainedModel:
    """The model of a checkpoint directory with all parameters on the meta device.

    Raises:
        ValueError: the architecture is unknown.
        CannotBuildError: it cannot be built from these settings.
    """
    try:
        config = unquantized_config(directory)
    except ValueError as error:
        stored = read_json_object(directory / CONFIG_FILE)
        if "auto_map" not in stored and stored.get("model_type") in (None, *CONFIG_MAPPING):
            raise CannotBuildError(str(error)) from error
        raise
    architecture = model_class(config)
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
    entries = _entries(model, stored)
    return {name: entry.module_name for name, entry in entries.items() if entry.module_name is not None}


def checkpoint_shapes(model: PreTrainedModel, stored: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Checkpoint name to shape of every tensor an unquantized checkpoint has; arguments as for ``checkpoint_names``."""
    return {name: entry.shape for name, entry in _entries(model, stored).items()}


def linear_weights(model: PreTrainedModel, stored: Collection[str]) -> dict[str, str]:
    """Checkpoint name of each linear's weight to its module path; arguments as for ``checkpoint_names``."""
    linears = {f"{name}.weight": name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = checkpoint_names(model, stored)
    return {name: linears[module_name] for name, module_name in names.items() if module_name in linears}


def _entries(model: PreTrainedModel, stored: Collection[str]) -> dict[str, CheckpointEntry]:
    known = {*stored, *(f"{layer}.weight" for layer in quantized_layers(list(stored)))}
    found = {}
    for name, entry in checkpoint_entries(model, unique_weights(model, model.state_dict())).items():
        other = entry.module_name or name
        if part := OF_AN_EXPERT.fullmatch(name):
            other = f"{other.rpartition('.')[0]}.{part[2]}.{part[3]}"
        found[other if other in known and name not in known else name] = entry
    return found
