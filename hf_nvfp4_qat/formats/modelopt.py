"""ModelOpt's dialect of the same numbers, for TensorRT-LLM and SGLang: other names, other directions.

    here (compressed-tensors)                       there
    -------------------------                       ------------------------------------------------------
    x.weight_packed         uint8   [N, K / 2]      x.weight          the same bytes
    x.weight_scale          e4m3    [N, K / 16]     x.weight_scale    the same bytes
    x.weight_global_scale   float32 [1]             x.weight_scale_2  its reciprocal, float32 []
    x.input_global_scale    float32 [1]             x.input_scale     its reciprocal, float32 []
    config.json                                     config.json with other keys, and hf_quant_config.json

A power of two survives two reciprocals. Other tools' scales may lose their last bit, so one that does is kept beside
its reciprocal in the metadata of the safetensors file, and comes back exact.

``ModelOptReader`` shows such a checkpoint under the names here, so whatever reads one dialect reads both.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_nvfp4_qat.formats.files import CONFIG_FILE, HF_QUANT_CONFIG, CheckpointReader, read_json_object
from hf_nvfp4_qat.formats.names import (
    BLOCK_SCALE,
    GLOBAL_ENCODE_SCALE,
    INPUT_GLOBAL_SCALE,
    OF_AN_EXPERT,
    PACKED,
    layer_of,
    quantization_config,
    scale_rule_of,
)
from hf_nvfp4_qat.numerics.format import BLOCK_SIZE
from hf_nvfp4_qat.selection.fused_groups import fused_group_key
from hf_nvfp4_qat.selection.layer_names import EMBEDDINGS
from hf_nvfp4_qat.selection.patterns import excluded_in_modelopt, names_matching
from hf_nvfp4_qat.version import __version__

QUANT_METHOD = "modelopt"
_QUANT_METHODS = ("modelopt", "modelopt_fp4")
_ALGORITHMS = {"W4A16_NVFP4": False, "NVFP4": True}
"""Name to whether inputs are quantized."""

_MAX_COMPARISONS = 3 * 10**7
"""Of excluded modules with names: more would take minutes."""
_AGAIN = "Take config.json from the checkpoint's source again."
_EXACT = "nvfp4_exact_scales"
_RECIPROCALS = {GLOBAL_ENCODE_SCALE: "weight_scale_2", INPUT_GLOBAL_SCALE: "input_scale"}
_NAMES = {PACKED: "weight", BLOCK_SCALE: BLOCK_SCALE, **_RECIPROCALS}


def to_modelopt(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors of a packed file in ModelOpt's dialect.

    Args:
        tensors: by their names here; those of a layer need not be together.
        metadata: of the safetensors file they come from.

    Returns:
        The tensors by ModelOpt's names, and the metadata of the file to write.
    """
    known = _exact_scales(metadata)
    found: dict[str, torch.Tensor] = {}
    exact: dict[str, str] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        there = f"{layer}.{_NAMES[part]}" if part in _NAMES else name
        if part in _RECIPROCALS:
            tensor, lost = _turned_around(tensor, known.get(name))
            exact.update({there: lost} if lost else {})
        found[there] = tensor
    return found, _with_exact_scales(metadata, exact)


