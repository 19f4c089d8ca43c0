"""Where a pushed tensor goes: rectangles of tensors, and how an engine's parameter is read back."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_nvfp4_qat.rollout.placement import slices
from hf_nvfp4_qat.rollout.vllm.loading import _region
from hf_nvfp4_qat.rollout.vllm.reading import _linear_bias, _linear_weight


@pytest.mark.parametrize(
    ("shape", "cut", "region"),
    [
        ((), lambda t: t, ()),
        ((), lambda t: t.view(1), ()),
        ((1,), lambda t: t[0], ((0, 1),)),
        ((128, 1, 4), lambda t: t, ((0, 128), (0, 1), (0, 4))),
        ((128, 1, 4), lambda t: t[32:64], ((32, 64), (0, 1), (0, 4))),
        ((128, 1, 4), lambda t: t.squeeze(1), ((0, 128), (0, 1), (0, 4))),
        ((1, 8), lambda t: t[:, 2:5], ((0, 1), (2, 5))),
        ((8, 1), lambda t: t[2:5], ((2, 5), (0, 1))),
        ((6, 8), lambda t: t[1], ((1, 2), (0, 8))),
        ((6, 8), lambda t: t[:, 7], ((0, 6), (7, 8))),
        ((6, 8), lambda t: t.t()[2:4, 1:3], ((1, 3), (2, 4))),
        ((6, 8), lambda t: t.view(-1), ((0, 6), (0, 8))),
        ((6, 8), lambda t: t[2:4].reshape(-1), ((2, 4), (0, 8))),
        ((6, 8), lambda t: t[6:], ((0, 0), (0, 0))),
        ((3, 4, 5), lambda t: t[1, 2:4], ((1, 2), (2, 4), (0, 5))),
    ],
)
def test_the_region_of_a_view_is_the_rectangle_it_covers(shape, cut, region):
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    part = cut(whole)
    assert _region(whole, part) == region
    assert sorted(whole[slices(region)].reshape(-1).tolist()) == sorted(part.reshape(-1).tolist())


def test_the_last_dim_widens_from_bytes_to_the_two_values_in_each():
    assert slices(((1, 2), (3, 5)), widen=2) == (slice(1, 2), slice(6, 10))
    assert slices(((3, 5),), widen=2) == (slice(6, 10),)
    assert slices((), widen=2) == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_is_asked_in_the_dtype_it_computes_in(dtype):
    """A router in float32 that is asked in bfloat16 reads past its input on a CPU."""
    linear = nn.Linear(48, 20, dtype=dtype)
    asked = []

    def apply(module, x, bias):
        asked.append(x.dtype)
        return F.linear(x, module.weight, bias)

    linear.input_size, linear.params_dtype, linear.quant_method = 48, dtype, SimpleNamespace(apply=apply)
    assert torch.equal(_linear_weight(linear, rows_at_once=32), linear.weight)
    assert torch.equal(_linear_bias(linear), linear.bias)
    assert set(asked) == {dtype}
