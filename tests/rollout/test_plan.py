"""A model's pushes are planned once, and anew when the model is built in another way; what is pushed is never old."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import load_qat, take_step, tiny_qwen3, tiny_qwen3_moe, tokens
from torch import nn
from torch.nn.utils import parametrize

from hf_nvfp4_qat import NVFP4QATConfig, calibrate_activations, prepare_qat
from hf_nvfp4_qat.modules.swap import qat_weights
from hf_nvfp4_qat.rollout import plan as plan_module
from hf_nvfp4_qat.rollout.stream import RolloutStream


@pytest.fixture
def plans(monkeypatch):
    """One entry for each plan that was made."""
    made, original = [], plan_module.packed_sources
    monkeypatch.setattr(
        plan_module, "packed_sources", lambda *args, **kwargs: (made.append(1), original(*args, **kwargs))[1]
    )
    return made


def pushed(model) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous().view(-1).view(torch.uint8).clone() for name, tensor in RolloutStream(model)}


def assert_equal(found, expected) -> None:
    assert list(found) == list(expected)
    assert not [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


def layer_of(model):
    return model.model.layers[1].mlp.down_proj


def step(model) -> None:
    take_step(model.train(), torch.optim.SGD(model.parameters(), lr=1e-2))


def edit_through_data(model) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(3)


def new_parameters(model) -> None:
    for module in (model.model.layers[1].self_attn.o_proj, model.model.norm):
        module.weight = nn.Parameter(torch.randn_like(module.weight))


def assign(model) -> None:
    model.load_state_dict({name: 3 * tensor for name, tensor in model.state_dict().items()}, assign=True)
    model.tie_weights()


VALUES = {"step": step, "through data": edit_through_data, "new parameters": new_parameters, "assigned": assign}


@pytest.mark.parametrize("change", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("make", [tiny_qwen3, tiny_qwen3_moe])
def test_new_values_are_pushed_by_the_plan_there_is(make, change, plans):
    model = prepare_qat(make())
    before = pushed(model)
    change(model)
    found = pushed(model)
    assert len(plans) == 1
    assert_equal(found, pushed(copy.deepcopy(model)))  # a copy has no plan yet
    assert len(plans) == 2
    assert any(not torch.equal(tensor, before[name]) for name, tensor in found.items())


def test_input_scales_are_those_of_the_moment(qwen3_dir, plans):
    model = load_qat(qwen3_dir, NVFP4QATConfig(activations="nvfp4"))
    calibrate_activations(model, [tokens()])
    before = pushed(model)
    layer_of(model).input_amax = 64 * layer_of(model).input_amax
    after = pushed(model)
    assert len(plans) == 1
    name = "model.layers.1.mlp.down_proj.input_global_scale"
    assert [key for key, tensor in after.items() if not torch.equal(tensor, before[key])] == [name]


def another_module(model) -> None:
    model.model.norm = copy.deepcopy(model.model.norm)
    with torch.no_grad():
        model.model.norm.weight.mul_(3)


def another_layer(model) -> None:
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[1].mlp)
    with torch.no_grad():
        layer_of(model).weight.mul_(3)


def another_rule(model) -> None:
    for weight in qat_weights(model).values():
        weight.scale_rule = "four_over_six"


STRUCTURES = {
    "another module": another_module,
    "another layer": another_layer,
    "another rule": another_rule,
    "a parameter more": lambda model: model.model.norm.register_parameter("bias", nn.Parameter(torch.ones(64))),
    "a buffer more": lambda model: model.model.norm.register_buffer("offset", torch.ones(3)),
    "a tie less": lambda model: setattr(model.lm_head, "weight", nn.Parameter(2 * model.lm_head.weight.detach())),
    "another shape": lambda model: setattr(model.model.norm, "weight", nn.Parameter(torch.ones(32))),
    "another dtype": lambda model: model.model.norm.to(torch.bfloat16),
    "a layer in bfloat16": lambda model: setattr(layer_of(model), "__class__", nn.Linear),
    "another conversion": lambda model: setattr(model, "_weight_conversions", []),
}


@pytest.mark.parametrize("change", STRUCTURES.values(), ids=STRUCTURES)
def test_another_structure_is_another_plan(change, plans):
    model = prepare_qat(tiny_qwen3()).requires_grad_(False)
    pushed(model)
    change(model)
    found = pushed(model)
    assert len(plans) == 2
    assert_equal(found, pushed(copy.deepcopy(model)))
    pushed(model)
    assert len(plans) == 3  # the copy's


def test_what_was_computed_from_several_weights_is_computed_anew(plans, monkeypatch):
    original = plan_module.packed_sources

    def computed(model, **kwargs):
        first, *others = original(model, **kwargs)
        return [replace(first, module_name=None), *others]

    monkeypatch.setattr(plan_module, "packed_sources", computed)
    model = prepare_qat(tiny_qwen3())
    for number in (1, 2, 3):
        pushed(model)
        assert len(plans) == number


def diverge(model) -> None:
    with torch.no_grad():
        layer_of(model).weight[0, 0] = float("nan")


def adapt(model) -> None:
    peft = pytest.importorskip("peft")
    peft.tuners.lora.LoraModel(model, peft.LoraConfig(target_modules=["embed_tokens"]), "default")


def forget_inputs(model) -> None:
    for layer in model.modules():
        if getattr(layer, "input_amax", None) is not None:
            layer.input_amax.zero_()


REFUSED = {
    "NaN": (diverge, r"down_proj\.weight.*Nothing was sent"),
    "computed": (lambda model: parametrize.register_parametrization(layer_of(model), "weight", nn.Tanh()), "computes"),
    "adapters": (adapt, "a PEFT adapter is in none before it is merged"),
    "inputs": (forget_inputs, "need the largest input of each layer"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_becomes_wrong_later_is_refused_at_the_next_push(change, message, qwen3_dir):
    model = load_qat(qwen3_dir, NVFP4QATConfig(activations="nvfp4"))
    calibrate_activations(model, [tokens()])
    pushed(model)
    change(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            RolloutStream(model)
