"""The quantized reference model of a trainer, where TRL moves it toward the policy."""

from types import SimpleNamespace

import pytest
import torch
from conftest import load_qat, tokens
from transformers import AutoModelForCausalLM
from trl import GRPOConfig
from trl.trainer.callbacks import SyncRefModelCallback

from hf_nvfp4_qat import NVFP4RolloutCallback, refresh_global_scales


@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_reference_that_follows_the_policy_computes_with_the_scales_of_its_weights(qwen3_dir, tmp_path, is_prepared):
    policy = load_qat(qwen3_dir)
    load = load_qat if is_prepared else AutoModelForCausalLM.from_pretrained
    reference = load(qwen3_dir, dtype=torch.float32).eval()
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], sync_ref_model=True)
    trainer = SimpleNamespace(ref_model=reference, args=args)
    NVFP4RolloutCallback(quantize_ref_model=True)._quantize_ref_model(trainer, policy)
    with torch.no_grad():
        reference(input_ids=tokens())
        for parameter in policy.parameters():
            parameter.mul_(1000)
        SyncRefModelCallback._sync_target_model(policy, reference, 0.9)
        followed = reference(input_ids=tokens()).logits
        refresh_global_scales(reference)
        assert torch.equal(followed, reference(input_ids=tokens()).logits)


def test_the_callback_adds_no_measuring_for_a_reference_that_it_does_not_move(qwen3_dir, tmp_path):
    reference = load_qat(qwen3_dir).eval()
    before = dict(reference._forward_pre_hooks)
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    trainer = SimpleNamespace(ref_model=reference, args=args)
    NVFP4RolloutCallback(quantize_ref_model=True)._quantize_ref_model(trainer, load_qat(qwen3_dir))
    assert dict(reference._forward_pre_hooks) == before
