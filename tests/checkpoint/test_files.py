"""All files of a checkpoint appear together or not at all."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from hf_nvfp4_qat.checkpoint.files import CheckpointReader, resolve_checkpoint, staged_files


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
        "import sys, time, hf_nvfp4_qat.checkpoint.stream as s\n"
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
    deadline = time.monotonic() + 120
    while not output.with_name("out.started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(moment * 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [path.name for path in output.iterdir()]
    assert process.returncode == -signal.SIGKILL
    assert all(name.endswith(".nvfp4-partial") for name in left), left
    with pytest.raises(ValueError, match="holds neither"):
        CheckpointReader(output)
