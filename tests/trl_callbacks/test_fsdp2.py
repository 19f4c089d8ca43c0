"""GRPO under FSDP2 in two processes, each with a CPU engine of its own: trained, pushed, resumed, exported."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import load_qat
from datasets import Dataset
from processes import in_processes
from sharding import fsdp_on_cpus
from trl_trainers import logged, make_trainer, release_engines, rollouts, small_qwen3

from hf_nvfp4_qat import NVFP4FSDPCallback, verify_nvfp4
from hf_nvfp4_qat.distributed.gather import reshard
from hf_nvfp4_qat.distributed.packed_gather import gathers_packed
from hf_nvfp4_qat.modules.swap import qat_modules

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def _grpo(source: Path, folder: Path, resume: str | None, rank: int) -> dict:
    with fsdp_on_cpus():
        callback = rollouts(check_every=1)
        trainer = make_trainer(
            load_qat(source), source, folder, [callback, NVFP4FSDPCallback("packed")], per_device_eval_batch_size=4,
            learning_rate=1e-3, bf16=True, save_strategy="steps", save_steps=2, fsdp=True,
            fsdp_config={"version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False},
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        pushes = [callback.generation.num_pushes]
        for change in (False, False, True):
            if change and rank == 0:
                # One process alone knows of this, and all push.
                reshard(trainer.model)
                with torch.no_grad():
                    trainer.model.model.norm.weight.to_local().mul_(1.1)
            # Three batches each; a forward without backward leaves weights gathered.
            trainer.evaluate(Dataset.from_dict({"prompt": ["hello"] * 24}))
            pushes.append(callback.generation.num_pushes)
    found = {
        "packed": gathers_packed(trainer.model),
        "mismatch": max(logged(trainer, "nvfp4/mismatch_kl")),
        "steps": len(logged(trainer, "nvfp4/mismatch_kl")),
        "pushes": pushes,
    }
    trainer.save_model(str(folder / "final"))
    dist.barrier()
    report = verify_nvfp4(folder / "final", trainer.model)
    found["verified"] = (report.ok, report.num_layers == len(qat_modules(trainer.model)), str(report))
    del trainer
    release_engines()  # the engine ends before the processes' group does
    return found


def test_grpo_under_fsdp2(tmp_path):
    small_qwen3(tmp_path / "source")
    out = tmp_path / "out"
    for resume in (None, str(out / "checkpoint-2")):
        for found in in_processes(partial(_grpo, tmp_path / "source", out, resume)):
            assert found["packed"] and found["steps"] == 3
            # One before each step, one before the first evaluation, none while nothing changes, one after that.
            assert found["pushes"] == ([3, 4, 4, 5] if resume is None else [1, 2, 2, 3])
            assert found["mismatch"] < 1e-3
            assert found["verified"][:2] == (True, True), found["verified"]
