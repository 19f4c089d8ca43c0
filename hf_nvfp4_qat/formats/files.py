"""Safetensors files on disk: written under temporary names and renamed when all are complete; read lazily.

Whatever is read may come from a stranger: sizes are looked at before a file is, and no name in an index leads out of
its folder.
"""

import json
import os
import platform
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open

CARD_FILE = "README.md"
CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HF_QUANT_CONFIG = "hf_quant_config.json"
"""Which ModelOpt's checkpoints have beside config.json."""
CHAT_TEMPLATES = "additional_chat_templates"
"""A folder, where a tokenizer has several of them."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Name of a dtype in a safetensors header to the dtype."""
FLOATING = ("F64", "F32", "F16", "BF16")
"""Those names that what is not quantized has."""
PARTIAL_SUFFIX = ".nvfp4-partial"
_RENAMES = f"renames.json{PARTIAL_SUFFIX}"
"""Lists what an unfinished change of a checkpoint in place still has to rename."""

_LONGEST_TEXT = 600
_MAX_JSON_BYTES = 2**27
"""Of an index of 100,000 tensors, the largest such file there is, about 10 MB are in use."""


BESIDE_WEIGHTS = (
    *("generation_config.json", "*processor_config.json", "chat_template.json", "*.jinja"),
    *("*tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "tekken.json", "normalizer.json"),
    *("*vocab*.json", "*vocab*.txt", "merges.txt", "dict.txt", "*.bpe", "*.codes", "*.spm", "*.tiktoken"),
    *("*.model", "tokenizer.model.*", "*.py"),
    *("*LICEN[CS]E*", "*[Ll]icen[cs]e*", "NOTICE*", "COPYING*", "*USE_POLICY*"),
)
"""What belongs to a checkpoint beside its weights, config.json and card, as patterns of ``fnmatch``.

What is not named here stays behind when a checkpoint is converted, published or downloaded: weights of other
frameworks, optimizer states, logs.
"""
TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model"),
    *("tekken.json", "tiktoken.model", "sentencepiece.bpe.model"),
)
"""Files of which a checkpoint with a tokenizer has one at least."""


def files_beside_weights(directory: Path) -> tuple[list[str], list[str]]:
    """Names of what belongs to a checkpoint by `BESIDE_WEIGHTS`, and of all else; folders end with "/".

    Hidden files and partial ones are in neither list.
    """
    found, others = [], []
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name.endswith(PARTIAL_SUFFIX):
            continue
        if path.is_dir() and path.name == CHAT_TEMPLATES:
            found += [f"{path.name}/{template.name}" for template in sorted(path.glob("*.jinja"))]
        elif path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in BESIDE_WEIGHTS):
            found.append(path.name)
        else:
            others.append(path.name + "/" * path.is_dir())
    return found, others


_running: set[str] = set()
"""Marks of the saves that this process is in."""
_MARK_END = re.compile(r"-(\d+)-[0-9a-f]{8}$")
_LONGEST_SAVE = 24 * 60 * 60
"""Seconds after which a partial file of another machine, whose processes are not seen here, is a leftover."""


