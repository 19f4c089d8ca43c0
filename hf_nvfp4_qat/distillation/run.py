"""From a checkpoint in high precision and some text to a packed NVFP4 checkpoint that predicts as the original does."""

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from hf_nvfp4_qat.checkpoint.load import check_nothing_missing, check_unquantized
from hf_nvfp4_qat.checkpoint.save import is_sharded_model, save_nvfp4
from hf_nvfp4_qat.checkpoint.skeleton import unquantized_config
from hf_nvfp4_qat.distillation.text import load_tokenizer, read_documents, sequences
from hf_nvfp4_qat.distillation.trainer import QADTrainer, Teacher
from hf_nvfp4_qat.distributed.gather import on_main_process
from hf_nvfp4_qat.doctor.verify import verify_nvfp4
from hf_nvfp4_qat.formats.files import resolve_checkpoint
from hf_nvfp4_qat.quantizer.config import NVFP4QATConfig


@dataclass(frozen=True)
class DistillationResult:
    """Losses on text that was not trained on, in nats a token, with the NVFP4 weights that are served.

    What is not quantized is measured as it was trained, in float32, and served in bfloat16.

    Attributes:
        teacher: cross entropy of the model in high precision.
        before, after: cross entropy of the quantized model before training (PTQ) and after.
        kl_before, kl_after: its divergence from the teacher.
        num_tokens: that it was trained on.
    """

    teacher: float
    before: float
    after: float
    kl_before: float
    kl_after: float
    num_tokens: int

    @property
    def recovered(self) -> float:
        """Share of the loss that quantization alone had cost; NaN where it had cost nothing."""
        gap = self.before - self.teacher
        return (self.before - self.after) / gap if gap > 0 else float("nan")


def distill(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    text: Sequence[Path],
    *,
    teacher: PreTrainedModel | Teacher | str | None = None,
    config: NVFP4QATConfig | None = None,
    sequence_length: int = 512,
    num_held_out: int = 16,
    cross_entropy_weight: float = 0.0,
    training: dict[str, Any] | None = None,
) -> DistillationResult:
    """Distil a model into its NVFP4 form and save it packed, with its tokenizer.

    In several processes (DDP, FSDP2) every process calls this, and the first one writes.

    Args:
        source: directory or Hub id of the model in high precision.
        destination: directory to write.
        text: files and folders of ``read_documents``; the last sequences are held out.
        teacher: as for ``QADTrainer``; None is `source`.
        config: what to quantize, and how.
        sequence_length: tokens a sequence.
        num_held_out: sequences to measure with.
        cross_entropy_weight: as for ``QADTrainer``.
        training: for ``TrainingArguments``, over the defaults: 300 steps of 16 sequences, learning rate 2e-4, cosine.

    Returns:
        What it cost, and what came back.

    Raises:
        ValueError: no text, or too little of it; no tokenizer; a source that is quantized, not whole, or custom
            code; training diverged, and nothing was written.
    """
    directory = resolve_checkpoint(source)
    check_unquantized(directory)
    unquantized_config(directory)  # says what to do about custom code
    tokenizer = load_tokenizer(directory)
    tokens = sequences(tokenizer, read_documents(text), sequence_length)
    if len(tokens) <= num_held_out:
        raise ValueError(
            f"The text gives {len(tokens)} sequences of {sequence_length} tokens, and {num_held_out} are held out to "
            "measure with. Give more text, or lower one of the two."
        )
    train, held_out = tokens[: len(tokens) - num_held_out], tokens[len(tokens) - num_held_out :]
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=config or NVFP4QATConfig(), output_loading_info=True
    )
    check_nothing_missing(directory, type(model), report["missing_keys"])
    with tempfile.TemporaryDirectory() as scratch:
        on_gpu = torch.cuda.is_available()
        options = {
            "output_dir": scratch, "max_steps": 300, "per_device_train_batch_size": 16, "learning_rate": 2e-4,
            "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "adam_beta2": 0.95, "optim": "adamw_torch_fused",
            "per_device_eval_batch_size": 4, "bf16": on_gpu, "use_cpu": not on_gpu, "dataloader_pin_memory": on_gpu,
            "logging_steps": 10, "save_strategy": "no", "report_to": [], "include_num_input_tokens_seen": "all",
            **(training or {}),
            "eval_on_start": True,  # measures what quantization alone costs, once the model is sharded
        }  # fmt: skip
        # Whole batches, where there is one; what is measured is not cut.
        batch_size = options["per_device_train_batch_size"]
        train = train[: len(train) // batch_size * batch_size or len(train)]
        arguments = TrainingArguments(**options)
        trainer = QADTrainer(
            model,
            arguments,
            teacher=str(directory) if teacher is None else teacher,
            cross_entropy_weight=cross_entropy_weight,
            train_dataset=_rows(train),
            eval_dataset=_rows(held_out),
        )
        trainer.train()
        before = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
        after = trainer.evaluate()
        num_tokens = int(trainer.state.num_input_tokens_seen)
    if not math.isfinite(after["eval_loss"]):
        raise ValueError(
            f"Training diverged (its loss is {after['eval_loss']}), and nothing was written. Lower the learning rate; "
            f"it was {arguments.learning_rate:g}."
        )
    _save(model, tokenizer, destination)
    return DistillationResult(
        teacher=after["eval_teacher_cross_entropy"],
        before=before["eval_cross_entropy"],
        after=after["eval_cross_entropy"],
        kl_before=before["eval_kl"],
        kl_after=after["eval_kl"],
        num_tokens=num_tokens,
    )


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, destination: str | os.PathLike) -> None:
    """Under DDP the first process writes and the others wait; of a model sharded by FSDP2 all gather."""
    sharded = is_sharded_model(model)

    def save_and_verify() -> None:
        save_nvfp4(model, destination)
        if not (problems := verify_nvfp4(destination, model)).ok:
            raise RuntimeError(f"The saved checkpoint is not the trained model: {problems}")

    def write(_: Iterator[Any]) -> list[Any]:
        if not sharded:
            save_and_verify()
        tokenizer.save_pretrained(destination)
        return []

    if sharded:
        save_and_verify()
    on_main_process(write, iter(())) if dist.is_initialized() else write(iter(()))


def _rows(tokens: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in tokens]
