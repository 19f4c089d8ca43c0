"""doctor: what will go wrong with an NVFP4 checkpoint, in which engine, and what to do about it.

It reads any directory, whoever wrote it and whatever happened to it since, and loads no model: headers first, then one
layer at a time. What is damaged becomes a finding and the rest is examined all the same. ``verify_nvfp4`` is the strict
question, "is this what it claims, and of this model?"; here the same checks are made, and those of files and engines.

A checkpoint is data, and may be an enemy's. Nothing in it is executed: no pickles, no code beside it, and of the
classes that config.json may name only models of Transformers are built, on the meta device, if its sizes are those of a
model that has these tensors.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_nvfp4_qat.checkpoint.skeleton import CannotBuildError, skeleton
from hf_nvfp4_qat.doctor.checks import (
    check_architecture,
    check_config,
    check_dtype,
    check_parts,
    check_values,
    setting,
    weight_shape,
)
from hf_nvfp4_qat.doctor.contents import Contents, read_contents
from hf_nvfp4_qat.doctor.engine_checks import (
    Shapes,
    check_engines,
    check_excludes,
    check_experts,
    check_ignore_by_name,
    check_inputs,
    check_kept_out,
    check_names_in_vllm,
    check_plain_loading,
    check_targets,
    check_tensor_parallel,
    check_unpacked_values,
)
from hf_nvfp4_qat.doctor.findings import ENGINES, Diagnosis, Finding, fold, found
from hf_nvfp4_qat.formats.files import (
    CONFIG_FILE,
    HF_QUANT_CONFIG,
    CheckpointReader,
    read_json_object,
    resolve_checkpoint,
)
from hf_nvfp4_qat.formats.modelopt import (
    ModelOptReader,
    dialect_conflict,
    has_modelopt_names,
    is_modelopt,
    legacy_settings,
)
from hf_nvfp4_qat.formats.names import (
    GLOBAL_ENCODE_SCALE,
    activations_of,
    is_nvfp4_config,
    packed_tensors,
    quantized_layers,
    scale_rule_of,
)

_COUNT = re.compile(r"^num|^n_|layer|expert|depth|block|label|head|stage")
_SIZE = re.compile(r"size$|dim$|embd$|inner$|ctx$|position|token")
"""Settings by which modules are made one by one, and others that look like them."""

_FIRST = {
    # Whichever file is mended, a loader may take the other.
    "": {"duplicate-tensor"},
    # Where config.json is the one that is wrong, the other may be right.
    "configs-disagree": {"duplicate-tensor", "bad-group", "missing-input-scale", "unused-input-scale"},
}
"""Findings of a rule are not mended while there are any of these."""


@dataclass
class Examination:
    """A checkpoint as it is looked at, for ``examine`` and ``repair``.

    Attributes:
        contents: its files.
        reader: of the tensors that can be read, under compressed-tensors' names.
        config: config.json in compressed-tensors' terms; None if it says nothing that can be used.
        layers: packed layers.
        readable: those of them whose parts are there and belong together.
        model: the architecture on the meta device, if it is known.
        findings: one by one.
    """

    contents: Contents
    reader: CheckpointReader
    config: dict[str, Any] | None = None
    layers: list[str] = field(default_factory=list)
    readable: list[str] = field(default_factory=list)
    model: PreTrainedModel | None = None
    findings: list[Finding] = field(default_factory=list)

    def add(self, rule: str, where: str, message: str) -> None:
        """Note a finding."""
        self.findings.append(found(rule, where, message))

    def shapes(self) -> Shapes:
        """``(N, K)`` of the packed layers that can be read."""
        return {layer: weight_shape(self.reader, layer) for layer in self.readable}


def examine(path: str | os.PathLike, *, engine: str | None = None, tensor_parallel_size: int = 1) -> Diagnosis:
    """Say what will go wrong with a checkpoint, without loading it.

    Args:
        path: directory, or Hub repository id, which is downloaded.
        engine: of `ENGINES`: leave out what concerns only the others.
        tensor_parallel_size: GPUs among which each matrix is to be divided.

    Raises:
        ValueError: `path` is no safetensors checkpoint at all, or an argument is out of range. Whatever else is wrong
            is in the diagnosis.
    """
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"`engine` is one of {', '.join(ENGINES)}; got {engine!r}.")
    if tensor_parallel_size < 1:
        raise ValueError(f"`tensor_parallel_size` counts GPUs, at least 1; got {tensor_parallel_size}.")
    examination = look_at(resolve_checkpoint(path))
    findings = list(examination.findings)
    shapes = examination.shapes()
    if examination.layers and examination.config is not None:
        findings += check_engines(examination.reader, shapes, examination.config, engine)
        if examination.model is not None:
            findings += check_plain_loading(examination.reader, examination.layers, examination.model, engine)
    if tensor_parallel_size > 1:
        findings += check_tensor_parallel(shapes, examination.contents.config, tensor_parallel_size)
    dialect = examination.reader.dialect if examination.layers else None
    sizes = (len(examination.layers), len(examination.contents.file_of))
    folded = fold(finding for finding in findings if finding.concerns(engine))
    return Diagnosis(examination.contents.directory, dialect, engine, *sizes, tuple(folded))


def look_at(directory: Path) -> Examination:
    """Make every check that depends on no engine.

    Raises:
        ValueError: there are no safetensors weights.
    """
    contents = read_contents(directory)
    examination = Examination(contents, _reader(contents))
    examination.findings += contents.findings
    reader = examination.reader
    examination.layers = quantized_layers(reader.names)
    if is_mixed := _is_mixed(contents):
        # Other formats have tensors of the same name; of theirs only NVFP4's has this scale.
        names = set(reader.names)
        examination.layers = [layer for layer in examination.layers if f"{layer}.{GLOBAL_ENCODE_SCALE}" in names]
    findings, examination.readable = check_parts(reader, examination.layers)
    examination.findings += findings
    if is_mixed:
        message = f"says that formats are mixed; only the {len(examination.layers)} layers in NVFP4 were examined"
        examination.add("mixed-precision", CONFIG_FILE, message)
    else:
        examination.config = _checked_config(examination)
    examination.findings += check_values(reader, examination.readable)
    examination.findings += check_unpacked_values(reader, examination.layers)
    # What a reader cannot give was found; nothing more can be said of it.
    lost = {finding.where for finding in examination.findings if finding.rule == "unreadable-tensor"}
    examination.readable = [layer for layer in examination.readable if layer not in lost]
    if examination.config is not None:
        _examine_by_config(examination, examination.config)
    if is_mixed or examination.config is not None:
        try:
            quantization = (contents.config or {}).get("quantization_config") or {}
            examination.findings += check_targets(reader, quantization, examination.layers)
        except (ValueError, TypeError, AttributeError) as error:
            examination.add("bad-config", CONFIG_FILE, f"`config_groups` cannot be read: {error}")
    examination.findings = _without_consequences(contents, examination.findings)
    rules = {finding.rule for finding in examination.findings}
    examination.findings = [
        replace(finding, fixable=finding.fixable and not (rules & _FIRST.get(finding.rule, _FIRST[""])))
        for finding in examination.findings
    ]
    return examination


_CONSEQUENCES = {
    *("missing-tensor", "missing-parts", "missing-expert", "missing-input-scale", "scale-without-codes"),
    *("nothing-packed", "no-quantization-config"),
}
"""Rules that are broken where a file is damaged or missing, and whose advice would do harm then."""


def _without_consequences(contents: Contents, findings: list[Finding]) -> list[Finding]:
    """Leave out what follows from files that cannot be read."""
    damaged = {finding.where for finding in contents.findings if finding.rule in ("unreadable-file", "missing-shard")}
    hidden = [name for name, file in (contents.weight_map or {}).items() if file in damaged]

    def follows(finding: Finding) -> bool:
        if not damaged or finding.rule not in _CONSEQUENCES:
            return False
        # A weight is there as its codes, `weight_packed`; and without an index nobody knows what the files held.
        starts = (f"{finding.where}.", *([f"{finding.where}_"] if finding.where.endswith(".weight") else []))
        return not hidden or any(f"{name}.".startswith(starts) for name in hidden)

    return [finding for finding in findings if not follows(finding)]


def _is_mixed(contents: Contents) -> bool:
    """Whether a checkpoint says that it has layers in several formats, in any of the places where it may."""
    quantization = (contents.config or {}).get("quantization_config")
    if not quantization and (contents.directory / HF_QUANT_CONFIG).is_file():
        try:
            quantization = read_json_object(contents.directory / HF_QUANT_CONFIG)
        except ValueError:  # said where it is examined
            return False
    if not isinstance(quantization, dict):
        return False
    legacy = quantization.get("quantization")
    details = legacy if isinstance(legacy, dict) else quantization
    return details.get("format") == "mixed-precision" or details.get("quant_algo") == "MIXED_PRECISION"


def _reader(contents: Contents) -> CheckpointReader:
    """For either dialect, by what config.json says or, if it says nothing, by the names of the tensors."""
    says_modelopt = is_modelopt(contents.directory, contents.config or {})
    if not (contents.config or {}).get("quantization_config"):
        says_modelopt |= has_modelopt_names(contents.file_of)
    return (ModelOptReader if says_modelopt else CheckpointReader)(contents.directory, contents.file_of)


def _checked_config(examination: Examination) -> dict[str, Any] | None:
    """config.json in compressed-tensors' terms, if it has any that can be used; what is wrong with it is noted."""
    contents, reader = examination.contents, examination.reader
    if contents.config is None:
        return None
    if not examination.layers and not contents.config.get("quantization_config"):
        message = "not one tensor is packed, and config.json does not say so either: this is no NVFP4 checkpoint"
        examination.add("nothing-packed", CONFIG_FILE, message)
        return None
    says_modelopt = is_modelopt(contents.directory, contents.config)
    if problem := dialect_conflict(contents.config, contents.file_of, says_modelopt=says_modelopt):
        examination.add("dialect-mismatch", CONFIG_FILE, problem)
        return None
    try:
        config = reader.config()
        quantization = config.get("quantization_config") or {}
        if is_nvfp4_config(quantization):
            activations_of(quantization), scale_rule_of(quantization)
            for written in (quantization, contents.config.get("quantization_config") or {}):
                _refuse_odd_types(written)
        examination.findings += check_config(config)
    except ValueError as error:
        examination.add("other-format" if says_modelopt else "bad-config", CONFIG_FILE, str(error))
        return None
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        # Whoever reads a field of another type than all tools write fails like this.
        message = f"a field has a type that it never has ({type(error).__name__}: {error})"
        examination.add("bad-config", CONFIG_FILE, message)
        return None
    if not is_nvfp4_config(config.get("quantization_config")):
        return None
    if not examination.layers:
        examination.add("nothing-packed", CONFIG_FILE, "says NVFP4, but not one tensor is packed")
    examination.findings += _check_dtype(examination, config)
    examination.findings += _check_legacy_config(contents)
    return config


