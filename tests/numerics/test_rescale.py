"""Powers of two move between the scales without changing a value, or not at all: every E4M3 scale is tried."""

import pytest
import torch

from hf_nvfp4_qat import NVFP4Tensor, quantize_nvfp4
from hf_nvfp4_qat.numerics.rescale import is_exact_in_bfloat16, rescaled, scale_facts, shared_exponents

SCALES = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
"""All that are positive: 7 subnormal ones first, 448 last."""


def weight(*scales: float, global_scale: float = 1.0, code: int = 0x21) -> NVFP4Tensor:
    """One row with these block scales, and codes that are not zero."""
    return NVFP4Tensor(
        torch.full((1, 8 * len(scales)), code, dtype=torch.uint8),
        torch.tensor([scales]).to(torch.float8_e4m3fn),
        torch.tensor(global_scale),
    )


def bits(weight: NVFP4Tensor) -> torch.Tensor:
    return weight.dequantize(torch.float32).view(torch.int32)


@pytest.mark.parametrize("scale", SCALES.float().tolist())
def test_one_scale_goes_to_the_top_and_a_pair_as_far_as_both_stay_normal(scale):
    for global_scale in (1.0, 2.0**-30, 1.37):
        alone = weight(scale, global_scale=global_scale)
        exponents = shared_exponents({"a": scale_facts(alone)})
        moved = rescaled(alone, exponents["a"])
        assert 224 < float(moved.block_scale.float().max()) <= 448 and torch.equal(bits(moved), bits(alone))
        for other in SCALES.float().tolist():
            pair = {"a": alone, "b": weight(other, global_scale=4 * global_scale)}
            exponents = shared_exponents({name: scale_facts(part) for name, part in pair.items()})
            # With the larger in (224, 448], the smaller is normal if they are less than 2**15 apart or so.
            larger, smaller = max(scale, 4 * other), min(scale, 4 * other)
            while larger > 448:
                larger, smaller = larger / 2, smaller / 2
            while larger <= 224:
                larger, smaller = larger * 2, smaller * 2
            assert (exponents is None) == (smaller < 2.0**-6), (scale, other)
    if exponents is not None:
        together = {name: rescaled(part, exponents[name]) for name, part in pair.items()}
        assert torch.equal(together["a"].global_decode_scale, together["b"].global_decode_scale)
        assert all(torch.equal(bits(together[name]), bits(part)) for name, part in pair.items())


def test_our_own_weights_stay_as_they_are():
    torch.manual_seed(0)
    ours = quantize_nvfp4(torch.randn(64, 256))
    assert shared_exponents({"a": scale_facts(ours)}) == {"a": 0}


def test_blocks_of_zeros_and_scales_of_zero_are_carried_along():
    mixed = NVFP4Tensor(
        torch.tensor([[0x21] * 8 + [0x80] * 8 + [0x12] * 8], dtype=torch.uint8),
        torch.tensor([[7.0, 2.0**-9, 0.0]]).to(torch.float8_e4m3fn),
        torch.tensor(1.0),
    )
    facts = scale_facts(mixed)
    assert (facts.num_zero, facts.num_subnormal, facts.num_negative_zeros, facts.smallest) == (1, 0, 8, 7.0)
    moved = rescaled(mixed, shared_exponents({"a": facts})["a"])
    assert moved.block_scale.float().tolist() == [[448.0, 2.0**-3, 0.0]] and torch.equal(bits(moved), bits(mixed))


@pytest.mark.parametrize("global_scale", [0.0, -1.0, float("nan"), float("inf"), 2.0**-126])
def test_a_scale_without_room_or_sense_is_left(global_scale):
    assert shared_exponents({"a": scale_facts(weight(1.0, global_scale=global_scale))}) is None
    assert shared_exponents({"a": scale_facts(weight(float("nan")))}) is None


def test_all_codes_are_told_from_zero_and_negative_zero():
    for code in range(16):
        facts = scale_facts(weight(1.0, code=code << 4))
        assert (facts.largest is None) == (code in (0, 8)) and facts.num_negative_zeros == 8 * (code == 8)


def test_rows_of_zeros_are_lost_only_if_their_scales_say_they_held_something():
    codes = torch.zeros(4, 24, dtype=torch.uint8)
    codes[3] = 0x21
    scales = torch.tensor([[0.0] * 3, [1.0, 1.0, 2.0**-9], [7.0, 8.0, 9.0], [7.0, 8.0, 9.0]]).to(torch.float8_e4m3fn)
    assert scale_facts(NVFP4Tensor(codes, scales, torch.tensor(1.0))).num_lost_rows == 1
    pruned = torch.randn(8, 64)
    pruned[::2] = 0
    assert scale_facts(quantize_nvfp4(pruned)).num_lost_rows == 0


def test_values_are_exact_in_bfloat16_with_a_power_of_two_and_mostly_not_without():
    assert is_exact_in_bfloat16(weight(*SCALES.float().tolist(), global_scale=2.0**-8))
    assert not is_exact_in_bfloat16(weight(3.25, global_scale=1.37))
    assert not is_exact_in_bfloat16(weight(1.0, global_scale=float("nan")))
