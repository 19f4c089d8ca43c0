"""QATLinear: what changes in a linear layer, and everything that must not."""

import copy
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import take_step, tiny_qwen3, tokens
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_nvfp4_qat import fake_quantize_nvfp4, prepare_qat
from hf_nvfp4_qat.modules.global_scale import GlobalScales
from hf_nvfp4_qat.modules.linear import QATLinear
from hf_nvfp4_qat.modules.swap import qat_modules
from hf_nvfp4_qat.numerics.quantize import quantize_unchecked


def make_linear(dtype=torch.float32, bias: bool = True) -> QATLinear:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias, dtype=dtype)
    layer = QATLinear.adopt(linear, name="layer", scale_group="layer", global_scales=GlobalScales())
    layer.nvfp4_weight.global_scales.refresh()
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_all_gradients_equal_plain_autograd_through_the_fake_quantized_weight(dtype, bias):
    layer = make_linear(dtype, bias)
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    layer(x).square().sum().backward()
    got = [x.grad.clone(), layer.weight.grad.clone()] + ([layer.bias.grad.clone()] if bias else [])
    x.grad = None
    layer.zero_grad()
    weight = fake_quantize_nvfp4(layer.weight).detach().to(dtype).requires_grad_()
    F.linear(x, weight, layer.bias).square().sum().backward()
    expected = [x.grad, weight.grad] + ([layer.bias.grad] if bias else [])
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_autograd_keeps_no_second_copy_of_the_weight():
    layer = make_linear()
    x = torch.randn(4, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    storages = {tensor.untyped_storage().data_ptr() for tensor in saved}
    assert storages == {x.untyped_storage().data_ptr(), layer.weight.untyped_storage().data_ptr()}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_saves_what_it_saves_without_qat(compiled):
    """Whatever arranges the backward, 1.25 bytes a weight and more would come back without `after`."""

    def saved_bytes(model):
        block = torch.compile(model, backend="aot_eager_decomp_partition") if compiled else model
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
        ):
            loss = block(torch.randn(4, 64)).square().mean()
        for tensor in (*model.parameters(), *model.buffers()):
            saved.pop(tensor.untyped_storage().data_ptr(), None)
        loss.backward()
        return sum(saved.values())

    plain = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64))
    expected = saved_bytes(plain)
    assert saved_bytes(prepare_qat(plain)) <= expected + 16


class CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    num = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


def test_gradient_checkpointing_computes_no_more_products_again_than_without_qat():
    def num_products(model):
        x = torch.randn(4, 64, requires_grad=True)
        with CountProducts() as count:
            checkpoint(model, x, use_reentrant=False).sum().backward()
        return count.num

    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    expected = num_products(model)
    assert expected == 2 + 1 + 4  # the last product is not needed again
    assert num_products(prepare_qat(model)) == expected


def test_a_bias_trains_alone():
    layer = make_linear()
    layer.weight.requires_grad_(False)
    layer(torch.randn(4, 64)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((48,), 4.0)) and layer.weight.grad is None


def test_a_frozen_weight_keeps_no_input_and_gets_no_gradient():
    layer = make_linear().requires_grad_(False)
    x = torch.randn(4, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert [tensor.shape for tensor in saved] == [layer.weight.shape]
    y.sum().backward()
    assert x.grad is not None and layer.weight.grad is None


def test_adopting_keeps_the_object_its_parameters_hooks_and_requires_grad():
    linear = nn.Linear(32, 16)
    linear.weight.requires_grad_(False)
    calls = []
    linear.register_forward_hook(lambda *_: calls.append(1))
    weight, bias = linear.weight, linear.bias
    layer = QATLinear.adopt(linear, name="x", scale_group="x", global_scales=GlobalScales())
    assert layer is linear and layer.weight is weight and layer.bias is bias and not layer.weight.requires_grad
    layer(torch.randn(1, 32))
    assert calls == [1]
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_adopting_an_indivisible_layer_names_it():
    with pytest.raises(ValueError, match=r"in_features divisible by 16; lm_head has 4001. Add it to `exclude`"):
        QATLinear.adopt(nn.Linear(4001, 8), name="lm_head", scale_group="", global_scales=GlobalScales())


def test_accelerate_hooks_put_on_before_still_reach_the_quantized_forward():
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    add_hook_to_module(linear, ModelHook())
    layer = QATLinear.adopt(linear, name="x", scale_group="x", global_scales=GlobalScales())
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), F.linear(x, layer.fake_quantized_weight().float(), layer.bias))
    remove_hook_from_module(layer)
    assert torch.equal(layer(x), F.linear(x, layer.fake_quantized_weight().float(), layer.bias))


def test_a_forward_patched_on_the_instance_is_refused():
    linear = nn.Linear(32, 16)
    linear.forward = lambda x: x
    with pytest.raises(ValueError, match="up_proj carries a patched forward of its own"):
        QATLinear.adopt(linear, name="up_proj", scale_group="x", global_scales=GlobalScales())
    assert type(linear) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_gives_fp32_gradients(dtype):
    layer = make_linear()
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, F.linear(x.to(dtype), layer.fake_quantized_weight().to(dtype), layer.bias.to(dtype)))
    y.float().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


