"""The door, the reference and the fast implementation, checked value by value against exact arithmetic."""

import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from benchmarks.plain import plain_formula
from hypothesis import given
from hypothesis import strategies as st
from processes import in_processes

from hf_nvfp4_qat import NVFP4Tensor, fake_quantize_nvfp4, numerics, quantize_nvfp4
from hf_nvfp4_qat.numerics import eager, reference
from hf_nvfp4_qat.numerics.format import BLOCK_SIZE, E2M1_MAGNITUDES, E2M1_TIES, E2M1_VALUES, SCALE_RULES
from hf_nvfp4_qat.numerics.quantize import fake_quantize_unchecked, global_amax, global_decode_scale_of_amax

IMPLS = ("reference", "eager")
ONE = torch.tensor(1.0)


def all_positive_bf16() -> torch.Tensor:
    """Every finite bfloat16 magnitude above zero: 32,639 values."""
    return torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)


def all_normal_e4m3() -> torch.Tensor:
    """Every E4M3 scale within [2**-6, 448]: 119 values."""
    return torch.arange(8, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)


def exact_code(magnitude: Fraction, scale: Fraction) -> int:
    """The E2M1 code nearest to magnitude / scale; ties to the even code."""
    quotient = magnitude / scale
    distances = [abs(quotient - Fraction(value)) for value in E2M1_MAGNITUDES]
    nearest = [code for code, distance in enumerate(distances) if distance == min(distances)]
    return next(code for code in nearest if code % 2 == 0) if len(nearest) > 1 else nearest[0]


def exact_e4m3(value: Fraction) -> Fraction:
    """`value` clamped to [2**-6, 448] and rounded to E4M3, ties to the even fraction."""
    value = min(max(value, Fraction(1, 64)), Fraction(448))
    exponent = 0
    while value >= 2 ** (exponent + 1):
        exponent += 1
    while value < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (exponent - 3)
    return round(value / step) * step  # Fraction rounds half to even


def exact_global_scale(amax: Fraction) -> Fraction:
    """The design's rule, in exact arithmetic."""
    value, exponent = amax / 6, 0
    while value >= 2 ** (exponent + 1):
        exponent += 1
    while value < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (exponent - 3)
    rounded = round(value / step) * step
    if rounded == Fraction(2) ** (exponent + 1):
        exponent += 1
    mantissa = rounded / Fraction(2) ** exponent
    exponent = exponent - 8 if mantissa <= Fraction(7, 4) else exponent - 7
    return Fraction(2) ** max(-100, min(100, exponent))


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("code", range(16))
def test_every_code_decodes_to_its_value(code):
    packed = torch.full((1, 8), code | code << 4, dtype=torch.uint8)
    weight = NVFP4Tensor(packed, torch.ones(1, 1).to(torch.float8_e4m3fn), ONE)
    assert weight.dequantize(torch.float32).tolist() == [[E2M1_VALUES[code]] * 16]


def test_the_even_column_is_in_the_low_nibble():
    weight = torch.tensor([[6.0, 1.0, *[0.0] * 14]]).expand(2, 16)
    assert quantize_nvfp4(weight).packed[0, 0] == 7 | 2 << 4


def test_all_e2m1_times_e4m3_products_are_exact_in_bfloat16():
    products = torch.tensor(E2M1_VALUES)[:, None] * all_normal_e4m3().float()
    assert torch.equal(products.bfloat16().float(), products)


def test_reference_codes_equal_exact_arithmetic_for_every_magnitude_and_scale():
    """32,639 magnitudes x 119 scales. In float64 both sides of a comparison are exact: 8 and 7 significant bits."""
    magnitudes, scales = all_positive_bf16(), all_normal_e4m3()
    padded = torch.cat([magnitudes, magnitudes.new_zeros(-len(magnitudes) % BLOCK_SIZE)]).view(-1, BLOCK_SIZE)
    ties = torch.tensor(E2M1_TIES, dtype=torch.float64)
    for scale in scales:
        thresholds = ties * scale.double()
        exact = torch.zeros_like(padded, dtype=torch.uint8)
        for lower, threshold in enumerate(thresholds):
            goes_up = padded.double() >= threshold if lower % 2 else padded.double() > threshold
            exact += goes_up
        assert torch.equal(reference.codes(padded, scale.expand(len(padded), 1), ONE), exact)