class StagedFiles:
    """Files of one checkpoint directory, written as ``NAME.MARK.nvfp4-partial`` until ``staged_files`` ends well.

    The mark says which machine, process and save a file is of: saves into one directory do not touch each other's.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names: list[str] = []
        self.mark = f"{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"

    def path(self, name: str) -> Path:
        """Where to write the file that will be `name`."""
        self.names.append(name)
        return self.partial(name)

    def partial(self, name: str) -> Path:
        """Where the file that will be `name` is until then."""
        return self.directory / f"{name}.{self.mark}{PARTIAL_SUFFIX}"

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write `content` as the JSON file `name`."""
        self.path(name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def staged_files(directory: str | os.PathLike, *, in_place: bool = False) -> Iterator[StagedFiles]:
    """All files of a checkpoint appear together, config.json last, or none does.

    A killed process leaves ``*.nvfp4-partial`` files, which nothing loads and the next save into the directory removes;
    an exception leaves nothing. An older checkpoint in the directory stays whole until the new one is; between the two,
    for as long as renaming takes, there is no config.json and nothing loads. Of two saves at the same time the one that
    ends last is there, whole.

    Args:
        directory: made if missing.
        in_place: change some files of a checkpoint and keep the others. A process that is killed while it renames
            leaves a list of what is to be done, for ``finish_renaming``: half of a new checkpoint would be nobody's.

    Raises:
        ValueError: `directory` is a file.
        RuntimeError: files that were written are gone; an older checkpoint is as it was.
    """
    directory = Path(directory)
    if directory.is_file():
        raise ValueError(f"A checkpoint is saved into a directory; {directory} is a file. Choose another path.")
    directory.mkdir(parents=True, exist_ok=True)
    _remove_left_overs(directory)
    staged = StagedFiles(directory)
    _running.add(staged.mark)
    try:
        yield staged
        with _locked(directory):
            _rename(staged, in_place)
    finally:
        _running.discard(staged.mark)
        if not is_unfinished(directory):
            for name in staged.names:
                staged.partial(name).unlink(missing_ok=True)


def _rename(staged: StagedFiles, in_place: bool) -> None:
    directory = staged.directory
    names = sorted(dict.fromkeys(staged.names), key=lambda name: name == CONFIG_FILE)
    if missing := [name for name in names if not staged.partial(name).is_file()]:
        raise RuntimeError(
            f"{len(missing)} files that this save wrote to {directory} are gone, the first {missing[0]}: something has "
            "removed them. An older checkpoint there is as it was. Save again, from one process at a time."
        )
    if in_place:
        # Complete before its own name appears: from then on the change is made, whatever happens.
        renames = {staged.partial(name).name: name for name in names}
        (directory / f"{_RENAMES}.new").write_text(json.dumps(renames), encoding="utf-8")
        os.replace(directory / f"{_RENAMES}.new", directory / _RENAMES)
    # From here to the end nothing loads: without a config.json the directory is no checkpoint.
    if CONFIG_FILE in names:
        (directory / CONFIG_FILE).unlink(missing_ok=True)
    if any(_WEIGHTS_FILE.fullmatch(name) for name in names) and not in_place:
        for older in (*weight_files(directory), directory / HF_QUANT_CONFIG):
            if older.name not in names:
                older.unlink(missing_ok=True)
    for name in names:
        os.replace(staged.partial(name), directory / name)
    (directory / _RENAMES).unlink(missing_ok=True)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time; where directories cannot be locked (Windows, some network mounts), any."""
    handle = None
    with suppress(ImportError, OSError):
        from fcntl import LOCK_EX, flock

        handle = os.open(directory, os.O_RDONLY)
        flock(handle, LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _remove_left_overs(directory: Path) -> None:
    """Remove the partial files of saves that were killed, and keep those of saves that may be running."""
    for folder in (directory, directory / CHAT_TEMPLATES):
        for partial in folder.glob(f"*{PARTIAL_SUFFIX}"):
            if not _may_be_running(partial):
                partial.unlink(missing_ok=True)


def _may_be_running(partial: Path) -> bool:
    stem = partial.name.removesuffix(PARTIAL_SUFFIX)
    match = _MARK_END.search(stem)
    if match is None:
        return False
    if not stem[: match.start()].endswith(f".{platform.node()}"):
        with suppress(OSError):  # it is gone by now
            return time.time() - partial.stat().st_mtime < _LONGEST_SAVE
        return False
    if int(match[1]) == os.getpid():  # or had that number: a container that starts again gives out the same ones
        return any(stem.endswith(f".{mark}") for mark in _running)
    return psutil.pid_exists(int(match[1]))


def is_unfinished(directory: Path) -> bool:
    """Whether a change in place was interrupted after the last file was written and before the last was renamed."""
    return (directory / _RENAMES).is_file()


def finish_renaming(directory: Path) -> None:
    """Finish what ``staged_files(in_place=True)`` was doing when its process was killed.

    Raises:
        ValueError: the list of what is to be renamed is not one of ours.
    """
    renames = read_json(directory / _RENAMES)
    if not isinstance(renames, dict) or not all(
        isinstance(name, str) and is_plain_name(name) for pair in renames.items() for name in pair
    ):
        raise ValueError(f"{directory / _RENAMES} must list file names; it does not. Remove it.")
    for partial, name in renames.items():
        if (directory / partial).is_file():
            os.replace(directory / partial, directory / name)
    (directory / _RENAMES).unlink()


def printable(text: str, *, longest: int = _LONGEST_TEXT) -> str:
    """Text that may be a stranger's, safe for a terminal: control characters and lone surrogates escaped, and cut."""
    text = text if len(text) <= longest else f"{text[:longest]}..."
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def is_plain_name(name: str) -> bool:
    """Whether a name from an index or a list is that of a file in the same directory, and of no other."""
    return re.fullmatch(r"[^/\\:\x00-\x1f\x7f\ud800-\udfff]{1,200}", name) is not None and name.strip(". ") != ""


def read_json(path: Path) -> Any:
    """The content of a JSON file that may be anybody's.

    Raises:
        ValueError: it is no regular file, too large, not UTF-8, not JSON, or nested too deeply.
    """
    if not path.is_file():
        raise ValueError(f"{path} must be a regular file; it is none. Copy the checkpoint's own file there.")
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
        raise ValueError(f"{path} must have at most {_MAX_JSON_BYTES} bytes; it has {size}. Do not trust it.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is not JSON that can be read: it is nested too deeply. Do not trust it.") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are
        raise ValueError(f"{path} is not JSON: {error}. Download or copy it again.") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file that may be anybody's.

    Raises:
        ValueError: as ``read_json``, or it is something other than an object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must hold a JSON object; it holds a {type(content).__name__}. Download or copy it again."
        )
    return content


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor name to file name, of an index; the file names may still be any string.

    Raises:
        ValueError: as ``read_json_object``, or it has no `weight_map` from strings to strings.
    """
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(
            f"{path} must have a `weight_map` from tensor names to file names; it does not. Copy it again."
        )
    return weight_map


_WEIGHTS_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(INDEX_FILE))


def weight_files(directory: str | os.PathLike) -> list[Path]:
    """model.safetensors, its shards and its index in a directory.

    Of two saves in one directory a loader may take the older: model.safetensors comes before an index.
    """
    directory = Path(directory)
    return [path for path in directory.iterdir() if _WEIGHTS_FILE.fullmatch(path.name)] if directory.is_dir() else []


@contextmanager
def replaced_weights(directory: str | os.PathLike) -> Iterator[None]:
    """Only the weights that are written meanwhile stay in a directory; if writing fails, only the older ones do."""
    aside = StagedFiles(Path(directory))
    older = weight_files(directory)
    _running.add(aside.mark)
    try:
        for path in older:
            os.replace(path, aside.path(path.name))
        yield
    except BaseException:
        for path in weight_files(directory):
            path.unlink()
        for name in aside.names:
            os.replace(aside.partial(name), aside.directory / name)
        raise
    else:
        for name in aside.names:
            aside.partial(name).unlink(missing_ok=True)
    finally:
        _running.discard(aside.mark)


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def tensor_names(path: Path) -> list[str]:
    """Names in the header of a safetensors file; its parser checks every size and offset against the file.

    Raises:
        ValueError: it is no regular file, or damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path} must be a regular file; it is none. Copy the checkpoint's own file there.")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path} is a pointer of Git LFS, not the file itself. Bring that with `git lfs pull`.")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except Exception as error:  # safetensors raises a type of its own
        raise ValueError(f"{path} cannot be read: {error}. Download or copy it again.") from error


