"""The command line, as a user runs it."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import load_qat, tiny_qwen3
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_nvfp4_qat import NVFP4QATConfig, verify_nvfp4
from hf_nvfp4_qat.cli import app
from hf_nvfp4_qat.modules.swap import qat_modules


def run(*arguments) -> tuple[int, str]:
    """Exit code and output, stdout and stderr together."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def run_json(*arguments) -> dict[str, dict]:
    """Layers by name from `inspect --json`; progress goes to stderr."""
    result = CliRunner().invoke(app, ["inspect", *(str(argument) for argument in arguments), "--json"])
    assert result.exit_code == 0, result.output
    return {layer["name"]: layer for layer in json.loads(result.stdout)}


def test_quantize_writes_what_the_model_itself_would_save(qwen3_dir, tmp_path):
    code, output = run("quantize", qwen3_dir, tmp_path / "cli")
    assert code == 0 and "14 layers packed" in output
    model = load_qat(qwen3_dir)
    model.save_pretrained(tmp_path / "model")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("cli", "model"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert verify_nvfp4(tmp_path / "cli", model).ok
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("cli", "model")]
    assert configs[0] == configs[1]


def test_quantize_reads_and_writes_shards_and_keeps_the_other_files(qwen3_dir, tmp_path):
    tiny_qwen3().save_pretrained(tmp_path / "source", max_shard_size="50KB")  # fp32
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    code, _ = run("quantize", tmp_path / "source", tmp_path / "out", "--max-shard-size", "20KB")
    assert code == 0 and len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert verify_nvfp4(tmp_path / "out", load_qat(tmp_path / "source")).ok


@pytest.mark.parametrize("command", ["quantize", "dequantize", "convert"])
def test_weights_of_other_frameworks_stay_behind_and_are_named(command, qwen3_dir, tmp_path, caplog):
    shutil.copytree(qwen3_dir, tmp_path / "source")
    if command != "quantize":
        assert run("quantize", qwen3_dir, tmp_path / "source", "--overwrite")[0] == 0
    foreign = ["flax_model.msgpack", "optimizer.ckpt", "rust_model.ot", "tf_model.h5", "trainer_state.json"]
    mine = ["LICENSE", "modeling_mine.py", "tokenizer.json", "additional_chat_templates/tools.jinja"]
    (tmp_path / "source" / "additional_chat_templates").mkdir()
    for name in [*foreign, *mine]:
        (tmp_path / "source" / name).write_text(f"{name}")
    assert run(command, tmp_path / "source", tmp_path / "out")[0] == 0
    assert all((tmp_path / "out" / name).read_text() == name for name in mine)
    assert not any((tmp_path / "out" / name).exists() for name in foreign)
    assert f"5 files of {tmp_path / 'source'} are not copied" in caplog.text
    assert ", ".join(foreign) in caplog.text


def test_tied_copies_in_the_source_are_kept_and_noted(qwen3_dir, tmp_path):
    shutil.copytree(qwen3_dir, tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    assert run("quantize", tmp_path / "source", tmp_path / "out")[0] == 0
    code, output = run("verify", tmp_path / "out")
    assert code == 0 and "lm_head.weight: not a tensor of Qwen3ForCausalLM, but skipped by loaders" in output


def test_quantize_takes_presets_and_excludes(qwen3_dir, tmp_path):
    assert "6 layers packed" in run("quantize", qwen3_dir, tmp_path / "a", "--preset", "ffn_only")[1]
    assert "12 layers packed" in run("quantize", qwen3_dir, tmp_path / "b", "--exclude", "o_proj")[1]
    assert verify_nvfp4(tmp_path / "a").ok and verify_nvfp4(tmp_path / "b").ok


def test_quantize_takes_the_whole_recipe(qwen3_dir, tmp_path):
    options = ("--scale-rule", "mse", "--bf16-last-layers", 1)
    assert "7 layers packed" in run("quantize", qwen3_dir, tmp_path / "cli", *options)[1]
    load_qat(qwen3_dir, NVFP4QATConfig(scale_rule="mse", bf16_last_layers=1)).save_pretrained(tmp_path / "model")
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("cli", "model"))
    assert ours == theirs
    errors = [run_json(qwen3_dir, "--scale-rule", rule)["model.layers.0.mlp.up_proj"] for rule in ("amax", "mse")]
    assert errors[1]["relative_error"] < 0.95 * errors[0]["relative_error"]


def test_dequantize_gives_the_served_values(qwen3_dir, tmp_path):
    run("quantize", qwen3_dir, tmp_path / "packed")
    code, output = run("dequantize", tmp_path / "packed", tmp_path / "plain", "--max-shard-size", "30KB")
    assert code == 0 and "14 layers unpacked" in output
    plain = load_qat(tmp_path / "plain", dtype=torch.bfloat16)
    for name, layer in qat_modules(load_qat(qwen3_dir)).items():
        assert torch.equal(plain.get_parameter(f"{name}.weight"), layer.fake_quantized_weight())
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_verify_says_good_and_exits_with_zero_or_names_the_problem_and_exits_with_two(qwen3_dir, tmp_path):
    run("quantize", qwen3_dir, tmp_path)
    code, output = run("verify", tmp_path)
    assert code == 0 and "14 packed layers, 52 tensors: good" in output
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors")
    code, output = run("verify", tmp_path)
    assert code == 2 and "model.layers.1.mlp.up_proj: missing weight_scale" in output


