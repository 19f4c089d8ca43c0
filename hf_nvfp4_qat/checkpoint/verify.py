"""verify_nvfp4: is a directory the packed checkpoint it claims to be, and of this model?"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_nvfp4_qat.checkpoint.files import CheckpointReader, resolve_checkpoint
from hf_nvfp4_qat.checkpoint.modelopt import open_checkpoint
from hf_nvfp4_qat.checkpoint.names import (
    BLOCK_SCALE,
    GLOBAL_ENCODE_SCALE,
    INPUT_GLOBAL_SCALE,
    PACKED,
    from_checkpoint,
    is_nvfp4_config,
    layer_of,
    packed_tensors,
    quantized_layers,
)
from hf_nvfp4_qat.checkpoint.skeleton import checkpoint_shapes, linear_weights, skeleton
from hf_nvfp4_qat.checkpoint.stream import packed_sources
from hf_nvfp4_qat.modules.fused_groups import fused_group_key
from hf_nvfp4_qat.modules.swap import matches
from hf_nvfp4_qat.numerics.format import E4M3_MIN_NORMAL
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor

_NUM_SHOWN = 20


@dataclass
class Verification:
    """What ``verify_nvfp4`` found.

    Attributes:
        path: the directory that was read.
        problems: what makes a loader fail or serve other weights; empty if the checkpoint is good.
        notes: what is unusual but loads right.
        num_layers: packed layers.
        num_tensors: tensors in the files.
        num_compared: tensors compared with the model's, if one was given.
    """

    path: Path
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_layers: int = 0
    num_tensors: int = 0
    num_compared: int = 0

    @property
    def ok(self) -> bool:
        """Whether loaders will serve what the checkpoint claims."""
        return not self.problems

    def __str__(self) -> str:
        compared = f", {self.num_compared} tensors equal to the model's" if self.num_compared else ""
        head = f"{self.path}: {self.num_layers} packed layers, {self.num_tensors} tensors"
        verdict = f"good{compared}" if self.ok else f"{len(self.problems)} problems"
        lines = [f"{head}: {verdict}", *(f"  problem: {problem}" for problem in self.problems[:_NUM_SHOWN])]
        if len(self.problems) > _NUM_SHOWN:
            lines.append(f"  and {len(self.problems) - _NUM_SHOWN} more")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def verify_nvfp4(path: str | os.PathLike, model: PreTrainedModel | None = None) -> Verification:
    """Check a packed checkpoint tensor by tensor: names, shapes, dtypes, scale ranges, fused groups, `ignore`.

    One in ModelOpt's dialect is checked, and reported, under the names of compressed-tensors.

    Args:
        path: directory or Hub repository id.
        model: a QAT model; its weights as served must then equal the decoded tensors, bit for bit. Of a sharded one
            every process must call this, since the shards are gathered.

    Returns:
        The report; ``report.ok`` is the verdict.

    Raises:
        ValueError: `path` holds no readable safetensors checkpoint at all.
    """
    reader = open_checkpoint(resolve_checkpoint(path))
    report = Verification(reader.directory, num_tensors=len(reader.names))
    layers = quantized_layers(reader.names)
    report.num_layers = len(layers)
    _check_config(reader, report)
    if not layers:
        report.problems.append(f"no layer is packed: not one tensor is named *.{PACKED}")
        return report
    readable = _check_names(reader, layers, report)
    _check_layers(reader, readable, report)
    _check_architecture(reader, layers, report)
    if model is not None:
        _check_against_model(reader, model, report)
    return report


def _check_config(reader: CheckpointReader, report: Verification) -> None:
    config = reader.config()
    quantization = config.get("quantization_config")
    if not quantization or not is_nvfp4_config(quantization):
        report.problems.append("config.json: quantization_config is not compressed-tensors / nvfp4-pack-quantized")
        return
    if quantization.get("quantization_status") != "compressed":
        report.problems.append("config.json: quantization_status must be 'compressed' for Transformers to unpack")
    if config.get("dtype", config.get("torch_dtype")) != "bfloat16":
        report.notes.append(f"config.json: dtype is {config.get('dtype')}; ours is bfloat16, exact for our weights")


def _check_names(reader: CheckpointReader, layers: list[str], report: Verification) -> list[str]:
    """The three parts of each layer are there, once; returns the layers that can be read."""
    names = set(reader.names)
    for name in reader.names:
        try:
            reader.layout(name)
        except ValueError as error:
            report.problems.append(str(error))
            names.discard(name)
    readable = []
    for layer in layers:
        missing = [part for part in (PACKED, BLOCK_SCALE, GLOBAL_ENCODE_SCALE) if f"{layer}.{part}" not in names]
        if missing:
            report.problems.append(f"{layer}: missing {', '.join(missing)}")
        else:
            readable.append(layer)
        if f"{layer}.weight" in names:
            report.problems.append(f"{layer}: has both an unquantized weight and packed codes")
    for name in reader.names:
        layer, _, part = name.rpartition(".")
        if part in (BLOCK_SCALE, GLOBAL_ENCODE_SCALE, INPUT_GLOBAL_SCALE) and f"{layer}.{PACKED}" not in names:
            report.problems.append(f"{name}: a scale without packed codes")
    return readable


def _check_layers(reader: CheckpointReader, layers: list[str], report: Verification) -> None:
    scale_of_group: dict[str, tuple[str, float]] = {}
    num_other_scales = num_negative_zeros = 0
    for layer in layers:
        try:
            weight = from_checkpoint(layer, reader.get_tensor)
        except (ValueError, RuntimeError) as error:
            report.problems.append(f"{layer}: {error}")
            continue
        _check_scales(layer, weight, report)
        num_other_scales += torch.frexp(weight.global_decode_scale).mantissa.item() != 0.5
        num_negative_zeros += int((weight.codes() == 8).sum())
        scale = weight.global_decode_scale.item()
        first, first_scale = scale_of_group.setdefault(fused_group_key(layer), (layer, scale))
        if scale != first_scale:
            report.problems.append(f"{layer}: vLLM fuses it with {first}, but their global scales differ")
    if num_other_scales:
        report.notes.append(
            f"{num_other_scales} layers have a global scale that is no power of two: another tool's; training it "
            "again moves its values a little"
        )
    if num_negative_zeros:
        report.notes.append(f"{num_negative_zeros} codes are negative zero: another tool's")


def _check_scales(layer: str, weight: NVFP4Tensor, report: Verification) -> None:
    scale = weight.block_scale.float()
    if not bool(weight.global_decode_scale.isfinite()) or weight.global_decode_scale.item() <= 0:
        report.problems.append(f"{layer}: global scale {weight.global_decode_scale.item()} is not finite and positive")
    if num_bad := int((~scale.isfinite() | (scale < 0)).sum()):
        report.problems.append(f"{layer}: {num_bad} block scales are NaN or negative")
    # A block scale below the normal range matters only where the block is not zero anyway.
    nonzero = ((weight.codes() & 7) != 0).view(*scale.shape, -1).any(-1)
    if num_subnormal := int(((scale < E4M3_MIN_NORMAL) & nonzero).sum()):
        report.problems.append(f"{layer}: {num_subnormal} block scales are subnormal; Marlin reads them as zero")


def _check_architecture(reader: CheckpointReader, layers: list[str], report: Verification) -> None:
    """Compare names and shapes with the model that config.json describes."""
    try:
        model = skeleton(reader.directory)
    except ValueError as error:
        report.notes.append(f"names not compared with the architecture: {error}")
        return
    packed = set(layers)
    expected = checkpoint_shapes(model)
    present = {f"{layer}.weight" for layer in packed} | {
        name for name in reader.names if layer_of(name).rpartition(".")[0] not in packed or name.endswith(".bias")
    }
    present -= packed_tensors(packed)
    report.problems += [f"{name}: missing" for name in sorted(set(expected) - present)]
    for name in sorted(present - set(expected)):
        is_skipped = name in model.all_tied_weights_keys or name.endswith("rotary_emb.inv_freq")
        found = report.notes if is_skipped else report.problems
        found.append(
            f"{name}: not a tensor of {type(model).__name__}{', but skipped by loaders' if is_skipped else ''}"
        )
    for name, shape in expected.items():
        layer = layer_of(name)
        shape_found: tuple[int, ...] | None = None
        if layer in packed:
            rows, half_columns = reader.layout(f"{layer}.{PACKED}")[1]
            shape_found = (rows, 2 * half_columns)
        elif name in present:
            shape_found = reader.layout(name)[1]
        if shape_found is not None and shape_found != shape:
            report.problems.append(f"{name}: shape {list(shape_found)}, the model's is {list(shape)}")
    ignore = (reader.config().get("quantization_config") or {}).get("ignore") or []
    for name, module_path in linear_weights(model).items():
        layer = layer_of(name)
        by_name, by_path = (any(matches(path, pattern) for pattern in ignore) for path in (layer, module_path))
        if layer in packed and (by_name or by_path):
            report.problems.append(f"{layer}: packed, but `ignore` tells loaders it is not")
        elif layer not in packed and name in present and not by_name:
            report.problems.append(f"{layer}: not packed and not in `ignore`; vLLM would look for packed weights")
        elif layer not in packed and name in present and not by_path:
            report.problems.append(
                f"{layer}: `ignore` lacks its module name {module_path}; Transformers looks for that"
            )


def _check_against_model(reader: CheckpointReader, model: PreTrainedModel, report: Verification) -> None:
    names = set(reader.names)
    for source in packed_sources(model):
        for name, tensor in source.tensors().items():
            if name not in names:
                report.problems.append(f"{name}: the model has it, the checkpoint does not")
                continue
            names.discard(name)
            stored = reader.get_tensor(name)
            same = stored.dtype == tensor.dtype and stored.shape == tensor.shape
            # Compared as bytes: float8 has no equality of its own, and bit for bit is the promise.
            if same and torch.equal(stored.view(torch.uint8), tensor.cpu().reshape(stored.shape).view(torch.uint8)):
                report.num_compared += 1
            else:
                report.problems.append(f"{name}: differs from the model's")
    report.problems += [f"{name}: the checkpoint has it, the model does not" for name in sorted(names)]
