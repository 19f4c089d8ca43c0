"""The model card of a packed checkpoint: what is in the files, what was measured, how to serve it. Nothing else.

Everything is read from the checkpoint itself, so a card can be written for one that somebody else made. What the card
says lies between two comments; an existing card keeps all else, its metadata included.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from hf_nvfp4_qat.checkpoint.layer_report import inspect_checkpoint
from hf_nvfp4_qat.checkpoint.load import check_packed
from hf_nvfp4_qat.formats.files import CARD_FILE, DTYPES, CheckpointReader, resolve_checkpoint
from hf_nvfp4_qat.formats.modelopt import ModelOptReader, open_checkpoint
from hf_nvfp4_qat.formats.names import (
    OF_AN_EXPERT,
    PACKED,
    TAGS,
    activations_of,
    layer_of,
    packed_tensors,
    quantized_layers,
    scale_rule_of,
)
from hf_nvfp4_qat.version import __version__

_DIALECTS = ("compressed-tensors", "modelopt")
_BEGIN, _END = "<!-- hf_nvfp4_qat: begin -->", "<!-- hf_nvfp4_qat: end -->"
_SECTION = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
_EVALUATION = "## Evaluation\n\n| | |\n|---|---|"
_KEPT_RESULTS = re.compile(rf"{re.escape(_EVALUATION)}\n((?:\|.*\|\n)+)")
"""The rows of results that an earlier card states."""
_LICENSE = ("license", "license_name", "license_link")

_RULES = {
    "four_over_six": "a block's largest magnitude becomes 6 or 4, whichever has the less squared error "
    "(`four_over_six`)",
    "mse": "the one of six with the least squared error (`mse`)",
}

Evaluation = Mapping[str, float | str] | Sequence[EvalResult]
"""Results to state: names with values, or ``EvalResult`` of huggingface_hub, which leaderboards read too."""


def model_card(
    path: str | os.PathLike,
    *,
    repo_id: str = "",
    base_model: str | None = None,
    license: Mapping[str, str] | None = None,
    original: str | os.PathLike | None = None,
    evaluation: Evaluation | None = None,
    tags: Sequence[str] = (),
    existing: ModelCard | None = None,
) -> ModelCard:
    """Write the card of a packed checkpoint, or write it into an existing one.

    Args:
        path: directory or Hub id, in either dialect.
        repo_id: where it will be, for the commands in the card; the directory's name if not given.
        base_model: Hub id of the model in high precision it comes from; None: what an existing card says.
        license: metadata of the base model, as ``license_of`` finds them; an existing card's license stays.
        original: the checkpoint in high precision to measure the error of the weights against; not measured if None.
        evaluation: results to state. Without them those in the text of an existing card stay, as earlier ones;
            results in its metadata stay but for those given anew.
        tags: besides ours.
        existing: a card to keep: metadata it has, and all text but what an earlier call wrote.

    Raises:
        ValueError: no packed checkpoint at `path`, `original` lacks a layer of it, or a result is no number or text.
    """
    reader = open_checkpoint(resolve_checkpoint(path))
    check_packed(reader)
    name = repo_id or reader.directory.resolve().name
    text = f"# {name.rpartition('/')[2]}\n" if existing is None else existing.text
    kept = {} if existing is None else existing.data.to_dict()
    if base_model is not None:
        kept |= {"base_model": base_model, "base_model_relation": "quantized"}
    results = _results(evaluation) if evaluation else []
    earlier = _KEPT_RESULTS.search(text)
    if earlier and not results:
        results = [*earlier[1].splitlines(), "", "Stated when an earlier version was published."]
    section = _section(reader, name, base_model=kept.get("base_model"), original=original, results=results)
    if _SECTION.search(text):
        text = _SECTION.sub(lambda _: section, text, count=1)
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    measured = existing.data.eval_results if existing is not None else None
    data = _metadata(kept, reader, license or {}, _merged(measured or [], evaluation), tags)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.lstrip()}")


def load_card(source: str | os.PathLike, *, token: str | None = None) -> ModelCard:
    """A model card, whatever its metadata claim.

    Args:
        source: a file, or a Hub id.
        token: for the Hub.

    Raises:
        ValueError: its metadata are no YAML.
    """
    try:
        return ModelCard.load(source, token=token, ignore_metadata_errors=True)
    except YAMLError as error:
        raise ValueError(
            f"A model card begins with YAML between two lines of ---; that of {source} cannot be read "
            f"({' '.join(str(error).split())[:200]}). Mend the card, or take it away."
        ) from error


def license_of(base_model: str, *, token: str | bool | None = None) -> dict[str, str]:
    """What the metadata of a model's card say of its license; empty if nothing, or if it cannot be reached.

    Args:
        base_model: Hub id, or a directory with a README.md.
        token: for the Hub.
    """
    source = Path(base_model) / CARD_FILE if Path(base_model).is_dir() else base_model
    try:
        metadata = load_card(source, token=token if isinstance(token, str) else None).data.to_dict()
    except (OSError, ValueError):
        return {}  # offline, private, or without a card that can be read: not ours to guess
    return {key: metadata[key] for key in _LICENSE if metadata.get(key)}


def _merged(known: Sequence[EvalResult], evaluation: Evaluation | None) -> list[EvalResult]:
    """Results for the metadata: those that are known, but for those that are given anew."""
    given = [] if evaluation is None or isinstance(evaluation, Mapping) else list(evaluation)
    return [*(result for result in known if not any(result.is_equal_except_value(new) for new in given)), *given]


def _metadata(
    kept: dict[str, Any],
    reader: CheckpointReader,
    license: Mapping[str, str],
    measured: list[EvalResult],
    tags: Sequence[str],
) -> ModelCardData:
    found: dict[str, Any] = {
        "library_name": "transformers",
        **({} if kept.get("license") else license),
        "base_model_relation": "quantized" if kept.get("base_model") else None,
        "pipeline_tag": "text-generation" if "CausalLM" in str(reader.config().get("architectures")) else None,
    }
    kept |= {key: value for key, value in found.items() if value is not None and kept.get(key) is None}
    had = [tag for tag in kept.get("tags") or () if tag not in _DIALECTS]
    kept["tags"] = list(dict.fromkeys([*had, *TAGS, reader.dialect, *tags]))
    if measured:
        kept.pop("model-index", None)
        kept |= {"eval_results": measured, "model_name": kept.get("model_name") or reader.directory.name}
    return ModelCardData(**kept)


def _section(
    reader: CheckpointReader,
    name: str,
    *,
    base_model: Any,
    original: str | os.PathLike | None,
    results: list[str],
) -> str:
    config = reader.config()
    quantization = config["quantization_config"]
    layers = quantized_layers(reader.names)
    shapes = {tensor: torch.Size(reader.layout(tensor)[1]) for tensor in reader.names}
    packed = packed_tensors(layers)
    num_quantized = sum(2 * shapes[f"{layer}.{PACKED}"].numel() for layer in layers)
    num_other = sum(shape.numel() for tensor, shape in shapes.items() if tensor not in packed)
    num_bytes = sum((reader.directory / file).stat().st_size for file in set(reader.file_of.values()))
    inputs = activations_of(quantization)
    of_base = f" of [{base_model}](https://huggingface.co/{base_model})" if isinstance(base_model, str) else ""
    lines = [
        _BEGIN,
        "",
        f"NVFP4 weights{of_base}. What follows was read from the files by `hf_nvfp4_qat` {__version__}.",
        "",
        "| | |",
        "|---|---|",
        f"| format | {'ModelOpt' if isinstance(reader, ModelOptReader) else 'compressed-tensors'}, NVFP4 "
        f"{'W4A4: inputs of these layers too' if inputs == 'nvfp4' else 'W4A16: activations stay in 16 bits'} |",
        f"| quantized | {len(layers):,} layers, {num_quantized:,} of {num_quantized + num_other:,} parameters |",
        f"| size | {_size(num_bytes)}; in bfloat16 {_size(2 * (num_quantized + num_other))} |",
    ]
    if rule := _RULES.get(scale_rule_of(quantization)):
        lines.append(f"| block scales | {rule} |")
    if original is not None:
        errors = [layer.relative_error or 0.0 for layer in inspect_checkpoint(reader.directory, original=original)]
        lines.append(
            f"| relative error of the weights | {sum(errors) / len(errors):.4f} on average, {max(errors):.4f} at most, "
            "by layer |"
        )
    matrices = [tensor for tensor, shape in shapes.items() if tensor.endswith(".weight") and len(shape) == 2]
    dtypes = sorted({reader.layout(tensor)[0] for tensor in matrices})
    for dtype in dtypes:
        left_out = Counter(
            re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer_of(tensor))
            for tensor in matrices
            if reader.layout(tensor)[0] == dtype
        )
        listed = ", ".join(f"`{pattern}`{f' ({count})' if count > 1 else ''}" for pattern, count in left_out.items())
        lines.append(f"| left in {str(DTYPES[dtype]).removeprefix('torch.')} | {listed} |")
    if results:
        lines += ["", _EVALUATION, *results]
    lines += [
        "",
        "## Use",
        "",
        "```",
        f"vllm serve {name}",
        "```",
        "",
        *_how_to_load(reader, name),
        "",
        f"Written with torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}.",
        "",
        _END,
    ]
    return "\n".join(lines)


def _how_to_load(reader: CheckpointReader, name: str) -> list[str]:
    lines = ["```python"]
    named = reader.config().get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    loader = "AutoModelForCausalLM" if architecture.endswith("ForCausalLM") else architecture
    if loader.isidentifier() and not isinstance(reader, ModelOptReader):
        lines.append(f"from transformers import {loader}  # with compressed-tensors installed")
        if any(OF_AN_EXPERT.fullmatch(layer) for layer in quantized_layers(reader.names)):
            lines += [
                "from hf_nvfp4_qat.compat import fix_expert_loading",
                "fix_expert_loading()  # Transformers leaves out the experts' global scales",
            ]
        lines += [f'model = {loader}.from_pretrained("{name}")', ""]
    return [
        *lines,
        "from hf_nvfp4_qat import load_nvfp4  # to go on training it in NVFP4",
        f'model = load_nvfp4("{name}")',
        "```",
    ]


def _results(evaluation: Evaluation) -> list[str]:
    if isinstance(evaluation, Mapping):
        if odd := [name for name, value in evaluation.items() if not isinstance(value, (int, float, str))]:
            raise ValueError(
                f"Results are numbers or texts by name; {odd[0]!r} is a {type(evaluation[odd[0]]).__name__}. Give each "
                "of its values a name of its own."
            )
        return [f"| {_cell(name)} | {_cell(value)} |" for name, value in evaluation.items()]
    return [
        f"| {_cell(f'{result.dataset_name}, {result.metric_name or result.metric_type}')} | "
        f"{_cell(result.metric_value)} |"
        for result in evaluation
    ]


def _cell(value: Any) -> str:
    """Of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"
