"""Checkpoint to checkpoint, without a model in memory: post-training quantization, and back.

Weights stream from file to file. Quantizing needs each fused group's largest magnitude first, so it reads the weights
twice: once for the global scales, once to pack.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hf_nvfp4_qat.checkpoint.load import (
    check_holds_no_codes,
    check_nothing_missing,
    check_packed,
    check_unquantized,
)
from hf_nvfp4_qat.checkpoint.save import (
    DEFAULT_SHARD_SIZE,
    check_dialect,
    packed_config,
    packed_weights,
    plan_files,
    write_weights,
)
from hf_nvfp4_qat.checkpoint.skeleton import checkpoint_names, missing_tensors, skeleton
from hf_nvfp4_qat.checkpoint.sources import LinearSource, PlainSource, Source
from hf_nvfp4_qat.checkpoint.stream import served_dtype, shared_scales
from hf_nvfp4_qat.formats.files import (
    CARD_FILE,
    CONFIG_FILE,
    DTYPES,
    HF_QUANT_CONFIG,
    INDEX_FILE,
    CheckpointReader,
    StagedFiles,
    files_beside_weights,
    printable,
    resolve_checkpoint,
    staged_files,
)
from hf_nvfp4_qat.formats.modelopt import (
    ModelOptReader,
    from_modelopt,
    modelopt_config_files,
    open_checkpoint,
    to_modelopt,
    unpacked_layers,
    unpacked_matrices,
)
from hf_nvfp4_qat.formats.names import (
    PACKED,
    SERVED_DTYPE,
    from_checkpoint,
    layer_of,
    packed_tensors,
    quantized_layers,
)
from hf_nvfp4_qat.modules.recipe import Recipe
from hf_nvfp4_qat.modules.swap import qat_weights, swap_linears

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called as (what is being done, weights done, weights in all)."""


def ptq_sources(
    directory: Path, recipe: Recipe, *, progress: Progress, trust_remote_code: bool = False
) -> tuple[list[Source], PreTrainedModel, CheckpointReader]:
    """What post-training quantization makes of an unquantized checkpoint: sources, skeleton and reader.

    Raises:
        ValueError: inputs are to be quantized too; the checkpoint is quantized already, cannot be read, holds codes, or
            lacks a weight to be quantized.
    """
    if recipe.activations != "bf16":
        raise ValueError(
            "The largest inputs of a model (`activations='nvfp4'`, W4A4) are known only when it runs, and this reads "
            "weights alone. Load it with `from_pretrained(..., quantization_config=...)`, call "
            "`calibrate_activations(model, batches)` and save it, or use `distill`."
        )
    check_unquantized(directory)
    reader = open_checkpoint(directory)
    check_holds_no_codes(reader)
    model = skeleton(directory, trust_remote_code=trust_remote_code)
    swap_linears(model, recipe, output_embedding=model.get_output_embeddings())
    module_names = checkpoint_names(model, reader.names)
    weights = set(qat_weights(model))
    selected = {name for name, module_name in module_names.items() if module_name in weights}
    found = {layer_of(name): partial(reader.get_tensor, name) for name in reader.names if name in selected}
    scales = shared_scales(found, progress=lambda num_done: progress("reading scales", num_done, len(found)))
    # Where linears have 16 bits, what has 32 was given them on purpose; matrices are most of the bytes, and stay out.
    is_mixed = all(reader.layout(name)[0] != "F32" for name in selected & set(reader.names))
    sources: list[Source] = []
    for name in reader.names:
        shape, read = reader.layout(name)[1], partial(reader.get_tensor, name)
        if name in selected:
            scale = partial(scales.__getitem__, layer_of(name))
            sources.append(LinearSource(name, shape, module_names.get(name), read, scale, recipe.scale_rule))
        else:
            is_matrix = len(shape) == 2 or (len(shape) == 3 and "experts" in name)
            dtype = served_dtype(model, name, _dtype(reader, name), keeps_float32=is_mixed and not is_matrix)
            sources.append(PlainSource(name, shape, module_names.get(name), read, dtype))
    if len(found) != len(selected):
        raise ValueError(
            f"All {len(selected)} weights to quantize must be in the checkpoint under the names that published "
            f"{type(model).__name__} checkpoints have; {directory} has {len(found)} of them. A training checkpoint can "
            "have others: load it with `from_pretrained(..., quantization_config=NVFP4QATConfig())` and save it."
        )
    return sources, model, reader


def quantize_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    recipe: Recipe | None = None,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    trust_remote_code: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> int:
    """Post-training quantization of a safetensors checkpoint, streaming: no model in memory, one shard at a time.

    Args:
        source: directory or Hub id of an unquantized checkpoint of a Transformers architecture.
        destination: directory to write, complete or not at all.
        recipe: what to quantize, and how; the defaults if None.
        max_shard_size: bytes, or a string such as "5GB".
        trust_remote_code: run the model's code that lies beside the weights, if config.json names some.
        progress: called after each weight.

    Returns:
        The number of packed layers.

    Raises:
        ValueError: bad input; nothing is written then.
    """
    sources, model, reader = ptq_sources(
        resolve_checkpoint(source), recipe or Recipe(), progress=progress, trust_remote_code=trust_remote_code
    )
    check_nothing_missing(reader.directory, type(model), missing_tensors(model, reader.names))
    files = plan_files(sources, max_shard_size=max_shard_size)
    with staged_files(destination) as staged:
        write_weights(files, packed_weights(files), staged, progress=partial(progress, "packing"))
        _copy_other_files(reader, staged)
        staged.write_json(CONFIG_FILE, packed_config(model.config, model=model, sources=sources))
    return sum(source.is_quantized for source in sources)


