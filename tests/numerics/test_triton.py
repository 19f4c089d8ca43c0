"""The Triton kernels against the reference, bit for bit, on a GPU."""

import pytest
import torch

from hf_nvfp4_qat import fake_quantize_nvfp4, quantize_nvfp4
from hf_nvfp4_qat.numerics.quantize import fake_quantize_unchecked

pytestmark = pytest.mark.gpu


def assert_equals_reference(weight, **kwargs):
    expected = quantize_nvfp4(weight, impl="reference", **kwargs)
    found = quantize_nvfp4(weight, impl="triton", **kwargs)
    assert torch.equal(found.packed, expected.packed)
    assert torch.equal(found.block_scale.view(torch.uint8), expected.block_scale.view(torch.uint8))
    assert torch.equal(found.global_decode_scale, expected.global_decode_scale)
    assert torch.equal(fake_quantize_nvfp4(weight, impl="triton", **kwargs), expected.dequantize())


def all_magnitudes() -> torch.Tensor:
    """bfloat16 [32640]: every finite magnitude, in order."""
    return torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).cuda()


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (257, 1040), (1024, 4096), (4, 64, 256)])
def test_random_weights(shape, size):
    torch.manual_seed(0)
    assert_equals_reference(torch.randn(shape, device="cuda") * size)


def test_every_magnitude_below_many_block_maxima_of_both_signs():
    magnitudes = all_magnitudes()
    for top in magnitudes[magnitudes > 0][::97]:
        below = magnitudes[magnitudes <= top]
        below = torch.cat([below, below.new_zeros(-len(below) % 15)]).view(-1, 15)
        blocks = torch.cat([below, top.expand(len(below), 1)], dim=1)
        for exponent in (-20, -8, 0):
            scale = torch.tensor(2.0**exponent, device="cuda")
            assert_equals_reference(torch.cat([blocks, -blocks]), global_decode_scale=scale)


def test_ties_and_the_global_scales_of_every_power():
    ties = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], device="cuda")
    block = torch.cat([ties, -ties[:7]])
    scales = torch.arange(-6, 9, device="cuda").exp2()[:, None]
    for exponent in range(-100, 101, 10):
        assert_equals_reference(block * scales * 2.0**exponent)
        assert_equals_reference(block * scales * 2.0**exponent, global_decode_scale=torch.tensor(1.0, device="cuda"))


def test_zeros_and_strided_input():
    assert_equals_reference(torch.zeros(64, 64, device="cuda"))
    assert_equals_reference(torch.randn(256, 512, device="cuda").t())
    assert_equals_reference(torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)[::2, 32:96])


def test_a_weight_with_nan_decodes_to_nan():
    weight = torch.ones(2, 16, device="cuda")
    weight[0, 3] = float("nan")
    values = fake_quantize_unchecked(weight, torch.tensor(float("nan"), device="cuda"))
    assert values.isnan().all()
    scale = torch.tensor(2.0**-10, device="cuda")
    values = fake_quantize_unchecked(weight, scale)
    assert values[0].isnan().all()
    assert torch.equal(values[1], fake_quantize_unchecked(weight[1:], scale, impl="reference")[0])


def test_auto_picks_triton_and_equals_the_cpu():
    weight = torch.randn(128, 256)
    found = quantize_nvfp4(weight.cuda())
    expected = quantize_nvfp4(weight)
    assert torch.equal(found.packed.cpu(), expected.packed)
    assert torch.equal(found.block_scale.cpu().view(torch.uint8), expected.block_scale.view(torch.uint8))


def test_one_graph_under_compile():
    weight, scale = torch.randn(64, 128, device="cuda"), torch.tensor(2.0**-10, device="cuda")
    compiled = torch.compile(lambda weight: fake_quantize_unchecked(weight, scale) * 2, fullgraph=True)
    assert torch.equal(compiled(weight), fake_quantize_unchecked(weight, scale) * 2)
