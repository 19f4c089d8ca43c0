"""load_nvfp4 starts where the checkpoint was served."""

import copy
import shutil

import pytest
import torch
from conftest import load_qat, take_step, tiny_qwen3, tiny_qwen3_moe, tokens
from packed_files import UP, edit_config, other_tools_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_nvfp4_qat import NVFP4QATConfig, coverage, fake_quantize_nvfp4, load_nvfp4, prepare_qat, verify_nvfp4
from hf_nvfp4_qat.modules.swap import qat_modules, qat_weights


@pytest.fixture(scope="module")
def packed(qwen3_dir, tmp_path_factory):
    """A trained model and its packed checkpoint."""
    model = load_qat(qwen3_dir)
    take_step(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    path = tmp_path_factory.mktemp("packed")
    model.save_pretrained(path)
    return model, path


@pytest.fixture
def damaged(packed, tmp_path):
    """A copy of the checkpoint and its tensors, to be changed and written back."""
    _, path = packed
    shutil.copytree(path, tmp_path / "copy")
    return tmp_path / "copy", load_file(path / "model.safetensors")


def test_our_checkpoint_continues_with_identical_values(packed, tmp_path):
    model, path = packed
    again = load_nvfp4(path)
    assert again.nvfp4_requantization.moved == {} and again.nvfp4_requantization.num_moved == 0
    for name, layer in qat_modules(model).items():
        twin = again.get_submodule(name)
        assert torch.equal(twin.weight, layer.fake_quantized_weight())
        assert torch.equal(twin.fake_quantized_weight(), layer.fake_quantized_weight())
        assert torch.equal(twin.global_decode_scale, layer.global_decode_scale)
    assert torch.equal(again(tokens()).logits, AutoModelForCausalLM.from_pretrained(path)(tokens()).logits)
    again.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("scale_rule", ["four_over_six", "mse"])
@pytest.mark.parametrize("make", [tiny_qwen3, tiny_qwen3_moe])
def test_scales_chosen_by_error_are_what_is_trained_saved_and_loaded(make, scale_rule, tmp_path):
    model = prepare_qat(make(), NVFP4QATConfig(scale_rule=scale_rule))
    take_step(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for weight in qat_weights(copy.deepcopy(model)).values():
        assert weight.scale_rule == scale_rule
        expected = fake_quantize_nvfp4(
            weight.master.detach(), global_decode_scale=weight.global_decode_scale, scale_rule=scale_rule
        )
        assert torch.equal(weight.fake_quantized_weight(), expected)
        assert not torch.equal(expected, fake_quantize_nvfp4(weight.master.detach()))
    model.save_pretrained(tmp_path / "a")
    assert verify_nvfp4(tmp_path / "a", model).ok
    again = load_nvfp4(tmp_path / "a")
    assert again.nvfp4_requantization.num_moved == 0
    assert again.hf_quantizer.quantization_config.scale_rule == scale_rule
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    for name, weight in qat_weights(again).items():
        assert torch.equal(weight.master, qat_weights(model)[name].fake_quantized_weight())
    if make is tiny_qwen3:  # Transformers loses the global scales of experts
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
        assert torch.equal(plain(tokens()).logits, again(tokens()).logits)


def test_every_rule_keeps_what_the_plain_one_has_chosen(packed):
    for rule in ("four_over_six", "mse"):
        assert load_nvfp4(packed[1], NVFP4QATConfig(scale_rule=rule)).nvfp4_requantization.num_moved == 0


def test_a_loaded_checkpoint_trains(packed):
    again = load_nvfp4(packed[1], dtype=torch.float32)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    losses = [take_step(again, optimizer).item() for _ in range(5)]
    assert losses[-1] < losses[0]


def test_exactly_the_packed_layers_train_in_nvfp4(qwen3_dir, tmp_path):
    load_qat(qwen3_dir, NVFP4QATConfig(preset="ffn_only")).save_pretrained(tmp_path)
    again = load_nvfp4(tmp_path)
    assert len(qat_modules(again)) == 6 and all(".mlp." in name for name in qat_modules(again))
    wider = load_nvfp4(tmp_path, NVFP4QATConfig())
    assert len(qat_modules(wider)) == 14
    narrower = load_nvfp4(tmp_path, NVFP4QATConfig(exclude=["re:.*layers.1.mlp"]))
    assert len(narrower.nvfp4_requantization.not_trained) == 3
    assert coverage(narrower).excluded["model.layers.1.mlp.up_proj"].startswith("exclude")


def test_another_tools_checkpoint_is_loaded_from_its_decoded_values_with_a_report(damaged):
    path, tensors = damaged
    other_tools_checkpoint(path, tensors)
    model = load_nvfp4(path)
    report = model.nvfp4_requantization
    assert report.num_input_scales == 14 and "14 activation scales dropped" in str(report)
    assert report.moved and 0 < max(report.moved.values()) < 0.1 and report.num_moved > 0
    served = AutoModelForCausalLM.from_pretrained(path)
    served(tokens())  # the first forward decodes
    decoded = served.get_submodule(UP).weight.detach()
    torch.testing.assert_close(model.get_submodule(UP).weight.detach().float(), decoded.float(), rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"quant_method": "gptq"}, "says gptq / nvfp4-pack-quantized"),
        ({"format": "pack-quantized"}, "says compressed-tensors / pack-quantized"),
    ],
)
def test_other_formats_are_refused_by_load(damaged, change, message):
    edit_config(damaged[0], **change)
    with pytest.raises(ValueError, match=message):
        load_nvfp4(damaged[0])


def test_unquantized_checkpoints_are_refused_by_load_with_the_way_out(qwen3_dir):
    with pytest.raises(ValueError, match="no quantization_config.*from_pretrained"):
        load_nvfp4(qwen3_dir)