def test_the_exact_comparison_itself_agrees_with_fractions():
    for scale in (Fraction(1, 64), Fraction(9, 8), Fraction(13), Fraction(448)):
        for magnitude in all_positive_bf16()[::997].tolist():
            block = torch.tensor([[magnitude] * 16]).bfloat16()
            stored = torch.tensor([[float(scale)]]).to(torch.float8_e4m3fn)
            assert reference.codes(block, stored, ONE)[0, 0] == exact_code(Fraction(magnitude), scale)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_tie_goes_to_the_even_code(impl):
    scales = all_normal_e4m3().float()
    ties = torch.tensor([*E2M1_TIES, *(-tie for tie in E2M1_TIES), 6.0, 0.0])
    blocks = (scales[:, None] * ties).bfloat16()  # one block a scale; 6 * scale makes that very scale
    expected = [0, 2, 2, 4, 4, 6, 6, 0, 10, 10, 12, 12, 14, 14, 7, 0]
    weight = quantize_nvfp4(blocks, global_decode_scale=ONE, impl=impl)
    assert torch.equal(weight.block_scale.float()[:, 0], scales)
    assert weight.codes().tolist() == [expected] * len(scales)


def test_eager_equals_the_reference_for_every_magnitude_below_every_block_maximum():
    magnitudes = all_positive_bf16()
    for scale in all_normal_e4m3().float():
        below = magnitudes[magnitudes.float() <= 6 * scale]
        below = torch.cat([below, below.new_zeros(-len(below) % 15)]).view(-1, 15)
        signs = torch.tensor([1, -1] * 7 + [1], dtype=torch.bfloat16)
        top = (6 * scale).bfloat16().expand(len(below), 1)
        blocks = torch.cat([below * signs, top], dim=1).contiguous()
        for ours, theirs in zip(eager.quantize(blocks, ONE), reference.quantize(blocks, ONE), strict=True):
            assert equal(ours, theirs)
        assert torch.equal(eager.fake_quantize(blocks, ONE), reference.fake_quantize(blocks, ONE))


@pytest.mark.parametrize("impl", IMPLS)
def test_block_scales_equal_exact_arithmetic_for_every_block_maximum(impl):
    maxima = all_positive_bf16()
    blocks = torch.zeros(len(maxima), BLOCK_SIZE, dtype=torch.bfloat16)
    blocks[:, 3] = -maxima
    scales = quantize_nvfp4(blocks, global_decode_scale=ONE, impl=impl).block_scale.float()[:, 0]
    # Below 2**-5 and above 4096 everything is clamped; check those by rule and the rest by fractions.
    values = maxima.double()
    assert bool((scales[values / 6 <= 2.0**-6] == 2.0**-6).all())
    assert bool((scales[values / 6 >= 448] == 448).all())
    inside = (values / 6 > 2.0**-6) & (values / 6 < 448)
    expected = [float(exact_e4m3(Fraction(value) / 6)) for value in values[inside].tolist()]
    assert scales[inside].tolist() == expected


def test_global_scale_equals_exact_arithmetic_for_every_amax():
    amax = all_positive_bf16()
    ours = global_decode_scale_of_amax(amax.float()).double().tolist()
    normal = [(value, scale) for value, scale in zip(amax.double().tolist(), ours, strict=True) if value > 2.0**-120]
    assert all(Fraction(scale) == exact_global_scale(Fraction(value)) for value, scale in normal)
    assert all(scale == 2.0**-100 for value, scale in zip(amax.double().tolist(), ours, strict=True) if value < 2**-91)


def test_global_scale_puts_every_top_block_scale_in_range_and_survives_requantization():
    amax = all_positive_bf16()
    amax = amax[(amax.float() > 2.0**-80) & (amax.float() < 2.0**100)]
    scale = global_decode_scale_of_amax(amax.float())
    top = (amax.float() / 6 / scale).to(torch.float8_e4m3fn).float()
    assert bool(((top >= 240) & (top <= 448)).all())
    assert torch.equal(global_decode_scale_of_amax(6 * top * scale), scale)


