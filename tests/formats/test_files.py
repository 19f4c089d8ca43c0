"""All files of a checkpoint appear together or not at all."""

import os
import platform
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from hf_nvfp4_qat.formats import files as module
from hf_nvfp4_qat.formats.files import (
    CheckpointReader,
    StagedFiles,
    files_beside_weights,
    resolve_checkpoint,
    staged_files,
)


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), staged_files(tmp_path / "out") as staged:
        staged.path("model.safetensors").write_bytes(b"half")
        raise RuntimeError
    assert list((tmp_path / "out").iterdir()) == []


def test_config_appears_last(tmp_path, monkeypatch):
    order = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(b.name), replace(a, b)))
    with staged_files(tmp_path) as staged:
        staged.write_json("config.json", {})
        staged.path("model.safetensors").write_bytes(b"x")
        staged.write_json("generation_config.json", {})
        assert not (tmp_path / "config.json").exists()
    assert order[-1] == "config.json" and len(order) == 3


def test_a_crash_while_renaming_over_a_checkpoint_leaves_nothing_that_loads(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")

    def fail(a, b):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt), staged_files(tmp_path) as staged:
        staged.path("model-00001-of-00002.safetensors").write_bytes(b"x")
        staged.write_json("config.json", {})
        assert (tmp_path / "model.safetensors").exists() and (tmp_path / "config.json").exists()  # whole until the end
    assert not (tmp_path / "config.json").exists()


