"""The scale is fresh whoever changed the weights: forward, export and the reference must always agree."""

import copy

import pytest
import torch
from accelerate import Accelerator
from conftest import load_qat, take_step, tokens
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from hf_nvfp4_qat import prepare_qat, quantize_nvfp4, refresh_global_scales
from hf_nvfp4_qat.formats.names import from_checkpoint
from hf_nvfp4_qat.modules.swap import qat_modules, qat_weights
from hf_nvfp4_qat.numerics.quantize import global_amax, global_decode_scale_of_amax

GROUPS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


def group_amax(layers: dict, name: str) -> torch.Tensor:
    """amax over the fused group of `name`, written out here independently of the group table."""
    for group in GROUPS:
        for member in group:
            if name.endswith(member):
                prefix = name.removesuffix(member)
                return torch.stack([global_amax(layers[prefix + other].weight) for other in group]).amax()
    return global_amax(layers[name].weight)


def assert_fresh(model, tmp_path) -> None:
    """Buffer, forward's weight, exported weight and reference agree, for every layer."""
    layers = qat_modules(model)
    # What forward multiplies with, seen from outside: its response to the identity.
    for name, layer in layers.items():
        scale = global_decode_scale_of_amax(group_amax(layers, name))
        identity = torch.eye(layer.in_features, dtype=layer.weight.dtype)
        bias = 0 if layer.bias is None else layer.bias
        with torch.no_grad():
            seen_by_forward = (layer(identity) - bias).t().bfloat16()
        reference = quantize_nvfp4(layer.weight.detach(), global_decode_scale=scale, impl="reference")
        assert torch.equal(layer.global_decode_scale, scale), name
        assert torch.equal(seen_by_forward, reference.dequantize()), name
    model.save_pretrained(tmp_path / "export")
    exported = load_file(tmp_path / "export" / "model.safetensors")
    for name, layer in layers.items():
        assert torch.equal(from_checkpoint(name, exported.__getitem__).dequantize(), layer.fake_quantized_weight()), (
            name
        )


def scales_of(model) -> list[float]:
    return [layer.global_decode_scale.item() for layer in qat_modules(model).values()]


def large_step_optimizer(model) -> torch.optim.Optimizer:
    """Steps large enough to change the power of two of every scale."""
    return torch.optim.AdamW(model.parameters(), lr=0.5)


def test_scales_are_fresh_after_loading(qat_model, tmp_path):
    assert_fresh(qat_model, tmp_path)


def test_scales_are_fresh_after_a_plain_training_loop(qat_model, tmp_path):
    before = scales_of(qat_model)
    optimizer = large_step_optimizer(qat_model)
    for _ in range(2):
        take_step(qat_model, optimizer)
        # Written by the step itself, not by the next forward.
        layers = qat_modules(qat_model)
        assert all(
            layer.global_decode_scale == global_decode_scale_of_amax(group_amax(layers, name))
            for name, layer in layers.items()
        )
    assert all(old != new for old, new in zip(before, scales_of(qat_model), strict=True))
    assert_fresh(qat_model, tmp_path)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adafactor, torch.optim.RMSprop])
def test_scales_are_fresh_after_any_optimizer(qat_model, make):
    take_step(qat_model, make(qat_model.parameters(), lr=0.5))
    layers = qat_modules(qat_model)
    for name, layer in layers.items():
        assert layer.global_decode_scale == global_decode_scale_of_amax(group_amax(layers, name))


