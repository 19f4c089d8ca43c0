"""The Triton kernels against the reference, bit for bit, on a GPU."""

import logging

import pytest
import torch

from hf_nvfp4_qat import fake_quantize_nvfp4, prepare_qat, quantize_nvfp4
from hf_nvfp4_qat.numerics.format import SCALE_RULES
from hf_nvfp4_qat.numerics.group_amax import GroupAmax
from hf_nvfp4_qat.numerics.quantize import (
    fake_quantize_unchecked,
    global_amax,
    global_decode_scale_of_amax,
    quantize_unchecked,
)
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor

pytestmark = pytest.mark.gpu


def assert_equals_reference(weight, **kwargs):
    expected = quantize_nvfp4(weight, impl="reference", **kwargs)
    found = quantize_nvfp4(weight, impl="triton", **kwargs)
    assert torch.equal(found.packed, expected.packed)
    assert torch.equal(found.block_scale.view(torch.uint8), expected.block_scale.view(torch.uint8))
    assert torch.equal(found.global_decode_scale, expected.global_decode_scale)
    values = expected.dequantize(impl="reference")
    assert torch.equal(found.dequantize(impl="triton"), values)
    assert torch.equal(fake_quantize_nvfp4(weight, impl="triton", **kwargs), values)


def all_magnitudes() -> torch.Tensor:
    """bfloat16 [32640]: every finite magnitude, in order."""
    return torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).cuda()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("scale_rule", SCALE_RULES)
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (257, 1040), (1024, 4096), (4, 64, 256), (2, 3, 32, 64)])
def test_random_weights(shape, size, dtype, scale_rule):
    torch.manual_seed(0)
    weight = torch.randn(shape, device="cuda", dtype=torch.float64) * size
    weight = weight.nan_to_num().clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else weight.to(dtype)
    assert_equals_reference(weight, scale_rule=scale_rule)


def test_every_magnitude_below_many_block_maxima_of_both_signs():
    magnitudes = all_magnitudes()
    for top in magnitudes[magnitudes > 0][::389]:
        below = magnitudes[magnitudes <= top]
        below = torch.cat([below, below.new_zeros(-len(below) % 15)]).view(-1, 15)
        blocks = torch.cat([below, top.expand(len(below), 1)], dim=1)
        for exponent in (-20, -8, 0):
            scale = torch.tensor(2.0**exponent, device="cuda")
            assert_equals_reference(torch.cat([blocks, -blocks]), global_decode_scale=scale)


@pytest.mark.parametrize("scale_rule", ["four_over_six", "mse"])
def test_scales_chosen_by_error_near_every_edge(scale_rule):
    """Blocks of sizes from below the smallest scale to the largest value, and those at the top of their matrix."""
    torch.manual_seed(0)
    sizes = torch.logspace(-9, 0, 4096, base=10, device="cuda")[:, None]
    for spread in (0.1, 1.0):
        weight = (torch.randn(4096, 256, device="cuda") * spread + 1) * sizes
        assert_equals_reference(weight, scale_rule=scale_rule)


def test_fp32_masters_are_rounded_to_bf16_first():
    magnitudes = all_magnitudes()[:-1].float()
    halfway = (magnitudes.view(torch.int32) + 0x8000).view(torch.float32)
    for values in (halfway, halfway.nextafter(halfway * 2), halfway.nextafter(halfway * 0)):
        values = torch.cat([values, -values])
        assert_equals_reference(values[: len(values) // 16 * 16].view(-1, 16))


def test_ties_and_the_global_scales_of_every_power():
    ties = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], device="cuda")
    block = torch.cat([ties, -ties[:7]])
    scales = torch.arange(-6, 9, device="cuda").exp2()[:, None]
    mantissas = torch.arange(8, 16, device="cuda")[:, None, None] / 8
    weight = (block * scales * mantissas).view(-1, 16)
    for exponent in range(-100, 101, 10):
        assert_equals_reference(weight * 2.0**exponent)
        assert_equals_reference(weight * 2.0**exponent, global_decode_scale=torch.tensor(1.0, device="cuda"))


def test_zeros_and_strided_input():
    assert_equals_reference(torch.zeros(64, 64, device="cuda"))
    weight = torch.randn(6, 256, 512, device="cuda")
    assert_equals_reference(weight[0].t())
    assert_equals_reference(weight.transpose(1, 2))
    assert_equals_reference(weight.transpose(0, 1))
    assert_equals_reference(weight[::2, 3:100:7, 32:96])
    assert_equals_reference(weight.bfloat16()[:, ::2, 32:96])
    assert_equals_reference(weight.flatten()[5 : 5 + 64 * 48].view(64, 48))


def test_experts_have_scales_of_their_own():
    weight = (
        torch.randn(5, 48, 64, device="cuda") * torch.tensor([1e-6, 1.0, 1e6, 1e-3, 0.0], device="cuda")[:, None, None]
    )
    assert_equals_reference(weight)
    together = fake_quantize_nvfp4(weight)
    for expert in range(5):
        assert torch.equal(together[expert], fake_quantize_nvfp4(weight[expert]))


