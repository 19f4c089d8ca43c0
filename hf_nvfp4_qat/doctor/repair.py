"""repair: mends in place what can be mended without changing a decoded value, and nothing else.

Two kinds of repairs. Those of tensors bring a fused group to one global scale, lift block scales out of the subnormal
range, and put layers that do not bear four bits back into bfloat16 where that is exact. Those of JSON files make them
say what the tensors are: the index, `ignore`, the status, the dtype, ModelOpt's second config.

Only files that change are written, one shard in memory at a time, under temporary names; a killed process leaves the
old checkpoint whole, or a list of renames that the next repair finishes.
"""

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_nvfp4_qat.checkpoint.skeleton import linear_weights, tied_heads
from hf_nvfp4_qat.doctor.checks import TEXT_CONFIGS
from hf_nvfp4_qat.doctor.examine import Examination, look_at
from hf_nvfp4_qat.formats.files import (
    CONFIG_FILE,
    FLOATING,
    HF_QUANT_CONFIG,
    INDEX_FILE,
    StagedFiles,
    finish_renaming,
    is_unfinished,
    printable,
    read_json_object,
    staged_files,
)
from hf_nvfp4_qat.formats.modelopt import ModelOptReader, legacy_settings, shift_exact_scales
from hf_nvfp4_qat.formats.names import (
    BLOCK_SCALE,
    GLOBAL_ENCODE_SCALE,
    PACKED,
    SERVED_DTYPE,
    from_checkpoint,
    layer_of,
    packed_tensors,
)
from hf_nvfp4_qat.numerics.rescale import ScaleFacts, rescaled, scale_facts, shared_exponents
from hf_nvfp4_qat.selection.fused_groups import always_fused_key
from hf_nvfp4_qat.selection.layer_names import EMBEDDINGS
from hf_nvfp4_qat.selection.patterns import names_matching, patterns_without_match

_RESCALED = ("unshared-scale", "subnormal-block-scale")
_DECODED = ("quantized-router", "quantized-lm-head", "quantized-embedding")


@dataclass
class _Plan:
    """What is to be done.

    Attributes:
        exponents: layer to the exponent by which its global decode scale grows.
        decoded: layers that go back to bfloat16.
        rules: of all findings that can be mended.
    """

    exponents: dict[str, int] = field(default_factory=dict)
    decoded: list[str] = field(default_factory=list)
    rules: set[str] = field(default_factory=set)


