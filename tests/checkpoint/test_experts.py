"""Fused experts in checkpoints: published one by one, resumed fused, loaded by us and by plain Transformers."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import EXPERT_FAMILIES, load_qat, tiny_moe, tiny_qwen3_moe, tokens
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_nvfp4_qat import NVFP4QATConfig, load_nvfp4, prepare_qat, verify_nvfp4
from hf_nvfp4_qat.checkpoint.convert import dequantize_checkpoint, quantize_checkpoint
from hf_nvfp4_qat.checkpoint.layer_report import fold_experts, inspect_checkpoint
from hf_nvfp4_qat.modules.swap import qat_weights


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A bfloat16 checkpoint of tiny_qwen3_moe."""
    path = tmp_path_factory.mktemp("moe")
    tiny_qwen3_moe().to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_experts_are_published_one_by_one_under_the_names_of_the_family(family, tmp_path):
    model = prepare_qat(tiny_moe(family))
    model.save_pretrained(tmp_path)
    report = verify_nvfp4(tmp_path, model)
    assert report.ok, str(report)
    tiny_moe(family).save_pretrained(tmp_path / "plain")
    published = load_file(tmp_path / "plain" / "model.safetensors")
    packed = load_file(tmp_path / "model.safetensors")
    experts = [name for name in published if ".experts." in name]
    assert experts and all(f"{name}_packed" in packed and name not in packed for name in experts)


def test_what_is_stored_is_what_is_trained(source, tmp_path):
    model = load_qat(source)
    model.save_pretrained(tmp_path)
    decoded = load_nvfp4(tmp_path, dtype=torch.float32)
    assert decoded.nvfp4_requantization.num_moved == 0 and not decoded.nvfp4_requantization.not_trained
    for name, weight in qat_weights(model).items():
        assert torch.equal(decoded.get_parameter(name).bfloat16(), weight.fake_quantized_weight()), name
    assert qat_weights(decoded).keys() == qat_weights(model).keys()


def test_a_model_with_other_weights_or_one_expert_less_is_found_out(source, tmp_path):
    model = load_qat(source)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[5, 0, 0] += 1.0
    report = verify_nvfp4(tmp_path, model)
    assert not report.ok and "layers.1.mlp.experts.5.down_proj" in str(report)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.3.up_proj.weight_packed"]
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "experts.3.up_proj" in str(verify_nvfp4(tmp_path))


def test_post_training_quantization_gives_the_same_bytes(source, tmp_path):
    load_qat(source).save_pretrained(tmp_path / "model")
    quantize_checkpoint(source, tmp_path / "ptq")
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ptq", "model"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in mine)
    dequantize_checkpoint(tmp_path / "ptq", tmp_path / "decoded")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "decoded", dtype=torch.bfloat16)
    for name, weight in qat_weights(load_qat(source)).items():
        assert torch.equal(model.get_parameter(name), weight.fake_quantized_weight())


def test_excluded_experts_stay_as_they_are(source, tmp_path):
    model = load_qat(source, NVFP4QATConfig(exclude=["experts"]))
    model.save_pretrained(tmp_path)
    assert verify_nvfp4(tmp_path, model).ok
    packed, original = (load_file(path / "model.safetensors") for path in (tmp_path, source))
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    assert torch.equal(packed[name], original[name])
    assert load_nvfp4(tmp_path).nvfp4_excluded["model.layers.0.mlp.experts"].startswith("exclude")


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        ids = (tokens(12)[0] + 3 * index) % 128
        return {"input_ids": ids, "labels": ids}


def test_a_resumed_trainer_has_every_expert(source, tmp_path):
    def train(folder, resume=None):
        arguments = TrainingArguments(
            output_dir=str(folder), use_cpu=True, per_device_train_batch_size=2, max_steps=4, save_steps=2, seed=0,
            learning_rate=1e-2, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(load_qat(source), arguments, train_dataset=Data())
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    straight = train(tmp_path)
    resumed = train(tmp_path, str(tmp_path / "checkpoint-2"))
    for (name, mine), theirs in zip(resumed.named_parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


LOAD_PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
from hf_nvfp4_qat.compat import fix_expert_loading
if sys.argv[2] == "fixed":
    fix_expert_loading()
    fix_expert_loading()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save({name: parameter for name, parameter in model.named_parameters() if "experts" in name}, sys.argv[3])
"""


@pytest.mark.slow
def test_plain_transformers_reads_experts_rightly_once_repaired(source, tmp_path):
    """In fresh processes: the repair changes Transformers' classes."""
    model = load_qat(source)
    model.save_pretrained(tmp_path)
    same = {}
    for kind in ("fixed", "plain"):
        result = tmp_path / f"{kind}.pt"
        subprocess.run([sys.executable, "-c", LOAD_PLAIN, str(tmp_path), kind, str(result)], check=True)
        loaded = torch.load(result, weights_only=False)
        experts = {name: weight for name, weight in qat_weights(model).items() if "experts" in name}
        assert loaded.keys() == experts.keys()
        same[kind] = all(torch.equal(loaded[name], experts[name].fake_quantized_weight()) for name in experts)
    assert same == {"fixed": True, "plain": False}, "if `plain` is true, Transformers no longer needs the repair"


def test_the_repair_refuses_versions_it_was_not_tested_in(monkeypatch):
    import transformers

    from hf_nvfp4_qat.compat import fix_expert_loading

    monkeypatch.setattr(transformers, "__version__", "6.0.0")
    with pytest.raises(ValueError, match="6.0.0 is installed"):
        fix_expert_loading()


def test_the_repair_warns_of_newer_minor_versions(monkeypatch, caplog):
    import transformers
    from transformers.integrations import compressed_tensors as integration
    from transformers.quantizers import quantizer_compressed_tensors as quantizer

    from hf_nvfp4_qat.compat import fix_expert_loading

    # Put back when the test ends: the repair is for fresh processes here.
    monkeypatch.setattr(integration.DecompressExperts, "convert", integration.DecompressExperts.convert)
    owner = quantizer.CompressedTensorsHfQuantizer
    monkeypatch.setattr(owner, "update_weight_conversions", owner.update_weight_conversions)
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    fix_expert_loading()
    assert "5.99.0 is installed" in caplog.text
    assert integration.DecompressExperts.convert.nvfp4


def test_inspection_shows_the_experts_of_a_layer_as_one(source):
    layers = inspect_checkpoint(source)
    folded = {layer.name: layer for layer in fold_experts(layers)}
    assert len(layers) == 2 * (4 + 3 * 8) and len(folded) == 2 * (4 + 3)
    down = [layer for layer in layers if layer.name.startswith("model.layers.1.") and layer.name.endswith("down_proj")]
    row = folded["model.layers.1.mlp.experts.*.down_proj"]
    assert row.num_blocks == sum(layer.num_blocks for layer in down) == 8 * 64 * 32 // 16
    assert row.relative_error == max(layer.relative_error for layer in down)


def test_ignore_names_routers_and_no_expert(source, tmp_path):
    load_qat(source).save_pretrained(tmp_path)
    ignore = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignore == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
