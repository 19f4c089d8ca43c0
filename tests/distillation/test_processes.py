"""Distillation in two processes: the losses of one process, one good checkpoint, and a teacher that is sharded too."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, tiny_qwen3
from distributed.test_fsdp_plugin import ExactSums, fsdp_on_cpus, shared_folder
from processes import in_processes
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from trl_callbacks.test_callback import byte_tokenizer

from hf_nvfp4_qat import prepare_qat, verify_nvfp4
from hf_nvfp4_qat.distillation import run as module
from hf_nvfp4_qat.distillation.run import distill
from hf_nvfp4_qat.distillation.trainer import QADTrainer

FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": False}}


def rows(num: int) -> list[dict]:
    ids = torch.randint(0, 128, (num, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def trained(folder: str, teacher, batch_size: int, **options) -> QADTrainer:
    arguments = TrainingArguments(
        output_dir=folder, use_cpu=True, per_device_train_batch_size=batch_size, per_device_eval_batch_size=2,
        max_steps=3, logging_steps=1, save_strategy="no", report_to=[], seed=0, learning_rate=1e-3, disable_tqdm=True,
        eval_on_start=True, **options,
    )  # fmt: skip
    student = prepare_qat(tiny_qwen3(tie_word_embeddings=False))
    callbacks = [ExactSums("bf16")] if "fsdp" in options else []
    trainer = QADTrainer(
        student, arguments, teacher=teacher, train_dataset=rows(16), eval_dataset=rows(8), callbacks=callbacks
    )
    trainer.train()
    return trainer


def losses(trainer: QADTrainer) -> list[float]:
    names = ("loss", "kl", "teacher_cross_entropy", "eval_loss", "eval_kl", "eval_teacher_cross_entropy")
    return [entry[name] for entry in trainer.state.log_history for name in names if name in entry]


def _train(path: str, rank: int) -> dict:
    """With a teacher of another architecture, from memory and from a path, which only the first process may read."""
    found = {}
    folder = shared_folder()
    found["ddp"] = losses(trained(folder, tiny_llama(), 2))
    with fsdp_on_cpus():
        efficient = {**FSDP2, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True}}
        for name, teacher, options in (("fsdp2", tiny_llama(), FSDP2), ("efficient", tiny_llama(), efficient)):
            if name == "efficient" and rank:
                with torch.no_grad():  # what a process has whose weights come from the first
                    for parameter in teacher.parameters():
                        parameter.zero_()
            trainer = trained(folder, teacher, 2, **options)
            found[name] = losses(trainer)
            parameters = list(trainer.teacher.model.parameters())
            found[f"{name}: sharded"] = (
                all(isinstance(parameter, DTensor) for parameter in parameters),
                any(parameter.requires_grad for parameter in parameters),
                all(isinstance(layer, FSDPModule) for layer in trainer.teacher.model.model.layers),
                all(isinstance(layer, FSDPModule) for layer in trainer.model.model.layers),
            )
    return found


@pytest.mark.slow
def test_losses_are_those_of_one_process_and_under_fsdp2_the_teacher_is_sharded(tmp_path):
    expected = pytest.approx(losses(trained(str(tmp_path), tiny_llama(), 4)), rel=1e-4)
    for found in in_processes(partial(_train, "")):
        for name in ("ddp", "fsdp2", "efficient"):
            assert found[name] == expected, name
        assert found["fsdp2: sharded"] == found["efficient: sharded"] == (True, False, True, True)
