"""What is checked in every packed checkpoint, by ``verify_nvfp4`` and ``doctor``: configuration, parts, values, names.

Layouts are compared before a tensor is read, so that nothing is read, or computed, whose size is only claimed. All
names are those of compressed-tensors; the reader shows the other dialect under them.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_nvfp4_qat.checkpoint.skeleton import (
    SKIPPED,
    checkpoint_shapes,
    linear_weights,
    missing_tensors,
    tied_copies,
    tied_heads,
)
from hf_nvfp4_qat.doctor.findings import Finding, found
from hf_nvfp4_qat.formats.files import CONFIG_FILE, DTYPES, FLOATING, CheckpointReader
from hf_nvfp4_qat.formats.names import (
    BLOCK_SCALE,
    FORMAT,
    GLOBAL_ENCODE_SCALE,
    INPUT_GLOBAL_SCALE,
    PACKED,
    QUANT_METHOD,
    SERVED_DTYPE,
    activations_of,
    checkpoint_layout,
    from_checkpoint,
    is_nvfp4_config,
    layer_of,
    packed_tensors,
)
from hf_nvfp4_qat.numerics.format import BLOCK_SIZE, E2M1_MAX
from hf_nvfp4_qat.numerics.rescale import ScaleFacts, scale_facts, shared_exponents
from hf_nvfp4_qat.selection.fused_groups import always_fused_key, split_fused_groups
from hf_nvfp4_qat.selection.patterns import names_matching

_STORED_AS = {dtype: name for name, dtype in DTYPES.items()}
_NVFP4_WEIGHTS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": BLOCK_SIZE}
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
_PLAUSIBLE = (1e-10, 1e4)
"""Of the largest magnitude of a weight: beyond it a scale stands where its reciprocal belongs."""


def setting(config: dict[str, Any], *names: str) -> Any:
    """The first of these settings that config.json has, at the top or in the part for the language model."""
    parts = [config, *(config.get(part) for part in TEXT_CONFIGS)]
    values = (part[name] for part in parts if isinstance(part, dict) for name in names if part.get(name) is not None)
    return next(values, None)


def check_config(config: dict[str, Any]) -> Iterator[Finding]:
    """config.json says what loaders must know."""
    quantization = config.get("quantization_config") or {}
    if not is_nvfp4_config(quantization):
        is_other = f"; it is {quantization.get('quant_method')} / {quantization.get('format')}" if quantization else ""
        rule = "other-format" if quantization else "no-quantization-config"
        yield found(rule, CONFIG_FILE, f"quantization_config is not {QUANT_METHOD} / {FORMAT}{is_other}")
        return
    if quantization.get("quantization_status") != "compressed":
        message = "quantization_status must be 'compressed' for Transformers to unpack"
        yield found("status-not-compressed", CONFIG_FILE, message, fixable=True)
    groups = quantization.get("config_groups")
    if not groups or not isinstance(groups, dict):
        yield found("bad-group", CONFIG_FILE, "`config_groups` names no layers")
        return
    for name, group in groups.items():
        weights = group.get("weights") or {}
        wrong = {key: weights.get(key) for key, value in _NVFP4_WEIGHTS.items() if weights.get(key) != value}
        if wrong:
            said = ", ".join(f"{key} {value}" for key, value in wrong.items())
            yield found("bad-group", CONFIG_FILE, f"`{name}` is not NVFP4: its weights have {said}")
        if not group.get("targets"):
            yield found("bad-group", CONFIG_FILE, f"`{name}` has no `targets`")
        if group.get("format") not in (None, FORMAT):
            yield found("bad-group", CONFIG_FILE, f"`{name}` has the format {group['format']}, and the rest {FORMAT}")


def targeted_layers(quantization: dict[str, Any], layers: Iterable[str]) -> set[str] | None:
    """Those of the linear `layers` that some group's `targets` name; None if it takes more than names to know.

    Raises:
        ValueError: `targets` has something that is no pattern.
    """
    layers = set(layers)
    groups = (quantization.get("config_groups") or {}).values()
    targets = {target for group in groups for target in group.get("targets") or []}
    if "Linear" in targets:
        return layers
    if any(map(_is_class, targets)):
        return None  # a class of some engine's
    return names_matching(layers, targets)


def layers_with_nvfp4_inputs(quantization: dict[str, Any], layers: Iterable[str]) -> set[str]:
    """Those of the packed `layers` whose group quantizes inputs: one that names a layer comes before one of a class.

    Raises:
        ValueError: as ``targeted_layers``.
    """
    layers = set(layers)
    groups = list((quantization.get("config_groups") or {}).values())
    if len({bool(group.get("input_activations")) for group in groups}) < 2:
        return layers if activations_of(quantization) == "nvfp4" else set()
    named: set[str] = set()
    found: set[str] = set()
    for group in groups:
        targets = [target for target in group.get("targets") or [] if not _is_class(target)]
        matching = names_matching(layers, targets)
        named |= matching
        found |= matching if group.get("input_activations") else set()
    classes = [any(map(_is_class, group.get("targets") or [])) for group in groups if group.get("input_activations")]
    return found | (layers - named if any(classes) else set())


def _is_class(target: Any) -> bool:
    return isinstance(target, str) and target[:1].isupper()


def check_dtype(config: dict[str, Any]) -> Iterator[Finding]:
    """What is not packed is served in bfloat16."""
    dtype = setting(config, "dtype", "torch_dtype")
    if dtype != str(SERVED_DTYPE).removeprefix("torch."):
        yield found("dtype", CONFIG_FILE, f"dtype is {dtype}; ours is bfloat16, exact for our weights")


def check_parts(reader: CheckpointReader, layers: list[str]) -> tuple[list[Finding], list[str]]:
    """The parts of each layer are there, once, in the dtypes and shapes that belong together.

    Returns:
        What is wrong, and the layers that can be read.
    """
    findings: list[Finding] = []
    layouts: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in reader.names:
        try:
            layouts[name] = reader.layout(name)
        except ValueError as error:
            findings.append(found("unreadable-tensor", name, str(error)))
    readable = []
    for layer in layers:
        wrong = list(_check_layer_parts(layer, layouts))
        findings += wrong
        if not wrong:
            readable.append(layer)
        if f"{layer}.weight" in layouts:
            findings.append(found("both-forms", layer, "has both an unquantized weight and packed codes"))
    for name in layouts:
        layer, _, part = name.rpartition(".")
        is_scale = part in (BLOCK_SCALE, GLOBAL_ENCODE_SCALE, INPUT_GLOBAL_SCALE)
        # Codes of another format have scales too.
        weight = layouts.get(f"{layer}.{PACKED}") or layouts.get(f"{layer}.weight")
        if is_scale and (weight is None or weight[0] in FLOATING):
            findings.append(found("scale-without-codes", name, "a scale without packed codes"))
    return findings, readable


def _check_layer_parts(layer: str, layouts: dict[str, tuple[str, tuple[int, ...]]]) -> Iterator[Finding]:
    missing = [part for part in (PACKED, BLOCK_SCALE, GLOBAL_ENCODE_SCALE) if f"{layer}.{part}" not in layouts]
    if missing:
        yield found("missing-parts", layer, f"missing {', '.join(missing)}")
        return
    _, codes_shape = layouts[f"{layer}.{PACKED}"]
    if len(codes_shape) != 2 or 0 in codes_shape or codes_shape[1] % (BLOCK_SIZE // 2):
        message = f"{PACKED} is {_shown(codes_shape)}; codes are [N, K / 2] with K divisible by {BLOCK_SIZE}"
        yield found("wrong-layout", layer, message)
        return
    weight_shape = (codes_shape[0], 2 * codes_shape[1])
    for name, (dtype, shape) in checkpoint_layout(layer, weight_shape, quantizes_input=True).items():
        part = name.removeprefix(f"{layer}.")
        stored, stored_shape = layouts.get(name, (_STORED_AS[dtype], shape))
        is_right = stored_shape == shape or (shape == (1,) and stored_shape == ())
        if stored != _STORED_AS[dtype] or not is_right:
            needed = f"an NVFP4 weight {_shown(weight_shape)} needs `{part}` as {_STORED_AS[dtype]} {_shown(shape)}"
            yield found("wrong-layout", layer, f"{needed}; it is {stored} {_shown(stored_shape)}")


def _shown(shape: tuple[int, ...]) -> str:
    return str(list(shape)) if len(shape) <= 4 else f"[{', '.join(map(str, shape[:4]))}, ...]"


def check_values(reader: CheckpointReader, layers: list[str]) -> list[Finding]:
    """The scales are usable, and one for what vLLM fuses.

    Args:
        reader: of the checkpoint.
        layers: those that ``check_parts`` found readable.
    """
    findings: list[Finding] = []
    groups: dict[str, dict[str, ScaleFacts]] = {}
    for layer in layers:
        try:
            facts = scale_facts(from_checkpoint(layer, reader.get_tensor))
        except (ValueError, RuntimeError) as error:
            findings.append(found("unreadable-tensor", layer, str(error)))
        else:
            groups.setdefault(always_fused_key(layer), {})[layer] = facts
    for group in groups.values():
        findings += _check_group(group)
    facts_of = [facts for group in groups.values() for facts in group.values()]
    if num_other := sum(torch.frexp(torch.tensor(f.global_decode_scale)).mantissa.item() != 0.5 for f in facts_of):
        message = f"{num_other} layers have a global scale that is no power of two: another tool's; training it again "
        findings.append(found("other-tools-scale", "global scales", f"{message}moves its values a little"))
    if num_zeros := sum(facts.num_negative_zeros for facts in facts_of):
        findings.append(found("negative-zero", "codes", f"{num_zeros} codes are negative zero: another tool's"))
    return findings


def _check_group(group: dict[str, ScaleFacts]) -> Iterator[Finding]:
    """The layers of one fused group, or one layer."""
    first, first_facts = next(iter(group.items()))
    is_fixable = shared_exponents(group) is not None
    for layer, facts in group.items():
        if not facts.has_good_global_scale:
            message = f"global scale {facts.global_decode_scale} is not finite and positive"
            yield found("bad-global-scale", layer, message)
        elif facts.largest is not None:
            magnitude = E2M1_MAX * facts.largest * facts.global_decode_scale
            if not _PLAUSIBLE[0] < magnitude < _PLAUSIBLE[1]:
                question = "is its global scale a reciprocal of the right one?"
                yield found("implausible-scale", layer, f"decodes to magnitudes of {magnitude:.1e}: {question}")
        if facts.num_bad:
            yield found("bad-block-scale", layer, f"{facts.num_bad} block scales are NaN or negative")
        if facts.num_zero:
            message = f"{facts.num_zero} block scales are zero under codes that are not: these blocks decode to zeros"
            yield found("zero-block-scale", layer, message)
        if facts.largest is None and not facts.num_bad:
            yield found("all-zero", layer, "decodes to nothing but zeros")
        if facts.num_lost_rows:
            message = f"{facts.num_lost_rows} rows have only zeros for codes, under block scales that zeros do not have"
            yield found("lost-codes", layer, message)
        if facts.num_zero_rows and facts.largest is not None:
            yield found("zero-rows", layer, f"{facts.num_zero_rows} rows decode to nothing but zeros")
        if facts.num_subnormal:
            message = f"{facts.num_subnormal} block scales are subnormal; Marlin reads them as zero"
            yield found("subnormal-block-scale", layer, message, fixable=is_fixable)
        if facts.global_decode_scale != first_facts.global_decode_scale and facts.has_good_global_scale:
            message = f"vLLM fuses it with {first}, but their global scales differ"
            yield found("unshared-scale", layer, message, fixable=is_fixable)


def check_architecture(
    reader: CheckpointReader, layers: list[str], readable: list[str], model: PreTrainedModel
) -> Iterator[Finding]:
    """Names, shapes and `ignore` are those of the model that config.json describes.

    Args:
        reader: of the checkpoint.
        layers: all that are packed.
        readable: those whose shapes are known.
        model: on the meta device.

    Raises:
        ValueError: `ignore` has something that is no pattern.
    """
    packed = set(layers)
    expected = checkpoint_shapes(model, reader.names)
    present = {f"{layer}.weight" for layer in packed} | (set(reader.names) - packed_tensors(packed))
    for name in sorted(missing_tensors(model, reader.names)):
        yield found("missing-tensor", name, "missing")
    # Llama 4's in ModelOpt's dialect: all experts of a layer in one tensor of codes.
    fused = tuple(sorted(name for name in expected if f"{name}_{BLOCK_SCALE}" in present))
    for name in fused:
        yield found("fused-experts", name, "experts that are packed in one tensor were not examined")
    expected = {name: shape for name, shape in expected.items() if name not in fused}
    present -= {name for name in present if name.startswith(fused)}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    copies = tied_copies(model, reader.names)
    for name in sorted(present - set(expected)):
        is_skipped = name in (*model.all_tied_weights_keys, *copies) or name.endswith(SKIPPED)
        is_skipped |= any(pattern.search(name) for pattern in ignored)
        message = f"not a tensor of {type(model).__name__}"
        if name in copies and name in reader.file_of and _differ(reader, name, copies[name]):
            message = (
                f"differs from {copies[name]}, to which config.json ties it; some loaders take the one, some the other"
            )
            yield found("another-head", name, message)
        elif is_skipped:
            yield found("skipped-tensor", name, f"{message}, but skipped by loaders")
        else:
            yield found("unknown-tensor", name, message)
    shapes: dict[str, tuple[int, ...]] = {f"{layer}.weight": weight_shape(reader, layer) for layer in readable}
    shapes |= {name: reader.layout(name)[1] for name in expected if name in present and layer_of(name) not in packed}
    for name, shape in expected.items():
        if shapes.get(name, shape) != shape:
            message = f"shape {_shown(shapes[name])}, the model's is {_shown(shape)}"
            yield found("wrong-shape", name, message)
    linears = linear_weights(model, reader.names)
    for name in sorted(shapes.keys() - linears.keys()):
        if name.endswith((".weight", ".bias")) and layer_of(name) not in packed:
            stored = reader.layout(name)[0]
            if stored not in FLOATING:
                yield found("wrong-layout", name, f"stored as {stored}; engines read floating-point numbers here")
    yield from check_ignore(reader, packed, linears, tied_heads(model))


def _differ(reader: CheckpointReader, name: str, other: str) -> bool:
    if reader.layout(name) != reader.layout(other):
        return True
    try:
        return not torch.equal(reader.get_tensor(name), reader.get_tensor(other))
    except ValueError:  # a tensor that cannot be read is a finding of its own
        return False


def check_ignore(
    reader: CheckpointReader, packed: set[str], linears: dict[str, str], heads: Collection[str]
) -> Iterator[Finding]:
    """`ignore` names the linear layers that are not packed, under both their names, and no others.

    Args:
        reader: of the checkpoint.
        packed: names of the packed layers.
        linears: weight name of each linear to its module path.
        heads: paths of linears that are tied to an embedding, and so have no tensor.

    Raises:
        ValueError: `ignore` has something that is no pattern.
    """
    quantization = reader.config().get("quantization_config") or {}
    entries = quantization.get("ignore") or []
    ignored = names_matching({*map(layer_of, linears), *linears.values(), *heads}, entries)
    plain = set(entries)
    targeted = targeted_layers(quantization, {*map(layer_of, linears), *packed, *heads})
    for layer in sorted(packed - (packed if targeted is None else targeted)):
        yield found("bad-group", layer, "packed, but no group's `targets` name it")
    names = set(reader.names)
    for name, module_path in linears.items():
        layer = layer_of(name)
        message, is_fixable = "", True
        is_wanted = layer in (targeted or ())
        if layer in packed and (layer in ignored or module_path in ignored):
            message = "packed, but `ignore` tells loaders it is not"
        elif layer not in packed and name in names and reader.layout(name)[0] not in FLOATING:
            message, is_fixable = f"neither packed nor unquantized: its weight is {reader.layout(name)[0]}", False
        elif layer not in packed and name in names and layer not in ignored and is_wanted:
            # vLLM translates plain entries, as it translates the names of weights.
            if module_path not in plain or not _differ_in_front(layer, module_path):
                message = "not packed and not in `ignore`; vLLM would look for packed weights"
        elif layer not in packed and name in names and module_path not in ignored and is_wanted:
            message = f"`ignore` lacks its module name {module_path}; Transformers looks for that"
        if message:
            yield found("ignore-mismatch", layer, message, fixable=is_fixable)
    for path in heads:
        if path in (targeted or ()) and path not in ignored and path not in packed:
            message = "tied to the embedding, and not in `ignore`: Transformers makes a packed layer of it, and fails"
            yield found("ignore-mismatch", path, message, fixable=True)
    stored = {layer_of(name) for name in linears if name in names} | packed
    for inside, outside in split_fused_groups(packed, stored).values():
        yield found("split-group", inside[0], f"packed, but {outside[0]}, which vLLM fuses with it, is not")


def _differ_in_front(path: str, other: str) -> bool:
    """Whether two paths of a layer are the same from its number on."""
    first, second = path.split("."), other.split(".")
    while first and second and first[-1] == second[-1]:
        first.pop(), second.pop()
    return not any(part.isdigit() for part in (*first, *second))


def weight_shape(reader: CheckpointReader, layer: str) -> tuple[int, int]:
    """``(N, K)`` of a packed layer whose parts belong together."""
    rows, half_columns = reader.layout(f"{layer}.{PACKED}")[1]
    return rows, 2 * half_columns
