"""ModelOpt's dialect: written, read, and converted without loss; witnesses are compressed-tensors, ModelOpt, vLLM."""

import json

import pytest
import torch
from conftest import SIZES, load_qat, tiny_llama, tiny_qwen3_moe, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_nvfp4_qat import NVFP4QATConfig, calibrate_activations, load_nvfp4, save_nvfp4, verify_nvfp4
from hf_nvfp4_qat.checkpoint.convert import convert_checkpoint, dequantize_checkpoint
from hf_nvfp4_qat.checkpoint.save import DIALECTS
from hf_nvfp4_qat.cli import app
from hf_nvfp4_qat.modules.swap import qat_modules, qat_weights

RECIPES = {
    "W4A16": NVFP4QATConfig(),
    "W4A4": NVFP4QATConfig(activations="nvfp4"),
    "mse, ffn_only": NVFP4QATConfig(scale_rule="mse", preset="ffn_only"),
}


def make(path, recipe):
    model = load_qat(path, recipe, dtype=torch.bfloat16)
    if recipe.activations == "nvfp4":
        calibrate_activations(model, [tokens()])
    return model.eval()


@pytest.fixture(params=RECIPES)
def model(request, llama_dir):
    return make(llama_dir, RECIPES[request.param])


def tensors_of(path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rewrite(path, **changes) -> None:
    """Change tensors of a checkpoint of one file."""
    with safe_open(path / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    save_file({**tensors_of(path), **changes}, path / "model.safetensors", metadata=metadata)


def bytes_of(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_a_model_is_saved_under_modelopts_names_and_reads_back_equal(model, tmp_path):
    save_nvfp4(model, tmp_path, dialect="modelopt")
    tensors = tensors_of(tmp_path)
    name, layer = next(iter(qat_modules(model).items()))
    weight = tensors[f"{name}.weight"]
    assert weight.dtype == torch.uint8 and weight.shape == (layer.out_features, layer.in_features // 2)
    assert tensors[f"{name}.weight_scale_2"].shape == ()
    assert torch.equal(tensors[f"{name}.weight_scale_2"], layer.global_decode_scale)
    assert (f"{name}.input_scale" in tensors) == (layer.input_amax is not None)
    assert not any("global_scale" in name or "packed" in name for name in tensors)
    algorithm = "W4A16_NVFP4" if layer.input_amax is None else "NVFP4"
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    legacy = json.loads((tmp_path / "hf_quant_config.json").read_text())
    assert quantization["quant_method"] == "modelopt" and quantization["quant_algo"] == algorithm
    assert legacy["quantization"] == {
        "quant_algo": algorithm, "kv_cache_quant_algo": None, "group_size": 16,
        "exclude_modules": quantization["ignore"],
    }  # fmt: skip
    report = verify_nvfp4(tmp_path, model)
    assert report.ok and report.num_compared == report.num_tensors, str(report)
    loaded = load_nvfp4(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    scale_rules = {weight.scale_rule for weight in qat_weights(loaded).values()}
    assert scale_rules == {weight.scale_rule for weight in qat_weights(model).values()}


def test_there_and_back_gives_the_same_bytes_in_every_file(model, tmp_path):
    save_nvfp4(model, tmp_path / "a", max_shard_size="24KB")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    num_layers = convert_checkpoint(tmp_path / "a", tmp_path / "b", "modelopt")
    assert num_layers == len(qat_modules(model))
    assert verify_nvfp4(tmp_path / "b", model).ok
    convert_checkpoint(tmp_path / "b", tmp_path / "c", "compressed-tensors")
    assert bytes_of(tmp_path / "c") == bytes_of(tmp_path / "a")
    save_nvfp4(model, tmp_path / "d", dialect="modelopt", max_shard_size="24KB")
    (tmp_path / "d" / "tokenizer.json").write_text("{}")
    assert bytes_of(tmp_path / "d") == bytes_of(tmp_path / "b")


@pytest.mark.parametrize("start", DIALECTS)
def test_scales_of_other_tools_keep_their_last_bit_there_and_back(start, llama_dir, tmp_path):
    other = next(dialect for dialect in DIALECTS if dialect != start)
    save_nvfp4(make(llama_dir, RECIPES["W4A4"]), tmp_path / "a", dialect=start)
    torch.manual_seed(0)
    scales = [name for name, tensor in tensors_of(tmp_path / "a").items() if tensor.numel() == 1]
    assert len(scales) == 28
    foreign = torch.rand(len(scales)) * 2000 + 1
    rewrite(
        tmp_path / "a",
        **{n: s.reshape(tensors_of(tmp_path / "a")[n].shape) for n, s in zip(scales, foreign, strict=True)},
    )
    assert ((1 / (1 / foreign)) != foreign).any()
    convert_checkpoint(tmp_path / "a", tmp_path / "b", other)
    convert_checkpoint(tmp_path / "b", tmp_path / "c", start)
    assert bytes_of(tmp_path / "c") == bytes_of(tmp_path / "a")


def test_experts_are_converted_too(tmp_path):
    tiny_qwen3_moe().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    model = load_qat(tmp_path / "source")
    model.save_pretrained(tmp_path / "a", dialect="modelopt")
    assert verify_nvfp4(tmp_path / "a", model).ok
    excluded = json.loads((tmp_path / "a" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert "model.layers.0.mlp.gate" in excluded
    dequantize_checkpoint(tmp_path / "a", tmp_path / "plain")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", "compressed-tensors")
    dequantize_checkpoint(tmp_path / "b", tmp_path / "plain_too")
    assert bytes_of(tmp_path / "plain") == bytes_of(tmp_path / "plain_too")


def test_compressed_tensors_own_converter_gives_our_tensors(llama_dir, tmp_path):
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
    model = make(llama_dir, RECIPES["W4A4"])
    save_nvfp4(model, tmp_path / "ours")
    save_nvfp4(model, tmp_path / "modelopt", dialect="modelopt")
    ignore = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]["ignore"]
    targets = [name for name in qat_modules(model)]
    theirs = converters.ModelOptNvfp4Converter(ignore=ignore, targets=targets).process(
        tensors_of(tmp_path / "modelopt")
    )
    ours = tensors_of(tmp_path / "ours")
    assert set(theirs) == set(ours)
    for name, tensor in ours.items():
        assert torch.equal(theirs[name].reshape(tensor.shape).view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.peers
def test_modelopt_itself_decodes_our_tensors_to_our_values(llama_dir, tmp_path):
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    model = make(llama_dir, NVFP4QATConfig())
    save_nvfp4(model, tmp_path, dialect="modelopt")
    tensors = tensors_of(tmp_path)
    for name, layer in qat_modules(model).items():
        packed = qtensor.NVFP4QTensor(layer.weight.shape, torch.bfloat16, tensors[f"{name}.weight"])
        decoded = packed.dequantize(
            scale=tensors[f"{name}.weight_scale"],
            double_scale=tensors[f"{name}.weight_scale_2"],
            block_sizes={-1: 16},
        )
        assert torch.equal(decoded, layer.fake_quantized_weight())


def test_nvidias_older_layout_with_wildcards_and_an_fp8_cache_is_read(llama_dir, tmp_path):
    """As published in 2025: nothing in config.json, `exclude_modules` with wildcards, scales of the cache."""
    model = make(llama_dir, NVFP4QATConfig(activations="nvfp4", bf16_first_layers=1))
    save_nvfp4(model, tmp_path / "a", dialect="modelopt")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    legacy = json.loads((tmp_path / "a" / "hf_quant_config.json").read_text())
    legacy["quantization"] |= {"exclude_modules": ["model.layers.0*", "lm_head"], "kv_cache_quant_algo": "FP8"}
    (tmp_path / "a" / "hf_quant_config.json").write_text(json.dumps(legacy))
    scale = "model.layers.1.self_attn.k_proj.k_scale"
    rewrite(tmp_path / "a", **{scale: torch.tensor(0.5)})
    convert_checkpoint(tmp_path / "a", tmp_path / "b", "compressed-tensors")
    quantization = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert {"lm_head", "model.layers.0.mlp.up_proj"} <= set(quantization["ignore"])
    assert "model.layers.1.mlp.up_proj" not in quantization["ignore"]
    assert quantization["kv_cache_scheme"]["num_bits"] == 8
    assert quantization["config_groups"]["group_0"]["input_activations"]
    assert torch.equal(tensors_of(tmp_path / "b")[scale], torch.tensor(0.5))
    loaded = load_nvfp4(tmp_path / "a")
    assert len(qat_modules(loaded)) == 7 and loaded.nvfp4_requantization.num_input_scales == 0


def test_regular_expressions_in_ignore_are_spelled_out(llama_dir, tmp_path):
    save_nvfp4(make(llama_dir, NVFP4QATConfig(bf16_first_layers=1)), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head", r"re:model\.layers\.0\..*proj$"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    convert_checkpoint(tmp_path / "a", tmp_path / "b", "modelopt")
    excluded = json.loads((tmp_path / "b" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert len(excluded) == 8 and "model.layers.0.mlp.up_proj" in excluded


def test_layers_that_no_group_names_are_excluded_there(llama_dir, tmp_path):
    save_nvfp4(make(llama_dir, NVFP4QATConfig(exclude=["re:.*self_attn.*"])), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    convert_checkpoint(tmp_path / "a", tmp_path / "b", "modelopt")
    excluded = json.loads((tmp_path / "b" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert len(excluded) == 9 and {"lm_head", "model.layers.1.self_attn.o_proj"} < set(excluded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_algo": "MIXED_PRECISION"}, "those with W4A16_NVFP4 or NVFP4 in blocks of 16.*MIXED_PRECISION"),
        ({"quant_algo": None}, "names no `quant_algo`"),
        ({"group_size": 32}, "group_size 32"),
        ({"kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "only FP8 can be carried over"),
    ],
)
def test_what_cannot_be_read_is_refused(change, message, llama_dir, tmp_path):
    save_nvfp4(make(llama_dir, NVFP4QATConfig()), tmp_path / "a", dialect="modelopt")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "a", tmp_path / "b", "compressed-tensors")
    assert not (tmp_path / "b").exists()


def test_what_modelopt_cannot_say_is_refused(llama_dir, tmp_path):
    save_nvfp4(make(llama_dir, NVFP4QATConfig()), tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    original = json.loads(path.read_text())
    for change, message in (
        ({"transform_config": {"a": 1}}, "transforms"),
        ({"config_groups": {"a": {}, "b": {}}}, "2 config groups"),
        ({"kv_cache_scheme": {"num_bits": 4, "type": "int"}}, "FP8 cache or none"),
    ):
        config = {**original, "quantization_config": {**original["quantization_config"], **change}}
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(tmp_path / "a", tmp_path / "b", "modelopt")
    with pytest.raises(ValueError, match="compressed-tensors already"):
        convert_checkpoint(tmp_path / "a", tmp_path / "b", "compressed-tensors")
    with pytest.raises(ValueError, match="`dialect` is one of compressed-tensors, modelopt; got 'onnx'"):
        convert_checkpoint(tmp_path / "a", tmp_path / "b", "onnx")
    with pytest.raises(ValueError, match="got 'onnx'"):
        save_nvfp4(make(llama_dir, NVFP4QATConfig()), tmp_path / "b", dialect="onnx")
    assert not (tmp_path / "b").exists()


def test_a_later_save_in_the_other_dialect_leaves_no_stale_file(llama_dir, tmp_path):
    model = make(llama_dir, NVFP4QATConfig())
    save_nvfp4(model, tmp_path, dialect="modelopt")
    save_nvfp4(model, tmp_path)
    assert not (tmp_path / "hf_quant_config.json").exists()
    assert verify_nvfp4(tmp_path, model).ok


def test_the_command_converts_and_refuses_an_occupied_folder(llama_dir, tmp_path):
    save_nvfp4(make(llama_dir, NVFP4QATConfig()), tmp_path / "a")

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    result = run("convert", tmp_path / "a", tmp_path / "b", "--to", "modelopt")
    assert result.exit_code == 0 and "14 layers in the dialect of modelopt" in result.output
    assert run("verify", tmp_path / "b").exit_code == 0
    assert run("inspect", tmp_path / "b").exit_code == 0
    assert run("convert", tmp_path / "a", tmp_path / "b").exit_code == 2
    # Onto itself: all is read before anything is replaced.
    assert run("convert", tmp_path / "b", tmp_path / "b", "--to", "compressed-tensors", "--overwrite").exit_code == 0
    assert bytes_of(tmp_path / "b") == bytes_of(tmp_path / "a")
    assert run("convert", tmp_path / "b", tmp_path / "c", "--to", "compressed-tensors").exit_code == 2


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_generates_the_same_from_both_dialects(tmp_path):
    from vllm_engines import generate, make_engine, release_engines, save

    changes = {**SIZES, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    save(tiny_llama(**changes), tmp_path / "source")
    model = load_qat(tmp_path / "source")
    found = []
    for dialect in DIALECTS:
        save_nvfp4(model, tmp_path / dialect, dialect=dialect)
        found.append(generate(make_engine(tmp_path / dialect)))
    release_engines()
    assert found[0] == found[1]
    assert len({token for tokens, _ in found[0] for token in tokens}) > 2
