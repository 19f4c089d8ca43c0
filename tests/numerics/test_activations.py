"""NVFP4 activations: the formula element by element, and vLLM's own emulation as a witness."""

import math

import pytest
import torch

from hf_nvfp4_qat.numerics.activations import activation_amax, fake_quantize_activation
from hf_nvfp4_qat.numerics.format import E2M1_MAGNITUDES
from hf_nvfp4_qat.numerics.quantize import global_decode_scale_of_amax

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def rows_of_many_sizes(dtype, num_rows: int = 96, device: str = "cpu") -> torch.Tensor:
    """``[num_rows, 512]``: rows from 2**-13 to 2**12, one of zeros, one with a block that stands out."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, 512, generator=generator)
    x *= torch.exp2(torch.randint(-13, 13, (num_rows, 1), generator=generator).float())
    x[3] = 0
    x[5, 16:32] *= 1000
    return x.to(dtype).to(device)


def e4m3(value: float) -> float:
    """Nearest E4M3 value of a magnitude up to 448, ties to even."""
    step = 2.0 ** (max(math.floor(math.log2(value)), -6) - 3) if value else 1.0
    return round(value / step) * step


def by_the_formula(block: list[float], global_scale: float) -> list[float]:
    """One block; Python computes in float64, and only powers of two and E4M3 values are divided by."""
    scale = e4m3(min(max(map(abs, block)) / 6 / global_scale, 448.0)) * global_scale
    values = []
    for element in block:
        magnitude = min(abs(element) / scale, 6.0) if scale else 0.0
        # Ties to the even code, which is the one with an even index.
        nearest = min(range(8), key=lambda code: (abs(E2M1_MAGNITUDES[code] - magnitude), code % 2))
        values.append(math.copysign(E2M1_MAGNITUDES[nearest] * scale, element))
    return values


@pytest.mark.parametrize("exponent", [-20, -6, 0, 4])
def test_it_is_the_formula(exponent):
    x = rows_of_many_sizes(torch.bfloat16, 24)
    global_scale = torch.tensor(2.0**exponent)
    expected = torch.tensor([by_the_formula(block, 2.0**exponent) for block in x.view(-1, 16).tolist()])
    found = fake_quantize_activation(x, global_scale).float().view(-1, 16)
    # A reciprocal that is rounded may turn a tie, and nothing else.
    step = expected.abs().amax(1, keepdim=True) / 6
    assert ((found - expected).abs() <= 2 * step).all()
    assert (found != expected).float().mean() < 1e-3


@pytest.mark.vllm
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3])
def test_it_is_vllms_emulation_to_the_bit(dtype, size):
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import ref_nvfp4_quant_dequant

    x = rows_of_many_sizes(dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    scale = global_decode_scale_of_amax(activation_amax(x) * size)
    assert torch.equal(fake_quantize_activation(x, scale), ref_nvfp4_quant_dequant(x, 1 / scale, 16))


def test_small_blocks_keep_a_scale_of_their_own_down_to_the_last_subnormal_and_then_vanish():
    scale = torch.tensor(1.0)
    x = torch.zeros(3, 16)
    x[0, 0], x[1, 0], x[2, 0] = 6 * 2.0**-9, 6 * 2.0**-7 * 1.5, 6 * 2.0**-11
    assert torch.equal(fake_quantize_activation(x, scale)[:2], x[:2])
    assert not fake_quantize_activation(x, scale)[2].any()


@pytest.mark.parametrize("size", [10000.0, torch.finfo(torch.bfloat16).max])
def test_larger_blocks_than_there_is_room_for_are_clipped(size):
    x = torch.full((1, 16), size)
    assert (fake_quantize_activation(x, torch.tensor(1.0)) == 6 * 448).all()


def test_a_block_that_is_not_finite_becomes_nan_and_does_not_count_as_largest():
    x = rows_of_many_sizes(torch.bfloat16)
    x[0, 5], x[1, 20] = torch.nan, torch.inf
    found = fake_quantize_activation(x, torch.tensor(1.0)).isnan()
    assert found[0, :16].all() and found[1, 16:32].all() and found.sum() == 32
    assert activation_amax(x) == 0
    assert activation_amax(x[2:]) == x[2:].abs().max()


def test_shapes_strides_and_empty_tensors():
    x = rows_of_many_sizes(torch.bfloat16)
    scale = torch.tensor(1.0)
    whole = fake_quantize_activation(x, scale)
    assert torch.equal(fake_quantize_activation(x.view(2, 48, 512), scale), whole.view(2, 48, 512))
    assert torch.equal(fake_quantize_activation(x.t().contiguous().t(), scale), whole)
    assert fake_quantize_activation(x[:0], scale).shape == (0, 512)
    assert activation_amax(x[:0]) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [-20, -6, 0, 4])
def test_the_kernel_gives_the_same_bits(dtype, exponent):
    x = rows_of_many_sizes(dtype, 999)
    x[7, 5], x[8, 20] = torch.nan, torch.inf
    expected = fake_quantize_activation(x, torch.tensor(2.0**exponent))
    found = fake_quantize_activation(x.cuda(), torch.tensor(2.0**exponent, device="cuda")).cpu()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    magnitudes = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)
    blocks = torch.cat([magnitudes[None].expand(16, -1).t(), -magnitudes.flip(0)[:, None].expand(-1, 16)])
    expected = fake_quantize_activation(blocks, torch.tensor(2.0**exponent))
    found = fake_quantize_activation(blocks.cuda(), torch.tensor(2.0**exponent, device="cuda"))
    assert torch.equal(found.cpu(), expected)
