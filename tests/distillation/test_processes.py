"""Distillation in two processes: the losses of one process, one good checkpoint, and a teacher that is sharded too."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama, tiny_qwen3
from processes import in_processes
from sharding import ExactSums, fsdp_on_cpus, shared_folder
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from hf_nvfp4_qat import prepare_qat, verify_nvfp4
from hf_nvfp4_qat.distillation import run as module
from hf_nvfp4_qat.distillation.run import distill
from hf_nvfp4_qat.distillation.trainer import QADTrainer

FSDP2 = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "cpu_ram_efficient_loading": False,
        "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"],  # the student's, not the teacher's
    },
}


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


def _train(rank: int) -> dict:
    """With a teacher of another architecture; its weights may come from the first process."""
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
                trainer.teacher._device == trainer.accelerator.device,  # its weights may be offloaded to another
            )
    return found


@pytest.mark.slow
def test_losses_are_those_of_one_process_and_under_fsdp2_the_teacher_is_sharded(tmp_path):
    expected = pytest.approx(losses(trained(str(tmp_path), tiny_llama(), 4)), rel=1e-4)
    for found in in_processes(_train):
        for name in ("ddp", "fsdp2", "efficient"):
            assert found[name] == expected, name
        assert found["fsdp2: sharded"] == found["efficient: sharded"] == (True, False, True, True, True)


def _distill(path: Path, kind: str, rank: int) -> dict:
    found = {}
    options = {
        "max_steps": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 1, "disable_tqdm": True,
        "optim": "sgd", "learning_rate": 1e-2, **(FSDP2 if kind == "fsdp2" else {}),
    }  # fmt: skip
    save, writers = module.save_nvfp4, []

    def counting(*arguments, **keywords):
        files = save(*arguments, **keywords)
        writers.extend(files)
        return files

    module.save_nvfp4 = counting
    with fsdp_on_cpus() if kind == "fsdp2" else nullcontext():
        result = distill(
            path / "source", path / "out", [path / "a.txt"], sequence_length=32, num_held_out=4, training=options
        )
        found["result"] = (result.before, result.after, result.teacher, result.num_tokens)
        found["there"] = (path / "out" / "tokenizer.json").is_file()  # also where another process wrote it
        found["wrote"] = bool(writers)

        def fails(*arguments, **keywords):
            raise OSError("disk full")

        module.save_nvfp4 = fails if kind == "ddp" else counting
        if kind == "ddp":
            try:
                distill(path / "source", path / "no", [path / "a.txt"], sequence_length=32, training=options)
            except (OSError, RuntimeError) as error:
                found["failed"] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_distilling_in_two_processes_ends_with_one_good_checkpoint(kind, tmp_path):
    tiny_qwen3(vocab_size=512).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    first, second = in_processes(partial(_distill, tmp_path, kind))
    assert first["result"] == second["result"] and first["result"][3] == 2 * 2 * 2 * 32
    assert first["there"] and second["there"] and first["wrote"] and not second["wrote"]
    report = verify_nvfp4(tmp_path / "out")
    assert report.ok and report.num_layers == 14 and not list((tmp_path / "out").glob("*partial*")), str(report)
    if kind == "ddp":
        assert first["failed"] == "OSError: disk full"
        reason = "Nothing was saved, because a process failed. It is process 0: OSError: disk full"
        assert second["failed"] == f"RuntimeError: {reason}"
