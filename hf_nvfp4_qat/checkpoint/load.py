"""Loading a packed NVFP4 checkpoint to continue QAT: decoded weights become the master weights.

A checkpoint of ours decodes to values that quantize to themselves, so the resumed model starts exactly where the
saved one was served. Another tool's global scales are not powers of two; its decoded values are rounded to bfloat16 and
move a little when quantized again, and the report says by how much.
"""

import logging
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from hf_nvfp4_qat.formats.files import (
    CONFIG_FILE,
    FLOATING,
    CheckpointReader,
    read_json_object,
    resolve_checkpoint,
)
from hf_nvfp4_qat.formats.modelopt import is_modelopt, open_checkpoint
from hf_nvfp4_qat.formats.names import (
    BLOCK_SCALE,
    FORMAT,
    GLOBAL_ENCODE_SCALE,
    PACKED,
    QUANT_METHOD,
    SERVED_DTYPE,
    from_checkpoint,
    is_nvfp4_config,
    layer_of,
    packed_tensors,
    quantized_layers,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Requantization:
    """How far quantizing a loaded checkpoint's weights again moves them.

    Attributes:
        num_layers: packed layers in the checkpoint.
        moved: module path to relative error (root of summed squares) for layers with any value moved.
        num_moved: elements that changed.
        num_elements: elements of all packed layers that train in NVFP4.
        not_trained: packed layers that now train in high precision (`exclude`, or a default rule).
        num_input_scales: activation scales of a W4A4 checkpoint that training with 16-bit inputs drops.
        unused: tensors of the checkpoint that the model has no place for, and that a save does not write.
    """

    num_layers: int
    moved: dict[str, float]
    num_moved: int
    num_elements: int
    not_trained: tuple[str, ...]
    num_input_scales: int
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.moved:
            change = (
                f"requantizing moves {self.num_moved:,} of {self.num_elements:,} weights in {len(self.moved)} layers, "
                f"by a relative error of up to {max(self.moved.values()):.2e}"
            )
        else:
            change = f"all {self.num_elements:,} weights keep their values"
        notes = [f"{self.num_layers} packed layers loaded, {change}"]
        if self.not_trained:
            notes.append(f"{len(self.not_trained)} packed layers now train in high precision")
        if self.num_input_scales:
            notes.append(f"{self.num_input_scales} activation scales dropped (training is W4A16: `activations='bf16'`)")
        if self.unused:
            notes.append(f"{len(self.unused)} tensors have no place in the model, the first {self.unused[0]}")
        return "; ".join(notes)


def read_decoded(reader: CheckpointReader) -> dict[str, torch.Tensor]:
    """Every tensor of a packed checkpoint, quantized ones decoded to bfloat16 under their ``.weight`` name."""
    layers = quantized_layers(reader.names)
    parts = packed_tensors(layers)
    decoded = {name: reader.get_tensor(name) for name in reader.names if name not in parts}
    for layer in layers:
        decoded[f"{layer}.weight"] = from_checkpoint(layer, reader.get_tensor).dequantize(SERVED_DTYPE)
    return decoded


def check_packed(reader: CheckpointReader) -> None:
    """Refuse a checkpoint that is not packed NVFP4 in this format.

    Raises:
        ValueError: another method or format, no packed layer, one that is there unpacked too, or tensors in other
            formats beside them.
    """
    config = reader.config().get("quantization_config")
    if not is_nvfp4_config(config):
        found = "no quantization_config" if not config else f"{config.get('quant_method')} / {config.get('format')}"
        raise ValueError(
            f"A packed NVFP4 checkpoint says {QUANT_METHOD} / {FORMAT} in config.json; {reader.directory} says "
            f"{found}. Unquantized weights load with `from_pretrained(..., quantization_config=NVFP4QATConfig())`."
        )
    if not quantized_layers(reader.names):
        raise ValueError(
            f"A packed NVFP4 checkpoint holds `{PACKED}` tensors; {reader.directory} has the config of one, and "
            "none of them. Download or copy the whole checkpoint, or take config.json from the unquantized one."
        )
    if missing := [
        f"{layer}.{part}"
        for layer in quantized_layers(reader.names)
        for part in (BLOCK_SCALE, GLOBAL_ENCODE_SCALE)
        if f"{layer}.{part}" not in reader.file_of
    ]:
        raise ValueError(
            f"Every packed layer needs its scales; {reader.directory} lacks {len(missing)}, the first {missing[0]}. "
            "Download or copy the whole checkpoint."
        )
    if both := [layer for layer in quantized_layers(reader.names) if f"{layer}.weight" in reader.file_of]:
        raise ValueError(
            f"A layer is packed or is not; {reader.directory} has {len(both)} in both forms, the first {both[0]}. "
            "Remove the one that is not to be served."
        )
    if others := codes_of_other_formats(reader):
        raise ValueError(
            f"What is not NVFP4 must be unquantized; {reader.directory} has {len(others)} tensors in other formats, "
            f"the first {others[0]} in {reader.layout(others[0])[0]}, and their codes would be read as weights. Serve "
            "it as it is, or quantize the original in one format."
        )


def check_unquantized(directory: Path) -> None:
    """Refuse to quantize what is quantized already.

    Raises:
        ValueError: config.json says how it is quantized.
    """
    if not (directory / CONFIG_FILE).is_file():
        return  # who needs one will say so
    config = read_json_object(directory / CONFIG_FILE)
    if (quantization := config.get("quantization_config")) or is_modelopt(directory, config):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else "modelopt"
        raise ValueError(
            f"Quantization starts from unquantized weights; {directory} says {method} in its config. Use the original "
            "checkpoint, or `nvfp4-qat dequantize` this one."
        )


def check_holds_no_codes(reader: CheckpointReader) -> None:
    """Refuse codes in a checkpoint that says nothing of a quantization: their numbers are no weights.

    Masks and tables of whole numbers, which many models have beside their weights, are no codes.

    Raises:
        ValueError: there are some.
    """
    for name in reader.names:
        dtype, shape = reader.layout(name)
        holds_weights = name.endswith(".weight") or (".experts." in name and len(shape) > 1)
        if dtype not in FLOATING and (holds_weights or dtype.startswith("F")):
            raise ValueError(
                f"Quantization starts from weights in 16 or 32 bits; {reader.directory} has codes, the first {name} in "
                f"{dtype}, and its config.json does not say what they mean. Use the original checkpoint."
            )


def codes_of_other_formats(reader: CheckpointReader) -> list[str]:
    """Weights, and other matrices, of numbers that no unquantized layer has; masks ``[1, 1, T, T]`` are no codes."""
    packed = packed_tensors(quantized_layers(reader.names))
    layouts = {name: reader.layout(name) for name in reader.names if name not in packed}
    return [
        name
        for name, (dtype, shape) in layouts.items()
        if dtype not in FLOATING
        and (name.endswith(".weight") or (len(shape) in (2, 3) and dtype not in ("I64", "BOOL")))
    ]


def check_nothing_missing(directory: Path, architecture: type[PreTrainedModel], missing: Collection[str]) -> None:
    """Refuse a checkpoint that does not give every tensor of its model.

    Args:
        directory: of the checkpoint.
        architecture: class of the model.
        missing: `missing_keys` of Transformers' loading report.

    Raises:
        ValueError: there are such tensors.
    """
    if missing:
        raise ValueError(
            f"Every tensor of a model must be in its checkpoint; {directory} lacks {len(missing)} of "
            f"{architecture.__name__}, the first {min(missing)}, and they would start at random. Download or copy the "
            "whole checkpoint."
        )


def load_decoded(path: str | os.PathLike, **kwargs: Any) -> tuple[PreTrainedModel, CheckpointReader]:
    """A packed checkpoint as an ordinary model with decoded weights, every one of which was in the checkpoint.

    Args:
        path: directory or Hub repository id.
        kwargs: for ``from_pretrained``; `revision` and `token` are used for the download.

    Raises:
        ValueError: not a packed NVFP4 checkpoint, an architecture Transformers does not know, or tensors that are
            missing, of another shape, or packed and not of this architecture.
    """
    from hf_nvfp4_qat.checkpoint.skeleton import model_class, unquantized_config, unused_tensors

    directory = resolve_checkpoint(path, revision=kwargs.pop("revision", None), token=kwargs.pop("token", None))
    reader = open_checkpoint(directory)
    check_packed(reader)
    trust_remote_code = bool(kwargs.pop("trust_remote_code", False))
    config = unquantized_config(directory, trust_remote_code=trust_remote_code)
    kwargs.setdefault("dtype", SERVED_DTYPE)
    if (directory / "generation_config.json").is_file():
        kwargs.setdefault("generation_config", GenerationConfig.from_pretrained(directory))
    architecture = model_class(config, directory, trust_remote_code=trust_remote_code)
    # The same call as for files, so that renamed and regrouped weights land where Transformers wants them.
    model, report = architecture.from_pretrained(
        None, config=config, state_dict=read_decoded(reader), output_loading_info=True, **kwargs
    )
    check_nothing_missing(directory, architecture, report["missing_keys"])
    if report["unexpected_keys"]:
        packed = {f"{layer}.weight" for layer in quantized_layers(reader.names)}
        ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
        lost = [name for name in unused_tensors(model, reader.names) if name in packed]
        if lost := [name for name in lost if not any(pattern.search(name) for pattern in ignored)]:
            raise ValueError(
                f"Every packed layer must be one of the model; {directory} has {len(lost)} that no layer of "
                f"{architecture.__name__} takes, the first {layer_of(lost[0])}. Check `architectures` in config.json."
            )
    model.name_or_path = str(path)
    return model, reader
