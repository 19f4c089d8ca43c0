"""from_pretrained and prepare_qat: what they make, and what they refuse early."""

import copy

import pytest
import torch
from conftest import load_qat, take_step, tiny_llama, tokens
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_nvfp4_qat import NVFP4QATConfig, prepare_qat
from hf_nvfp4_qat.modules.swap import qat_modules
from hf_nvfp4_qat.quantizer.hf_quantizer import NVFP4QATHfQuantizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_master_weights_are_loaded_as_they_are(qwen3_dir, dtype):
    model = load_qat(qwen3_dir, dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(qwen3_dir, dtype=dtype)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor) and model.state_dict()[name].dtype == dtype
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(qat_modules(model)) == 14


def test_tied_embeddings_stay_tied(qwen3_dir):
    model = load_qat(qwen3_dir)
    assert model.lm_head.weight is model.model.embed_tokens.weight and type(model.lm_head) is nn.Linear
    model.resize_token_embeddings(160)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.shape[0] == 160


def test_the_user_list_does_not_lose_the_default_exclusions(qwen3_dir):
    model = load_qat(qwen3_dir, NVFP4QATConfig(exclude=["o_proj"]))
    assert type(model.lm_head) is nn.Linear and len(qat_modules(model)) == 12


def test_prepare_qat_equals_from_pretrained(qwen3_dir):
    loaded = load_qat(qwen3_dir)
    prepared = prepare_qat(AutoModelForCausalLM.from_pretrained(qwen3_dir, dtype=torch.float32))
    assert torch.equal(loaded(tokens()).logits, prepared(tokens()).logits)
    assert qat_modules(loaded).keys() == qat_modules(prepared).keys()
    assert isinstance(prepared.hf_quantizer, NVFP4QATHfQuantizer) and prepared.is_quantized
    assert prepared.config.quantization_config == loaded.config.quantization_config


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_a_model_that_a_device_map_places_trains_the_same(qwen3_dir, device_map):
    losses = []
    for options in ({}, {"device_map": device_map}):
        model = load_qat(qwen3_dir, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([take_step(model, optimizer).item() for _ in range(3)])
    assert len(qat_modules(model)) == 14 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][0] - losses[0][2] > 1e-3 * losses[0][0]


@pytest.mark.parametrize("places", [{"model": "cpu", "lm_head": "disk"}, {"model": 0, "lm_head": "cpu"}])
def test_offloading_is_refused(qwen3_dir, places):
    with pytest.raises(ValueError, match="none may be offloaded; `device_map` places modules on"):
        load_qat(qwen3_dir, device_map=places)


def test_generate_deepcopy_and_eval_work(qat_model):
    twin = copy.deepcopy(qat_model).eval()
    with torch.no_grad():
        output = twin.generate(tokens(4), max_new_tokens=5, do_sample=False, pad_token_id=0)
        greedy = tokens(4)
        for _ in range(5):
            greedy = torch.cat([greedy, qat_model.eval()(greedy).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(output, greedy)


def test_gradient_checkpointing_gives_the_same_gradients(qat_model):
    twin = copy.deepcopy(qat_model).train()
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (qat_model.train(), twin):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    for ours, theirs in zip(qat_model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_torch_compile_has_no_graph_break_and_the_same_gradients(qat_model):
    compiled = torch.compile(qat_model, fullgraph=True, backend="aot_eager")
    loss = compiled(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in qat_model.parameters()]
    qat_model.zero_grad()
    eager = qat_model(input_ids=tokens(), labels=tokens()).loss
    eager.backward()
    assert torch.equal(loss, eager)
    for compiled_gradient, parameter in zip(gradients, qat_model.parameters(), strict=True):
        torch.testing.assert_close(compiled_gradient, parameter.grad, rtol=1e-5, atol=1e-7)


def test_every_parameter_gets_a_gradient(llama_dir):
    model = load_qat(llama_dir)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_a_packed_checkpoint_with_our_config_is_refused(qat_model, tmp_path):
    """Upstream's own check comes first; the way out, load_nvfp4, is in prepare_qat's message and the README."""
    qat_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantized with CompressedTensorsConfig but you are passing a NVFP4QATConfig"):
        load_qat(tmp_path)


def test_a_quantized_model_is_refused_by_prepare_with_the_way_out(qat_model, tmp_path):
    qat_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"quantized with compressed-tensors. .*load_nvfp4\(path\)"):
        prepare_qat(AutoModelForCausalLM.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="trains in NVFP4 already"):
        prepare_qat(qat_model)


def test_other_quantizers_are_untouched(qwen3_dir):
    assert BitsAndBytesConfig(load_in_8bit=True).quant_method == "bitsandbytes"
    plain = AutoModelForCausalLM.from_pretrained(qwen3_dir)
    assert "save_pretrained" not in vars(plain) and not qat_modules(plain)


def test_a_plain_module_trains(tmp_path):
    model = prepare_qat(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    x, y = torch.randn(64, 32), torch.randn(64, 16)
    losses = []
    for _ in range(30):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_biases_work_in_half_precision():
    model = prepare_qat(tiny_llama().to(torch.bfloat16))
    assert model(tokens()).logits.dtype == torch.bfloat16
