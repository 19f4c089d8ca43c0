"""The Triton kernels against the reference, bit for bit, on a CPU: Triton's interpreter runs them with NumPy.

On a GPU, test_triton.py goes through many more numbers. Two things are tested there alone. Encoding is written in PTX,
which the interpreter does not have. And where a conversion to bfloat16 must round, the interpreter cuts off: here,
weights of every dtype have bfloat16 values.

Whether kernels are compiled or interpreted is decided when Triton is imported, for good. All of it happens in a
process of its own, so that nothing else here (torch.compile imports Triton) ever sees the interpreter.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from hf_nvfp4_qat.numerics.activations import fake_quantize_activation
from hf_nvfp4_qat.numerics.format import SCALE_RULES
from hf_nvfp4_qat.numerics.quantize import (
    fake_quantize_nvfp4,
    global_amax,
    global_decode_scale_of_amax,
    quantize_nvfp4,
)
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor

pytest.importorskip("triton")
SHAPES = [(1, 16), (3, 48), (129, 80), (3, 5, 64)]


@pytest.fixture(scope="module")
def interpreter():
    """A process in which a kernel's launch is a call of NumPy."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("TRITON_INTERPRET", "1")
            process.submit(int).result()  # started, with this variable, which is taken back here
        yield process


def random_weight(shape: tuple[int, ...], dtype: torch.dtype, size: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * size).bfloat16().to(dtype)


def edges() -> torch.Tensor:
    """float32 [R, 32]: every tie of E2M1 under many scales, signed zeros, a block of zeros, sizes far apart."""
    ties = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    block = torch.cat([ties, -ties[:7]])
    scales = torch.arange(-6, 9).exp2()[:, None] * (torch.arange(8, 16)[:, None, None] / 8)
    blocks = (block * scales).view(-1, 16)
    return torch.cat([torch.zeros(1, 32), torch.cat([blocks, blocks.flip(0) * 2.0**-10], dim=1)])


def magnitudes() -> torch.Tensor:
    """bfloat16 [N, 16]: under each of some maxima, all magnitudes down to an eighth and more."""
    every = torch.arange(0x3E80, 0x4000, dtype=torch.int16).view(torch.bfloat16)  # 0.25 to 2
    blocks = []
    for top in every[256::9]:
        below = every[every <= top]
        below = below[len(below) % 15 :].view(-1, 15)
        blocks.append(torch.cat([below, top.expand(len(below), 1)], dim=1))
    return torch.cat(blocks)


WEIGHTS = {
    **{
        f"{shape} {dtype}": random_weight(shape, dtype) for shape in SHAPES for dtype in (torch.bfloat16, torch.float32)
    },
    "float16": random_weight((33, 64), torch.float16),
    "tiny": random_weight((33, 64), torch.float32, 1e-38),
    "huge": random_weight((33, 64), torch.float32, 1e30),
    "edges": edges(),
    "magnitudes": magnitudes(),
    "transposed": random_weight((64, 48), torch.bfloat16).t(),
    "experts by columns": random_weight((3, 32, 48), torch.float32).transpose(1, 2),
    "sliced": random_weight((40, 96), torch.float32)[3::7, 32:96],
}


def _fake_quantize(weight: torch.Tensor, scale: torch.Tensor, scale_rule: str) -> torch.Tensor:
    from hf_nvfp4_qat.numerics.triton_kernels import fake_quantize

    return fake_quantize(weight, scale, scale_rule)


