"""TRL's own distillation trainer, on-policy, with a student in NVFP4: alone, and rolling out on the packed weights."""

import pytest
import torch
from conftest import byte_tokenizer, load_qat
from datasets import Dataset
from transformers import AutoModelForCausalLM, set_seed
from trl_trainers import MEMORY, ON_GPU, logged, rollouts

from hf_nvfp4_qat import save_nvfp4, verify_nvfp4
from hf_nvfp4_qat.modules.swap import qat_weights

pytestmark = pytest.mark.slow


def make_trainer(folder, tmp_path, callbacks=(), **options):
    from trl import DistillationConfig, DistillationTrainer

    set_seed(0)
    arguments = DistillationConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_completion_length=16, max_steps=2, logging_steps=1,
        learning_rate=1e-3, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=not ON_GPU, bf16=False,
        seed=0, **options,
    )  # fmt: skip
    return DistillationTrainer(
        load_qat(folder),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["one two three", "the", "a longer prompt", "x = 1"] * 4}),
        processing_class=byte_tokenizer(),
        callbacks=list(callbacks),
    )


def test_the_student_trains_and_is_what_is_saved(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path)
    before = {name: weight.master.detach().clone() for name, weight in qat_weights(trainer.model).items()}
    trainer.train()
    assert len(logged(trainer, "loss")) == 2 and all(loss > 0 for loss in logged(trainer, "loss"))
    assert all(not torch.equal(before[name], weight.master) for name, weight in qat_weights(trainer.model).items())
    save_nvfp4(trainer.model, tmp_path / "packed")
    assert verify_nvfp4(tmp_path / "packed", trainer.model).ok


@pytest.mark.vllm
def test_it_rolls_out_on_the_packed_weights(folder, tmp_path):
    callback = rollouts(check_every=1)
    trainer = make_trainer(
        folder, tmp_path, [callback], use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=MEMORY,
        vllm_max_model_length=128,
    )  # fmt: skip
    trainer.train()
    assert callback.generation.num_pushes == 2 and callback.generation.last_check.ok
    assert len(logged(trainer, "nvfp4/sync_seconds")) == 2