def test_the_simple_power_of_two_rule_does_not_survive_requantization():
    """Why the rule is not 2 ** ceil(log2(amax / 2688)): the top scale can round down to 224."""
    amax = torch.tensor(6 * 226.0)  # 226 rounds to 224 in E4M3
    simple = 2.0 ** torch.ceil(torch.log2(amax / 2688))
    assert simple == 1 and 2.0 ** torch.ceil(torch.log2(6 * torch.tensor(224.0) / 2688)) == 0.5
    assert global_decode_scale_of_amax(amax) == global_decode_scale_of_amax(torch.tensor(6 * 448.0 * 0.5)) == 0.5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_bfloat16_rounding_of_any_dtype_is_what_gets_quantized(impl, dtype):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    rounded = quantize_nvfp4(weight.to(torch.bfloat16), impl=impl)
    assert equal(quantize_nvfp4(weight, impl=impl).packed, rounded.packed)
    assert fake_quantize_nvfp4(weight, impl=impl).dtype == torch.bfloat16
    assert torch.equal(fake_quantize_nvfp4(weight, impl=impl), rounded.dequantize())


@pytest.mark.parametrize("impl", IMPLS)
def test_an_all_zero_weight_is_zero_with_scale_one(impl):
    weight = quantize_nvfp4(torch.zeros(4, 32), impl=impl)
    assert weight.global_decode_scale == 1
    assert not weight.packed.any() and not weight.dequantize().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_is_code_zero_and_never_negative_zero(impl):
    weight = torch.full((4, 32), -0.0)
    weight[0, 0] = 6.0
    weight[1, :16] = torch.tensor([-0.01, 6.0] * 8)  # rounds to zero from below
    quantized = quantize_nvfp4(weight, impl=impl)
    assert not (quantized.codes() == 8).any()
    assert not torch.signbit(fake_quantize_nvfp4(weight, impl=impl)).any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size, bound", [(1e-30, 0.2), (1.0, 0.11), (1e30, 0.11)])
def test_blocks_far_from_one_keep_their_relative_error(impl, size, bound):
    """At 1e-30 the global scale has reached 2**-100 and block scales have few steps left; nothing is flushed."""
    weight = (torch.randn(8, 64, generator=torch.Generator().manual_seed(2)) * size).bfloat16().double()
    values = fake_quantize_nvfp4(weight, impl=impl).double()
    assert (values - weight).norm() / weight.norm() < bound
    beside_large = fake_quantize_nvfp4(torch.cat([weight, torch.full_like(weight, 1e30)]), impl=impl)
    assert bool(beside_large.isfinite().all())


@pytest.mark.parametrize("bad, count", [(float("nan"), 1), (float("inf"), 2), (float("-inf"), 3)])
def test_nan_and_infinity_are_refused_and_counted(bad, count):
    weight = torch.ones(4, 32)
    weight.view(-1)[5 : 5 + count] = bad
    for door in (quantize_nvfp4, fake_quantize_nvfp4):
        with pytest.raises(ValueError, match=f"holds {count} such values .* among 128"):
            door(weight)


def test_a_float32_too_large_for_bfloat16_counts_as_infinity():
    weight = torch.full((2, 16), 3.4e38)
    with pytest.raises(ValueError, match="32 such values"):
        quantize_nvfp4(weight)


@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.ones(4, 40), "divisible by 16; weight has 40"),
        (torch.ones(32), r"shape \[32\]"),
        (torch.ones(4, 16, dtype=torch.int32), "torch.int32"),
        (torch.ones(4, 16).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
)
def test_a_tensor_without_nvfp4_form_is_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        quantize_nvfp4(weight)


@pytest.mark.parametrize("scale", [0.3, 0.0, -1.0, float("nan"), 2.0**-101, 2.0**101])
def test_a_global_scale_that_is_no_power_of_two_in_range_is_refused(scale):
    with pytest.raises(ValueError, match="power of two"):
        quantize_nvfp4(torch.ones(2, 16), global_decode_scale=torch.tensor(scale))


