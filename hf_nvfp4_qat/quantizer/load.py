"""load_nvfp4: continue QAT from a packed checkpoint."""

import logging
import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_nvfp4_qat.checkpoint.load import Requantization, load_decoded
from hf_nvfp4_qat.checkpoint.skeleton import checkpoint_names, unused_tensors
from hf_nvfp4_qat.formats.files import CheckpointReader
from hf_nvfp4_qat.formats.names import (
    INPUT_GLOBAL_SCALE,
    activations_of,
    layer_of,
    quantized_layers,
    scale_rule_of,
)
from hf_nvfp4_qat.modules.experts import expert_parameters
from hf_nvfp4_qat.modules.swap import fused_experts, qat_modules, qat_weights
from hf_nvfp4_qat.numerics.format import E2M1_MAX, E4M3_MAX
from hf_nvfp4_qat.quantizer.config import NVFP4QATConfig
from hf_nvfp4_qat.quantizer.hf_quantizer import prepare_qat

logger = logging.getLogger(__name__)


def load_nvfp4(path: str | os.PathLike, config: NVFP4QATConfig | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load a packed NVFP4 checkpoint as a model that goes on training in NVFP4.

    Args:
        path: directory or Hub repository id of a compressed-tensors `nvfp4-pack-quantized` checkpoint, ours or another
            tool's.
        config: what to quantize, and how; None quantizes the layers that are packed in the checkpoint, but for those
            that ``NVFP4QATConfig`` leaves out by rule (the report counts them), by the rule they were packed with, and
            inputs if the checkpoint does and no experts are fused.
        kwargs: for ``from_pretrained`` (`dtype`, `device_map`, `revision`, `trust_remote_code`, ...); `dtype` is that
            of the master weights and of everything else, bfloat16 by default.

    Returns:
        The QAT model. ``model.nvfp4_requantization`` says how far quantizing again moves the loaded values: not at
        all for a checkpoint of ours.

    Raises:
        ValueError: not a packed NVFP4 checkpoint, an architecture Transformers does not know, a tensor of the model
            that is not there, or, without a `config`, layers with NVFP4 inputs beside others.
    """
    model, reader = load_decoded(path, **kwargs)
    packed = set(quantized_layers(reader.names))
    layers_of: dict[str, list[str]] = {}
    for name, module_name in checkpoint_names(model, reader.names).items():
        layers_of.setdefault(module_name, []).append(layer_of(name))
    if config is None:
        stored = reader.config()["quantization_config"]
        if len({bool(group.get("input_activations")) for group in stored["config_groups"].values()}) > 1:
            raise ValueError(
                f"One recipe quantizes the inputs of all its layers or of none; {path} has groups of both. Say which: "
                "`config=NVFP4QATConfig(activations='bf16')`, or 'nvfp4'."
            )
        config = NVFP4QATConfig(
            exclude=_unpacked_modules(model, packed, layers_of),
            scale_rule=scale_rule_of(stored),
            activations="bf16" if fused_experts(model) else activations_of(stored),
        )
    decoded = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
    prepare_qat(model, config)
    _load_input_amaxes(model, reader, layers_of)
    model.nvfp4_requantization = requantization = _requantization(model, reader, decoded, layers_of)
    is_notable = requantization.moved or requantization.not_trained or requantization.unused
    logger.log(logging.WARNING if is_notable else logging.INFO, "%s: %s.", path, requantization)
    return model


def _unpacked_modules(model: PreTrainedModel, packed: set[str], layers_of: dict[str, list[str]]) -> tuple[str, ...]:
    """Linears and experts of which nothing is packed."""
    weights = {name: [f"{name}.weight"] for name, module in model.named_modules() if isinstance(module, nn.Linear)} | {
        name: [f"{name}.{parameter}" for parameter in expert_parameters(model.get_submodule(name))]
        for name in fused_experts(model)
    }
    return tuple(
        name
        for name, parameters in weights.items()
        if not any(layer in packed for parameter in parameters for layer in layers_of.get(parameter, ()))
    )


def _load_input_amaxes(model: PreTrainedModel, reader: CheckpointReader, layers_of: dict[str, list[str]]) -> None:
    for path, module in qat_modules(model).items():
        names = [f"{layer}.{INPUT_GLOBAL_SCALE}" for layer in layers_of.get(f"{path}.weight", ())]
        found = [reader.get_tensor(name).float().reshape(()) for name in names if name in reader.file_of]
        if module.input_amax is not None and found:
            # The largest magnitude that the scale has room for; of a checkpoint of ours it gives the scale back.
            module.input_amax.copy_(E2M1_MAX * E4M3_MAX / torch.stack(found).min())


def _requantization(
    model: PreTrainedModel, reader: CheckpointReader, decoded: dict[str, torch.Tensor], layers_of: dict[str, list[str]]
) -> Requantization:
    packed = quantized_layers(reader.names)
    weights = qat_weights(model)
    moved: dict[str, float] = {}
    num_moved = num_elements = 0
    for name, weight in weights.items():
        before, after = decoded[name].to(torch.bfloat16), weight.fake_quantized_weight()
        num_elements += before.numel()
        if count := int((before != after).sum()):
            num_moved += count
            moved[layer_of(name)] = float((after.float() - before.float()).norm() / before.float().norm())
    trained = {layer for name in weights for layer in layers_of.get(name, ())}
    return Requantization(
        num_layers=len(packed),
        moved=moved,
        num_moved=num_moved,
        num_elements=num_elements,
        not_trained=tuple(layer for layer in packed if layer not in trained),
        num_input_scales=0
        if any(module.input_amax is not None for module in qat_modules(model).values())
        else sum(name.endswith(f".{INPUT_GLOBAL_SCALE}") for name in reader.names),
        unused=tuple(unused_tensors(model, reader.names)),
    )