def test_left_overs_of_a_killed_save_are_removed_by_the_next(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors.nvfp4-partial").write_bytes(b"half")
    with staged_files(tmp_path) as staged:
        staged.write_json("config.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"}


def partials(path) -> list:
    return list(path.glob("**/*.nvfp4-partial"))


def test_left_overs_of_killed_processes_are_removed_wherever_they_are(tmp_path):
    """A process that has ended, one of this process' own number before it started, and one of another machine."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "additional_chat_templates").mkdir()
    for process, host in ((ended.pid, platform.node()), (os.getpid(), platform.node()), (1, "elsewhere")):
        for name in ("model.safetensors", "additional_chat_templates/a.jinja"):
            partial = tmp_path / f"{name}.{host}-{process}-0123abcd.nvfp4-partial"
            partial.write_bytes(b"half")
            os.utime(partial, (0, 0))  # in 1970
    with staged_files(tmp_path) as staged:
        staged.write_json("config.json", {})
    assert not partials(tmp_path)


def test_partial_files_of_saves_that_may_be_running_are_kept(tmp_path):
    """Of another process, of a thread of this one, and of another machine, whose processes nobody sees from here."""
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mine = [tmp_path / f"model.safetensors.{platform.node()}-{other.pid}-0123abcd.nvfp4-partial"]
    mine.append(tmp_path / "model.safetensors.elsewhere-1-0123abcd.nvfp4-partial")
    for partial in mine:
        partial.write_bytes(b"half")
    with staged_files(tmp_path) as outer:
        outer.write_json("config.json", {"save": 1})
        with staged_files(tmp_path) as inner:
            inner.write_json("config.json", {"save": 2})
        assert sorted(partials(tmp_path)) == sorted([*mine, outer.partial("config.json")])
    assert (tmp_path / "config.json").read_text() == '{\n  "save": 1\n}\n'
    assert sorted(partials(tmp_path)) == sorted(mine)
    other.communicate(b"\n")


def test_a_save_whose_files_are_gone_leaves_the_older_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="1 files that this save wrote to .* are gone, the first model-00001"):
        with staged_files(tmp_path) as staged:
            staged.path("model-00001-of-00001.safetensors").write_bytes(b"x")
            staged.write_json("config.json", {"new": True})
            staged.partial("model-00001-of-00001.safetensors").unlink()
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert (tmp_path / "config.json").read_text() == "{}"


def test_two_saves_rename_one_after_the_other(tmp_path, monkeypatch):
    """While one renames the other waits, so that no checkpoint has files of both."""
    first, second = (StagedFiles(tmp_path) for _ in range(2))
    for number, staged in enumerate((first, second)):
        for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "config.json"):
            staged.path(name).write_bytes(b"%d" % number)

    def finish(staged):
        with module._locked(tmp_path):
            module._rename(staged, in_place=False)

    replace, other = os.replace, threading.Thread(target=finish, args=(second,))
    entered = threading.Event()
    monkeypatch.setattr(module, "_rename", lambda *a, rename=module._rename, **k: (entered.set(), rename(*a, **k)))

    def slow(source, target):
        if not other.ident:
            entered.clear()
            other.start()
            assert not entered.wait(0.2)  # it comes in at once where nothing is locked
        replace(source, target)

    monkeypatch.setattr(os, "replace", slow)
    finish(first)
    other.join()
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"1"} and len(list(tmp_path.iterdir())) == 3


BELONGS = (
    "LICENSE", "LICENSE.md", "License.txt", "Llama-LICENSE.txt", "NOTICE", "USE_POLICY.md", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "generation_config.json", "merges.txt", "modeling_mine.py",
    "preprocessor_config.json", "processor_config.json", "qwen.tiktoken", "sentencepiece.bpe.model", "source.spm",
    "special_tokens_map.json", "spiece.model", "tekken.json", "tokenizer.json", "tokenizer.model",
    "tokenizer.model.v3", "tokenizer_config.json", "video_preprocessor_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
DOES_NOT = (
    "README.md", "adapter_config.json", "adapter_model.safetensors", "consolidated.00.pth", "flax_model.msgpack",
    "model.ckpt", "model.gguf", "model.onnx", "model.pt", "optimizer.bin", "optimizer.pt", "params.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "rng_state_0.pth", "rust_model.ot", "scheduler.pt",
    "tf_model.h5", "trainer_state.json", "training_args.bin",
)  # fmt: skip


def test_what_belongs_to_a_checkpoint_is_listed_and_nothing_else(tmp_path):
    for name in (*BELONGS, *DOES_NOT, ".gitattributes", "model.safetensors.x-1-0123abcd.nvfp4-partial"):
        (tmp_path / name).touch()
    for name in ("onnx", "additional_chat_templates"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tool_use.jinja").touch()
    found, others = files_beside_weights(tmp_path)
    assert found == sorted([*BELONGS, "additional_chat_templates/tool_use.jinja"])
    assert others == sorted([*DOES_NOT, "onnx/"])


def test_what_is_downloaded_is_the_weights_their_configs_and_what_belongs_to_them(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **options: asked.update(options) or tmp_path)
    resolve_checkpoint("me/model")
    weights = ["config.json", "hf_quant_config.json", "model-1.safetensors", "model.safetensors.index.json"]
    names = [*weights, *BELONGS, *(name for name in DOES_NOT if not name.endswith(".safetensors"))]
    patterns = asked["allow_patterns"]
    assert list(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=patterns)) == [*weights, *BELONGS]


def test_only_files_of_the_replaced_checkpoint_are_removed(tmp_path):
    mine = ("model_ema.safetensors", "model.fp16.safetensors", "download.partial", "adapter_model.safetensors")
    for name in (*mine, "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(b"old")
    with staged_files(tmp_path) as staged:
        staged.path("model.safetensors").write_bytes(b"new")
    assert {path.name for path in tmp_path.iterdir()} == {*mine, "model.safetensors"}


def test_a_missing_shard_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ValueError, match="1 files that are not there, the first model-1.safetensors"):
        CheckpointReader(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds neither"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("content, message", [(None, "does not"), ("{", "is not JSON"), ("[]", "holds a list")])
def test_a_bad_config_is_refused(tmp_path, content, message):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        CheckpointReader(tmp_path).config()


def test_a_path_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither"):
        resolve_checkpoint(tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.0, 0.3, 0.7])
def test_killing_the_command_line_halfway_leaves_nothing_that_looks_like_a_checkpoint(qwen3_dir, tmp_path, moment):
    """Kill once packing has begun, and a little later; each weight is slowed down to hit the middle."""
    code = (
        "import sys, time, hf_nvfp4_qat.checkpoint.sources as s\n"
        "pack = s.quantize_nvfp4\n"
        "def slow(*a, **k):\n"
        "    open(sys.argv[2] + '.started', 'w').close(); time.sleep(0.3); return pack(*a, **k)\n"
        "s.quantize_nvfp4 = slow\n"
        "sys.argv[0] = 'nvfp4-qat'\n"
        "from hf_nvfp4_qat.checkpoint.convert import quantize_checkpoint\n"
        "quantize_checkpoint(sys.argv[1], sys.argv[2], max_shard_size='8KB')\n"
    )
    output = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, str(qwen3_dir), str(output)])
    while not output.with_name("out.started").exists():
        assert process.poll() is None, "it ended before it packed anything"
        time.sleep(0.02)
    time.sleep(moment * 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [path.name for path in output.iterdir()]
    assert process.returncode == -signal.SIGKILL
    assert all(name.endswith(".nvfp4-partial") for name in left), left
    with pytest.raises(ValueError, match="holds neither"):
        CheckpointReader(output)
