"""Calibration of W4A4: the largest input of each layer on data of the user's choice."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hf_nvfp4_qat.modules.global_scale import scales_of
from hf_nvfp4_qat.modules.swap import qat_modules, qat_weights


@torch.no_grad()
def calibrate_activations(
    model: nn.Module, batches: Iterable[Mapping[str, Any] | torch.Tensor], *, process_group: Any = None
) -> int:
    """Measure the inputs of every layer with NVFP4 activations anew, and set their global scales by it.

    Training does the same by and by. Calibrate what is quantized without training, what is to serve rollouts before
    its first step, and what was trained through outliers that it has left behind. Where several processes train the
    model, all of them must call, with data of their own or the same.

    Args:
        model: made with ``NVFP4QATConfig(activations="nvfp4")``.
        batches: what the model is called with: mappings of keyword arguments, or token ids ``[B, T]``.
        process_group: as for ``share_input_amaxes``.

    Returns:
        How many layers were calibrated.

    Raises:
        ValueError: no layer quantizes its input, or one has seen none.
    """
    layers = {name: layer for name, layer in qat_modules(model).items() if layer.input_amax is not None}
    if not layers:
        raise ValueError(
            f"Calibration is for models with NVFP4 activations; {type(model).__name__} has none. Make it with "
            "`NVFP4QATConfig(activations='nvfp4')`."
        )
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for layer in layers.values():
        assert layer.input_amax is not None
        layer.input_amax.zero_()
        layer.training = True  # alone: what drops out in training does not here
    try:
        for batch in batches:
            if isinstance(batch, torch.Tensor):
                model(batch.to(device))
            else:
                model(**{key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()})
    finally:
        for module, mode in modes.items():
            module.training = mode
    share_input_amaxes(model, process_group)
    check_calibrated(layers)
    return len(layers)


def share_input_amaxes(model: nn.Module, process_group: Any = None) -> None:
    """Give all processes that train a W4A4 model together the largest inputs that any of them has seen.

    FSDP2, tensor parallelism, DDP, and FSDP1 with original parameters need no call: it happens at each optimizer step.
    Under ZeRO, FSDP1 with flat parameters, or a loop of your own, call it on every process before saving. Models with
    16-bit inputs are left alone.

    Args:
        model: the QAT model.
        process_group: the processes that train it, each with data of its own; beside the mesh of sharded weights and
            the processes of a DDP or FSDP1 wrapper, which are known. None adds none.
    """
    for scales in scales_of(qat_weights(model).values()):
        scales.share_input_amaxes(process_group=process_group)


def check_calibrated(layers: Mapping[str, Any]) -> None:
    """Refuse layers whose input's scale nobody knows.

    Args:
        layers: ``QATLinear`` by module path; those with 16-bit inputs do not matter.

    Raises:
        ValueError: one has seen no input, or none but zeros.
    """
    amaxes = {name: layer.input_amax for name, layer in layers.items() if layer.input_amax is not None}
    if not amaxes:
        return
    read = torch.stack([amax.reshape(()) for amax in amaxes.values()]).tolist()  # one wait for the device, not one each
    if missing := [name for name, amax in zip(amaxes, read, strict=True) if not amax]:
        raise ValueError(
            f"NVFP4 activations need the largest input of each layer; {len(missing)} of {len(amaxes)} have seen none "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Train a step, or call "
            "`calibrate_activations(model, batches)`."
        )