def repair(path: str | os.PathLike) -> list[str]:
    """Mend a checkpoint directory where that loses nothing: every packed layer decodes to the same values, bit for bit.

    Args:
        path: a local directory.

    Returns:
        What was changed, a line each; empty if nothing was.

    Raises:
        ValueError: `path` is no local directory, has links among its files, or holds no safetensors weights.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ValueError(
            f"A repair changes a local directory; {str(path)!r} is none. Download it first: `hf download REPO "
            "--local-dir DIRECTORY`."
        )
    if links := sorted(path.name for path in directory.iterdir() if path.is_symlink()):
        raise ValueError(
            f"A repair changes files of their own; {links[0]} in {directory} is a link, as in a snapshot of the Hub's "
            "cache. Copy it first: `cp -rL DIRECTORY COPY`, or `hf download REPO --local-dir DIRECTORY`."
        )
    changes = []
    if is_unfinished(directory):
        finish_renaming(directory)
        changes.append("finished a repair that was interrupted")
    examination = look_at(directory)
    plan = _plan(examination)
    configs, done = _configs(examination, plan)
    file_of = examination.reader.file_of
    changed = {f"{layer}.{part}" for layer in plan.exponents for part in (BLOCK_SCALE, GLOBAL_ENCODE_SCALE)}
    weights = sorted({file_of[name] for name in changed | packed_tensors(plan.decoded) if name in file_of})
    if weights or configs:
        if weights and CONFIG_FILE not in configs and examination.contents.config is not None:
            # Written again as it is: while it is away nothing loads shards that do not belong together.
            configs[CONFIG_FILE] = examination.contents.config
        with staged_files(directory, in_place=True) as staged:
            for file in weights:
                _write_shard(examination, plan, file, staged)
            for name, content in configs.items():
                staged.write_json(name, content)
    if plan.exponents:
        changes.append(f"moved powers of two between the scales of {_listed(plan.exponents)}")
    if plan.decoded:
        changes.append(f"decoded to bfloat16: {_listed(plan.decoded)}")
    return [*changes, *done]


def _plan(examination: Examination) -> _Plan:
    fixable = [finding for finding in examination.findings if finding.fixable]
    decoded = dict.fromkeys(finding.where for finding in fixable if finding.rule in _DECODED)
    plan = _Plan(decoded=list(decoded), rules={finding.rule for finding in fixable})
    groups = {always_fused_key(finding.where) for finding in fixable if finding.rule in _RESCALED}
    members: dict[str, dict[str, ScaleFacts]] = {}
    for layer in examination.readable:
        if (key := always_fused_key(layer)) in groups and layer not in plan.decoded:
            members.setdefault(key, {})[layer] = scale_facts(from_checkpoint(layer, examination.reader.get_tensor))
    for facts in members.values():
        plan.exponents |= shared_exponents(facts) or {}
    return plan


def _listed(names: Iterable[str]) -> str:
    names = [printable(name) for name in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _write_shard(examination: Examination, plan: _Plan, file: str, staged: StagedFiles) -> None:
    """One file again, with the tensors of the plan as they shall be and all others as they are."""
    reader = examination.reader
    with safe_open(reader.directory / file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        metadata = opened.metadata() or {}
    stored_exponents: dict[str, int] = {}
    for layer, exponent in plan.exponents.items():
        scale, global_scale = f"{layer}.{BLOCK_SCALE}", f"{layer}.{GLOBAL_ENCODE_SCALE}"
        if reader.file_of[scale] == file:
            weight = rescaled(from_checkpoint(layer, reader.get_tensor), exponent)
            tensors[reader.name_in_file(scale)] = weight.block_scale
        if reader.file_of[global_scale] == file:
            stored = reader.name_in_file(global_scale)
            # ModelOpt stores the decode direction, compressed-tensors the other.
            stored_exponents[stored] = exponent if isinstance(reader, ModelOptReader) else -exponent
            tensors[stored] = torch.ldexp(tensors[stored], torch.tensor(stored_exponents[stored]))
    for layer in plan.decoded:
        for name in packed_tensors([layer]):
            if reader.file_of.get(name) == file:
                del tensors[reader.name_in_file(name)]
        if reader.file_of[f"{layer}.{PACKED}"] == file:
            tensors[f"{layer}.weight"] = from_checkpoint(layer, reader.get_tensor).dequantize(SERVED_DTYPE)
    save_file(tensors, staged.path(file), metadata=shift_exact_scales(metadata, stored_exponents))


def _configs(examination: Examination, plan: _Plan) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The JSON files that change, and what changes in them."""
    contents = examination.contents
    files: dict[str, dict[str, Any]] = {}
    done = []
    if "index-mismatch" in plan.rules or (plan.decoded and contents.weight_map is not None):
        files[INDEX_FILE] = _index(examination, plan)
        if "index-mismatch" in plan.rules:
            done.append(f"{INDEX_FILE} written anew from the headers of the shards")
    config = copy.deepcopy(contents.config) or {}
    quantization = config.get("quantization_config") or {}
    if "status-not-compressed" in plan.rules:
        quantization["quantization_status"] = "compressed"
        done.append("quantization_status set to 'compressed'")
    if "dtype-float32" in plan.rules:
        for part in (config, *(config.get(name) for name in TEXT_CONFIGS)):
            if isinstance(part, dict):
                part.update({key: "bfloat16" for key in ("dtype", "torch_dtype") if part.get(key) == "float32"})
        done.append("dtype set to bfloat16")
    legacy = _legacy_config(contents.directory) if isinstance(examination.reader, ModelOptReader) else None
    if "ignore-mismatch" in plan.rules or _linear_again(plan):
        ignore = _ignore(examination, plan)
        if isinstance(quantization.get("quantization"), dict):
            quantization["quantization"]["exclude_modules"] = ignore
        elif quantization:
            quantization["ignore"] = ignore
        if legacy is not None and isinstance(legacy.get("quantization"), dict):
            legacy["quantization"]["exclude_modules"] = ignore
        done.append(f"`ignore` written anew, {len(ignore)} entries")
    if "configs-disagree" in plan.rules and legacy is not None:
        known = legacy.get("quantization")
        legacy["quantization"] = {**(known if isinstance(known, dict) else {}), **legacy_settings(quantization)}
        done.append(f"{HF_QUANT_CONFIG} made to say what {CONFIG_FILE} says")
    if config != (contents.config or {}):
        files[CONFIG_FILE] = config
    if legacy is not None and legacy != _legacy_config(contents.directory):
        files[HF_QUANT_CONFIG] = legacy
    return files, done


def _legacy_config(directory: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(directory / HF_QUANT_CONFIG)
    except ValueError:  # there is none, or it was found to be damaged
        return None


def _index(examination: Examination, plan: _Plan) -> dict[str, Any]:
    """The index that belongs to the headers, with its metadata if it has any."""
    contents, reader = examination.contents, examination.reader
    weight_map = dict(contents.file_of)
    for layer in plan.decoded:
        codes_file = reader.file_of[f"{layer}.{PACKED}"]
        for name in packed_tensors([layer]):
            if name in reader.file_of:
                del weight_map[reader.name_in_file(name)]
        weight_map[f"{layer}.weight"] = codes_file
    try:
        known = read_json_object(contents.directory / INDEX_FILE)
    except ValueError:
        known = {}
    return {"metadata": {}, **known, "weight_map": weight_map}


def _linear_again(plan: _Plan) -> list[str]:
    """The decoded layers that loaders run as linears."""
    return [layer for layer in plan.decoded if layer.rpartition(".")[2] not in EMBEDDINGS]


def _ignore(examination: Examination, plan: _Plan) -> list[str]:
    """The entries that name no packed layer, and the names of all that are not packed, in both namings."""
    reader = examination.reader
    names = {name for name in reader.names if reader.layout(name)[0] in FLOATING}
    linears = {} if examination.model is None else linear_weights(examination.model, reader.names)
    packed = set(examination.layers) - set(plan.decoded)
    paths = {*packed, *(path for name, path in linears.items() if layer_of(name) in packed)}
    entries = (examination.config or {}).get("quantization_config", {}).get("ignore") or []
    kept = patterns_without_match(paths, entries)
    if isinstance(reader, ModelOptReader):
        wrong = reader.wrongly_excluding(packed)
        kept = [entry for entry in kept if entry not in wrong]
    needed = set(_linear_again(plan))
    for name, path in linears.items():
        if layer_of(name) in needed or (layer_of(name) not in packed and name in names):
            needed |= {layer_of(name), path}
    if examination.model is not None:
        needed |= set(tied_heads(examination.model)) - packed
    # An entry that goes may have stood for others too.
    stood_for = {layer_of(name) for name in names if name.endswith(".weight") and layer_of(name) not in packed}
    needed |= names_matching(stood_for, [entry for entry in entries if entry not in kept])
    return sorted({*kept, *(needed - names_matching(needed, kept))})
