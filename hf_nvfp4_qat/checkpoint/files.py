"""Safetensors files on disk: written under temporary names and renamed when all are complete; read lazily."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
HF_QUANT_CONFIG = "hf_quant_config.json"
"""Which ModelOpt's checkpoints have beside config.json."""
PARTIAL_SUFFIX = ".nvfp4-partial"


class StagedFiles:
    """Files of one checkpoint directory, written as ``NAME.nvfp4-partial`` until ``staged_files`` ends well."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names: list[str] = []

    def path(self, name: str) -> Path:
        """Where to write the file that will be `name`."""
        self.names.append(name)
        return self.directory / f"{name}{PARTIAL_SUFFIX}"

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write `content` as the JSON file `name`."""
        self.path(name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def staged_files(directory: str | os.PathLike) -> Iterator[StagedFiles]:
    """All files of a checkpoint appear together, config.json last, or none does.

    A killed process leaves ``*.nvfp4-partial`` files, which nothing loads and the next save into the directory removes;
    an exception leaves nothing. An older checkpoint in the directory stays whole until the new one is; between the two,
    for as long as renaming takes, there is no config.json and nothing loads.

    Raises:
        ValueError: `directory` is a file.
    """
    directory = Path(directory)
    if directory.is_file():
        raise ValueError(f"A checkpoint is saved into a directory; {directory} is a file. Choose another path.")
    directory.mkdir(parents=True, exist_ok=True)
    for left_over in directory.glob(f"*{PARTIAL_SUFFIX}"):
        left_over.unlink()
    staged = StagedFiles(directory)
    try:
        yield staged
        # From here to the end nothing loads: without a config.json the directory is no checkpoint.
        if CONFIG_FILE in staged.names:
            (directory / CONFIG_FILE).unlink(missing_ok=True)
        if any(_WEIGHTS_FILE.fullmatch(name) for name in staged.names):
            for older in (*weight_files(directory), directory / HF_QUANT_CONFIG):
                if older.name not in staged.names:
                    older.unlink(missing_ok=True)
        for name in sorted(dict.fromkeys(staged.names), key=lambda name: name == CONFIG_FILE):
            os.replace(directory / f"{name}{PARTIAL_SUFFIX}", directory / name)
    finally:
        for name in staged.names:
            (directory / f"{name}{PARTIAL_SUFFIX}").unlink(missing_ok=True)


_WEIGHTS_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(INDEX_FILE))


def weight_files(directory: str | os.PathLike) -> dict[Path, tuple[int, int]]:
    """model.safetensors, its shards and its index in a directory, each with (inode, modification time in ns).

    Of two saves in one directory a loader may take the older: model.safetensors comes before an index.
    """
    directory = Path(directory)
    paths = [path for path in directory.iterdir() if _WEIGHTS_FILE.fullmatch(path.name)] if directory.is_dir() else []
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def _tensor_names(path: Path) -> list[str]:
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

    Raises:
        ValueError: no safetensors weights there, or a shard named by the index is missing.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory)
        index = self.directory / INDEX_FILE
        single = self.directory / "model.safetensors"
        # model.safetensors first, as Transformers does.
        if single.is_file():
            self.file_of = dict.fromkeys(_tensor_names(single), single.name)
        elif index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            if outside := [file for file in weight_map.values() if Path(file).name != file]:
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
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(
                f"A checkpoint directory holds a {CONFIG_FILE}; {self.directory} does not. Download or copy the whole "
                "checkpoint."
            ) from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}. Download or copy it again.") from None
        if not isinstance(config, dict):
            raise ValueError(
                f"{path} must hold a JSON object; it holds a {type(config).__name__}. Download or copy it again."
            )
        return config

    def get_tensor(self, name: str) -> torch.Tensor:
        """Read one tensor into CPU memory.

        Raises:
            ValueError: the file that should hold it does not, or cannot be read.
        """
        try:
            return self._file(name).get_tensor(self._name_in_file(name))
        except Exception as error:  # safetensors raises a type of its own
            path = self.directory / self.file_of[name]
            raise ValueError(_DAMAGED.format(path=path, name=name, error=error)) from error

    def layout(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(safetensors dtype name, shape) of a tensor, without reading it."""
        try:
            view = self._file(name).get_slice(self._name_in_file(name))
        except Exception as error:
            path = self.directory / self.file_of[name]
            raise ValueError(_DAMAGED.format(path=path, name=name, error=error)) from error
        return view.get_dtype(), tuple(view.get_shape())

    def metadata(self, name: str) -> dict[str, str]:
        """Metadata of the file that a tensor is in."""
        return self._file(name).metadata() or {}

    def _name_in_file(self, name: str) -> str:
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
        patterns = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "*.py"]
        return Path(snapshot_download(str(path), revision=revision, token=token, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"A checkpoint is a local directory or a Hub repository id; {str(path)!r} is neither ({reason})."
        ) from error