def _refuse_odd_types(quantization: dict[str, Any]) -> None:
    for group in (quantization.get("config_groups") or {}).values():
        for name, kind in (("targets", list), ("weights", dict), ("input_activations", dict)):
            if not isinstance(group.get(name) or kind(), kind):
                raise TypeError(f"`{name}` of a group must be a {kind.__name__}; it is a {type(group[name]).__name__}")


def _check_dtype(examination: Examination, config: dict[str, Any]) -> Iterator[Finding]:
    if setting(config, "dtype", "torch_dtype") != "float32":
        yield from check_dtype(config)
        return
    packed = packed_tensors(examination.layers)
    stored = {examination.reader.layout(name)[0] for name in examination.reader.names if name not in packed}
    is_served = not stored & {"F64", "F32", "F16"}
    message = "dtype is float32: engines compute in it, slowly, or cannot"
    yield found("dtype-float32", CONFIG_FILE, message, fixable=is_served)


def _check_legacy_config(contents: Contents) -> Iterator[Finding]:
    """Of ModelOpt's two places for the same, engines read the one or the other."""
    quantization = (contents.config or {}).get("quantization_config")
    is_here = (contents.directory / HF_QUANT_CONFIG).exists()
    if not is_here or not is_modelopt(contents.directory, contents.config or {}):
        return
    try:
        legacy = read_json_object(contents.directory / HF_QUANT_CONFIG).get("quantization")
    except ValueError as error:
        yield found("bad-json", HF_QUANT_CONFIG, str(error))
        return
    if not quantization or "quantization" in quantization:
        return
    if not isinstance(legacy, dict):
        yield found("configs-disagree", HF_QUANT_CONFIG, "has no `quantization`, which config.json has", fixable=True)
        return
    for key, said in legacy_settings(quantization).items():
        there = legacy.get(key)
        if isinstance(said, list) and isinstance(there, list):
            said, there = sorted(map(str, said)), sorted(map(str, there))
        if there != said:
            yield found("configs-disagree", HF_QUANT_CONFIG, f"{key} is another than config.json has", fixable=True)


