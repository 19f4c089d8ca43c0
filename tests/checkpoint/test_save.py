"""What save_pretrained and save_nvfp4 write, where, and what they refuse."""

import copy
import json
import os
import pickle
import threading

import pytest
import torch
from conftest import load_qat, take_step, tiny_llama, tiny_qwen3, tokens
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_nvfp4_qat import NVFP4QATConfig, prepare_qat, save_nvfp4, verify_nvfp4
from hf_nvfp4_qat.checkpoint import sources, stream
from hf_nvfp4_qat.formats.files import CheckpointReader
from hf_nvfp4_qat.formats.names import from_checkpoint
from hf_nvfp4_qat.modules.swap import qat_modules


def config_of(path) -> dict:
    return json.loads((path / "config.json").read_text())


def bfloat16_twin(model, tmp_path):
    """The QAT model as it trains in bfloat16: master weights loaded in the served dtype."""
    model.save_pretrained(tmp_path / "checkpoint-1")
    return load_qat(tmp_path / "checkpoint-1", dtype=torch.bfloat16)


@pytest.mark.parametrize("directory", ["qwen3_dir", "llama_dir"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_plain_transformers_gives_the_same_logits_bit_for_bit(directory, max_shard_size, request, tmp_path):
    model = load_qat(request.getfixturevalue(directory))
    take_step(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    model.save_pretrained(tmp_path / "packed", max_shard_size=max_shard_size)
    num_files = len(list((tmp_path / "packed").glob("*.safetensors")))
    assert (num_files == 1) == (max_shard_size == "5GB")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert served.dtype == torch.bfloat16
    expected = bfloat16_twin(model, tmp_path).eval()(tokens()).logits
    assert torch.equal(served(tokens()).logits, expected)


def test_the_checkpoint_holds_packed_layers_and_bfloat16_for_the_rest(qat_model, tmp_path):
    qat_model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, layer in qat_modules(qat_model).items():
        assert f"{name}.weight" not in tensors
        assert torch.equal(from_checkpoint(name, tensors.__getitem__).dequantize(), layer.fake_quantized_weight())
    assert len(tensors) == 3 * 14 + 10
    packed = (".weight_packed", ".weight_scale", ".weight_global_scale")
    others = {name: tensor for name, tensor in tensors.items() if not name.endswith(packed)}
    assert {tensor.dtype for tensor in others.values()} == {torch.bfloat16}
    for name, tensor in others.items():
        assert torch.equal(tensor, qat_model.state_dict()[name].bfloat16())
    config = config_of(tmp_path)
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["quantization_config"]["config_groups"]["group_0"]["input_activations"] is None
    assert qat_model.dtype == torch.float32 and qat_model.config.quantization_config == NVFP4QATConfig()


def test_training_checkpoints_hold_master_weights_and_no_quantization_config(qat_model, tmp_path):
    qat_model.save_pretrained(tmp_path / "checkpoint-12")
    assert "quantization_config" not in config_of(tmp_path / "checkpoint-12")
    tensors = load_file(tmp_path / "checkpoint-12" / "model.safetensors")
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, qat_model.state_dict()[name])
    # The model itself is as before.
    assert qat_model.hf_quantizer is not None and qat_model.is_quantized
    qat_model.save_pretrained(tmp_path / "packed")
    assert verify_nvfp4(tmp_path / "packed", qat_model).ok


@pytest.mark.parametrize(
    "save_format, name, is_packed",
    [
        ("auto", "checkpoint-3", False),
        ("auto", "checkpoint-final", True),
        ("auto", "my-checkpoint-3x", True),
        ("master", "anything", False),
        ("nvfp4", "checkpoint-3", True),
    ],
)
def test_the_saving_rule_and_its_overrides(qwen3_dir, tmp_path, save_format, name, is_packed):
    load_qat(qwen3_dir, NVFP4QATConfig(save_format=save_format)).save_pretrained(tmp_path / name)
    assert ("quantization_config" in config_of(tmp_path / name)) == is_packed


@pytest.mark.parametrize("name", ["packed", "checkpoint-5"])
def test_a_given_state_dict_is_honoured(qat_model, tmp_path, name):
    state = {key: torch.ones_like(value) * 3 for key, value in qat_model.state_dict().items()}
    qat_model.save_pretrained(tmp_path / name, state_dict=state)
    tensors = load_file(tmp_path / name / "model.safetensors")
    assert (tensors["model.norm.weight"] == 3).all()
    layer = "model.layers.0.mlp.up_proj"
    if name == "packed":
        assert (from_checkpoint(layer, tensors.__getitem__).dequantize() == 3).all()  # with a scale of its own
    else:
        assert (tensors[f"{layer}.weight"] == 3).all()


@pytest.mark.parametrize("state", [{}, {"model.norm.weight": torch.ones(64)}])
def test_a_state_dict_without_the_qat_weights_is_refused_before_anything_is_written(qat_model, tmp_path, state):
    with pytest.raises(ValueError, match="0 of 14 were found .* Nothing was written"):
        qat_model.save_pretrained(tmp_path / "packed", state_dict=state)
    assert not (tmp_path / "packed").exists()


def test_an_empty_state_dict_is_honoured_in_a_training_checkpoint(qat_model, tmp_path):
    """The placeholder that Trainer passes where DeepSpeed writes the weights."""
    qat_model.save_pretrained(tmp_path / "checkpoint-1", state_dict={})
    weights = tmp_path / "checkpoint-1" / "model.safetensors"
    assert not weights.exists() or load_file(weights) == {}


def test_nan_in_a_weight_stops_the_save_and_leaves_the_old_checkpoint(qat_model, tmp_path):
    qat_model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        qat_model.model.layers[1].mlp.down_proj.weight[0, :3] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj.weight cannot be packed.* holds 3 such values"):
        qat_model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_the_main_process_writes(qat_model, tmp_path):
    qat_model.save_pretrained(tmp_path / "packed", is_main_process=False)
    assert not (tmp_path / "packed").exists()


def test_a_smaller_save_replaces_a_sharded_one(qat_model, tmp_path):
    qat_model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "notes.txt").write_text("mine")
    qat_model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.safetensors", "config.json", "generation_config.json", "notes.txt"}
    assert verify_nvfp4(tmp_path, qat_model).ok


def test_one_weight_is_packed_at_a_time(qat_model, tmp_path, monkeypatch):
    """At no time are more packed weights alive than one shard holds."""
    alive, most = [0], [0]
    pack = sources.quantize_nvfp4

    class Counted:
        def __del__(self):
            alive[0] -= 1

    def counting(weight, **kwargs):
        packed = pack(weight, **kwargs)
        packed.packed.counted = Counted()
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        return packed

    monkeypatch.setattr(sources, "quantize_nvfp4", counting)
    qat_model.save_pretrained(tmp_path, max_shard_size="8KB")
    num_shards = len(list(tmp_path.glob("*.safetensors")))
    assert num_shards > 5 and most[0] <= 3


def test_the_index_counts_bytes_and_parameters(qat_model, tmp_path):
    qat_model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    total = 0
    for file in tmp_path.glob("*.safetensors"):
        total += sum(tensor.nbytes for tensor in load_file(file).values())
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata()["format"] == "pt"
    assert index["metadata"]["total_size"] == total
    assert index["metadata"]["total_parameters"] == sum(p.numel() for p in qat_model.parameters())


def test_a_variant_of_a_packed_checkpoint_is_refused(qat_model, tmp_path):
    with pytest.raises(ValueError, match="no variants; got variant='nvfp4'"):
        qat_model.save_pretrained(tmp_path / "packed", variant="nvfp4")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("first, then", [("nvfp4", "master"), ("master", "nvfp4")])
@pytest.mark.parametrize("sizes", [("20KB", "5GB"), ("5GB", "20KB")])
def test_saving_in_the_other_format_over_a_checkpoint_leaves_only_the_new_one(qat_model, tmp_path, first, then, sizes):
    for save_format, max_shard_size in zip((first, then), sizes, strict=True):
        with torch.no_grad():
            qat_model.model.norm.weight.add_(1)
        qat_model.nvfp4_save_format = save_format
        qat_model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.norm.weight.float(), qat_model.model.norm.weight)
    assert set(CheckpointReader(tmp_path).file_of.values()) == {path.name for path in tmp_path.glob("*.safetensors")}