_DAMAGED = "{path} cannot give {name}: {error}. Download or copy it again."


class CheckpointReader:
    """Tensors of a safetensors checkpoint directory by name, read one at a time.

    Args:
        directory: a directory with model.safetensors, or an index and its shards.
        file_of: tensor name to file name, if that is known already.

    Raises:
        ValueError: no safetensors weights there, or a shard named by the index is missing.
    """

    dialect = "compressed-tensors"
    """In whose names and directions the file holds packed tensors."""

    def __init__(self, directory: str | os.PathLike, file_of: dict[str, str] | None = None) -> None:
        self.directory = Path(directory)
        index = self.directory / INDEX_FILE
        single = self.directory / SINGLE_FILE
        # model.safetensors first, as Transformers does.
        if file_of is not None:
            self.file_of = file_of
        elif single.is_file():
            self.file_of = dict.fromkeys(tensor_names(single), single.name)
        elif index.is_file():
            weight_map = read_weight_map(index)
            if outside := [file for file in weight_map.values() if not is_plain_name(file)]:
                raise ValueError(f"{index} must name files beside it; it names {outside[0]!r}. Do not trust it.")
            missing = sorted({file for file in weight_map.values() if not (self.directory / file).is_file()})
            if missing:
                raise ValueError(
                    f"{index} names {len(missing)} files that are not there, the first {missing[0]}. "
                    "Download or copy the whole checkpoint."
                )
            self.file_of = dict(weight_map)
        else:
            raise ValueError(
                f"A checkpoint directory holds model.safetensors or {INDEX_FILE}; {self.directory} holds neither. "
                "Checkpoints in other formats must be saved as safetensors first."
            )
        self._open: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        """Tensor names, in the order of the index."""
        return list(self.file_of)

    def config(self) -> dict[str, Any]:
        """The parsed config.json.

        Raises:
            ValueError: there is none, or it is no JSON object.
        """
        path = self.directory / CONFIG_FILE
        if not path.exists():
            raise ValueError(
                f"A checkpoint directory holds a {CONFIG_FILE}; {self.directory} does not. Download or copy the whole "
                "checkpoint."
            )
        config = read_json_object(path)
        quantization = config.get("quantization_config")
        if not isinstance(quantization or {}, dict) or not isinstance((quantization or {}).get("ignore") or [], list):
            raise ValueError(
                f"{path} must hold an object as `quantization_config`, with a list as `ignore`; it does not. Take it "
                "from the checkpoint's source again."
            )
        return config

    def get_tensor(self, name: str) -> torch.Tensor:
        """Read one tensor into CPU memory.

        Raises:
            ValueError: the file that should hold it does not, or cannot be read.
        """
        try:
            return self._file(name).get_tensor(self.name_in_file(name))
        except Exception as error:  # safetensors raises a type of its own
            path = self.directory / self.file_of[name]
            raise ValueError(_DAMAGED.format(path=path, name=name, error=error)) from error

    def layout(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(safetensors dtype name, shape) of a tensor, without reading it."""
        try:
            view = self._file(name).get_slice(self.name_in_file(name))
        except Exception as error:
            path = self.directory / self.file_of[name]
            raise ValueError(_DAMAGED.format(path=path, name=name, error=error)) from error
        return view.get_dtype(), tuple(view.get_shape())

    def metadata(self, name: str) -> dict[str, str]:
        """Metadata of the file that a tensor is in."""
        return self._file(name).metadata() or {}

    def name_in_file(self, name: str) -> str:
        """The name under which the file holds a tensor: its own, but for another dialect's."""
        return name

    def _file(self, name: str) -> Any:
        file = self.file_of[name]
        if file not in self._open:
            self._open[file] = safe_open(self.directory / file, framework="pt")
        return self._open[file]


def resolve_checkpoint(
    path: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """A local checkpoint directory: `path` itself, or the Hub repository of that id, downloaded to the cache.

    Raises:
        ValueError: `path` is neither a directory nor a repository that can be downloaded.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", INDEX_FILE, CONFIG_FILE, HF_QUANT_CONFIG, *BESIDE_WEIGHTS]
        return Path(snapshot_download(str(path), revision=revision, token=token, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"A checkpoint is a local directory or a Hub repository id; {str(path)!r} is neither ({reason})."
        ) from error
