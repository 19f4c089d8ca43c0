"""verify_nvfp4: is a directory the packed checkpoint it claims to be, and of this model?"""

import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from hf_nvfp4_qat.checkpoint.skeleton import CannotBuildError, skeleton
from hf_nvfp4_qat.checkpoint.stream import packed_sources
from hf_nvfp4_qat.doctor.checks import check_architecture, check_config, check_dtype, check_parts, check_values
from hf_nvfp4_qat.doctor.findings import Diagnosis, Finding, found
from hf_nvfp4_qat.formats.files import CONFIG_FILE, CheckpointReader, resolve_checkpoint
from hf_nvfp4_qat.formats.modelopt import open_checkpoint
from hf_nvfp4_qat.formats.names import PACKED, quantized_layers


def verify_nvfp4(path: str | os.PathLike, model: PreTrainedModel | None = None) -> Diagnosis:
    """Check a packed checkpoint tensor by tensor: names, shapes, dtypes, scale ranges, fused groups, `ignore`.

    One in ModelOpt's dialect is checked, and reported, under the names of compressed-tensors.

    Args:
        path: directory or Hub repository id.
        model: a QAT model; its weights as served must then equal the decoded tensors, bit for bit. Of a sharded one
            every process must call this, since the shards are gathered.

    Returns:
        The report, each finding by itself; ``report.ok`` is the verdict.

    Raises:
        ValueError: `path` holds no readable safetensors checkpoint at all.
    """
    reader = open_checkpoint(resolve_checkpoint(path))
    layers = quantized_layers(reader.names)
    findings = list(_check(reader, layers))
    num_compared = 0
    if model is not None and layers:
        differing = list(_differences(reader, model))
        num_compared = len(set(reader.names) - {finding.where for finding in differing})
        findings += differing
    # What is to be repaired is asked of ``examine``, which knows what else is wrong.
    found_here = tuple(replace(finding, fixable=False) for finding in findings)
    dialect = reader.dialect if layers else None
    return Diagnosis(reader.directory, dialect, None, len(layers), len(reader.names), found_here, num_compared)


def _check(reader: CheckpointReader, layers: list[str]) -> Iterator[Finding]:
    config = reader.config()
    yield from check_config(config)
    if not layers:
        yield found("nothing-packed", CONFIG_FILE, f"no layer is packed: not one tensor is named *.{PACKED}")
        return
    yield from check_dtype(config)
    findings, readable = check_parts(reader, layers)
    yield from findings
    yield from check_values(reader, readable)
    try:
        architecture = skeleton(reader.directory)
    except CannotBuildError as error:
        yield found("bad-config", CONFIG_FILE, str(error))
    except ValueError as error:
        yield found("not-compared", "architecture", f"not compared with it: {error}")
    else:
        yield from check_architecture(reader, layers, readable, architecture)


def _differences(reader: CheckpointReader, model: PreTrainedModel) -> Iterator[Finding]:
    names = set(reader.names)
    for source in packed_sources(model):
        for name, tensor in source.tensors().items():
            if name not in names:
                yield found("another-model", name, "the model has it, the checkpoint does not")
                continue
            names.discard(name)
            stored = reader.get_tensor(name)
            same = stored.dtype == tensor.dtype and stored.shape == tensor.shape
            # Compared as bytes: float8 has no equality of its own, and bit for bit is the promise. Flat: a tensor
            # without dims has no bytes to view.
            both = (each.reshape(-1).view(torch.uint8) for each in (stored, tensor.cpu()))
            if not same or not torch.equal(*both):
                yield found("another-model", name, "differs from the model's")
    for name in sorted(names):
        yield found("another-model", name, "the checkpoint has it, the model does not")
