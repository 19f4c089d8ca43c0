"""A QAT model's own way to save: methods of its class, beside whatever others put on the instance."""

import copy
import pickle

import pytest
from conftest import load_qat, tiny_qwen3, tokens
from safetensors.torch import load_file

from hf_nvfp4_qat import NVFP4QATConfig, prepare_qat
from hf_nvfp4_qat.modules.swap import qat_modules


@pytest.mark.parametrize("name", ["save_pretrained", "push_to_hub"])
def test_a_patched_way_to_save_is_refused_before_any_layer_is_changed(name):
    model = tiny_qwen3()
    patch = getattr(model, name)
    setattr(model, name, patch)
    with pytest.raises(ValueError, match=f"this Qwen3ForCausalLM carries a patched `{name}` of its own"):
        prepare_qat(model)
    assert getattr(model, name) is patch and not qat_modules(model)
    delattr(model, name)
    prepare_qat(model)


def test_a_patch_that_comes_later_stays_and_calls_the_saving_of_qat(qat_model, tmp_path):
    inner, calls = qat_model.save_pretrained, []

    def patched(path):
        calls.append(path)
        inner(path)

    qat_model.save_pretrained = patched
    qat_model.save_pretrained(tmp_path)
    assert calls == [tmp_path] and qat_model.save_pretrained is patched
    assert any(name.endswith("weight_packed") for name in load_file(tmp_path / "model.safetensors"))


def test_the_class_is_called_as_before_and_makes_models_without_qat(qat_model, qwen3_dir, tmp_path):
    plain = tiny_qwen3()
    assert isinstance(qat_model, type(plain)) and repr(type(qat_model)) == repr(type(plain))
    for other in (type(qat_model)(qat_model.config), type(qat_model).from_pretrained(qwen3_dir)):
        assert type(other) is type(plain) and not qat_modules(other)
    for twin in (copy.copy(qat_model), copy.deepcopy(qat_model), pickle.loads(pickle.dumps(qat_model))):
        assert type(twin) is type(qat_model) and twin(tokens()).logits.equal(qat_model(tokens()).logits)
    assert "save_pretrained" not in vars(qat_model) and "push_to_hub" not in vars(qat_model)


def test_a_model_that_only_lives_for_one_expression_saves(qwen3_dir, tmp_path):
    load_qat(qwen3_dir, NVFP4QATConfig(save_format="master")).save_pretrained(tmp_path)
    assert "model.layers.0.mlp.up_proj.weight" in load_file(tmp_path / "model.safetensors")
