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

from hf_nvfp4_qat.checkpoint.files import CheckpointReader, resolve_checkpoint
from hf_nvfp4_qat.checkpoint.inspect import inspect_checkpoint
from hf_nvfp4_qat.checkpoint.load import check_packed
from hf_nvfp4_qat.checkpoint.modelopt import ModelOptReader, open_checkpoint
from hf_nvfp4_qat.checkpoint.names import (
    PACKED,
    activations_of,
    layer_of,
    packed_tensors,
    quantized_layers,
    scale_rule_of,
)
from hf_nvfp4_qat.version import __version__

TAGS = ("nvfp4", "4-bit", "vllm")
_DIALECTS = ("compressed-tensors", "modelopt")
_BEGIN, _END = "<!-- hf_nvfp4_qat: begin -->", "<!-- hf_nvfp4_qat: end -->"
_EVALUATION = "## Evaluation\n\n| | |\n|---|---|"
_KEPT_RESULTS = re.compile(rf"{re.escape(_EVALUATION)}\n((?:\|.*\|\n)+)")
"""The rows of results that an earlier card states."""

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
    license: str | None = None,
    original: str | os.PathLike | None = None,
    evaluation: Evaluation | None = None,
    tags: Sequence[str] = (),
    existing: ModelCard | None = None,
) -> ModelCard:
    """Write the card of a packed checkpoint, or write it into an existing one.

    Args:
        path: directory or Hub id, in either dialect.
        repo_id: where it will be, for the commands in the card; the directory's name if not given.
        base_model: Hub id of the model in high precision it comes from.
        license: of the base model; an existing card's stays.
        original: the checkpoint in high precision to measure the error of the weights against; not measured if None.
        evaluation: results to state.
        tags: besides ours.
        existing: a card to keep: metadata it has, and all text but what an earlier call wrote.

    Raises:
        ValueError: no packed checkpoint at `path`, or `original` lacks a layer of it.
    """
    reader = open_checkpoint(resolve_checkpoint(path))
    check_packed(reader)
    name = repo_id or reader.directory.resolve().name
    text = f"# {name.rpartition('/')[2]}\n" if existing is None else existing.text
    kept = {} if existing is None else existing.data.to_dict()
    if base_model is None and isinstance(kept.get("base_model"), str):
        base_model = kept["base_model"]
    results = _KEPT_RESULTS.search(text)
    kept_results = results[1].splitlines() if results else []
    section = _section(
        reader,
        name,
        base_model=base_model,
        original=original,
        results=_results(evaluation) if evaluation else kept_results,
    )
    if _BEGIN in text and _END in text:
        before, rest = text.split(_BEGIN, 1)
        text = f"{before}{section}{rest.split(_END, 1)[1]}"
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    data = _metadata(kept, reader, base_model, license, evaluation, tags)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.lstrip()}")


def license_of(base_model: str, *, token: str | bool | None = None) -> str | None:
    """What a model's card says of its license; None if it has none, or cannot be reached.

    Args:
        base_model: Hub id, or a directory with a README.md.
        token: for the Hub.
    """
    path = Path(base_model)
    if path.is_dir():
        card = ModelCard.load(path / "README.md") if (path / "README.md").is_file() else None
        return getattr(card and card.data, "license", None)
    try:
        return ModelCard.load(base_model, token=token if isinstance(token, str) else None).data.license
    except (OSError, ValueError):
        return None  # offline, private, or without a card: not ours to guess


def _metadata(
    kept: dict[str, Any],
    reader: CheckpointReader,
    base_model: str | None,
    license: str | None,
    evaluation: Evaluation | None,
    tags: Sequence[str],
) -> ModelCardData:
    dialect = "modelopt" if isinstance(reader, ModelOptReader) else "compressed-tensors"
    found: dict[str, Any] = {
        "library_name": "transformers",
        "license": license,
        "base_model": base_model,
        "base_model_relation": "quantized" if base_model or kept.get("base_model") else None,
        "pipeline_tag": "text-generation" if "CausalLM" in str(reader.config().get("architectures")) else None,
    }
    for key, value in found.items():
        if value is not None and kept.get(key) is None:
            kept[key] = value
    kept["tags"] = list(
        dict.fromkeys([*(tag for tag in kept.get("tags") or () if tag not in _DIALECTS), *TAGS, dialect, *tags])
    )
    if evaluation is not None and not isinstance(evaluation, Mapping):
        kept.pop("model-index", None)
        kept |= {"eval_results": list(evaluation), "model_name": kept.get("model_name") or reader.directory.name}
    return ModelCardData(**kept)


def _section(
    reader: CheckpointReader,
    name: str,
    *,
    base_model: str | None,
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
    of_base = f" of [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
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
    left_out = Counter(
        re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer_of(tensor))
        for tensor, shape in shapes.items()
        if tensor.endswith(".weight") and len(shape) == 2
    )
    if left_out:
        listed = ", ".join(f"`{pattern}`{f' ({count})' if count > 1 else ''}" for pattern, count in left_out.items())
        lines.append(f"| left in {config.get('dtype', 'bfloat16')} | {listed} |")
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
    if not isinstance(reader, ModelOptReader):
        lines += [
            "from transformers import AutoModelForCausalLM  # with compressed-tensors installed",
            f'model = AutoModelForCausalLM.from_pretrained("{name}")',
            "",
        ]
    return [
        *lines,
        "from hf_nvfp4_qat import load_nvfp4  # to go on training it in NVFP4",
        f'model = load_nvfp4("{name}")',
        "```",
    ]


def _results(evaluation: Evaluation) -> list[str]:
    if isinstance(evaluation, Mapping):
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