def test_a_file_that_was_written_again_stays_where_times_do_not_tell(qat_model, tmp_path, monkeypatch):
    """File systems with coarse times, and writers that keep the inode."""
    upstream = type(qat_model).save_pretrained

    def as_before(self, directory, **options):
        upstream(self, directory, **options)
        os.utime(tmp_path / "checkpoint-1" / "model.safetensors", ns=(0, 0))

    monkeypatch.setattr(type(qat_model), "save_pretrained", as_before)
    for value in (1.0, 2.0):
        with torch.no_grad():
            qat_model.model.norm.weight.fill_(value)
        qat_model.save_pretrained(tmp_path / "checkpoint-1")
    tensors = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert (tensors["model.norm.weight"] == 2).all() and len(list((tmp_path / "checkpoint-1").iterdir())) == 3


def test_a_training_checkpoint_that_cannot_be_written_leaves_the_older_one(qat_model, tmp_path, monkeypatch):
    directory = tmp_path / "checkpoint-1"
    qat_model.save_pretrained(directory, max_shard_size="20KB")
    before = {path.name: path.read_bytes() for path in directory.glob("model*")}

    def fails(self, directory, **options):
        for name in ("model.safetensors", min(before)):
            (directory / name).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(type(qat_model).original_class, "save_pretrained", fails)
    with pytest.raises(OSError, match="disk full"):
        qat_model.save_pretrained(directory)
    assert {path.name: path.read_bytes() for path in directory.glob("model*")} == before


