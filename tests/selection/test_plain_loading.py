"""Which packed layers plain Transformers fails on is known before any is packed, and is true."""

import logging

import pytest
import torch
from conftest import SIZES, tiny_qwen3
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, set_seed

from hf_nvfp4_qat import prepare_qat
from hf_nvfp4_qat.doctor.examine import examine
from hf_nvfp4_qat.selection.plain_loading import why_plain_loading_fails

ZAMBA = dict(
    num_hidden_layers=6, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=16, n_mamba_heads=2, mamba_dt_rank=4,
    attention_hidden_size=128, attention_head_dim=32, use_mamba_kernels=False,
)  # fmt: skip


def tiny(model_type: str, **changes):
    set_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**SIZES, **ids, **changes}))


def of_this_package(caplog) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name.startswith("hf_nvfp4_qat")]


@pytest.mark.parametrize(
    "model_type, changes, reason",
    [
        ("nanochat", {}, "`_init_weights` of NanoChatForCausalLM reads its weight"),
        ("modernbert-decoder", {}, "`_init_weights` of ModernBertDecoderForCausalLM reads its weight"),
        ("zamba", ZAMBA, "its weight is tied to that of model.layers."),
        ("llama", {}, None),
    ],
)
def test_training_warns_the_doctor_says_so_and_plain_transformers_does_fail(
    model_type, changes, reason, tmp_path, caplog
):
    model = tiny(model_type, **changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with caplog.at_level(logging.WARNING, "hf_nvfp4_qat"):
        prepare_qat(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    found = [finding for finding in examine(tmp_path).findings if finding.rule == "plain-loading"]
    errors = [f for f in examine(tmp_path, engine="transformers").findings if f.rule == "plain-loading"]
    if reason is None:
        AutoModelForCausalLM.from_pretrained(tmp_path)
        assert not of_this_package(caplog) and not found and not errors
        return
    assert "Plain Transformers cannot load the packed checkpoint" in caplog.text and reason in caplog.text
    assert {f.severity for f in found} == {"warning"} and {f.severity for f in errors} == {"error"}
    assert any(reason in f.message for f in errors) and not examine(tmp_path, engine="transformers").ok
    assert examine(tmp_path, engine="vllm").ok or model_type == "zamba"
    with pytest.raises(AttributeError, match="weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_asking_changes_neither_the_model_nor_random_numbers(monkeypatch):
    model = tiny("nanochat")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    initialize = model._init_weights
    monkeypatch.setattr(model, "_init_weights", lambda module: (torch.rand(2), initialize(module)))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert why_plain_loading_fails(model, ["model.layers.0.self_attn.o_proj"])
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(before) == list(model.state_dict())


def test_what_is_not_packed_is_no_reason():
    model = tiny("nanochat")
    assert not why_plain_loading_fails(model, ["model.layers.0.mlp.fc1", "model.layers.0.mlp.fc2"])
    assert not why_plain_loading_fails(tiny_qwen3(), ["model.layers.0.mlp.up_proj"])
    assert not why_plain_loading_fails(torch.nn.Linear(16, 16), [])
