"""verify_nvfp4: is a directory the packed checkpoint it claims to be, and of this model?"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_nvfp4_qat.checkpoint.skeleton import CannotBuildError, skeleton
from hf_nvfp4_qat.checkpoint.stream import packed_sources
from hf_nvfp4_qat.doctor.checks import (
    check_architecture,
    check_config,
    check_dtype,
    check_parts,
    check_values,
)
from hf_nvfp4_qat.doctor.findings import Finding
from hf_nvfp4_qat.formats.files import CheckpointReader, printable, resolve_checkpoint
from hf_nvfp4_qat.formats.modelopt import open_checkpoint
from hf_nvfp4_qat.formats.names import PACKED, quantized_layers

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

    def add(self, findings: Iterable[Finding]) -> None:
        """Take over what the checks found: what is worse than a note is a problem."""
        for finding in findings:
            (self.notes if finding.severity == "note" else self.problems).append(str(finding))

    def __str__(self) -> str:
        compared = f", {self.num_compared} tensors equal to the model's" if self.num_compared else ""
        head = f"{self.path}: {self.num_layers} packed layers, {self.num_tensors} tensors"
        verdict = f"good{compared}" if self.ok else f"{len(self.problems)} problems"
        lines = [f"{head}: {verdict}", *(f"  problem: {printable(text)}" for text in self.problems[:_NUM_SHOWN])]
        if len(self.problems) > _NUM_SHOWN:
            lines.append(f"  and {len(self.problems) - _NUM_SHOWN} more")
        return "\n".join([*lines, *(f"  note: {printable(note)}" for note in self.notes)])


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
    config = reader.config()
    report.add(check_config(config))
    if not layers:
        report.problems.append(f"no layer is packed: not one tensor is named *.{PACKED}")
        return report
    report.add(check_dtype(config))
    findings, readable = check_parts(reader, layers)
    report.add(findings)
    report.add(check_values(reader, readable))
    try:
        architecture = skeleton(reader.directory)
    except CannotBuildError as error:
        report.problems.append(str(error))
    except ValueError as error:
        report.notes.append(f"names not compared with the architecture: {error}")
    else:
        report.add(check_architecture(reader, layers, readable, architecture))
    if model is not None:
        _check_against_model(reader, model, report)
    return report


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
            # Compared as bytes: float8 has no equality of its own, and bit for bit is the promise. Flat: a tensor
            # without dims has no bytes to view.
            if same and torch.equal(stored.view(-1).view(torch.uint8), tensor.cpu().reshape(-1).view(torch.uint8)):
                report.num_compared += 1
            else:
                report.problems.append(f"{name}: differs from the model's")
    report.problems += [f"{name}: the checkpoint has it, the model does not" for name in sorted(names)]
