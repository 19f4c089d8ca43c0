"""Which layers cost the most when they alone are quantized."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_nvfp4_qat.checkpoint.load import check_nothing_missing, check_unquantized
from hf_nvfp4_qat.checkpoint.skeleton import unquantized_config
from hf_nvfp4_qat.distillation.divergence import IGNORED, divergence
from hf_nvfp4_qat.distillation.text import load_tokenizer, read_documents, sequences
from hf_nvfp4_qat.formats.files import resolve_checkpoint
from hf_nvfp4_qat.modules.swap import qat_modules, qat_weights
from hf_nvfp4_qat.quantizer.config import NVFP4QATConfig


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one group of layers alone costs.

    Attributes:
        modules: paths of the layers; those that vLLM fuses are quantized or left alone together.
        num_parameters: of their weights.
        loss: by how much the cross entropy rises, in nats a token. Small ones may be negative.
        kl: divergence of the predictions from those of the model in high precision, in nats a token.
    """

    modules: tuple[str, ...]
    num_parameters: int
    loss: float
    kl: float


def measure_sensitivity(
    model: nn.Module,
    tokens: torch.Tensor,
    *,
    batch_size: int = 4,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Sensitivity]:
    """Quantize one group of layers after the other, and compare the model's predictions with its own without NVFP4.

    Args:
        model: a QAT model with a language model's head.
        tokens: int64 ``[S, T]`` to predict, on any device.
        batch_size: sequences at a time.
        progress: called after each forward.

    Returns:
        One entry a group, the largest divergence first.

    Raises:
        ValueError: a model without NVFP4 weights, or one whose inputs are NVFP4 too.
    """
    weights = qat_weights(model)
    if not weights:
        raise ValueError(
            f"{type(model).__name__} has no NVFP4 weights, so nothing can be ranked. Load it with "
            "`quantization_config=NVFP4QATConfig()`."
        )
    if any(layer.input_amax is not None for layer in qat_modules(model).values()):
        raise ValueError("Layers are ranked by what their weights cost; give a model with `activations='bf16'`.")
    groups: dict[str, list[str]] = {}
    for name, weight in weights.items():
        # The weights of an experts module have scales of their own, but are excluded together.
        is_experts = weight.master.ndim == 3
        groups.setdefault(name.rpartition(".")[0] if is_experts else weight.scale_group, []).append(name)
    sums = torch.zeros(len(groups), 2, dtype=torch.float64)
    num_tokens = 0
    was_training = model.training
    device = next(model.parameters()).device
    batches = [batch.to(device) for batch in tokens.split(batch_size)]
    model.eval()
    try:
        for number, batch in enumerate(batches):
            with torch.no_grad():
                with _quantized_only(model, ()):
                    reference = model(input_ids=batch).logits
                for place, names in enumerate(groups.values()):
                    with _quantized_only(model, names):
                        logits = model(input_ids=batch).logits
                    _, kl, cross_entropy, before = divergence(logits, reference, batch)
                    sums[place] += torch.stack([cross_entropy - before, kl]).cpu()
                    progress("measuring", number * len(groups) + place + 1, len(batches) * len(groups))
            num_tokens += int((batch[:, 1:] != IGNORED).sum())
    finally:
        model.train(was_training)
    found = [
        Sensitivity(
            modules=tuple(dict.fromkeys(name.rpartition(".")[0] for name in names)),
            num_parameters=sum(weights[name].master.numel() for name in names),
            loss=float(loss) / num_tokens,
            kl=float(kl) / num_tokens,
        )
        for names, (loss, kl) in zip(groups.values(), sums.tolist(), strict=True)
    ]
    return sorted(found, key=lambda entry: -entry.kl)


@contextmanager
def _quantized_only(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Compute with NVFP4 values of the weights `names` alone, and with the others as they are."""
    weights = qat_weights(model)
    for name, weight in weights.items():
        weight.is_quantized = name in names
    try:
        yield
    finally:
        for weight in weights.values():
            weight.is_quantized = True


def sensitivity(
    source: str | os.PathLike,
    text: Sequence[Path],
    *,
    config: NVFP4QATConfig | None = None,
    sequence_length: int = 512,
    num_sequences: int = 8,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Sensitivity]:
    """``measure_sensitivity`` of a checkpoint in high precision, computed in bfloat16 on a GPU and float32 on a CPU.

    Args:
        source: directory or Hub id.
        text: files and folders of ``read_documents``; the first sequences are used.
        config: what would be quantized, and how.
        sequence_length, num_sequences: how much of the text.
        progress: called after each forward.

    Raises:
        ValueError: no text, fewer tokens than one sequence, no tokenizer, or a source that is quantized, not
            whole, or custom code.
    """
    directory = resolve_checkpoint(source)
    check_unquantized(directory)
    unquantized_config(directory)  # says what to do about custom code
    tokens = sequences(load_tokenizer(directory), read_documents(text), sequence_length)
    on_gpu = torch.cuda.is_available()
    model, report = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        quantization_config=config or NVFP4QATConfig(),
        output_loading_info=True,
    )
    check_nothing_missing(directory, type(model), report["missing_keys"])
    model = model.to("cuda" if on_gpu else "cpu")
    return measure_sensitivity(model, tokens[:num_sequences], progress=progress)