@pytest.mark.parametrize("scale_rule", SCALE_RULES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_fake_quantization(interpreter, name, scale_rule):
    weight = WEIGHTS[name]
    scale = global_decode_scale_of_amax(global_amax(weight))
    found = interpreter.submit(_fake_quantize, weight, scale, scale_rule).result()
    assert torch.equal(found, fake_quantize_nvfp4(weight, scale_rule=scale_rule, impl="reference"))


def _dequantize(weight: NVFP4Tensor, out: torch.Tensor) -> torch.Tensor:
    from hf_nvfp4_qat.numerics.triton_decode import dequantize

    return dequantize(weight.packed, weight.block_scale, weight.global_decode_scale, out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", WEIGHTS)
def test_decoding(interpreter, name, dtype):
    packed = quantize_nvfp4(WEIGHTS[name], impl="reference")
    found = interpreter.submit(_dequantize, packed, torch.empty(packed.shape, dtype=dtype)).result()
    assert torch.equal(found, packed.dequantize(dtype, impl="reference"))


@pytest.mark.parametrize("global_scale", [2.0**-100, 0.37, 2.0**90])
def test_any_bytes_decode_as_the_formula_says(interpreter, global_scale):
    """Every block scale, subnormal, negative and NaN ones too, with every code."""
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(256, 1)
    codes = (
        torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8).expand(256, 8).contiguous()
    )
    weight = NVFP4Tensor(codes, scales, torch.tensor(global_scale))
    found = interpreter.submit(_dequantize, weight, torch.empty(256, 16)).result()
    expected = weight.dequantize(torch.float32, impl="reference")
    assert torch.equal(found.isnan(), expected.isnan()) and expected.isnan().sum() == 32
    numbers = ~expected.isnan()
    assert torch.equal(found[numbers].view(torch.int32), expected[numbers].view(torch.int32))


def _amaxes(weights: list[torch.Tensor], first_groups: list[int], num_groups: int) -> torch.Tensor:
    from hf_nvfp4_qat.numerics.triton_amax import AmaxPlan

    plan = AmaxPlan.of(weights, first_groups, num_groups)
    assert plan is not None
    return plan.run()


def test_amaxes_of_many_weights_at_once(interpreter):
    weights = [
        random_weight((70, 1040), torch.bfloat16),  # more than one chunk
        random_weight((37, 48), torch.float32, 3.0),
        random_weight((4, 16, 48), torch.bfloat16, 1e-3),
        torch.zeros(8, 16),
        torch.empty(0, 64, dtype=torch.bfloat16),
    ]
    amaxes = [weight.abs().amax((-2, -1)).float().view(-1) for weight in weights[:-1]]
    shared = torch.maximum(amaxes[0], amaxes[1])
    expected = torch.cat([shared, *amaxes[2:], torch.zeros(1)])
    assert torch.equal(interpreter.submit(_amaxes, weights, [0, 0, 1, 5, 6], 7).result(), expected)
    weights[1][5, 7] = torch.nan
    assert interpreter.submit(_amaxes, weights, [0, 0, 1, 5, 6], 7).result().isnan().nonzero().tolist() == [[0]]


def _decode_scales(amax: torch.Tensor) -> torch.Tensor:
    from hf_nvfp4_qat.numerics.triton_amax import decode_scales

    return decode_scales(amax)


def test_global_scales_of_every_amax(interpreter):
    magnitudes = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).float()
    amax = torch.cat([magnitudes, torch.tensor([torch.inf, torch.nan])])
    found = interpreter.submit(_decode_scales, amax).result()
    assert torch.equal(found[:-2], global_decode_scale_of_amax(magnitudes)) and found[-2:].isnan().all()


def _fake_quantize_activation(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    from hf_nvfp4_qat.numerics.triton_activations import fake_quantize

    return fake_quantize(x, scale)


@pytest.mark.parametrize("exponent", [-20, -6, 0, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_activations(interpreter, dtype, exponent):
    sizes = torch.arange(-13, 13).exp2()[:, None]
    x = (random_weight((26, 512), torch.float32) * sizes).to(dtype)
    x[3], x[7, 5], x[8, 20] = 0, torch.nan, torch.inf
    scale = torch.tensor(2.0**exponent)
    found, expected = (
        interpreter.submit(_fake_quantize_activation, x, scale).result(),
        fake_quantize_activation(x, scale),
    )
    assert torch.equal(found.isnan(), expected.isnan()) and expected.isnan().sum() == 32
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def _is_interpreted() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def test_only_that_process_interprets(interpreter):
    assert interpreter.submit(_is_interpreted).result() and not _is_interpreted()
