"""Families whose checkpoints need more than others: layers that vLLM names in its own way, or builds unquantized."""

import json

import pytest
from conftest import SIZES, load_qat
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, set_seed

from hf_nvfp4_qat import NVFP4QATConfig, quantize_nvfp4
from hf_nvfp4_qat.checkpoint.convert import convert_checkpoint, quantize_checkpoint
from hf_nvfp4_qat.doctor.examine import examine
from hf_nvfp4_qat.doctor.repair import repair
from hf_nvfp4_qat.formats.names import ignored_in_vllm, to_checkpoint

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "falcon_h1": dict(mamba_d_state=16, mamba_n_heads=8, mamba_d_head=16, mamba_d_ssm=128, mamba_n_groups=1),
    "jamba": dict(
        num_experts=4, num_experts_per_tok=2, attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1,
        expert_layer_period=2, mamba_d_state=16, use_mamba_kernels=False,
    ),
    "deepseek_v32": dict(
        num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
        first_k_dense_replace=2, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1,
        topk_group=1, index_n_heads=4, index_head_dim=32, index_topk=8,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Unquantized checkpoints by model type."""
    root = tmp_path_factory.mktemp("sources")
    for model_type, changes in FAMILIES.items():
        set_seed(0)
        config = CONFIG_MAPPING[model_type](**{**SIZES, **_IDS, **changes})
        AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(root / model_type)
    return root


def change_ignore(path, change):
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["ignore"] = change(config["quantization_config"]["ignore"])
    (path / "config.json").write_text(json.dumps(config))


def pack(path, layer):
    """As a tool does that has no rule for the layer."""
    tensors = load_file(path / "model.safetensors")
    tensors |= to_checkpoint(layer, quantize_nvfp4(tensors.pop(f"{layer}.weight")))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    change_ignore(path, lambda entries: [entry for entry in entries if entry != layer])


def rules(path, **arguments):
    return {(finding.rule, finding.where) for finding in examine(path, **arguments).findings}


@pytest.mark.parametrize("made_by", ["save", "quantize"])
def test_ignore_has_the_names_under_which_vllm_builds_mamba_mixers(made_by, sources, tmp_path):
    if made_by == "save":
        load_qat(sources / "falcon_h1").save_pretrained(tmp_path)
    else:
        quantize_checkpoint(sources / "falcon_h1", tmp_path)
    ignore = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ignore"]
    assert "re:.*mixer[.]out_proj$" in ignore and "model.layers.0.mamba.out_proj" in ignore
    assert not any("in_proj" in entry for entry in ignore)  # it is packed
    assert examine(tmp_path).ok
    change_ignore(tmp_path, lambda entries: [entry for entry in entries if "mixer" not in entry])
    found = [finding for finding in examine(tmp_path, engine="vllm").findings if finding.rule == "vllm-name"]
    assert "'re:.*mixer[.]out_proj$'" in found[0].message
    assert examine(tmp_path, engine="transformers").ok


def test_the_other_dialect_has_them_too_and_gives_them_back(sources, tmp_path):
    quantize_checkpoint(sources / "falcon_h1", tmp_path / "here")
    convert_checkpoint(tmp_path / "here", tmp_path / "there", "modelopt")
    excluded = json.loads((tmp_path / "there" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "mixer.out_proj" in excluded and examine(tmp_path / "there").ok
    convert_checkpoint(tmp_path / "there", tmp_path / "back", "compressed-tensors")
    ignore = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("here", "back")]
    assert len({str(sorted(config["quantization_config"]["ignore"])) for config in ignore}) == 1


def test_an_entry_for_vllm_names_no_packed_layer():
    unpacked = ["model.layers.0.mamba.in_proj", "model.layers.0.mamba.out_proj", "model.layers.1.mamba.out_proj"]
    assert set(ignored_in_vllm(unpacked, ["model.layers.1.mamba.in_proj"]).values()) == {"re:.*mixer[.]out_proj$"}
    assert ignored_in_vllm(["lm_head", "model.layers.0.mixer.out_proj"], []) == {}


def test_the_doctor_finds_packed_layers_that_vllm_builds_unquantized(sources, tmp_path):
    model = load_qat(sources / "jamba", NVFP4QATConfig())
    assert model.nvfp4_excluded["model.layers.0.mamba.in_proj"] == "vLLM builds it unquantized"
    model.save_pretrained(tmp_path)
    assert examine(tmp_path).ok
    pack(tmp_path, "model.layers.0.mamba.in_proj")
    assert ("unquantized-in-vllm", "model.layers.0.mamba.in_proj") in rules(tmp_path, engine="vllm")
    assert not examine(tmp_path).ok and repair(tmp_path) == []
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["NobodysModel"]}))
    assert ("unquantized-in-vllm", "model.layers.0.mamba.in_proj") in rules(tmp_path)


def test_the_doctor_finds_token_selectors_packed_and_mends_them(sources, tmp_path):
    quantize_checkpoint(sources / "deepseek_v32", tmp_path)
    assert examine(tmp_path).ok, str(examine(tmp_path))
    layer = "model.layers.1.self_attn.indexer.wk"
    pack(tmp_path, layer)
    assert ("quantized-router", layer) in rules(tmp_path)
    assert repair(tmp_path) and examine(tmp_path).ok
    assert f"{layer}.weight" in load_file(tmp_path / "model.safetensors")


def test_the_doctor_sees_by_structure_what_no_name_tells(sources, tmp_path, monkeypatch):
    """As reasons_by_rule does in training; of an architecture that is not known it has names alone."""
    quantize_checkpoint(sources / "deepseek_v32", tmp_path)
    layer = "model.layers.1.self_attn.indexer.wk"
    pack(tmp_path, layer)
    monkeypatch.setattr("hf_nvfp4_qat.selection.rules.CHOOSES_OR_ANSWERS", ())
    monkeypatch.setattr("hf_nvfp4_qat.selection.rules.KEPT_OUT", ())
    assert ("quantized-router", layer) in rules(tmp_path)