def test_copies_and_pickles_save_themselves(qat_model, tmp_path):
    for number, twin in enumerate((copy.deepcopy(qat_model), pickle.loads(pickle.dumps(qat_model)))):
        with torch.no_grad():
            twin.model.norm.weight.fill_(7)
        twin.save_pretrained(tmp_path / str(number))
        assert (load_file(tmp_path / str(number) / "model.safetensors")["model.norm.weight"] == 7).all()
    assert not (qat_model.model.norm.weight == 7).any()


def test_repeated_and_concurrent_saves_of_one_model_agree(qat_model, tmp_path):
    threads = [threading.Thread(target=qat_model.save_pretrained, args=(tmp_path / str(i),)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = [(tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(3)]
    assert files[0] == files[1] == files[2]


def test_progress_counts_every_weight(qat_model, tmp_path):
    calls = []
    save_nvfp4(qat_model, tmp_path, progress=lambda num_done, total: calls.append((num_done, total)))
    assert calls == [(i, 24) for i in range(1, 25)]


def test_ignored_arguments_are_reported(qat_model, tmp_path, caplog):
    qat_model.save_pretrained(tmp_path, save_original_format=False)
    assert "ignores save_original_format" in caplog.text


def test_save_nvfp4_refuses_a_model_that_is_not_trained_in_nvfp4(tmp_path):
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no QAT layers"):
        save_nvfp4(tiny_qwen3(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_file_in_the_place_of_the_directory_is_refused(qat_model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        qat_model.save_pretrained(tmp_path / "file")


def test_biases_and_frozen_weights_are_saved(llama_dir, tmp_path):
    model = load_qat(llama_dir).requires_grad_(False)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bias = model.model.layers[0].self_attn.q_proj.bias
    assert torch.equal(tensors["model.layers.0.self_attn.q_proj.bias"], bias.bfloat16())


def test_checkpoint_names_are_used_where_they_differ_from_module_names(tmp_path):
    """LLaVA: modules live at model.language_model.layers, tensors at language_model.model.layers."""
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(text_config=LlamaConfig(**text), vision_config=CLIPVisionConfig(**vision), image_token_index=1)
    LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "source", quantization_config=NVFP4QATConfig())
    layers = qat_modules(model)
    assert len(layers) == 7 and all(".language_model." in name for name in layers)
    model.save_pretrained(tmp_path / "packed")
    original = load_file(tmp_path / "source" / "model.safetensors")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    packed = {name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")}
    assert len(packed) == 7 and all(f"{name}.weight" in original for name in packed)
    ignore = config_of(tmp_path / "packed")["quantization_config"]["ignore"]
    matrices = {n.removesuffix(".weight") for n, t in original.items() if n.endswith(".weight") and t.ndim == 2}
    embeddings = {name for name in matrices if "embed" in name}
    assert set(ignore) >= matrices - packed - embeddings and not set(ignore) & packed
    assert verify_nvfp4(tmp_path / "packed", model).ok
    # Plain Transformers finds every tensor: it compares `ignore` with module names.
    served, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected = model.eval()(input_ids=tokens(8) % 64).logits
    assert torch.equal(served(input_ids=tokens(8) % 64).logits, expected)
    for name, parameter in served.vision_tower.named_parameters() if hasattr(served, "vision_tower") else ():
        assert torch.equal(parameter, model.vision_tower.get_parameter(name))


def test_routers_and_excluded_experts_are_listed_in_ignore(tmp_path):
    sizes = dict(hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1, vocab_size=64)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads))
    prepare_qat(model, NVFP4QATConfig(exclude=[r"re:.*experts$"])).save_pretrained(tmp_path)
    ignore = config_of(tmp_path)["quantization_config"]["ignore"]
    assert "model.layers.0.mlp.gate" in ignore and "model.layers.0.mlp.experts.3.down_proj" in ignore
    assert verify_nvfp4(tmp_path, model).ok


def test_modules_that_transformers_keeps_in_fp32_are_not_cast():
    model = nn.Module()
    model._keep_in_fp32_modules_strict = {"gate.weight", "norm"}
    cast = {
        name: stream.served_dtype(model, name, torch.float32) for name in ("mlp.gate.weight", "norm.bias", "up.weight")
    }
    assert list(cast.values()) == [torch.float32, torch.float32, torch.bfloat16]


def test_a_plain_module_can_be_prepared_and_streamed():
    model = prepare_qat(nn.ModuleDict({"up": nn.Linear(32, 16, bias=False)}))
    (source,) = stream.packed_sources(model)
    assert list(source.tensors()) == ["up.weight_packed", "up.weight_scale", "up.weight_global_scale"]


def test_prepare_qat_gives_a_from_config_model_the_saving_rule(tmp_path):
    model = prepare_qat(tiny_llama())
    model.save_pretrained(tmp_path / "packed")
    assert verify_nvfp4(tmp_path / "packed", model).ok
