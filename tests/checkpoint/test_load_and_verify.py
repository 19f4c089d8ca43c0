"""load_nvfp4 starts where the checkpoint was served; verify_nvfp4 finds every kind of damage."""

import copy
import json
import shutil

import pytest
import torch
from conftest import SIZES, load_qat, take_step, tiny_qwen3, tiny_qwen3_moe, tokens
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hf_nvfp4_qat import NVFP4QATConfig, coverage, fake_quantize_nvfp4, load_nvfp4, prepare_qat, verify_nvfp4
from hf_nvfp4_qat.modules.swap import qat_modules, qat_weights

UP = "model.layers.0.mlp.up_proj"


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


def rewrite(path, tensors) -> None:
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"].update(changes)
    (path / "config.json").write_text(json.dumps(config))


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


def other_tools_checkpoint(path, tensors) -> None:
    """As another tool writes it: global scales 2688 / amax, not powers of two, and a W4A4 activation scale."""
    for name in list(tensors):
        if name.endswith("weight_global_scale"):
            tensors[name] = tensors[name] * 1.37
            tensors[name.replace("weight_global_scale", "input_global_scale")] = torch.ones(1)
    rewrite(path, tensors)


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


def test_a_good_checkpoint_verifies_alone_and_against_its_model(packed):
    model, path = packed
    report = verify_nvfp4(path)
    assert report.ok and report.num_layers == 14 and report.num_tensors == 52 and not report.notes
    assert verify_nvfp4(path, model).num_compared == 52


def test_tensors_without_dims_verify_against_their_model(tmp_path):
    """The parameters of Apertus' activation."""
    config = CONFIG_MAPPING["apertus"](**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = prepare_qat(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    model.save_pretrained(tmp_path)
    report = verify_nvfp4(tmp_path, model)
    assert report.ok, report.problems
    with torch.no_grad():
        model.model.layers[1].mlp.act_fn.alpha_p.add_(1)
    assert verify_nvfp4(tmp_path, model).problems == ["model.layers.1.mlp.act_fn.alpha_p: differs from the model's"]


def test_another_models_checkpoint_does_not_verify(packed, qwen3_dir):
    report = verify_nvfp4(packed[1], load_qat(qwen3_dir))
    assert any("model.layers.0.mlp.up_proj.weight_packed: differs from the model's" in p for p in report.problems)


def set_tensor(suffix, change):
    def damage(path, tensors):
        tensors[f"{UP}.{suffix}"] = change(tensors[f"{UP}.{suffix}"])
        rewrite(path, tensors)

    return damage


def drop(*names):
    def damage(path, tensors):
        for name in names:
            del tensors[name]
        rewrite(path, tensors)

    return damage


def add(name, tensor):
    def damage(path, tensors):
        tensors[name] = tensor
        rewrite(path, tensors)

    return damage


def subnormal_scale(scale):
    scale = scale.clone()
    scale.view(torch.uint8)[0, 0] = 3
    return scale


def nan_scale(scale):
    scale = scale.clone()
    scale.view(torch.uint8)[0, 0] = 0x7F
    return scale


DAMAGES = {
    "missing scale": (drop(f"{UP}.weight_scale"), "up_proj: missing weight_scale"),
    "missing layer": (
        drop(*(f"{UP}.{p}" for p in ("weight_packed", "weight_scale", "weight_global_scale"))),
        "missing",
    ),
    "missing norm": (drop("model.norm.weight"), "model.norm.weight: missing"),
    "scale without codes": (drop(f"{UP}.weight_packed"), "a scale without packed codes"),
    "extra tensor": (add("model.extra.weight", torch.ones(2)), "model.extra.weight: not a tensor of Qwen3ForCausalLM"),
    "both forms": (add(f"{UP}.weight", torch.ones(2, 2)), "both an unquantized weight and packed codes"),
    "wrong dtype": (
        set_tensor("weight_scale", lambda t: t.float()),
        "needs `weight_scale` as F8_E4M3 [128, 4]; it is F32",
    ),
    "wrong rows": (set_tensor("weight_packed", lambda t: t[:-1].contiguous()), "needs `"),
    "shared scale": (set_tensor("weight_global_scale", lambda t: t * 2), "vLLM fuses it with"),
    "zero global scale": (set_tensor("weight_global_scale", lambda t: t * 0), "not finite and positive"),
    "nan block scale": (set_tensor("weight_scale", nan_scale), "1 block scales are NaN or negative"),
    "subnormal block scale": (set_tensor("weight_scale", subnormal_scale), "1 block scales are subnormal"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_verify_finds(damage, message, damaged):
    path, tensors = damaged
    damage(path, tensors)
    report = verify_nvfp4(path)
    assert not report.ok and any(message in problem for problem in report.problems), report.problems


def test_verify_finds_a_wrong_shape_for_the_architecture(damaged):
    path, tensors = damaged
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.bfloat16)
    rewrite(path, tensors)
    assert any("model.norm.weight: shape [32], the model's is [64]" in p for p in verify_nvfp4(path).problems)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"quantization_status": "frozen"}, "quantization_status must be 'compressed'"),
        ({"format": "other"}, "is not compressed-tensors / nvfp4-pack-quantized"),
        ({"ignore": ["lm_head", UP]}, "packed, but `ignore` tells loaders it is not"),
    ],
)
def test_verify_finds_a_wrong_config(damaged, change, message):
    edit_config(damaged[0], **change)
    assert any(message in problem for problem in verify_nvfp4(damaged[0]).problems)


def test_verify_finds_an_unpacked_linear_that_ignore_does_not_name(llama_dir, tmp_path):
    load_qat(llama_dir).save_pretrained(tmp_path)
    edit_config(tmp_path, ignore=[])
    assert (
        "lm_head: not packed and not in `ignore`; vLLM would look for packed weights" in verify_nvfp4(tmp_path).problems
    )


def test_verify_survives_a_truncated_file(damaged):
    path, _ = damaged
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot be read"):
        verify_nvfp4(path)


def test_another_tools_scales_and_negative_zeros_are_noted_not_refused(damaged):
    path, tensors = damaged
    tensors[f"{UP}.weight_packed"] = tensors[f"{UP}.weight_packed"].clone()
    tensors[f"{UP}.weight_packed"][0, 0] = 0x88
    other_tools_checkpoint(path, tensors)
    report = verify_nvfp4(path)
    assert report.ok and "14 layers have a global scale that is no power of two" in report.notes[0]
    assert "2 codes are negative zero" in report.notes[1]


def test_an_unquantized_checkpoint_is_one_problem_not_hundreds(qwen3_dir):
    report = verify_nvfp4(qwen3_dir)
    assert not report.ok and len(report.problems) == 2