def from_modelopt(reader: "ModelOptReader", names: Sequence[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The way back.

    Args:
        reader: of the checkpoint.
        names: names here, of tensors of one file.

    Returns:
        The tensors by their names here, and the metadata of the file to write.
    """
    found = {name: reader.turned_around(name) for name in names}
    exact = {name: lost for name, (_, lost) in found.items() if lost}
    tensors = {name: tensor for name, (tensor, _) in found.items()}
    return tensors, _with_exact_scales(reader.metadata(names[0]), exact)


def legacy_settings(quantization: dict[str, Any]) -> dict[str, Any]:
    """What hf_quant_config.json has to say for a `quantization_config` in ModelOpt's dialect."""
    weights = [group.get("weights") or {} for group in (quantization.get("config_groups") or {}).values()]
    sizes = [{"group_size": of_group["group_size"]} for of_group in weights if "group_size" in of_group]
    excluded = quantization.get("ignore") or []
    return {"quant_algo": quantization.get("quant_algo"), "exclude_modules": excluded, **(sizes or [{}])[0]}


def modelopt_config_files(config: Mapping[str, Any], *, unpacked: list[str]) -> dict[str, dict[str, Any]]:
    """Both configuration files of the same checkpoint in ModelOpt's dialect: name to content.

    Args:
        config: the config.json of a packed checkpoint here.
        unpacked: checkpoint names of the layers with a matrix that is not packed; patterns in `ignore` stand for these.

    Raises:
        ValueError: several groups, transforms, or a cache that is quantized to something other than FP8.
    """
    ours = config["quantization_config"]
    groups = ours.get("config_groups") or {}
    if len(groups) != 1 or ours.get("transform_config"):
        raise ValueError(
            f"ModelOpt's dialect is written for one NVFP4 recipe; this checkpoint has {len(groups)} config groups"
            f"{' and transforms' if ours.get('transform_config') else ''}. It can only stay as it is."
        )
    group = next(iter(groups.values()))
    cache = ours.get("kv_cache_scheme")
    if cache and (cache.get("num_bits"), cache.get("type")) != (8, "float"):
        raise ValueError(
            f"ModelOpt's dialect is written with an FP8 cache or none; kv_cache_scheme is {cache}. It can only stay "
            "as it is."
        )
    numbers = {"num_bits": 4, "type": "float", "group_size": BLOCK_SIZE, "dynamic": False}
    ignore = ours.get("ignore") or []
    observer = {name: group["weights"][name] for name in ("observer_kwargs",) if group["weights"].get(name)}
    inputs = {"input_activations": numbers} if group.get("input_activations") else {}
    named = names_matching(unpacked, ignore)
    named |= {f"mixer.{match[1]}" for entry in ignore if (match := _MIXER_IN_VLLM.fullmatch(entry))}
    quantization = {
        "quant_method": QUANT_METHOD,
        "quant_algo": "NVFP4" if inputs else "W4A16_NVFP4",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**numbers, **observer}, **inputs}},
        "ignore": _spelled_out(ignore, named),
        "producer": {"name": "hf_nvfp4_qat", "version": __version__},
        **({"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}} if cache else {}),
    }
    details = {**legacy_settings(quantization), "kv_cache_quant_algo": "FP8" if cache else None}
    legacy = {"producer": quantization["producer"], "quantization": details}
    return {HF_QUANT_CONFIG: legacy, CONFIG_FILE: {**config, "quantization_config": quantization}}


class ModelOptReader(CheckpointReader):
    """A checkpoint in ModelOpt's dialect, under the names and in the directions of compressed-tensors.

    Attributes:
        stored_name: name here to the name in the file.

    Raises:
        ValueError: as ``CheckpointReader``.
    """

    dialect = QUANT_METHOD

    def __init__(self, directory: str | os.PathLike, file_of: dict[str, str] | None = None) -> None:
        super().__init__(directory, file_of)
        layers = {name.rpartition(".")[0] for name in self.file_of if name.endswith(".weight_scale_2")}
        here = {there: part for part, there in _NAMES.items()}
        self._exact: dict[str, dict[str, str]] = {}
        self.stored_name: dict[str, str] = {}
        for name in self.file_of:
            layer, _, part = name.rpartition(".")
            self.stored_name[f"{layer}.{here[part]}" if layer in layers and part in here else name] = name
        self.file_of = {name: self.file_of[stored] for name, stored in self.stored_name.items()}

    def config(self) -> dict[str, Any]:
        """config.json with the `quantization_config` that compressed-tensors would have.

        Raises:
            ValueError: as ``CheckpointReader``; another algorithm than NVFP4, weight-only or with NVFP4 inputs.
        """
        config = super().config()
        stored = _stored_config(config, self)
        algorithm = str(stored["quant_algo"]).upper()
        if algorithm not in _ALGORITHMS or stored.get("group_size", BLOCK_SIZE) != BLOCK_SIZE:
            raise ValueError(
                f"Of ModelOpt's checkpoints those with {' or '.join(_ALGORITHMS)} in blocks of {BLOCK_SIZE} can be "
                f"read; {self.directory} has {algorithm}, group_size {stored.get('group_size', BLOCK_SIZE)}."
            )
        groups = (stored.get("config_groups") or {}).values()
        for weights in (group.get("weights") or {} for group in groups):
            if (weights.get("num_bits", 4), weights.get("group_size", BLOCK_SIZE)) != (4, BLOCK_SIZE):
                raise ValueError(
                    f"{algorithm} has 4 bits in blocks of {BLOCK_SIZE}; a group in the config of {self.directory} has "
                    f"{weights.get('num_bits', 4)} in blocks of {weights.get('group_size', BLOCK_SIZE)}. {_AGAIN}"
                )
        if len(stored["ignore"]) * len(self.names) > _MAX_COMPARISONS:
            raise ValueError(
                f"Excluded modules are compared with every name; {len(stored['ignore'])} of them with "
                f"{len(self.names)} names would take too long. Name only the modules that there are."
            )
        weights_only = bool(groups) and not any(group.get("input_activations") for group in groups)
        unpacked = unpacked_layers(self)
        excluded = {layer for entry in stored["ignore"] for layer in unpacked if excluded_in_modelopt(entry, layer)}
        config["quantization_config"] = quantization_config(
            [_MIXER.sub(r"re:.*mixer[.]\1$", entry) for entry in _spelled_out(stored["ignore"], excluded)],
            scale_rule=scale_rule_of(stored),
            quantizes_input=_ALGORITHMS[algorithm] and not weights_only,
        )
        if stored["has_fp8_cache"]:
            config["quantization_config"]["kv_cache_scheme"] = {
                "num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True,
            }  # fmt: skip
        return config

    def wrongly_excluding(self, layers: Iterable[str]) -> dict[str, list[str]]:
        """Excluded entries that leave packed ones of `layers` out too, as engines read them, to those layers.

        Engines compare entries with the modules that they build: fused ones, and all experts of a layer as one.

        Raises:
            ValueError: as ``config``.
        """
        layers_of: dict[str, list[str]] = {}
        for layer in layers:
            expert = OF_AN_EXPERT.fullmatch(layer)
            layers_of.setdefault(expert[1] if expert else fused_group_key(layer), []).append(layer)
        found = {
            entry: [layer for name, built in layers_of.items() if excluded_in_modelopt(entry, name) for layer in built]
            for entry in _stored_config(super().config(), self)["ignore"]
        }
        return {entry: excluded for entry, excluded in found.items() if excluded}

    def get_tensor(self, name: str) -> torch.Tensor:  # noqa: D102
        return self.turned_around(name)[0]

    def turned_around(self, name: str) -> tuple[torch.Tensor, str | None]:
        """A tensor, and of a scale whose reciprocal's reciprocal is another, the stored bytes in hexadecimal."""
        stored = super().get_tensor(name)
        if not self.is_reciprocal(name):
            return stored, None
        file = self.file_of[name]
        if file not in self._exact:
            self._exact[file] = _exact_scales(self.metadata(name))
        found, lost = _turned_around(stored, self._exact[file].get(self.stored_name[name]))
        return found.reshape(1), lost

    def layout(self, name: str) -> tuple[str, tuple[int, ...]]:  # noqa: D102
        dtype, shape = super().layout(name)
        return ("F32", (1,)) if self.is_reciprocal(name) and shape in ((), (1,)) else (dtype, shape)

    def name_in_file(self, name: str) -> str:  # noqa: D102
        return self.stored_name[name]

    def is_reciprocal(self, name: str) -> bool:
        """Whether the file holds the reciprocal of a tensor."""
        return name.rpartition(".")[2] in _RECIPROCALS and self.stored_name[name] != name


def open_checkpoint(directory: str | os.PathLike) -> CheckpointReader:
    """A reader for a checkpoint in either dialect, or unquantized.

    Raises:
        ValueError: as ``CheckpointReader``.
    """
    reader = CheckpointReader(directory)
    try:
        config = reader.config()
    except ValueError:
        return reader  # who needs a config.json will say so
    says_modelopt = is_modelopt(reader.directory, config)
    if problem := dialect_conflict(config, reader.names, says_modelopt=says_modelopt):
        raise ValueError(f"config.json and the tensors must be of one dialect; in {directory} {problem}. {_AGAIN}")
    return ModelOptReader(directory) if says_modelopt else reader


def dialect_conflict(config: Mapping[str, Any], names: Iterable[str], *, says_modelopt: bool) -> str:
    """Where config.json names the one dialect and the tensors are in the other: what is so; else empty.

    Args:
        config: config.json.
        names: of the tensors as they are stored.
        says_modelopt: as ``is_modelopt`` has it.
    """
    names = set(names)
    is_there, is_here = has_modelopt_names(names), any(name.endswith(f".{PACKED}") for name in names)
    if says_modelopt and is_here and not is_there:
        return "config.json says ModelOpt's, and the tensors are named as compressed-tensors names them"
    if config.get("quantization_config") and not says_modelopt and is_there and not is_here:
        return "the tensors are named as ModelOpt names them, and config.json says compressed-tensors"
    return ""


def is_modelopt(directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this config.json is in ModelOpt's dialect."""
    quantization = config.get("quantization_config")
    if not quantization:
        return (directory / HF_QUANT_CONFIG).is_file()
    return isinstance(quantization, dict) and quantization.get("quant_method") in _QUANT_METHODS


def has_modelopt_names(names: Iterable[str]) -> bool:
    """Whether tensors of these names are packed in ModelOpt's dialect, whatever a config says."""
    return any(name.endswith(f".{_RECIPROCALS[GLOBAL_ENCODE_SCALE]}") for name in names)


def unpacked_layers(reader: CheckpointReader) -> list[str]:
    """Checkpoint names of the layers that have a weight which is not packed."""
    return [layer_of(name) for name in reader.names if name.endswith(".weight")]


def unpacked_matrices(reader: CheckpointReader) -> list[str]:
    """Those of the ``unpacked_layers`` that an engine may build as linear: a matrix each, and no embeddings."""
    return [
        layer
        for layer in unpacked_layers(reader)
        if len(reader.layout(f"{layer}.weight")[1]) == 2 and layer.rpartition(".")[2] not in EMBEDDINGS
    ]


def _stored_config(config: Mapping[str, Any], reader: CheckpointReader) -> dict[str, Any]:
    """`quant_algo`, `ignore`, `has_fp8_cache` and the like of either of ModelOpt's two places."""
    stored = config.get("quantization_config")
    if stored and "quantization" not in stored:
        cache = stored.get("kv_cache_scheme")
        is_fp8 = cache == "FP8" or (isinstance(cache, dict) and cache.get("num_bits") == 8)
        found = {**stored, "ignore": list(stored.get("ignore") or [])}
    else:
        if not stored:
            stored = read_json_object(reader.directory / HF_QUANT_CONFIG)
        details = stored.get("quantization") or {}
        cache = details.get("kv_cache_quant_algo")
        is_fp8 = cache == "FP8"
        found = {**details, "ignore": list(details.get("exclude_modules") or [])}
    if not found.get("quant_algo"):
        raise ValueError(
            f"A checkpoint of ModelOpt says how it is quantized; {reader.directory} names no `quant_algo` in "
            f"{CONFIG_FILE} or {HF_QUANT_CONFIG}. Download or copy it again."
        )
    if cache and not is_fp8:
        raise ValueError(
            f"Of quantized caches only FP8 can be carried over; {reader.directory} has {cache}. Serve it as it is."
        )
    return {**found, "has_fp8_cache": is_fp8}


_MIXER = re.compile(r"^mixer\.(\w+)$")
_MIXER_IN_VLLM = re.compile(r"re:\.\*mixer\[\.\](\w+)\$")
"""An entry of ``ignored_in_vllm``; `_MIXER` says the same where a part of a name is enough."""


def _spelled_out(entries: list[str], named: set[str]) -> list[str]:
    """The plain names among `entries`, and the layers that all of them stand for: the dialects' patterns differ."""
    return sorted({entry for entry in entries if "*" not in entry and not entry.startswith("re:")} | named)


def shift_exact_scales(metadata: Mapping[str, str], exponents: Mapping[str, int]) -> dict[str, str]:
    """Metadata of a file some of whose global scales are multiplied by powers of two, of either dialect.

    Args:
        metadata: of the file as it was.
        exponents: stored name to the exponent by which that scale grows; its reciprocal shrinks as much.
    """
    exact = _exact_scales(metadata)
    for name in exact.keys() & exponents.keys():
        exact[name] = _bytes_of(torch.ldexp(_of_bytes(exact[name]), torch.tensor(-exponents[name])))
    return _with_exact_scales(metadata, exact)


def _turned_around(scale: torch.Tensor, exact: str | None) -> tuple[torch.Tensor, str | None]:
    """The reciprocal, float32 ``[]``, or the `exact` one if known; and the scale's bytes if they are lost by it.

    Raises:
        ValueError: the `exact` one is not the reciprocal but for its last bits.
    """
    scale = scale.float().reshape(())
    found = 1.0 / scale
    if exact is not None:
        found, rounded = _of_bytes(exact), found
        if not torch.isclose(found, rounded, rtol=1e-6, atol=0):
            raise ValueError(
                f"The metadata `{_EXACT}` holds a scale's lost bits, not another scale; it says {found.item()} where "
                f"the file says {rounded.item()}. Take the file from its source again."
            )
    return found, None if torch.equal(1.0 / found, scale) else _bytes_of(scale)


def _bytes_of(scale: torch.Tensor) -> str:
    return scale.numpy().tobytes().hex()


def _of_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.float32)[0]


def _exact_scales(metadata: Mapping[str, str]) -> dict[str, str]:
    """Stored name to the bytes of its scale's exact reciprocal, in hexadecimal.

    Raises:
        ValueError: the metadata is damaged.
    """
    try:
        exact = json.loads(metadata.get(_EXACT, "{}"))
        is_good = isinstance(exact, dict) and all(len(bytes.fromhex(value)) == 4 for value in exact.values())
    except (ValueError, TypeError, RecursionError):
        is_good = False
    if not is_good:
        raise ValueError(f"The metadata `{_EXACT}` of a file is damaged. Take the file from its source again.")
    return exact


def _with_exact_scales(metadata: Mapping[str, str], exact: Mapping[str, str]) -> dict[str, str]:
    kept = {key: value for key, value in metadata.items() if key != _EXACT}
    return {**kept, **({_EXACT: json.dumps(exact, sort_keys=True)} if exact else {})}
