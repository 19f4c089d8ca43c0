"""What lies in a checkpoint directory, damaged or not: which file holds which tensor, by the files' own headers.

Loaders disagree about what they read. Transformers takes model.safetensors, or else what the index names; vLLM takes
what the index names, or else every *.safetensors. Here everything that any of them would read is looked at, and where
they would differ, that is a finding. Headers go through safetensors' own parser, which checks every size and offset
against the file before anything is allocated.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_nvfp4_qat.doctor.findings import Finding, found
from hf_nvfp4_qat.formats.files import (
    CONFIG_FILE,
    INDEX_FILE,
    PARTIAL_SUFFIX,
    SINGLE_FILE,
    TOKENIZERS,
    is_plain_name,
    is_unfinished,
    read_json_object,
    read_weight_map,
    tensor_names,
)

_NUMBERED = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")

_OTHER_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


@dataclass
class Contents:
    """What could be read of a directory, and what could not.

    Attributes:
        directory: of the checkpoint.
        file_of: stored tensor name to the file whose header has it.
        weight_map: that of the index; None without one, or if it cannot be read.
        config: config.json; None without one, or if it cannot be read.
        findings: what is wrong with the files themselves.
    """

    directory: Path
    file_of: dict[str, str] = field(default_factory=dict)
    weight_map: dict[str, str] | None = None
    config: dict[str, Any] | None = None
    findings: list[Finding] = field(default_factory=list)

    def add(self, rule: str, where: str, message: str, *, fixable: bool = False) -> None:
        """Note a finding."""
        self.findings.append(found(rule, where, message, fixable=fixable))


def read_contents(directory: Path) -> Contents:
    """Look at the files of a checkpoint directory; what is damaged becomes a finding.

    Raises:
        ValueError: there are no safetensors weights at all.
    """
    contents = Contents(directory)
    present = sorted(path.name for path in directory.iterdir() if path.name.endswith(".safetensors"))
    has_index = (directory / INDEX_FILE).exists()
    if SINGLE_FILE not in present and not has_index and not any(map(_NUMBERED.fullmatch, present)):
        raise ValueError(
            f"A checkpoint directory holds {SINGLE_FILE} or {INDEX_FILE}; {directory} holds neither. Other formats "
            "are not read."
        )
    if is_unfinished(directory):
        contents.add("unfinished-repair", "weights", "a repair was interrupted while it renamed", fixable=True)
    if (directory / CONFIG_FILE).exists():
        contents.config = _read(contents, CONFIG_FILE)
    else:
        contents.add("no-config", CONFIG_FILE, "there is none")
    if has_index:
        contents.weight_map = _read(contents, INDEX_FILE, read_weight_map)
    shards = _shards(contents, present)
    num_before = len(contents.findings)
    holders = _holders(contents, shards)
    contents.file_of = {name: files[0] for name, files in holders.items()}
    if SINGLE_FILE not in shards:
        is_whole = len(contents.findings) == num_before and not _rules(contents) & {"missing-shard", "path-outside"}
        _check_index(contents, has_index, is_whole)
    _check_other_files(contents)
    return contents


def _read(contents: Contents, name: str, read: Callable[[Path], dict] = read_json_object) -> dict[str, Any] | None:
    """The content of a JSON file; None if it is damaged, which is noted."""
    try:
        return read(contents.directory / name)
    except ValueError as error:
        contents.add("bad-json", name, str(error))
        return None


def _shards(contents: Contents, present: list[str]) -> list[str]:
    """The weight files that some loader reads; what of them is missing, or too much, is noted."""
    named = sorted(set((contents.weight_map or {}).values()))
    if SINGLE_FILE in present:
        if contents.weight_map is not None and named != [SINGLE_FILE]:
            message = "stands beside an index of other files: Transformers takes the one, vLLM the others"
            contents.add("two-layouts", SINGLE_FILE, message)
        elif contents.weight_map is None:
            # Mistral's own format has its weights twice.
            for name in present:
                if name != SINGLE_FILE and not name.startswith("consolidated"):
                    contents.add("stray-weights", name, "vLLM reads every *.safetensors where there is no index")
        return [SINGLE_FILE]
    inside = []
    for name in named:
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            contents.add("path-outside", INDEX_FILE, f"names {name!r}, which is no file beside it; it was not read")
        elif not (contents.directory / name).exists():
            contents.add("missing-shard", name, "named by the index, and not there")
        else:
            inside.append(name)
    numbered = [name for name in present if _NUMBERED.fullmatch(name)]
    if contents.weight_map is not None:
        # Of another save by their names: "of-00003" where the index names those "of-00002".
        totals = {name[15:20] for name in inside if _NUMBERED.fullmatch(name)}
        for name in [name for name in numbered if name not in inside and totals and name[15:20] not in totals]:
            contents.add("unindexed-shard", name, "not of the shards that the index names")
            numbered.remove(name)
    if contents.weight_map is None and numbered:
        total = max(int(name[15:20]) for name in numbered)
        if num_missing := total - len(numbered):
            there = {int(name[6:11]) for name in numbered}
            first = next((number for number in range(1, total + 1) if number not in there), total)
            name = f"model-{first:05d}-of-{total:05d}.safetensors"
            contents.add("missing-shard", name, f"{abs(num_missing)} of {total} shards are not there")
    return sorted({*inside, *numbered})


def _holders(contents: Contents, shards: list[str]) -> dict[str, list[str]]:
    """Stored tensor name to the files that have it."""
    holders: dict[str, list[str]] = {}
    for shard in shards:
        try:
            for name in tensor_names(contents.directory / shard):
                holders.setdefault(name, []).append(shard)
        except ValueError as error:
            contents.add("unreadable-file", shard, str(error))
    for name, files in holders.items():
        if len(files) > 1:
            contents.add("duplicate-tensor", name, f"is in {len(files)} files; loaders take the one they read last")
    return holders


def _check_index(contents: Contents, has_index: bool, is_whole: bool) -> None:
    """The index and the shards' headers agree; else it can be written anew, if every tensor is in exactly one shard."""
    if contents.weight_map is None:
        problem = "cannot be read" if has_index else "is missing; Transformers does not find the shards without it"
        contents.add("index-mismatch", INDEX_FILE, problem, fixable=is_whole)
        return
    elsewhere = [name for name, file in contents.file_of.items() if contents.weight_map.get(name) not in (file, None)]
    unnamed = contents.file_of.keys() - contents.weight_map.keys()
    nowhere = contents.weight_map.keys() - contents.file_of.keys()
    is_whole = is_whole and not nowhere
    for name in elsewhere:
        contents.add("index-mismatch", name, "the index names another file than the one that has it", fixable=is_whole)
    for name in sorted(unnamed):
        contents.add("index-mismatch", name, "in a shard, but not in the index", fixable=is_whole)
    damaged = {finding.where for finding in contents.findings if finding.rule in ("unreadable-file", "missing-shard")}
    for name in sorted(nowhere):
        # Of a file that is damaged or missing, that was said.
        if contents.weight_map[name] not in damaged and "path-outside" not in _rules(contents):
            contents.add("index-mismatch", name, "in the index, but in no shard")


def _check_other_files(contents: Contents) -> None:
    if not is_unfinished(contents.directory):
        for path in sorted(contents.directory.glob(f"*{PARTIAL_SUFFIX}")):
            contents.add("partial-files", path.name, "left by a save that did not finish")
    for name in _OTHER_JSON:
        if (contents.directory / name).exists():
            _read(contents, name)
    if not any((contents.directory / name).exists() for name in TOKENIZERS):
        contents.add("no-tokenizer", "tokenizer", "there is none beside the weights")


def _rules(contents: Contents) -> set[str]:
    return {finding.rule for finding in contents.findings}