def test_inspect_measures_the_error_of_each_layer(qwen3_dir, tmp_path):
    run("quantize", qwen3_dir, tmp_path / "packed")
    layers = run_json(tmp_path / "packed", "--original", qwen3_dir)
    assert len(layers) == 14
    model, plain = load_qat(qwen3_dir), tiny_qwen3().bfloat16()
    for name, layer in qat_modules(model).items():
        original = plain.get_parameter(f"{name}.weight").float()
        error = (layer.fake_quantized_weight().float() - original).norm().detach() / original.norm().detach()
        assert layers[name]["relative_error"] == pytest.approx(float(error), rel=1e-5)
        assert layers[name]["bits_per_weight"] == pytest.approx(4.5, abs=0.05) and layers[name]["num_clipped"] == 0
    assert run_json(qwen3_dir) == layers
    table = run("inspect", tmp_path / "packed")[1]
    assert "model.layers.0.self_attn.q_proj" in table and "64x64" in table


def test_inspect_counts_clipped_floored_and_zero_blocks():
    from hf_nvfp4_qat import quantize_nvfp4
    from hf_nvfp4_qat.checkpoint.layer_report import inspect_weight

    weight = torch.ones(4, 32)
    weight[0] = 0  # two zero blocks
    weight[1] = 1e-9  # two blocks at the floor
    weight[2, :16] = 4000  # one block beyond 6 * 448
    scale = torch.tensor(1.0)
    report = inspect_weight("x", quantize_nvfp4(weight, global_decode_scale=scale), weight)
    assert (report.num_zero, report.num_floored, report.num_clipped, report.num_blocks) == (4, 0, 1, 8)
    weight[1] = 0.01  # rounds to one half of 2**-6, not to zero
    assert inspect_weight("x", quantize_nvfp4(weight, global_decode_scale=scale), weight).num_floored == 2


def test_inspect_draws_a_plot(qwen3_dir, tmp_path):
    pytest.importorskip("matplotlib")
    code, _ = run("inspect", qwen3_dir, "--plot", tmp_path / "plot.png")
    assert code == 0 and (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("quantize", "{missing}", "{out}"), "is neither"),
        (("quantize", "{empty}", "{out}"), "holds neither"),
        (("quantize", "{packed}", "{out}"), "says compressed-tensors in its config"),
        (("quantize", "{source}", "{occupied}"), "must be empty"),
        (("quantize", "{source}", "{out}", "--preset", "half"), "`preset` is one of full, ffn_only; got 'half'"),
        (("quantize", "{source}", "{out}", "--exclude", "nothing"), "name none of"),
        (("quantize", "{source}", "{out}", "--max-shard-size", "big"), "big"),
        (("quantize", "{nobody}", "{out}"), "names 'NobodyForCausalLM'"),
        (("dequantize", "{source}", "{out}"), "no quantization_config"),
        (("verify", "{missing}"), "is neither"),
        (("inspect", "{missing}"), "is neither"),
        (("inspect", "{packed}", "--original", "{packed}"), "has no"),
    ],
)
def test_bad_input_is_one_readable_line_and_exit_code_two(arguments, message, qwen3_dir, tmp_path):
    paths = {name: tmp_path / name for name in ("missing", "empty", "out", "occupied", "packed", "nobody")}
    paths["source"] = qwen3_dir
    paths["empty"].mkdir()
    paths["occupied"].mkdir()
    (paths["occupied"] / "thesis.txt").write_text("")
    run("quantize", qwen3_dir, paths["packed"])
    shutil.copytree(qwen3_dir, paths["nobody"])
    config = json.loads((paths["nobody"] / "config.json").read_text())
    (paths["nobody"] / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyForCausalLM"]}))
    command = [argument.format(**paths) for argument in arguments]
    code, output = run(*command)
    lines = [line for line in output.splitlines() if line.strip() and "error:" in line]
    assert code == 2 and len(lines) == 1 and message in lines[0], output
    assert "Traceback" not in output
    assert not paths["out"].exists() or not any(paths["out"].iterdir())


def test_overwrite_replaces_an_occupied_directory(qwen3_dir, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    code, _ = run("quantize", qwen3_dir, tmp_path, "--overwrite")
    assert code == 0 and (tmp_path / "thesis.txt").read_text() == "mine" and verify_nvfp4(tmp_path).ok


def test_the_installed_command_runs():
    command = [sys.executable, "-c", "from hf_nvfp4_qat.cli import main; main()", "--help"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(name in output for name in ("quantize", "verify", "inspect", "dequantize"))