def test_mixed_dtypes_without_autocast_are_refused_as_by_nn_linear():
    with pytest.raises(RuntimeError, match="dtype"):
        make_linear(torch.float32)(torch.randn(2, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_module_keeps_the_scale_in_float32(dtype):
    layer = make_linear()
    with torch.no_grad():
        layer.weight.mul_(2.0**-18)
    expected = layer.fake_quantized_weight()
    scale = layer.global_decode_scale.clone()
    assert scale < 2.0**-25  # float16 could not hold it
    layer.to(dtype)
    assert layer.global_decode_scale.dtype == torch.float32 and torch.equal(layer.global_decode_scale, scale)
    if dtype != torch.float16:
        assert torch.equal(layer.fake_quantized_weight(), expected)


def test_changing_the_weight_between_forward_and_backward_raises():
    layer = make_linear()
    y = layer(torch.randn(2, 64, requires_grad=True))
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_weight_with_nan_gives_nan_not_a_silent_number():
    layer = make_linear()
    with torch.no_grad():
        layer.weight[3, 5] = float("nan")
    assert layer(torch.ones(1, 64)).isnan().all()


def test_torch_compile_has_one_graph_and_the_same_numbers():
    layer = make_linear()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 64, requires_grad=True)
    compiled(x).square().sum().backward()
    gradients = (x.grad.clone(), layer.weight.grad.clone())
    x.grad = layer.weight.grad = None
    layer(x).square().sum().backward()
    assert torch.equal(gradients[0], x.grad) and torch.equal(gradients[1], layer.weight.grad)


def test_packing_and_unpacking_are_in_the_graph_of_torch_compile():
    weight, scale = torch.randn(48, 64), torch.tensor(2.0**-10)

    def round_trip(weight, scale):
        return quantize_unchecked(weight * 2, scale).dequantize(torch.float32) + 1

    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight, scale), round_trip(weight, scale))


def test_copies_and_pickles_are_independent_and_fresh():
    layer = make_linear()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is QATLinear and twin.nvfp4_weight.global_scales is not layer.nvfp4_weight.global_scales
        with torch.no_grad():
            twin.weight.mul_(1000)
        assert torch.equal(twin.fake_quantized_weight(), fake_quantize_nvfp4(twin.weight))
        assert torch.equal(layer.fake_quantized_weight(), fake_quantize_nvfp4(layer.weight))


def test_a_layer_can_be_freed():
    layer = make_linear()
    layer(torch.randn(1, 64))
    gone = weakref.ref(layer)
    del layer
    assert gone() is None


PARAMETRIZATIONS = {
    "weight_norm": (nn.utils.parametrizations.weight_norm, parametrize.remove_parametrizations),
    "spectral_norm": (nn.utils.parametrizations.spectral_norm, parametrize.remove_parametrizations),
    "old weight_norm": (nn.utils.weight_norm, lambda layer, _: nn.utils.remove_weight_norm(layer)),
    "old spectral_norm": (nn.utils.spectral_norm, lambda layer, _: nn.utils.remove_spectral_norm(layer)),
    "pruning": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), prune.remove),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils")
@pytest.mark.parametrize("put_on, take_off", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
def test_a_computed_weight_is_refused_until_it_is_a_parameter_again(put_on, take_off, tmp_path):
    model = prepare_qat(tiny_qwen3())
    layer = model.model.layers[0].self_attn.o_proj
    put_on(layer)
    refusal = r"layers\.0\.self_attn\.o_proj computes its weight from other tensors"
    if parametrize.is_parametrized(layer):
        with pytest.raises(ValueError, match=refusal):
            model(tokens())
    with pytest.raises(ValueError, match=refusal):
        model.save_pretrained(tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    take_off(layer, "weight")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = [take_step(model, optimizer).item() for _ in range(3)]
    assert losses[2] < losses[0] and layer.nvfp4_weight.global_scales.is_fresh(layer.nvfp4_weight)
    model.save_pretrained(tmp_path / "packed")
    assert "model.layers.0.self_attn.o_proj.weight_packed" in load_file(tmp_path / "packed" / "model.safetensors")


@pytest.mark.filterwarnings("ignore:`torch.nn.utils")
def test_a_weight_that_is_computed_already_is_refused_before_any_layer_is_changed():
    model = tiny_qwen3()
    nn.utils.weight_norm(model.model.layers[1].self_attn.o_proj)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.o_proj computes its weight from other tensors"):
        prepare_qat(model)
    assert not qat_modules(model)


def test_a_parametrized_bias_does_not_matter():
    torch.manual_seed(0)
    model = prepare_qat(nn.Sequential(nn.Linear(32, 16)))
    expected = model(torch.ones(2, 32))
    parametrize.register_parametrization(model[0], "bias", nn.Identity())
    assert torch.equal(model(torch.ones(2, 32)), expected)
