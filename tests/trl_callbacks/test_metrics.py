"""What is measured at a push and at a batch of rollouts."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from hf_nvfp4_qat import quantize_nvfp4
from hf_nvfp4_qat.trl_callbacks.metrics import WeightSample, mismatch_kl, record_mismatch


def test_mismatch_kl_estimates_the_kl_of_two_categoricals():
    torch.manual_seed(0)
    sampler, trainer = torch.randn(2, 50).log_softmax(-1)
    tokens = torch.multinomial(sampler.exp(), 200_000, replacement=True)[None]
    total, count = mismatch_kl(sampler[tokens], trainer[tokens], torch.ones_like(tokens))
    exact = (sampler.exp() * (sampler - trainer)).sum()
    assert count == 200_000
    assert total / count == pytest.approx(exact.item(), rel=0.02)


def test_mismatch_kl_counts_neither_padding_nor_tokens_without_a_log_probability():
    sampler = torch.tensor([[-1.0, float("nan"), -2.0, -50.0]])
    trainer = torch.tensor([[-1.5, -1.0, -2.0, -1.0]])
    total, count = mismatch_kl(sampler, trainer, torch.tensor([[1, 1, 1, 0]]))
    assert count == 2
    assert total.item() == pytest.approx(math.exp(-0.5) - 1 + 0.5)


def test_weight_error_and_code_flips_of_a_small_weight_are_exact():
    torch.manual_seed(0)
    first, second = torch.randn(2, 40, 64)
    sample = WeightSample()
    sample.observe("w", first, quantize_nvfp4(first))
    metrics = sample.metrics()
    master = first.bfloat16().float()
    decoded = quantize_nvfp4(first).dequantize().float()
    assert metrics == {"weight_error": pytest.approx(((decoded - master).norm() / master.norm()).item())}
    sample.observe("w", second, quantize_nvfp4(second))
    before, after = (quantize_nvfp4(weight).packed for weight in (first, second))
    changed = ((before & 15) != (after & 15)).sum() + ((before >> 4) != (after >> 4)).sum()
    assert sample.metrics()["code_flips"] == pytest.approx(changed.item() / first.numel())
    sample.observe("w", second, quantize_nvfp4(second))
    assert sample.metrics()["code_flips"] == 0


def test_the_sample_of_a_large_weight_is_bounded_and_spread():
    weight = torch.randn(4001, 64)
    sample = WeightSample()
    sample.observe("w", weight, quantize_nvfp4(weight))
    # Every fourth row, 4 blocks each.
    assert torch.equal(sample._masters[0], weight[::4].bfloat16().reshape(-1, 16))
    assert len(sample._masters[0]) == 4 * 1001
    assert 0 < sample.metrics()["weight_error"] < 0.2


def test_metrics_of_several_weights_are_of_all_of_them_together():
    small, large = torch.randn(8, 32), 100 * torch.randn(8, 32)
    sample = WeightSample()
    for name, weight in (("small", small), ("large", large)):
        sample.observe(name, weight, quantize_nvfp4(weight))
    error = torch.cat([quantize_nvfp4(weight).dequantize().float() - weight.bfloat16() for weight in (small, large)])
    expected = error.norm() / torch.cat([small, large]).bfloat16().float().norm()
    assert sample.metrics()["weight_error"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_push_that_did_not_end_leaves_nothing_behind():
    weight = torch.randn(8, 32)
    sample = WeightSample()
    sample.observe("a", weight, quantize_nvfp4(weight))
    sample.metrics()
    sample.observe("a", weight, quantize_nvfp4(weight))
    sample.start()
    sample.observe("a", weight, quantize_nvfp4(weight))
    assert sample.metrics()["code_flips"] == 0


def test_metrics_without_a_push_are_empty():
    assert WeightSample().metrics() == {}


def comparing_trainer(output, *, corrects=True):
    trainer = SimpleNamespace(
        args=SimpleNamespace(use_vllm=True, vllm_importance_sampling_correction=corrects),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=lambda tensor: tensor),
        _generate_and_score_completions=lambda inputs: output,
    )
    record_mismatch(trainer)
    trainer._generate_and_score_completions([])
    return trainer._metrics["train"]


@pytest.mark.parametrize(
    ("ratio", "masked"),
    [(torch.tensor([[1.0], [0.0]]), 1 / 2), (torch.tensor([[1.0, 0.0], [1.0, 0.0]]), 1 / 3)],
    ids=["sequence", "token"],
)
def test_masked_fraction_is_of_sequences_or_of_completion_tokens(ratio, masked):
    output = {
        "sampling_per_token_logps": torch.zeros(2, 2),
        "old_per_token_logps": torch.full((2, 2), math.log(2)),
        "completion_mask": torch.tensor([[1, 1], [1, 0]]),
        "importance_sampling_ratio": ratio,
    }
    recorded = comparing_trainer(output)
    assert recorded["nvfp4/masked_fraction"] == [pytest.approx(masked)]
    assert recorded["nvfp4/mismatch_kl"] == [pytest.approx(2 - 1 - math.log(2))]


def test_a_trainer_that_compares_nothing_records_nothing():
    assert not comparing_trainer({"completion_mask": torch.ones(1, 1)}, corrects=False)
    record_mismatch(SimpleNamespace())