def test_an_optimizer_that_writes_through_data_is_seen(qat_model):
    class DataWriter(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.mul_(100)

    DataWriter(qat_model.parameters()).step()
    layers = qat_modules(qat_model)
    for name, layer in layers.items():
        assert layer.global_decode_scale == global_decode_scale_of_amax(group_amax(layers, name))


def test_scales_are_fresh_after_a_manual_update_without_an_optimizer(qat_model, tmp_path):
    with torch.no_grad():
        for parameter in qat_model.parameters():
            parameter.mul_(37)
    assert_fresh(qat_model, tmp_path)


def test_changing_one_member_of_a_group_refreshes_all_of_it(qat_model):
    attention = qat_model.model.layers[0].self_attn
    with torch.no_grad():
        attention.k_proj.weight.mul_(64)
    scale = attention.q_proj.global_decode_scale.clone()
    attention.q_proj(torch.zeros(1, 64))
    assert attention.q_proj.global_decode_scale > scale
    assert attention.q_proj.global_decode_scale == attention.v_proj.global_decode_scale


@pytest.mark.parametrize("assign", [False, True])
def test_scales_are_fresh_after_load_state_dict(qat_model, qwen3_dir, tmp_path, assign):
    other = load_qat(qwen3_dir)
    state = {name: tensor * 50 for name, tensor in other.state_dict().items()}
    qat_model.load_state_dict(state, assign=assign)
    layers = qat_modules(qat_model)
    for name, layer in layers.items():  # written by loading itself: a compiled forward would not check
        assert layer.global_decode_scale == global_decode_scale_of_amax(group_amax(layers, name))
    assert_fresh(qat_model, tmp_path)


def test_scales_are_fresh_after_loading_into_a_submodule(qat_model, tmp_path):
    layer = qat_model.model.layers[0]
    layer.load_state_dict({name: tensor * 50 for name, tensor in layer.state_dict().items()})
    assert_fresh(qat_model, tmp_path)


def test_a_scale_whose_buffer_is_replaced_is_computed_anew(qat_model, tmp_path):
    """As Accelerate does, which puts the buffers of before loading back."""
    for layer in qat_modules(qat_model).values():
        layer.global_decode_scale = torch.ones_like(layer.global_decode_scale)
    assert_fresh(qat_model, tmp_path)


def test_scales_are_fresh_after_trainer(qat_model, tmp_path):
    before = scales_of(qat_model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=0.5, report_to="none", use_cpu=True,
        per_device_train_batch_size=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": tokens()[0], "labels": tokens()[0]}] * 4
    Trainer(model=qat_model, args=arguments, train_dataset=data).train()
    assert before != scales_of(qat_model)
    assert_fresh(qat_model, tmp_path)


def test_scales_are_fresh_after_accelerate_with_gradient_accumulation(qat_model, tmp_path):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(qat_model, large_step_optimizer(qat_model))
    before = scales_of(qat_model)
    for step in range(4):
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens(), labels=tokens()).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        assert (scales_of(qat_model) == before) == (step == 0)
    assert_fresh(accelerator.unwrap_model(model), tmp_path)


def test_scales_are_fresh_in_a_compiled_model(qat_model):
    compiled = torch.compile(qat_model, backend="aot_eager")
    optimizer = large_step_optimizer(qat_model)
    for _ in range(2):
        take_step(compiled, optimizer)
        with torch.no_grad():
            assert torch.equal(compiled(tokens()).logits, copy.deepcopy(qat_model)(tokens()).logits)


def test_writes_through_data_are_covered_by_saving_and_by_refresh(qat_model, tmp_path):
    for layer in qat_modules(qat_model).values():
        layer.weight.data.mul_(1000)  # no version counter sees this
    refresh_global_scales(qat_model)
    assert_fresh(qat_model, tmp_path)
    for layer in qat_modules(qat_model).values():
        layer.weight.data.mul_(1000)
    qat_model.save_pretrained(tmp_path / "export")
    assert_fresh(qat_model, tmp_path)


def test_a_copied_layer_has_scales_of_its_own(qat_model):
    layer = qat_model.model.layers[0]
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.self_attn.k_proj.weight.mul_(64)
    twin.self_attn.q_proj(torch.zeros(1, 64))
    assert twin.self_attn.q_proj.global_decode_scale == twin.self_attn.k_proj.global_decode_scale
    assert twin.self_attn.q_proj.global_decode_scale > layer.self_attn.q_proj.global_decode_scale


def test_a_step_of_another_model_does_not_touch_these_scales(qat_model, qwen3_dir, monkeypatch):
    other = load_qat(qwen3_dir)
    scales = next(iter(qat_weights(qat_model).values())).global_scales
    refreshed = []
    monkeypatch.setattr(scales, "_refresh", lambda groups: refreshed.extend(groups))
    take_step(other, torch.optim.SGD(other.parameters(), lr=0.1))
    assert refreshed == []


def test_inference_mode_and_weights_made_in_it_work(qwen3_dir):
    with torch.inference_mode():
        model = load_qat(qwen3_dir)
        assert model(tokens()).logits.isfinite().all()


def test_an_optimizer_that_steps_flat_copies_leaves_the_next_forward_to_refresh():
    """As ZeRO does: the optimizer owns a flat tensor, and the weights are written where PyTorch does not count."""
    layer = prepare_qat(torch.nn.Sequential(torch.nn.Linear(64, 48)))[0]
    layer(torch.randn(1, 64))
    before = layer.global_decode_scale.clone()
    flat = torch.nn.Parameter(layer.weight.detach().flatten().clone())
    optimizer = torch.optim.SGD([flat], lr=1.0)
    flat.grad = -99 * flat.detach()
    optimizer.step()
    layer.weight.data.copy_(flat.detach().view_as(layer.weight))
    layer(torch.randn(1, 64))
    assert layer.global_decode_scale > before
    assert torch.equal(layer.global_decode_scale, global_decode_scale_of_amax(global_amax(layer.weight)))


def test_a_second_optimizer_for_other_parameters_leaves_fresh_scales_alone():
    """As with Muon for the matrices and AdamW for the rest."""
    layer = prepare_qat(torch.nn.Sequential(torch.nn.Linear(64, 48)))[0]
    matrices, rest = torch.optim.SGD([layer.weight], lr=0.1), torch.optim.SGD([layer.bias], lr=0.1)
    layer(torch.randn(1, 64)).sum().backward()
    matrices.step()
    rest.step()
    assert layer.nvfp4_weight.global_scales.is_fresh(layer.nvfp4_weight)