def dequantize_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    progress: Progress = lambda stage, done, total: None,
) -> int:
    """Write a packed NVFP4 checkpoint as an ordinary bfloat16 one, streaming; the values are those that are served.

    Args, Raises: as ``quantize_checkpoint``; activation scales of a W4A4 checkpoint are left out.

    Returns:
        The number of decoded layers.
    """
    reader = open_checkpoint(resolve_checkpoint(source))
    check_packed(reader)
    model = None
    with suppress(ValueError):  # of an architecture that is not known here, nobody can say what is missing
        model = skeleton(reader.directory)
    if model is not None:
        check_nothing_missing(reader.directory, type(model), missing_tensors(model, reader.names))
    layers = quantized_layers(reader.names)
    replaced = packed_tensors(layers)
    sources: list[Source] = [
        PlainSource(name, reader.layout(name)[1], None, partial(reader.get_tensor, name), _dtype(reader, name))
        for name in reader.names
        if name not in replaced
    ]
    for layer in layers:
        rows, half_columns = reader.layout(f"{layer}.{PACKED}")[1]
        read = partial(_decode, layer, reader)
        sources.append(PlainSource(f"{layer}.weight", (rows, 2 * half_columns), None, read, SERVED_DTYPE))
    config = {key: value for key, value in reader.config().items() if key != "quantization_config"}
    files = plan_files(sources, max_shard_size=max_shard_size)
    with staged_files(destination) as staged:
        write_weights(files, packed_weights(files), staged, progress=partial(progress, "decoding"))
        _copy_other_files(reader, staged)
        staged.write_json(CONFIG_FILE, config)
    return len(layers)


def convert_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    dialect: str,
    *,
    progress: Progress = lambda stage, done, total: None,
) -> int:
    """Write a packed NVFP4 checkpoint in the other dialect: the same codes, scales and files under other names.

    There and back gives the same tensors, byte for byte. One file is in memory at a time.

    Args:
        source: directory or Hub id, in either dialect.
        destination: directory to write, complete or not at all.
        dialect: "modelopt" or "compressed-tensors".
        progress: called after each file.

    Returns:
        The number of packed layers.

    Raises:
        ValueError: the checkpoint is in that dialect already, or has what it cannot say; nothing is written then.
    """
    check_dialect(dialect)
    reader = open_checkpoint(resolve_checkpoint(source))
    check_packed(reader)
    if reader.dialect == dialect:
        raise ValueError(
            f"A checkpoint is converted to the other dialect; {reader.directory} is in that of {dialect} already. "
            "Use it as it is, or choose the other one."
        )
    configs = {CONFIG_FILE: reader.config()}
    if dialect == "modelopt":
        quantization = configs[CONFIG_FILE]["quantization_config"]
        if not any("Linear" in (group.get("targets") or []) for group in quantization["config_groups"].values()):
            # There every matrix is taken for packed that is not excluded; here those that `targets` leave out are not.
            quantization["ignore"] = sorted({*(quantization.get("ignore") or []), *unpacked_matrices(reader)})
        configs = modelopt_config_files(configs[CONFIG_FILE], unpacked=unpacked_layers(reader))
    by_file: dict[str, list[str]] = {}
    for name, file in reader.file_of.items():
        by_file.setdefault(file, []).append(name)
    weight_map: dict[str, str] = {}
    with staged_files(destination) as staged:
        for number, (file, names) in enumerate(by_file.items(), start=1):
            if isinstance(reader, ModelOptReader):
                tensors, metadata = from_modelopt(reader, names)
            else:
                read = {name: reader.get_tensor(name) for name in names}
                tensors, metadata = to_modelopt(read, reader.metadata(names[0]))
            save_file(tensors, staged.path(file), metadata=metadata)
            weight_map.update(dict.fromkeys(tensors, file))
            progress("converting", number, len(by_file))
        if (reader.directory / INDEX_FILE).is_file():
            index = json.loads((reader.directory / INDEX_FILE).read_text(encoding="utf-8"))
            staged.write_json(INDEX_FILE, {**index, "weight_map": weight_map})
        _copy_other_files(reader, staged, with_card=True)
        for name, content in configs.items():
            staged.write_json(name, content)
    return len(quantized_layers(reader.names))


def _decode(layer: str, reader: CheckpointReader) -> torch.Tensor:
    return from_checkpoint(layer, reader.get_tensor).dequantize(SERVED_DTYPE)


def _dtype(reader: CheckpointReader, name: str) -> torch.dtype:
    stored = reader.layout(name)[0]
    if stored not in DTYPES:
        raise ValueError(
            f"Unquantized tensors are copied in a dtype of torch; {name} is stored as {stored}. Convert it first."
        )
    return DTYPES[stored]


def _copy_other_files(reader: CheckpointReader, staged: StagedFiles, *, with_card: bool = False) -> None:
    """What belongs to a checkpoint beside weights and config.json: tokenizer, chat templates, code, license.

    The card is another model's, but where the weights stay the same. What is left out is logged.
    """
    files, others = files_beside_weights(reader.directory)
    if with_card and CARD_FILE in others:
        others.remove(CARD_FILE)
        files.append(CARD_FILE)
    for name in files:
        path = staged.path(name)
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(reader.directory / name, path)
    written_anew = {CONFIG_FILE, HF_QUANT_CONFIG, INDEX_FILE, *reader.file_of.values()}
    if left_out := [printable(name) for name in others if name not in written_anew]:
        logger.warning(
            "%d files of %s are not copied, since they do not belong to this checkpoint: %s",
            len(left_out),
            reader.directory,
            ", ".join(left_out),
        )
