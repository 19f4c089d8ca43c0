"""QATLinear with NVFP4 inputs (W4A4), and their calibration."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import load_qat, tiny_llama, tiny_qwen3, tiny_qwen3_moe, tokens
from processes import in_processes
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_nvfp4_qat import NVFP4QATConfig, calibrate_activations, coverage, prepare_qat
from hf_nvfp4_qat.modules.swap import qat_modules
from hf_nvfp4_qat.numerics.activations import activation_amax, fake_quantize_activation
from hf_nvfp4_qat.numerics.quantize import global_decode_scale_of_amax

W4A4 = NVFP4QATConfig(activations="nvfp4")


def make_layer(dtype=torch.float32, bias: bool = True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, bias=bias, dtype=dtype))
    return prepare_qat(model, W4A4)[0].train()


def make_input(dtype=torch.float32, **kwargs):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 8, 64, generator=generator).to(dtype).requires_grad_(**kwargs)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients_are_those_of_quantized_input_and_weight_straight_through(dtype, compiled):
    layer, x = make_layer(dtype), make_input(dtype)
    out = (torch.compile(layer) if compiled else layer)(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    scale = global_decode_scale_of_amax(activation_amax(x))
    x_leaf = fake_quantize_activation(x, scale).requires_grad_()
    weight = layer.fake_quantized_weight().to(dtype).requires_grad_()
    expected = F.linear(x_leaf, weight, layer.bias)
    expected.backward(grad)
    assert torch.equal(out, expected)
    assert torch.equal(x.grad, x_leaf.grad)
    assert torch.equal(layer.weight.grad, weight.grad)
    assert not torch.equal(x_leaf, x)
    assert layer.input_amax == activation_amax(x)


def test_layers_that_share_an_input_keep_it_once_and_as_it_is():
    first, second, x = make_layer(), make_layer(), make_input()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda _: x):
        first(x), second(x)
    assert kept.count(x.data_ptr()) == 2
    assert set(kept) == {x.data_ptr(), first.weight.data_ptr(), second.weight.data_ptr()}


def test_the_scale_follows_the_largest_input_in_training_and_stays_in_evaluation():
    layer, x = make_layer(), make_input(requires_grad=False)
    layer(x)
    layer(x * 0.1)
    assert layer.input_amax == activation_amax(x)
    layer.eval()
    layer(x * 100)
    assert layer.input_amax == activation_amax(x)
    scale = global_decode_scale_of_amax(layer.input_amax)
    clipped = fake_quantize_activation(x * 100, scale)
    assert torch.equal(layer(x * 100), F.linear(clipped, layer.fake_quantized_weight().float(), layer.bias))
    assert clipped.max() == 6 * 448 * scale


def test_before_any_training_the_scale_is_that_of_the_input_itself():
    layer, x = make_layer().eval(), make_input(requires_grad=False)
    quantized = fake_quantize_activation(x, global_decode_scale_of_amax(activation_amax(x)))
    assert torch.equal(layer(x), F.linear(quantized, layer.fake_quantized_weight().float(), layer.bias))
    assert layer.input_amax == 0


def test_an_input_that_is_not_finite_does_not_spoil_the_scale():
    layer, x = make_layer(), make_input(requires_grad=False)
    layer(x)
    bad = x.clone()
    bad[0, 0, 0] = torch.inf
    assert layer(bad).isnan().any()
    assert layer.input_amax == activation_amax(x)


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for again in (False, True):
        layer, x = make_layer(), make_input()
        out = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        out.square().sum().backward()
        gradients.append((x.grad, layer.weight.grad, layer.input_amax))
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_autocast_gives_the_same_numbers_with_a_weight_that_comes_quantized():
    """As FSDP2 gathers it; the input is rounded to the dtype of the product before it is quantized, in both cases."""
    layer, gathered, x = make_layer(), make_layer(), make_input(requires_grad=False)
    gathered.nvfp4_weight.is_gathered = True
    with torch.no_grad():
        gathered.weight.copy_(layer.fake_quantized_weight())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gathered(x), layer(x))
    assert gathered.input_amax == layer.input_amax == activation_amax(x.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_keeps_the_largest_input_in_float32(dtype):
    layer = make_layer()
    layer(make_input() * 1e6)
    amax = layer.input_amax.clone()
    assert layer.to(dtype).input_amax.dtype == torch.float32
    assert layer.input_amax == amax


def test_copies_pickles_and_state_dicts_carry_the_largest_input():
    layer, x = make_layer(), make_input(requires_grad=False)
    layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.input_amax == layer.input_amax
        other(10 * x)
        assert other.input_amax > layer.input_amax
    fresh = make_layer()
    fresh.load_state_dict(layer.state_dict())
    assert fresh.input_amax == layer.input_amax


def test_weights_of_a_model_without_nvfp4_inputs_load_and_leave_the_largest_input():
    layer = make_layer()
    layer(make_input())
    amax = layer.input_amax.clone()
    layer.load_state_dict(nn.Linear(64, 48).state_dict())
    assert layer.input_amax == amax


def test_a_model_with_16_bit_inputs_holds_nothing_more():
    model = prepare_qat(tiny_qwen3())
    assert not any("input_amax" in name for name in model.state_dict())


def test_siblings_that_vllm_fuses_see_the_same_input():
    model = prepare_qat(tiny_llama(), W4A4).train()
    model(input_ids=tokens())
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.input_amax == layer.self_attn.k_proj.input_amax == layer.self_attn.v_proj.input_amax
    assert layer.mlp.gate_proj.input_amax == layer.mlp.up_proj.input_amax > 0
    assert "input=nvfp4" in repr(layer)


def test_calibration_measures_anew_without_dropout_and_gives_the_modes_back():
    model = prepare_qat(tiny_qwen3(attention_dropout=0.5), W4A4)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    for layer in qat_modules(model).values():
        layer.input_amax.fill_(1e9)
    assert calibrate_activations(model, [tokens(), {"input_ids": tokens() + 1}]) == 14
    first = [layer.input_amax.item() for layer in qat_modules(model).values()]
    calibrate_activations(model, [tokens(), {"input_ids": tokens() + 1}])
    assert first == [layer.input_amax.item() for layer in qat_modules(model).values()]
    assert max(first) < 1e9 and min(first) > 0
    assert modes == [module.training for module in model.modules()]


def test_calibration_needs_a_model_that_quantizes_inputs_and_data_that_reaches_all_layers():
    with pytest.raises(ValueError, match="activations='nvfp4'"):
        calibrate_activations(prepare_qat(tiny_qwen3()), [tokens()])
    with pytest.raises(ValueError, match="14 of 14 have seen none"):
        calibrate_activations(prepare_qat(tiny_qwen3(), W4A4), [])


def test_fused_experts_are_refused_and_may_be_left_out():
    with pytest.raises(ValueError, match=r"fused experts.*re:\.\*experts\$"):
        prepare_qat(tiny_qwen3_moe(), W4A4)
    model = prepare_qat(tiny_qwen3_moe(), NVFP4QATConfig(activations="nvfp4", exclude=["re:.*experts$"]))
    assert len(coverage(model).quantized) == 8


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="`activations` is one of bf16, nvfp4; got 'fp8'"):
        NVFP4QATConfig(activations="fp8")


def test_from_pretrained_starts_from_zero_and_a_training_checkpoint_goes_on(qwen3_dir, tmp_path):
    model = load_qat(qwen3_dir, W4A4)
    assert all(layer.input_amax == 0 for layer in qat_modules(model).values())
    calibrate_activations(model, [tokens()])
    path = tmp_path / "checkpoint-1"
    model.save_pretrained(path)
    for dtype in (torch.float32, torch.bfloat16):
        again = load_qat(path, W4A4, dtype=dtype)
        for name, layer in qat_modules(again).items():
            amax = qat_modules(model)[name].input_amax
            assert layer.input_amax.dtype == torch.float32
            assert global_decode_scale_of_amax(layer.input_amax) == global_decode_scale_of_amax(amax)
    narrow = load_qat(path, NVFP4QATConfig(activations="nvfp4", preset="ffn_only"))
    assert all(layer.input_amax == 0 for layer in qat_modules(narrow).values())


def _train(rank: int) -> list[float]:
    model = prepare_qat(tiny_qwen3(), W4A4).train()
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for step in range(2):
        batch = (tokens() + 11 * rank + step) % 128
        parallel(input_ids=batch, labels=batch).loss.backward()
        own = [layer.input_amax.item() for layer in qat_modules(model).values()]
        optimizer.step()
    return own, [layer.input_amax.item() for layer in qat_modules(model).values()]


@pytest.mark.slow
def test_processes_share_the_largest_input_at_each_step():
    (first, shared), (second, also_shared) = in_processes(_train)
    assert first != second
    assert shared == also_shared == [max(pair) for pair in zip(first, second, strict=True)]
