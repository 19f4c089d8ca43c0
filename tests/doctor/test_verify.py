"""verify_nvfp4 finds every kind of damage, and what differs from a model."""

import shutil

import pytest
import torch
from conftest import SIZES, load_qat, take_step
from packed_files import UP, edit_config, other_tools_checkpoint, rewrite
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hf_nvfp4_qat import prepare_qat, verify_nvfp4


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
    assert {finding.rule for finding in report.findings} == {"another-model"} and "error: another-model: " in str(
        report
    )
    assert report.num_compared == report.num_tensors - len(report.findings)


def test_verify_names_what_only_the_model_or_only_the_checkpoint_has(damaged, qwen3_dir):
    path, tensors = damaged
    tensors["mine"] = tensors.pop("model.norm.weight")
    rewrite(path, tensors)
    report = verify_nvfp4(path, load_qat(qwen3_dir))
    assert "model.norm.weight: the model has it, the checkpoint does not" in report.problems
    assert "mine: the checkpoint has it, the model does not" in report.problems
    assert "not good" in str(report)


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