def test_more_than_2_to_the_31_elements():
    rows = 2**31 // 4096 + 3
    weight = torch.empty(rows, 4096, dtype=torch.bfloat16, device="cuda").normal_()
    scale = torch.tensor(2.0**-9, device="cuda")
    values, packed = fake_quantize_unchecked(weight, scale), quantize_unchecked(weight, scale)
    assert torch.equal(packed.dequantize(), values)
    for part in (slice(0, 8), slice(rows // 2, rows // 2 + 8), slice(rows - 8, rows)):
        assert torch.equal(values[part], fake_quantize_unchecked(weight[part], scale, impl="reference"))
    assert GroupAmax([weight], [0], 1)([weight]) == weight.abs().max()


def test_a_weight_with_nan_decodes_to_nan():
    weight = torch.ones(2, 16, device="cuda")
    weight[0, 3] = float("nan")
    values = fake_quantize_unchecked(weight, torch.tensor(float("nan"), device="cuda"))
    assert values.isnan().all()
    scale = torch.tensor(2.0**-10, device="cuda")
    values = fake_quantize_unchecked(weight, scale)
    assert values[0].isnan().all()
    assert torch.equal(values[1], fake_quantize_unchecked(weight[1:], scale, impl="reference")[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_bytes_decode_as_the_formula_says(dtype):
    """Other tools write subnormal and negative scales, negative zeros, and global scales that are no power of two."""
    scales = torch.arange(256, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn).view(256, 1)
    packed = torch.randint(0, 256, (256, 8), dtype=torch.uint8, device="cuda")
    for global_scale in (2.0**-100, 0.37, 1.0, 2.0**90):
        weight = NVFP4Tensor(packed, scales, torch.tensor(global_scale, device="cuda"))
        expected, found = weight.dequantize(dtype, impl="reference"), weight.dequantize(dtype, impl="triton")
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())
        assert torch.equal(found.signbit(), expected.signbit()) or expected.isnan().any()


def test_amaxes_of_many_weights_at_once():
    torch.manual_seed(0)
    weights = [
        torch.randn(4096, 4096, device="cuda").bfloat16(),
        torch.randn(37, 48, device="cuda"),
        torch.randn(6, 512, 1040, device="cuda").bfloat16() * 1e-3,
        torch.zeros(8, 16, device="cuda"),
        torch.randn(100, 16, device="cuda") * 1e30,
        torch.empty(0, 64, device="cuda", dtype=torch.bfloat16),
    ]
    first_groups = [0, 0, 1, 7, 8, 9]
    amax = GroupAmax(weights, first_groups, 10)
    expected = torch.cat([global_amax(weight).view(-1) for weight in weights])
    shared = torch.maximum(expected[0], expected[1])
    assert torch.equal(amax(weights), torch.cat([shared.view(1), expected[2:]]))
    weights[2][3, 5, 7] = 1e5
    assert amax(weights)[4] == torch.tensor(1e5).bfloat16().float()
    weights[4][50, 3] = float("nan")
    assert amax(weights).isnan().nonzero().tolist() == [[8]]
    assert amax.fits(weights, first_groups) and not amax.fits([weight.clone() for weight in weights], first_groups)


def test_scales_of_every_amax():
    amax = torch.cat([all_magnitudes().float(), torch.tensor([torch.inf, torch.nan], device="cuda")])
    found, expected = global_decode_scale_of_amax(amax), global_decode_scale_of_amax(amax.cpu())
    assert torch.equal(found.cpu()[:-2], expected[:-2]) and found[-2:].isnan().all()


def test_auto_picks_triton_and_equals_the_cpu(caplog):
    weight = torch.randn(128, 256)
    with caplog.at_level(logging.INFO, logger="hf_nvfp4_qat"):
        found = quantize_nvfp4(weight.cuda())
        quantize_nvfp4(weight.cuda())
    assert len([record for record in caplog.records if 'picked "triton"' in record.message]) <= 1
    expected = quantize_nvfp4(weight)
    assert torch.equal(found.packed.cpu(), expected.packed)
    assert torch.equal(found.block_scale.cpu().view(torch.uint8), expected.block_scale.view(torch.uint8))


def test_one_graph_under_compile():
    weight, scale = torch.randn(64, 128, device="cuda"), torch.tensor(2.0**-10, device="cuda")
    compiled = torch.compile(lambda weight: fake_quantize_unchecked(weight, scale) * 2, fullgraph=True)
    assert torch.equal(compiled(weight), fake_quantize_unchecked(weight, scale) * 2)


def test_a_captured_step_refreshes_the_scales_and_equals_the_eager_one():
    """Forward, backward, optimizer and the refresh in one CUDA graph: no host synchronization anywhere."""
    torch.manual_seed(0)
    inputs = torch.randn(32, 64, device="cuda")

    def make():
        torch.manual_seed(1)
        model = prepare_qat(
            torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 64)).cuda()
        )
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, capturable=True)

    def step(model, optimizer):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    eager, captured = make(), make()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*captured)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*captured)
    for _ in range(4):
        graph.replay()
    for _ in range(7):
        step(*eager)
    for mine, theirs in zip(captured[0].modules(), eager[0].modules(), strict=True):
        if hasattr(mine, "global_decode_scale"):
            assert torch.equal(mine.weight, theirs.weight)
            assert torch.equal(mine.global_decode_scale, theirs.global_decode_scale)
            expected = global_decode_scale_of_amax(global_amax(mine.weight))
            assert torch.equal(mine.global_decode_scale, expected)


def test_a_refresh_does_not_wait_for_the_gpu():
    model = prepare_qat(torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(20)]).cuda())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(4, 256, device="cuda")).sum().backward()
        optimizer.step()
    model(torch.randn(4, 256, device="cuda")).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
