"""`nvfp4-qat distill`: text in, a packed checkpoint out that is closer to the original than quantization alone."""

import json
import shutil

import pytest
import torch
from conftest import byte_tokenizer, tiny_qwen3
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_nvfp4_qat import NVFP4QATConfig, load_nvfp4, verify_nvfp4
from hf_nvfp4_qat.checkpoint.convert import quantize_checkpoint
from hf_nvfp4_qat.cli import app
from hf_nvfp4_qat.distillation.run import distill
from hf_nvfp4_qat.distillation.text import read_documents, sequences
from hf_nvfp4_qat.distillation.trainer import QADTrainer
from hf_nvfp4_qat.modules.swap import qat_modules


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    tiny_qwen3(vocab_size=512, initializer_range=0.15).to(torch.bfloat16).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text")
    (path / "more").mkdir()
    (path / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    lines = [json.dumps({"text": f"{number} plus {number} is {2 * number}. "}) for number in range(400)]
    (path / "more" / "b.jsonl").write_text("\n".join(lines))
    (path / "more" / "c.bin").write_bytes(b"\x00")
    return path


def test_distil_brings_back_part_of_the_loss_and_saves_what_it_trained(source, text, tmp_path):
    result = distill(
        source, tmp_path / "out", [text], config=NVFP4QATConfig(scale_rule="four_over_six"), sequence_length=64,
        training={"max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 3e-4, "disable_tqdm": True},
    )  # fmt: skip
    assert result.num_tokens == 60 * 8 * 64
    assert result.kl_after < 0.8 * result.kl_before
    assert result.recovered == pytest.approx((result.before - result.after) / (result.before - result.teacher))
    assert verify_nvfp4(tmp_path / "out").ok
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokens = sequences(AutoTokenizer.from_pretrained(tmp_path / "out"), read_documents([text]), 64)[-16:]
    with torch.no_grad():
        losses = [model(input_ids=tokens, labels=tokens).loss.item() for model in (served, original)]
    assert losses[0] == pytest.approx(result.after, rel=2e-3)  # computed in bfloat16, there in float32
    assert losses[1] == pytest.approx(result.teacher, rel=2e-3)


def test_the_command_prints_what_came_back(source, text, tmp_path):
    arguments = ["distill", source, tmp_path / "out", "--text", text, "--steps", 3, "--batch-size", 2]
    options = ["--sequence-length", 32, "--teacher-device", "cpu", "--bf16-last-layers", 1, "--held-out", 4]
    result = CliRunner().invoke(app, [str(argument) for argument in [*arguments, *options]])
    assert result.exit_code == 0, result.output
    assert (
        "192 tokens, measured on 4 sequences held out" in result.output and "of what NVFP4 cost came" in result.output
    )
    assert verify_nvfp4(tmp_path / "out").ok
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.1.mlp.up_proj" in ignored and "model.layers.0.mlp.up_proj" not in ignored


def test_the_command_distils_into_w4a4_and_takes_the_text_in(source, text, tmp_path):
    arguments = ["distill", source, tmp_path / "out", "--text", text, "--steps", 2, "--batch-size", 2]
    options = ["--sequence-length", 32, "--activations", "nvfp4", "--cross-entropy-weight", 0.5, "--held-out", 4]
    result = CliRunner().invoke(app, [str(argument) for argument in [*arguments, *options]])
    assert result.exit_code == 0, result.output
    assert verify_nvfp4(tmp_path / "out").ok
    amaxes = [layer.input_amax for layer in qat_modules(load_nvfp4(tmp_path / "out")).values()]
    assert len(amaxes) == 14 and min(amaxes) > 0


@pytest.mark.parametrize("num_held_out", [1, 6, 7])
def test_all_sequences_that_are_held_out_are_measured(num_held_out, source, text, tmp_path):
    result = distill(
        source, tmp_path / "out", [text], sequence_length=64, num_held_out=num_held_out,
        training={"max_steps": 1, "per_device_train_batch_size": 2, "disable_tqdm": True},
    )  # fmt: skip
    teacher = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokens = sequences(AutoTokenizer.from_pretrained(source), read_documents([text]), 64)[-num_held_out:]
    with torch.no_grad():
        logits = torch.cat([teacher(input_ids=row[None]).logits[0, :-1].float() for row in tokens])
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).item()
    assert result.teacher == pytest.approx(expected, rel=1e-4)
    assert result.num_tokens == 2 * 64


def test_less_text_than_a_batch_is_trained_on_all_the_same(source, text, tmp_path):
    options = {"max_steps": 2, "per_device_train_batch_size": 1000, "disable_tqdm": True}
    result = distill(source, tmp_path / "out", [text], sequence_length=64, training=options)
    num_train = len(sequences(AutoTokenizer.from_pretrained(source), read_documents([text]), 64)) - 16
    assert 0 < num_train < 1000 and result.num_tokens == 2 * num_train * 64


def test_training_that_diverges_writes_nothing(source, text, tmp_path):
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e30, "disable_tqdm": True}
    with pytest.raises(ValueError, match="Training diverged .* it was 1e\\+30"):
        distill(source, tmp_path / "out", [text], sequence_length=64, training=options)
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_before_it_trains(source, text, tmp_path, monkeypatch):
    monkeypatch.setattr(QADTrainer, "train", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "number.json").write_text("5")
    (tmp_path / "word.json").write_text('"o_proj"')
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 500)
    shutil.copytree(source, tmp_path / "mute", ignore=shutil.ignore_patterns("*token*"))
    quantize_checkpoint(source, tmp_path / "packed")
    out = tmp_path / "out"
    for arguments, message in {
        ("distill", source, tmp_path / "file", "--text", text): "is a file. Choose another name",
        ("distill", source, out, "--text", text, "--exclude-from", tmp_path / "number.json"): "it holds a int",
        ("distill", source, out, "--text", text, "--exclude-from", tmp_path / "word.json"): "it holds a str",
        ("distill", source, out, "--text", tmp_path / "latin.txt"): "latin.txt is not: 'utf-8' codec",
        ("distill", tmp_path / "mute", out, "--text", text): "has none beside the weights",
        ("distill", tmp_path / "packed", out, "--text", text): "says compressed-tensors in its config",
        ("sensitivity", tmp_path / "packed", "--text", text): "says compressed-tensors in its config",
        ("sensitivity", source, "--text", text, "--output", tmp_path / "no" / "x"): "a directory that is there",
    }.items():
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    assert not out.exists()


