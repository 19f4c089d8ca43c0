"""W4A4 checkpoints: written, verified, read back, and read by compressed-tensors."""

import json

import pytest
import torch
from conftest import load_qat, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_nvfp4_qat import NVFP4QATConfig, calibrate_activations, load_nvfp4, save_nvfp4, verify_nvfp4
from hf_nvfp4_qat.checkpoint.convert import dequantize_checkpoint, quantize_checkpoint
from hf_nvfp4_qat.modules.swap import qat_modules
from hf_nvfp4_qat.numerics.quantize import global_decode_scale_of_amax

W4A4 = NVFP4QATConfig(activations="nvfp4")


@pytest.fixture
def model(qwen3_dir):
    model = load_qat(qwen3_dir, W4A4, dtype=torch.bfloat16)
    calibrate_activations(model, [tokens()])
    return model.eval()


@pytest.fixture
def packed(model, tmp_path):
    path = tmp_path / "packed"
    model.save_pretrained(path)
    return path


def test_every_layer_has_its_input_scale_in_the_direction_vllm_reads(model, packed):
    tensors = load_file(packed / "model.safetensors")
    for name, layer in qat_modules(model).items():
        scale = tensors[f"{name}.input_global_scale"]
        assert scale.shape == (1,) and scale.dtype == torch.float32
        assert scale * global_decode_scale_of_amax(layer.input_amax) == 1
    assert sum(name.endswith("input_global_scale") for name in tensors) == 14
    assert not any("input_amax" in name for name in tensors)
    group = json.loads((packed / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert group["input_activations"]["dynamic"] == "local"
    assert verify_nvfp4(packed, model).ok


def test_a_checkpoint_loads_as_what_was_saved(model, packed):
    loaded = load_nvfp4(packed).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert "dropped" not in str(loaded.nvfp4_requantization)
    weights_only = load_nvfp4(packed, NVFP4QATConfig())
    assert "14 activation scales dropped" in str(weights_only.nvfp4_requantization)
    assert all(layer.input_amax is None for layer in qat_modules(weights_only).values())


def test_plain_transformers_quantizes_the_inputs_too(model, packed):
    plain = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16).eval()
    weights_only = load_nvfp4(packed, NVFP4QATConfig()).eval()
    with torch.no_grad():
        ours, theirs, w4a16 = (m(tokens()).logits.float() for m in (model, plain, weights_only))
    assert (theirs - ours).norm() < 0.6 * (theirs - w4a16).norm()


def test_verify_finds_an_input_scale_that_differs_or_is_missing(model, packed):
    tensors = load_file(packed / "model.safetensors")
    first, second = [name for name in tensors if name.endswith("input_global_scale")][:2]
    tensors[first] = tensors[first] * 2
    del tensors[second]
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    problems = verify_nvfp4(packed, model).problems
    assert f"{first}: differs from the model's" in problems
    assert any(problem.startswith(second) for problem in problems)


def test_nothing_is_saved_before_the_inputs_are_known(qwen3_dir, tmp_path):
    with pytest.raises(ValueError, match="calibrate_activations"):
        save_nvfp4(load_qat(qwen3_dir, W4A4), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_given_state_dict_may_bring_its_own(model, tmp_path):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "model.layers.0.mlp.down_proj"
    state[f"{name}.input_amax"] *= 16
    save_nvfp4(model, tmp_path, state_dict=state)
    stored = load_file(tmp_path / "model.safetensors")[f"{name}.input_global_scale"]
    assert stored * global_decode_scale_of_amax(model.get_submodule(name).input_amax) == 1 / 16


def test_quantizing_files_alone_is_refused_and_dequantizing_leaves_the_scales_out(qwen3_dir, packed, tmp_path):
    with pytest.raises(ValueError, match="known only when it runs"):
        quantize_checkpoint(qwen3_dir, tmp_path / "ptq", W4A4)
    dequantize_checkpoint(packed, tmp_path / "plain")
    assert not any("input_global" in name for name in load_file(tmp_path / "plain" / "model.safetensors"))