def _examine_by_config(examination: Examination, config: dict[str, Any]) -> None:
    """What takes config.json to check: layers that are kept out, experts, inputs, the architecture."""
    reader, layers = examination.reader, examination.layers
    try:
        examination.model, against_model = _compare(examination, config)
        examination.findings += against_model
    except CannotBuildError as error:
        examination.add("bad-config", CONFIG_FILE, str(error))
    except ValueError as error:
        examination.add("not-compared", "architecture", f"not compared with it: {error}")
        try:
            examination.findings += check_ignore_by_name(reader, layers)
        except ValueError as bad_pattern:
            examination.add("bad-config", CONFIG_FILE, str(bad_pattern))
    examination.findings += check_experts(reader, config)
    examination.findings += check_excludes(reader, layers)
    try:
        examination.findings += check_kept_out(reader, examination.readable, config, examination.model)
        examination.findings += check_names_in_vllm(reader, layers, config)
        examination.findings += check_inputs(reader, examination.readable, config)
    except ValueError as bad_pattern:
        examination.add("bad-config", CONFIG_FILE, str(bad_pattern))


def _compare(examination: Examination, config: dict[str, Any]) -> tuple[PreTrainedModel, list[Finding]]:
    """The architecture, and what differs from it.

    Raises:
        ValueError: it is not known, or would not be a model of these tensors.
    """
    reader = examination.reader
    if reason := _implausible(config, len(reader.names)):
        raise ValueError(reason)
    try:
        model = skeleton(reader.directory)
        return model, list(check_architecture(reader, examination.layers, examination.readable, model))
    except CannotBuildError:
        raise
    except Exception as error:  # Transformers' configurations and models raise whatever a wrong value leads to
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _implausible(config: dict[str, Any], num_tensors: int) -> str:
    """Why a model of this configuration is not built; empty if nothing speaks against it.

    Layers and labels are made one by one, so that a number in a file must not decide how many. Backbones may be
    downloaded.
    """
    waiting: list[tuple[str, Any]] = [("config.json", {k: v for k, v in config.items() if k != "quantization_config"})]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += ((name, entry) for entry in value)
        if "backbone" in name and value:
            return f"it may take a backbone from elsewhere ({name})"
        is_count = _COUNT.search(name) is not None and _SIZE.search(name) is None
        if isinstance(value, int) and abs(value) > (max(1024, num_tensors) if is_count else 2**40):
            return f"{name} is {value}, and there are {num_tensors} tensors"
        if isinstance(value, (list, dict)) and len(value) > 2**17:
            return f"{name} has {len(value)} entries"
    return ""
