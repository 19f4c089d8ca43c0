"""Writing a packed checkpoint: which weights go into which file, its config.json, and the files themselves."""

import copy
import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from hf_nvfp4_qat.checkpoint.skeleton import tied_copies
from hf_nvfp4_qat.checkpoint.sources import LinearSource, Source
from hf_nvfp4_qat.checkpoint.stream import (
    ignored_layers,
    is_tied,
    packed_sources,
    wrong_tied_settings,
)
from hf_nvfp4_qat.distributed.gather import on_main_process, reshard
from hf_nvfp4_qat.formats.files import CONFIG_FILE, INDEX_FILE, StagedFiles, staged_files
from hf_nvfp4_qat.formats.modelopt import modelopt_config_files, to_modelopt
from hf_nvfp4_qat.formats.names import SERVED_DTYPE, layer_of, quantization_config
from hf_nvfp4_qat.modules.swap import qat_weights
from hf_nvfp4_qat.sharding.parts import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAVE_FORMATS = ("auto", "master", "nvfp4")
DIALECTS = ("compressed-tensors", "modelopt")
DEFAULT_SHARD_SIZE = "5GB"


def save_nvfp4(
    model: "PreTrainedModel",
    path: str | os.PathLike,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    dialect: str = "compressed-tensors",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    progress: Callable[[int, int], None] = lambda num_done, total: None,
) -> list[str]:
    """Write the packed NVFP4 checkpoint of a QAT model: compressed-tensors `nvfp4-pack-quantized`, or ModelOpt's.

    vLLM, SGLang and plain Transformers (with compressed-tensors) load the first without this package; vLLM,
    TensorRT-LLM and SGLang before 0.5.22 the second. What is not quantized is written in bfloat16. Weights are
    packed one at a time; the extra memory is one shard. All files appear together when complete.

    Under DDP every process has the whole model: call this in one of them. Of a model sharded by FSDP2 every process
    must call this, unless a full `state_dict` is given: each packs its rows, packed bytes are gathered, and the first
    process writes. If it fails, all raise.

    Args:
        model: a QAT model.
        path: directory, made if missing.
        state_dict: full master weights by module name, if they are not to be taken from the model.
        dialect: "compressed-tensors" or "modelopt".
        max_shard_size: bytes, or a string such as "5GB".
        progress: called after each weight with (weights done, weights in all).

    Returns:
        Names of the files written by this process.

    Raises:
        ValueError: an unknown `dialect`, `model` has no QAT layer, weights cannot be packed or are missing, `path` is
            a file. Nothing is written then.
    """
    check_dialect(dialect)
    if not qat_weights(model):
        raise ValueError(
            f"save_nvfp4 writes models trained in NVFP4; {type(model).__name__} has no QAT layers. Load it with "
            "`quantization_config=NVFP4QATConfig()`, or call `prepare_qat` first."
        )
    sources = packed_sources(model, state_dict=state_dict)
    configs = {CONFIG_FILE: packed_config(model.config, model=model, sources=sources)}
    if dialect == "modelopt":
        unpacked = [layer_of(source.name) for source in sources if not source.is_quantized]
        configs = modelopt_config_files(configs[CONFIG_FILE], unpacked=unpacked)
    files = plan_files(sources, max_shard_size=max_shard_size)

    def write(weights: Iterator[dict[str, torch.Tensor]]) -> list[str]:
        with staged_files(path) as staged:
            write_weights(files, weights, staged, dialect=dialect, progress=progress)
            next(weights, None)  # the end, which raises if another process failed
            for name, content in configs.items():
                staged.write_json(name, content)
            if model.can_generate():
                staged.write_json("generation_config.json", model.generation_config.to_diff_dict())
        return staged.names + _save_remote_code(model, path)

    weights = packed_weights(files)
    if any(source.is_sharded for source in sources):
        return on_main_process(write, weights)
    return write(weights)