def test_text_is_read_from_files_and_folders(text):
    documents = read_documents([text, text / "a.txt"])
    assert len(documents) == 402 and documents[0] == documents[-1]
    tokenizer = byte_tokenizer()
    a, b, c = tokenizer("abc").input_ids
    assert sequences(tokenizer, ["ab", "c"], 2).tolist() == [[a, b], [tokenizer.eos_token_id, c]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: [path / "nothing.txt"], "There is no file or folder"),
        (lambda path: [path], "No text was found in"),
        (lambda path: [(path / "x.bin", (path / "x.bin").write_bytes(b"1"))[0]], "Text is read from .txt, .md, .jsonl"),
        (lambda path: [(path / "x.jsonl", (path / "x.jsonl").write_text('{"a": 1}'))[0]], "line 1 is not"),
        (lambda path: [(path / "x.jsonl", (path / "x.jsonl").write_text('{"text": 5}'))[0]], "line 1 is not"),
        (lambda path: [(path / "x.txt", (path / "x.txt").write_text("few"))[0]], "fewer than one sequence of 64"),
        (lambda path: [(path / "x.txt", (path / "x.txt").write_text("a b " * 100))[0]], "and 16 are held out"),
    ],
)
def test_bad_text_is_refused_before_anything_is_loaded_for_training(make, message, source, tmp_path):
    with pytest.raises(ValueError, match=message):
        distill(source, tmp_path / "out", make(tmp_path), sequence_length=64)
    assert not (tmp_path / "out").exists()
