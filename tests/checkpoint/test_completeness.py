"""Nothing that a checkpoint lacks, or that no weight is, gets lost in silence: loading, quantizing, saving."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SIZES, load_qat, tiny_llama, tiny_moe, tiny_qwen3, tokens
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig, set_seed
from typer.testing import CliRunner

from hf_nvfp4_qat import NVFP4QATConfig, load_nvfp4, save_nvfp4, verify_nvfp4
from hf_nvfp4_qat.checkpoint.convert import dequantize_checkpoint, quantize_checkpoint
from hf_nvfp4_qat.cli import app
from hf_nvfp4_qat.doctor.examine import examine
from hf_nvfp4_qat.modules.swap import qat_modules
from hf_nvfp4_qat.rollout.stream import RolloutStream

SINGLE = "model.safetensors"
LINEAR_ATTENTION = dict(
    layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4, linear_num_key_heads=2,
    linear_key_head_dim=16, linear_value_head_dim=16,
)  # fmt: skip
FAMILIES: dict[str, dict] = {
    **dict.fromkeys(("qwen3", "gemma2", "gemma3_text", "phi3", "opt", "olmo2", "cohere", "granite", "bloom"), {}),
    "gpt_neox": {"tie_word_embeddings": False},
    "qwen3_5_text": LINEAR_ATTENTION,
    "nemotron_h": dict(
        num_hidden_layers=3, layers_block_type=["mamba", "attention", "mlp"], ssm_state_size=16, mamba_num_heads=8,
        mamba_head_dim=16, n_groups=1,
    ),
    "mamba2": dict(num_heads=8, head_dim=16, state_size=16, n_groups=1, expand=2),
    "zamba2": dict(
        mamba_d_state=16, mamba_headdim=16, mamba_ngroups=1, num_hidden_layers=4, n_mamba_heads=8, mamba_expand=2,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], use_mamba_kernels=False, attention_hidden_size=128,
        hybrid_layer_ids=[1, 3], num_mem_blocks=1,
    ),
}  # fmt: skip


def saved(model, path: Path) -> Path:
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def of_family(family: str, path: Path, **changes) -> Path:
    """A bfloat16 checkpoint of a tiny model of this type."""
    set_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CONFIG_MAPPING[family](**{**SIZES, **ids, **FAMILIES.get(family, {}), **changes})
    return saved(AutoModelForCausalLM.from_config(config, dtype=torch.float32), path)


def rewritten(path: Path, change) -> Path:
    """The checkpoint at `path` with its tensors changed."""
    tensors = load_file(path / SINGLE)
    change(tensors)
    save_file(tensors, path / SINGLE, metadata={"format": "pt"})
    return path


def without(path: Path, prefix: str) -> Path:
    def drop(tensors):
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return rewritten(path, drop)


def edited(path: Path, **changes) -> Path:
    config = json.loads((path / "config.json").read_text())
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def llama_packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed")
    save_nvfp4(load_qat(saved(tiny_llama(), path / "source")), path / "packed")
    return path / "packed"


@pytest.fixture(scope="module")
def moe_packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("moe")
    quantize_checkpoint(saved(tiny_moe("qwen3_moe"), path / "source"), path / "packed")
    return path / "packed"


MISSING = [
    ("lm_head.", "lm_head.weight", 1),
    ("model.norm.", "model.norm.weight", 1),
    ("model.layers.1.mlp.down_proj.", "model.layers.1.mlp.down_proj.bias", 2),
]


@pytest.mark.parametrize("prefix, first, count", MISSING)
@pytest.mark.parametrize("read", [load_nvfp4, lambda path: dequantize_checkpoint(path, path / "out")])
def test_a_packed_checkpoint_that_lacks_a_tensor_is_refused_by_its_name(
    read, prefix, first, count, llama_packed, tmp_path
):
    path = without(shutil.copytree(llama_packed, tmp_path / "copy"), prefix)
    with pytest.raises(ValueError, match=f"lacks {count} of LlamaForCausalLM, the first {first}, and they would start"):
        read(path)
    assert not (path / "out").exists()


def test_the_experts_of_a_layer_that_are_not_there_are_refused(moe_packed, tmp_path):
    path = without(shutil.copytree(moe_packed, tmp_path / "copy"), "model.layers.1.mlp.experts.")
    with pytest.raises(ValueError, match=r"lacks 2 of Qwen3MoeForCausalLM, the first model.layers.1.mlp.experts.down"):
        load_nvfp4(path)
    with pytest.raises(ValueError, match="lacks 24 of Qwen3MoeForCausalLM"):
        dequantize_checkpoint(path, tmp_path / "out")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.bias"])
def test_a_source_that_lacks_a_tensor_is_not_quantized(name, tmp_path):
    source = without(saved(tiny_llama(), tmp_path / "source"), name)
    with pytest.raises(ValueError, match=f"lacks 1 of LlamaForCausalLM, the first {name}"):
        quantize_checkpoint(source, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_of_tied_tensors_one_is_enough_whichever_it_is(tmp_path):
    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    source = rewritten(saved(tiny_qwen3(), tmp_path / "source"), rename)
    quantize_checkpoint(source, tmp_path / "packed")
    assert load_nvfp4(tmp_path / "packed").nvfp4_requantization.num_moved == 0
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "plain")
    assert not [finding for finding in examine(tmp_path / "packed").findings if finding.rule == "missing-tensor"]
    with pytest.raises(ValueError, match="lacks 1 of Qwen3ForCausalLM, the first model.embed_tokens.weight"):
        quantize_checkpoint(without(source, "lm_head."), tmp_path / "other")


def test_what_a_class_lets_be_missing_is_not_missed(tmp_path, monkeypatch):
    path = tmp_path / "packed"
    quantize_checkpoint(saved(tiny_llama(), tmp_path / "source"), path)
    without(path, "model.norm.")
    monkeypatch.setattr(type(tiny_llama()), "_keys_to_ignore_on_load_missing", {r"model\.norm\.weight"})
    assert load_nvfp4(path).nvfp4_requantization.num_moved == 0
    assert verify_nvfp4(path).ok
    dequantize_checkpoint(path, tmp_path / "plain")


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_checkpoints_of_all_families_raise_no_false_alarm(family, tmp_path):
    source = of_family(family, tmp_path / "source")
    quantize_checkpoint(source, tmp_path / "packed")
    model = load_nvfp4(tmp_path / "packed")
    assert not model.nvfp4_requantization.moved and not model.nvfp4_requantization.unused
    model.save_pretrained(tmp_path / "again")
    load_nvfp4(tmp_path / "again")
    dequantize_checkpoint(tmp_path / "again", tmp_path / "plain")


def test_a_packed_layer_that_the_model_does_not_have_is_refused(llama_packed, tmp_path):
    def copy_layer(tensors):
        layer, other = "model.layers.1.mlp.up_proj.", "model.layers.7.mlp.up_proj."
        tensors |= {name.replace(layer, other): tensors[name].clone() for name in tensors if name.startswith(layer)}

    path = rewritten(shutil.copytree(llama_packed, tmp_path / "copy"), copy_layer)
    with pytest.raises(ValueError, match=r"has 1 that no layer of LlamaForCausalLM takes, the first model\.layers\.7"):
        load_nvfp4(path)


def test_a_tensor_that_has_no_place_is_in_the_report(llama_packed, tmp_path):
    path = rewritten(
        shutil.copytree(llama_packed, tmp_path / "copy"), lambda t: t.update({"mtp.fc.weight": torch.ones(4, 4)})
    )
    report = load_nvfp4(path).nvfp4_requantization
    assert report.unused == ("mtp.fc.weight",)
    assert "1 tensors have no place in the model, the first mtp.fc.weight" in str(report)


GENERATION = {"eos_token_id": [2, 5], "pad_token_id": 0, "bos_token_id": 1, "max_new_tokens": 77, "temperature": 0.6,
              "do_sample": True}  # fmt: skip


def test_the_settings_of_generation_survive_every_command_and_the_next_save(tmp_path):
    source = saved(tiny_llama(), tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps(GENERATION))
    quantize_checkpoint(source, tmp_path / "packed")
    model = load_nvfp4(tmp_path / "packed")
    assert model.generation_config.eos_token_id == [2, 5] and model.generation_config.max_new_tokens == 77
    model.save_pretrained(tmp_path / "again")
    dequantize_checkpoint(tmp_path / "again", tmp_path / "plain")
    for name in ("packed", "again", "plain"):
        kept = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert {key: kept[key] for key in GENERATION} == GENERATION, name
    given = load_nvfp4(tmp_path / "packed", generation_config=GenerationConfig(max_new_tokens=3))
    assert given.generation_config.max_new_tokens == 3


CODES = {torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8"}


@pytest.mark.parametrize("dtype", CODES)
def test_codes_without_a_config_that_explains_them_are_not_taken_for_weights(dtype, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    source = rewritten(saved(tiny_llama(), tmp_path / "source"), lambda t: t.update({name: t[name].to(dtype)}))
    message = f"has codes, the first {name} in {CODES[dtype]}, and its config.json"
    with pytest.raises(ValueError, match=message):
        load_qat(source)
    run = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "packed")])
    assert run.exit_code == 2 and isinstance(run.exception, SystemExit) and not (tmp_path / "packed").exists()
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(source, tmp_path / "packed")


def test_masks_and_tables_of_whole_numbers_are_no_codes(tmp_path):
    tables = {"attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8), "position_ids": torch.arange(4)[None]}
    source = rewritten(saved(tiny_llama(), tmp_path / "source"), lambda t: t.update(tables))
    assert len(qat_modules(load_qat(source))) == 14
    quantize_checkpoint(source, tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert sum(name.endswith(".weight_packed") for name in stored) == 14
    assert all(torch.equal(stored[name], table) for name, table in tables.items())
    assert len(qat_modules(load_nvfp4(tmp_path / "packed"))) == 14


def test_weights_that_a_class_leaves_out_are_named_once(tmp_path, caplog):
    source = of_family("qwen3_5_text", tmp_path / "source")
    extra = {"mtp.fc.weight": torch.ones(8, 8), "mtp.proj.weight": torch.ones(8, 8), "mtp.norm.weight": torch.ones(8)}
    rewritten(source, lambda tensors: tensors.update(extra))
    with caplog.at_level(logging.WARNING, logger="hf_nvfp4_qat"):
        load_qat(source)
    said = [record.getMessage() for record in caplog.records if "has no place for" in record.getMessage()]
    assert len(said) == 1 and "2 matrices of the checkpoint, the first mtp.fc.weight" in said[0]
    caplog.clear()
    load_qat(without(source, "mtp."))
    assert not [record for record in caplog.records if "has no place for" in record.getMessage()]


STATE = {"qwen3_5_text": ("A_log", "linear_attn.norm.weight"), "nemotron_h": ("A_log", "D")}


@pytest.mark.parametrize("family", STATE)
def test_state_in_float32_stays_float32_in_quantize_save_and_push(family, tmp_path):
    def as_published(tensors):
        for name in tensors:
            if name.endswith(STATE[family]):
                tensors[name] = torch.rand(tensors[name].shape) * 3 + 0.1

    torch.manual_seed(0)
    source = rewritten(of_family(family, tmp_path / "source"), as_published)
    state = {name: tensor for name, tensor in load_file(source / SINGLE).items() if name.endswith(STATE[family])}
    quantize_checkpoint(source, tmp_path / "packed")
    model = load_qat(source)
    model.save_pretrained(tmp_path / "saved")
    files = [load_file(tmp_path / name / SINGLE) for name in ("packed", "saved")]
    for found in (*files, dict(RolloutStream(model))):
        assert len(state) >= 2 and all(torch.equal(found[name], tensor) for name, tensor in state.items())
        assert all(found[name].dtype == torch.float32 for name in state)
        others = [name for name in found if name.endswith(("layernorm.weight", "norm_f.weight", "dt_bias"))]
        assert any(found[name].dtype == torch.bfloat16 for name in others)


def test_a_vector_that_a_16_bit_source_has_in_float32_stays_and_a_float32_source_is_rounded(tmp_path):
    norm, head = "model.norm.weight", "lm_head.weight"
    source = saved(tiny_llama(), tmp_path / "source")
    rewritten(source, lambda tensors: tensors.update({name: tensors[name].float() + 1e-4 for name in (norm, head)}))
    quantize_checkpoint(source, tmp_path / "mixed")
    mixed = load_file(tmp_path / "mixed" / SINGLE)
    assert torch.equal(mixed[norm], load_file(source / SINGLE)[norm]) and mixed[head].dtype == torch.bfloat16
    tiny_llama().save_pretrained(tmp_path / "float32")
    quantize_checkpoint(tmp_path / "float32", tmp_path / "rounded")
    assert load_file(tmp_path / "rounded" / SINGLE)[norm].dtype == torch.bfloat16


def vision_model():
    text = {**SIZES, "model_type": "mistral", "tie_word_embeddings": False}
    vision = {"model_type": "pixtral", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 4, "patch_size": 14, "image_size": 28, "head_dim": 16}  # fmt: skip
    set_seed(0)
    config = CONFIG_MAPPING["mistral3"](text_config=text, vision_config=vision, tie_word_embeddings=False)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def tied_settings(path: Path) -> tuple:
    config = json.loads((path / "config.json").read_text())
    return config.get("tie_word_embeddings"), config.get("text_config", {}).get("tie_word_embeddings")


@pytest.mark.parametrize(
    "make, auto", [(tiny_llama, AutoModelForCausalLM), (vision_model, AutoModelForImageTextToText)]
)
def test_a_head_of_its_own_is_never_said_to_be_tied(make, auto, tmp_path):
    source = saved(make(), tmp_path / "source")
    is_composite = "text_config" in json.loads((source / "config.json").read_text())
    edited(source, tie_word_embeddings=True, **({"text_config": {"tie_word_embeddings": True}} if is_composite else {}))
    model = auto.from_pretrained(source, dtype=torch.float32, quantization_config=NVFP4QATConfig())
    model.save_pretrained(tmp_path / "saved")
    quantize_checkpoint(source, tmp_path / "packed")
    for name in ("saved", "packed"):
        assert tied_settings(tmp_path / name) == (False, False if is_composite else None)
        assert any(tensor.endswith("lm_head.weight") for tensor in load_file(tmp_path / name / SINGLE))
    expected = {"tie_word_embeddings": False}
    settings = RolloutStream(model).tied_settings  # which go into the engine's config
    assert settings == (expected | ({"text_config": expected} if is_composite else {}))


def test_a_head_that_is_tied_stays_tied_in_config_and_engine(tmp_path):
    source = saved(tiny_qwen3(), tmp_path / "source")
    copy_of_head = {"lm_head.weight": load_file(source / SINGLE)["model.embed_tokens.weight"]}
    model = load_qat(source)
    model.save_pretrained(tmp_path / "saved")
    quantize_checkpoint(source, tmp_path / "packed")
    quantize_checkpoint(rewritten(source, lambda tensors: tensors.update(copy_of_head)), tmp_path / "twice")
    assert {tied_settings(tmp_path / name) for name in ("saved", "packed", "twice")} == {(True, None)}
    assert not RolloutStream(model).tied_settings
    notes = [finding for finding in examine(tmp_path / "twice").findings if finding.rule == "skipped-tensor"]
    assert [finding.where for finding in notes] == ["lm_head.weight"] and examine(tmp_path / "twice").ok


def test_a_head_tied_by_hand_is_said_to_be_tied(tmp_path):
    model = load_qat(saved(tiny_llama(), tmp_path / "source"))
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    assert tied_settings(tmp_path / "saved") == (True, None)
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / SINGLE)
    again = load_nvfp4(tmp_path / "saved")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def adapted(path: Path, **options):
    peft = pytest.importorskip("peft")
    model = load_qat(path, NVFP4QATConfig(exclude=["re:.*self_attn.*"]))
    return peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))


@pytest.mark.parametrize(
    "options", [{"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
def test_adapters_are_refused_where_whole_weights_are_needed_until_they_are_merged(options, llama_dir, tmp_path):
    model = adapted(llama_dir, **options)
    base = model.get_base_model()
    for write in (
        lambda: save_nvfp4(model, tmp_path / "a"), lambda: save_nvfp4(base, tmp_path / "b"),
        lambda: base.save_pretrained(tmp_path / "c"), lambda: RolloutStream(model), lambda: RolloutStream(base),
        lambda: verify_nvfp4(tmp_path / "merged", model),
    ):  # fmt: skip
        if not (tmp_path / "merged").exists():
            load_qat(llama_dir).save_pretrained(tmp_path / "merged")
        with pytest.raises(ValueError, match=r"a PEFT adapter is in none before it is merged; .* has one"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert verify_nvfp4(tmp_path / "merged", merged).ok
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    torch.testing.assert_close(served(input_ids=tokens()).logits.float(), expected, rtol=0, atol=0.05)


@pytest.fixture(scope="module")
def custom(tmp_path_factory):
    """A checkpoint whose model is code beside it."""
    path = saved(tiny_llama(), tmp_path_factory.mktemp("custom") / "source")
    (path / "configuration_tiny.py").write_text(
        "from transformers import LlamaConfig\nclass TinyConfig(LlamaConfig):\n    model_type = 'tiny_custom'\n"
    )
    (path / "modeling_tiny.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_tiny import TinyConfig\n"
        "class TinyForCausalLM(LlamaForCausalLM):\n    config_class = TinyConfig\n"
    )
    classes = {
        "AutoConfig": "configuration_tiny.TinyConfig",
        "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
    }
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "tiny_custom", "architectures": ["TinyForCausalLM"], "auto_map": classes}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_custom_code_runs_where_it_is_trusted_and_comes_along(custom, tmp_path):
    run = CliRunner().invoke(app, ["quantize", str(custom), str(tmp_path / "packed"), "--trust-remote-code"])
    assert run.exit_code == 0, run.output
    model = load_nvfp4(tmp_path / "packed", trust_remote_code=True)
    assert type(model).__name__ == "TinyForCausalLM" and model.nvfp4_requantization.num_moved == 0
    model.save_pretrained(tmp_path / "again")
    dequantize_checkpoint(tmp_path / "again", tmp_path / "plain")
    for name in ("packed", "again", "plain"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["auto_map"]["AutoModelForCausalLM"].endswith("modeling_tiny.TinyForCausalLM")
        assert {"modeling_tiny.py", "configuration_tiny.py"} <= {path.name for path in (tmp_path / name).iterdir()}
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", trust_remote_code=True)
    assert torch.equal(served(tokens()).logits, model(tokens()).logits)


def test_custom_code_that_is_not_trusted_does_not_run_and_the_way_out_exists(custom, tmp_path):
    spoiled = shutil.copytree(custom, tmp_path / "source")
    (spoiled / "configuration_tiny.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for arguments in (["quantize", str(spoiled), str(tmp_path / "packed")], ["inspect", str(spoiled)],
                      ["sensitivity", str(spoiled), "--text", str(spoiled / "modeling_tiny.py")]):  # fmt: skip
        run = CliRunner().invoke(app, arguments)
        said = " ".join(run.output.split())
        assert run.exit_code == 2 and "is custom code, and none was run" in said
        assert "--trust-remote-code` of `nvfp4-qat quantize`" in said
    quantize_checkpoint(custom, tmp_path / "packed", trust_remote_code=True)
    shutil.copy(spoiled / "configuration_tiny.py", tmp_path / "packed")
    with pytest.raises(ValueError, match="none was run.*`trust_remote_code=True` of `load_nvfp4`"):
        load_nvfp4(tmp_path / "packed")
    assert not (tmp_path / "ran").exists()