def check_dialect(dialect: str) -> None:
    """Refuse an unknown one.

    Raises:
        ValueError: not among `DIALECTS`.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"`dialect` is one of {', '.join(DIALECTS)}; got {dialect!r}.")


def packed_config(config: Any, *, model: "PreTrainedModel", sources: list[Source]) -> dict[str, Any]:
    """The config.json of a packed checkpoint.

    Args:
        config: the model's ``PretrainedConfig``; not changed.
        model: gives the architecture's name.
        sources: the weights of the checkpoint.
    """
    config = copy.deepcopy(config)
    tied = False if is_tied(model) and _has_another_head(model, sources) else is_tied(model)
    for name, value in wrong_tied_settings(config, tied).items():
        part = getattr(config, name) if isinstance(value, dict) else config
        part.tie_word_embeddings = tied
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = str(SERVED_DTYPE).removeprefix("torch.")
    quantized = next((source for source in sources if isinstance(source, LinearSource)), None)
    config.quantization_config = quantization_config(
        ignored_layers(model, sources),
        scale_rule=quantized.scale_rule if quantized else "amax",
        quantizes_input=quantized is not None and quantized.input_amax is not None,
    )
    return config.to_diff_dict()


def _has_another_head(model: "PreTrainedModel", sources: list[Source]) -> bool:
    """Whether a checkpoint whose config says that the head is the embedding holds another matrix as head."""
    by_name = {source.name: source for source in sources if not source.is_quantized}
    if all(source.module_name for source in by_name.values()):
        return False  # every tensor is one of the model, which has one for both
    copies = tied_copies(model, by_name).items()
    return any(not torch.equal(by_name[name].master(), by_name[other].master()) for name, other in copies)


def plan_files(sources: list[Source], *, max_shard_size: int | str) -> dict[str, list[Source]]:
    """Which weights go into which file, in the order in which they are written.

    Args:
        sources: what to write.
        max_shard_size: bytes, or a string such as "5GB".
    """
    by_name = {source.name: source for source in sources}
    # The planner looks at sizes only, and a weight's three tensors stay together: plan with one blob a weight.
    blobs = {source.name: torch.empty(source.nbytes, dtype=torch.uint8, device="meta") for source in sources}
    plan = split_torch_state_dict_into_shards(
        blobs, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    return {file: [by_name[name] for name in names] for file, names in plan.filename_to_tensors.items()}


def packed_weights(files: dict[str, list[Source]]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of each weight, packed when asked for, in the order of the plan; after an error it goes on."""
    return map(lambda source: source.tensors(), chain.from_iterable(files.values()))


def write_weights(
    files: dict[str, list[Source]],
    weights: Iterator[dict[str, torch.Tensor]],
    staged: StagedFiles,
    *,
    dialect: str = "compressed-tensors",
    progress: Callable[[int, int], None] = lambda num_done, total: None,
) -> None:
    """Write model.safetensors, or shards with an index. One shard is in memory at a time.

    Args:
        files: what ``plan_files`` gives.
        weights: what ``packed_weights`` gives for it.
        staged: where to.
        dialect: of `DIALECTS`.
        progress: called after each weight with (weights done, weights in all).
    """
    sources = [source for contents in files.values() for source in contents]
    weight_map: dict[str, str] = {}
    num_done = 0
    for file, contents in files.items():
        shard: dict[str, torch.Tensor] = {}
        for _ in contents:
            shard.update({key: tensor.cpu() for key, tensor in next(weights).items()})
            num_done += 1
            progress(num_done, len(sources))
        metadata = {"format": "pt"}
        if dialect == "modelopt":
            shard, metadata = to_modelopt(shard, metadata)
        save_file(shard, staged.path(file), metadata=metadata)
        weight_map.update(dict.fromkeys(shard, file))
    if len(files) > 1:
        sizes = {
            "total_size": sum(source.nbytes for source in sources),
            "total_parameters": sum(torch.Size(source.shape).numel() for source in sources),
        }
        staged.write_json(INDEX_FILE, {"metadata": sizes, "weight_map": weight_map})


def is_sharded_model(model: "PreTrainedModel") -> bool:
    """Whether it takes every process to save a QAT model, since each has a part of its weights only."""
    reshard(model)
    return any(is_sharded(weight.master) for weight in qat_weights(model).values())


def _save_remote_code(model: "PreTrainedModel", path: str | os.PathLike) -> list[str]:
    if not model.is_remote_code():
        return []
    from transformers.dynamic_module_utils import custom_object_save

    return [Path(file).name for file in custom_object_save(model, path, config=model.config) or ()]
