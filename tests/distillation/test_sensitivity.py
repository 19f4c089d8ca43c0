"""The costliest layers come first, and leaving them out helps."""

import json

import pytest
import torch
from conftest import byte_tokenizer, load_qat, tiny_qwen3, tiny_qwen3_moe, tokens
from typer.testing import CliRunner

from hf_nvfp4_qat import NVFP4QATConfig, coverage, prepare_qat, verify_nvfp4
from hf_nvfp4_qat.cli import app
from hf_nvfp4_qat.distillation.divergence import divergence
from hf_nvfp4_qat.distillation.sensitivity import measure_sensitivity

IDS = torch.randint(0, 128, (6, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_qwen3_moe])
def test_each_entry_is_what_quantizing_that_group_alone_costs(make):
    plain = make(initializer_range=0.1).eval()
    found = measure_sensitivity(prepare_qat(make(initializer_range=0.1)), IDS, batch_size=4)
    assert sorted(found, key=lambda entry: -entry.kl) == found
    names = [module for entry in found for module in entry.modules]
    assert sorted(names) == sorted(coverage(prepare_qat(make())).quantized)
    for entry in (found[0], found[-1]):
        others = [name for name in names if name not in entry.modules]
        alone = prepare_qat(make(initializer_range=0.1), NVFP4QATConfig(exclude=others)).eval()
        with torch.no_grad():
            reference = plain(IDS).logits
            _, kl, cross_entropy, base = divergence(alone(IDS).logits, reference, IDS)
        assert entry.kl == pytest.approx(float(kl) / (6 * 31), rel=1e-4)
        assert entry.loss == pytest.approx(float(cross_entropy - base) / (6 * 31), abs=1e-6)


def test_the_model_is_left_as_it_was():
    model = prepare_qat(tiny_qwen3()).train()
    before = model(tokens()).logits
    measure_sensitivity(model, IDS)
    assert model.training and torch.equal(model(tokens()).logits, before)


def test_a_model_without_nvfp4_weights_is_refused():
    with pytest.raises(ValueError, match="has no NVFP4 weights, so nothing can be ranked"):
        measure_sensitivity(tiny_qwen3(), IDS)


def test_a_model_with_nvfp4_inputs_is_refused():
    with pytest.raises(ValueError, match="activations='bf16'"):
        measure_sensitivity(prepare_qat(tiny_qwen3(), NVFP4QATConfig(activations="nvfp4")), IDS)


def test_the_command_writes_a_list_that_quantize_takes(tmp_path):
    tiny_qwen3(vocab_size=512).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text("Some text to measure with. " * 20)

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    options = ("--text", tmp_path / "text.txt", "--sequence-length", 32, "--sequences", 2)
    shown = run("sensitivity", tmp_path / "source", *options, "--leave-out", 2, "--output", tmp_path / "exclude.json")
    assert shown.exit_code == 0 and "8 groups of layers, each quantized alone" in shown.output, shown.output
    ranked = json.loads(run("sensitivity", tmp_path / "source", *options, "--json").stdout)
    excluded = json.loads((tmp_path / "exclude.json").read_text())
    assert excluded == [*ranked[0]["modules"], *ranked[1]["modules"]]
    done = run("quantize", tmp_path / "source", tmp_path / "out", "--exclude-from", tmp_path / "exclude.json")
    assert done.exit_code == 0 and verify_nvfp4(tmp_path / "out").ok
    model = load_qat(tmp_path / "source", NVFP4QATConfig(exclude=excluded))
    assert f"{14 - len(excluded)} layers packed" in done.output and len(coverage(model).quantized) == 14 - len(excluded)
    (tmp_path / "exclude.json").write_text("no list")
    assert (
        "Write a list of modules"
        in run("quantize", tmp_path / "source", tmp_path / "b", "--exclude-from", tmp_path / "exclude.json").output
    )