def test_a_global_scale_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \[3\] for a weight \[3, 2, 16\]"):
        quantize_nvfp4(torch.ones(3, 2, 16), global_decode_scale=ONE)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="auto, reference, eager, triton; got 'fast'"):
        quantize_nvfp4(torch.ones(2, 16), impl="fast")
    with pytest.raises(ValueError, match="needs the weight on an NVIDIA GPU"):
        quantize_nvfp4(torch.ones(2, 16), impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 16), (4, 0), (0, 4, 32), (3, 0, 32)])
def test_empty_weights_quantize_to_empty_records(impl, shape):
    weight = quantize_nvfp4(torch.empty(shape), impl=impl)
    assert weight.shape == shape and weight.dequantize().shape == shape
    assert fake_quantize_nvfp4(torch.empty(shape), impl=impl).shape == shape


@pytest.mark.parametrize("impl", IMPLS)
def test_non_contiguous_input_gives_the_same_as_its_copy(impl):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(3)).t()[::2]
    assert not weight.is_contiguous()
    assert equal(quantize_nvfp4(weight, impl=impl).packed, quantize_nvfp4(weight.contiguous(), impl=impl).packed)
    assert torch.equal(fake_quantize_nvfp4(weight, impl=impl), fake_quantize_nvfp4(weight.contiguous(), impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_experts_are_quantized_one_by_one_with_their_own_global_scale(impl):
    experts = (
        torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(4)) * torch.tensor([1e-3, 1, 1e3])[:, None, None]
    )
    together = quantize_nvfp4(experts, impl=impl)
    assert together.global_decode_scale.shape == (3,) and len(set(together.global_decode_scale.tolist())) == 3
    for index, expert in enumerate(experts):
        alone = quantize_nvfp4(expert, impl=impl)
        assert equal(together.packed[index], alone.packed)
        assert equal(together.block_scale[index], alone.block_scale)
        assert torch.equal(together.dequantize()[index], alone.dequantize())
    assert torch.equal(fake_quantize_nvfp4(experts, impl=impl), together.dequantize())


def test_input_is_never_written_to():
    weight = torch.randn(8, 32).bfloat16()
    before = weight.clone()
    quantize_nvfp4(weight)
    fake_quantize_nvfp4(weight)
    assert torch.equal(weight, before)


def test_fake_quantize_passes_the_gradient_straight_through():
    weight = torch.randn(4, 32, requires_grad=True)
    gradient = torch.randn(4, 32)
    fake_quantize_nvfp4(weight).float().backward(gradient.bfloat16().float())
    assert torch.equal(weight.grad, gradient.bfloat16().float())


def test_a_record_refuses_parts_that_do_not_belong_together():
    good = quantize_nvfp4(torch.ones(4, 32))
    with pytest.raises(ValueError, match="block_scale"):
        NVFP4Tensor(good.packed, good.block_scale[:2], good.global_decode_scale)
    with pytest.raises(ValueError, match="global_decode_scale"):
        NVFP4Tensor(good.packed, good.block_scale, good.global_decode_scale.double())


def test_the_worked_block_of_the_format_document():
    block = [0.42, -0.11, 0.05, 0.30, -0.27, 0.008, -0.35, 0.19, 0, 0.07, -0.02, 0.23, -0.16, 0.38, 0.12, -0.05]
    weight = quantize_nvfp4(torch.tensor([block]))
    document = (Path(numerics.__file__).parent / "FORMAT.md").read_text()
    assert weight.global_decode_scale == 2.0**-12 and "g = 2^(-4-8) = 2^-12" in document
    assert weight.block_scale.float().item() == 288 and "block_scale = 288" in document
    assert weight.packed.numpy().tobytes().hex(" ") == "b7 61 0e 5e 20 59 7c 93"
    assert "b7 61 0e 5e 20 59 7c 93" in document
    assert weight.dequantize()[0, :4].tolist() == [0.421875, -0.10546875, 0.03515625, 0.28125]


# Properties. Values: bfloat16 bit patterns with moderate exponents, zeros among them.
bf16_bits = st.integers(0, 0xFFFF).filter(lambda bits: 60 << 7 <= (bits & 0x7FFF) <= 190 << 7 or bits & 0x7FFF == 0)


@st.composite
def weights(draw, min_rows: int = 1) -> torch.Tensor:
    rows, blocks = draw(st.integers(min_rows, 4)), draw(st.integers(1, 3))
    # One exponent offset a row makes blocks of very different size, down to the scale floor.
    count = rows * blocks * 16
    bits = draw(st.lists(bf16_bits, min_size=count, max_size=count))
    return torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(rows, blocks * 16)


@given(weights(), st.sampled_from(SCALE_RULES))
def test_quantizing_a_dequantized_weight_changes_nothing(weight, scale_rule):
    once = quantize_nvfp4(weight, scale_rule=scale_rule)
    again = quantize_nvfp4(once.dequantize(), scale_rule=scale_rule)
    assert torch.equal(again.dequantize(), once.dequantize())
    assert torch.equal(again.global_decode_scale, once.global_decode_scale)


@given(weights(), st.sampled_from(SCALE_RULES))
def test_eager_and_reference_agree_bit_for_bit(weight, scale_rule):
    fast, plain = (quantize_nvfp4(weight, scale_rule=scale_rule, impl=impl) for impl in ("eager", "reference"))
    assert equal(fast.packed, plain.packed) and equal(fast.block_scale, plain.block_scale)
    assert torch.equal(fake_quantize_nvfp4(weight, scale_rule=scale_rule, impl="eager"), plain.dequantize())


@given(weights(min_rows=2), st.sampled_from(SCALE_RULES), st.data())
def test_row_shards_concatenate_to_the_whole_weight(weight, scale_rule, data):
    cut = data.draw(st.integers(1, weight.shape[0] - 1))
    whole = quantize_nvfp4(weight, scale_rule=scale_rule)
    shards = [
        quantize_nvfp4(rows, global_decode_scale=whole.global_decode_scale, scale_rule=scale_rule)
        for rows in (weight[:cut], weight[cut:])
    ]
    assert equal(torch.cat([shard.packed for shard in shards]), whole.packed)
    assert torch.equal(torch.cat([shard.dequantize() for shard in shards]), whole.dequantize())


@given(weights(), st.sampled_from(SCALE_RULES))
def test_negating_the_input_negates_the_output(weight, scale_rule):
    values = fake_quantize_nvfp4(weight, scale_rule=scale_rule)
    assert torch.equal(fake_quantize_nvfp4(-weight, scale_rule=scale_rule), -values)


@given(weights(), st.integers(-8, 8), st.sampled_from(SCALE_RULES))
def test_scaling_the_input_by_a_power_of_two_scales_the_output(weight, exponent, scale_rule):
    factor = 2.0**exponent
    scaled = fake_quantize_nvfp4(weight * factor, scale_rule=scale_rule)
    assert torch.equal(scaled, fake_quantize_nvfp4(weight, scale_rule=scale_rule) * factor)


@given(weights(), st.integers(-3, 0))
def test_inside_the_normal_range_the_values_do_not_depend_on_the_global_scale(weight, exponent):
    scale = global_decode_scale_of_amax(global_amax(weight))
    block_scale = quantize_nvfp4(weight).block_scale.float()
    other = scale * 2.0**-exponent  # a larger global scale: block scales shrink
    inside = (block_scale * 2.0**exponent >= 2.0**-6).repeat_interleave(16, dim=1)
    values, others = fake_quantize_nvfp4(weight), fake_quantize_nvfp4(weight, global_decode_scale=other)
    assert torch.equal(values[inside], others[inside])


def every_pair_of_maxima() -> torch.Tensor:
    """bfloat16 [2048, 512, 16]: matrices for each amax of two octaves, blocks in them for each maximum of four.

    In one of eight, blocks go up to the amax; in the others one block alone decides the global scale.
    """
    maxima = torch.arange(256).add(0x3F80).to(torch.int16).view(torch.bfloat16).float().repeat(8)  # 1 to 4
    lower = torch.cat([maxima[:256] / 4, maxima[:256]])
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(2048, 512, 16, generator=generator).mul_(2).sub_(1)
    blocks[:, :, 0] = 1
    highest = maxima / torch.ones(2048).index_fill_(0, torch.arange(256, 2048), 2.0)
    blocks *= torch.where(lower[None, :] <= highest[:, None], lower[None, :], 0.0)[..., None]
    blocks[:, 0] = torch.rand(2048, 16, generator=generator) * maxima[:, None]
    blocks[:, 0, 0] = maxima
    return blocks.bfloat16()


@pytest.mark.parametrize("scale_rule", SCALE_RULES)
def test_global_scales_survive_requantization_whatever_the_maxima_are(scale_rule):
    once = quantize_nvfp4(every_pair_of_maxima(), scale_rule=scale_rule)
    again = quantize_nvfp4(once.dequantize(), scale_rule=scale_rule)
    assert torch.equal(again.global_decode_scale, once.global_decode_scale)
    assert torch.equal(again.dequantize(), once.dequantize())


def test_without_its_bound_another_scale_moves_the_global_scale(monkeypatch):
    monkeypatch.setattr(eager, "TOP_VALUE_MIN", 0.0)
    once = quantize_nvfp4(every_pair_of_maxima(), scale_rule="mse")
    again = quantize_nvfp4(once.dequantize(), scale_rule="mse")
    assert not torch.equal(again.global_decode_scale, once.global_decode_scale)


def test_other_scales_have_the_least_error_of_those_they_are_chosen_from():
    """Against exact arithmetic, block by block, with every E4M3 scale that the rule allows."""
    weight = torch.randn(40, 16, generator=torch.Generator().manual_seed(3)).bfloat16()
    g = Fraction(float(global_decode_scale_of_amax(global_amax(weight))))
    scales = [Fraction(value) for value in all_normal_e4m3().float().tolist()]
    values = [Fraction(value) for value in E2M1_MAGNITUDES]

    def error(block: list[Fraction], scale: Fraction) -> Fraction:
        return sum((abs(x) / g - values[exact_code(abs(x), scale * g)] * scale) ** 2 for x in block)

    for rule in ("four_over_six", "mse"):
        found = quantize_nvfp4(weight, scale_rule=rule)
        for row, scale in zip(weight.tolist(), found.block_scale.float().view(-1).tolist(), strict=True):
            block = [Fraction(x) for x in row]
            top = max(map(abs, block))
            first = exact_e4m3(top / 6 / g)
            others = scales[scales.index(first) + 1 :][:5] if rule == "mse" else [exact_e4m3(top / 4 / g)]
            allowed = [first]
            for other in others:
                code_max = values[exact_code(top, other * g)]
                if code_max >= 4 and (first < 240 or code_max * other >= 1408):
                    allowed.append(other)
            assert error(block, Fraction(scale)) == min(error(block, other) for other in allowed)


@pytest.mark.parametrize(("scale_rule", "share"), [("four_over_six", 0.86), ("mse", 0.8)])
def test_choosing_scales_by_error_lessens_it(scale_rule, share):
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    errors = [
        (fake_quantize_nvfp4(weight, scale_rule=rule).float() - weight.float()).square().sum()
        for rule in (scale_rule, "amax")
    ]
    assert errors[0] < share * errors[1]


def test_an_unknown_scale_rule_is_refused():
    with pytest.raises(ValueError, match="`scale_rule` is one of amax, four_over_six, mse; got 'minmax'"):
        quantize_nvfp4(torch.ones(1, 16), scale_rule="minmax")


def _times_as_fast_as_the_plain_formula(rank: int) -> list[float]:
    weight = torch.randn(2048, 4096, generator=torch.Generator().manual_seed(5)).mul_(0.02).bfloat16()
    scale = global_decode_scale_of_amax(global_amax(weight))

    def best(function, repeats: int) -> float:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            function(weight, scale)
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    assert torch.equal(plain_formula(weight, scale), fake_quantize_unchecked(weight, scale))
    # A busy machine can spoil one measurement, not the best of several.
    return [best(plain_formula, 2) / best(fake_quantize_unchecked, 9) for _ in range(4)]


@pytest.mark.nightly
def test_eager_is_at_least_ten_times_faster_than_the_plain_formula():
    # In a process of its own: in one that has run other tests glibc keeps large tensors, of which the plain formula
    # makes more, and the ratio depends on what ran before.
    (ratios,) = in_processes(_times_as_fast_as_the_plain_formula, 1)
    assert max(ratios) > 10, ratios
