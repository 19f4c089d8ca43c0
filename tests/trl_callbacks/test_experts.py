"""GRPO of a mixture of experts with a real engine: trained, pushed, checked, as close to the trainer as in BF16."""

import pytest
import torch
from conftest import SMALL_ENGINE, byte_tokenizer, load_qat, tiny_qwen3_moe
from transformers import AutoModelForCausalLM, set_seed
from trl_trainers import MEMORY, greedy, logged, make_trainer, rollouts

from hf_nvfp4_qat import save_nvfp4
from hf_nvfp4_qat.checkpoint.convert import dequantize_checkpoint, quantize_checkpoint

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# Enough tokens: where rounding tips the router, a token differs much, and few do.
LARGE = {"per_device_train_batch_size": 64, "max_steps": 4}


@pytest.fixture(autouse=True)
def without_groups():
    """vLLM makes its groups once a process; those of an engine without experts lack one that experts need."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("grpo_moe")
    tokenizer = byte_tokenizer()
    model = tiny_qwen3_moe(
        vocab_size=512, hidden_size=128, intermediate_size=256, moe_intermediate_size=128, head_dim=32,
        initializer_range=0.06, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_mismatch_is_that_of_bf16_and_the_engine_runs_what_is_exported(folder, tmp_path, monkeypatch):
    from trl.generation import vllm_generation
    from vllm import LLM

    from hf_nvfp4_qat.trl_callbacks.metrics import record_mismatch, record_routing

    set_seed(0)
    # The same function as the QAT model's: with decoded weights.
    decoded = tmp_path / "decoded"
    quantize_checkpoint(folder, tmp_path / "packed")
    dequantize_checkpoint(tmp_path / "packed", decoded)
    byte_tokenizer().save_pretrained(decoded)
    plain = AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.float32)
    engine = vllm_generation.LLM
    with monkeypatch.context() as patch:
        patch.setattr(vllm_generation, "LLM", lambda **kwargs: engine(**kwargs, **SMALL_ENGINE, dtype="bfloat16"))
        # The weights stay as they are: TRL pushes fused experts under names that vLLM does not know.
        trainer = make_trainer(plain, decoded, tmp_path, [], learning_rate=0.0, **LARGE)
        trainer.vllm_generation.sync_weights = lambda: None
    record_mismatch(trainer)
    record_routing(trainer, trainer.vllm_generation.llm, every=2)
    trainer.train()
    bf16 = logged(trainer, "nvfp4/mismatch_kl")
    bf16_routing = logged(trainer, "nvfp4/routing_difference")
    set_seed(0)
    model = load_qat(folder)
    callback = rollouts(check_every=1, routing_every=2)
    trainer = make_trainer(model, folder, tmp_path, [callback], learning_rate=1e-3, **LARGE)
    trainer.train()
    assert callback.generation.num_pushes == 4  # one before each step's generation
    qat = logged(trainer, "nvfp4/mismatch_kl")
    assert len(qat) == len(bf16) == 4
    assert sum(qat) <= 1.2 * sum(bf16), (qat, bf16)
    assert max(logged(trainer, "nvfp4/code_flips")) > 0
    routing, rerouted = (logged(trainer, f"nvfp4/{name}") for name in ("routing_difference", "rerouted_tokens"))
    assert len(routing) == len(rerouted) == len(bf16_routing) == 2
    assert all(0 < part <= whole < 0.2 for part, whole in zip(routing, rerouted, strict=True)), (routing, rerouted)
    assert sum(routing) <= 2 * sum(bf16_routing), (routing, bf16_routing)
    trainer.vllm_generation.sync_weights()
    save_nvfp4(model, tmp_path / "served")
    fresh = LLM(str(tmp_path / "served"), max_model_len=128, gpu_memory_utilization=MEMORY, **SMALL_ENGINE)
    assert greedy(fresh) == greedy(trainer.vllm_generation.llm)
