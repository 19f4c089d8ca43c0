"""Which vLLM server is accepted: a real one of the CPU build, and what servers in trouble answer."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from conftest import SMALL_ENGINE, load_qat, tiny_qwen3
from fake_server import answering

from hf_nvfp4_qat import NVFP4QATConfig, save_nvfp4
from hf_nvfp4_qat.formats.names import quantization_config
from hf_nvfp4_qat.rollout.stream import RolloutStream
from hf_nvfp4_qat.rollout.vllm.server import check_server, reset_server_caches, start_command, with_start_command

SIZES = dict(vocab_size=512, hidden_size=128, intermediate_size=256, head_dim=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    tiny_qwen3(**SIZES).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def model(folder):
    return load_qat(folder)


def rollout_config(model):
    return RolloutStream(model).quantization_config


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_is_asked_until_its_caches_are_empty():
    posts: list[str] = []
    with answering(200, resets=[False, False, True], posts=posts) as url:
        reset_server_caches(url, timeout=60)
    assert posts == ["/reset_prefix_cache?reset_external=true"] * 3 + ["/reset_encoder_cache"]


def test_a_server_whose_cache_stays_in_use_is_an_error():
    with answering(200, resets=[False]) as url:
        with pytest.raises(
            RuntimeError, match=r"could not empty its prefix cache.*for 0 s: it has unfinished requests"
        ):
            reset_server_caches(url, timeout=0)


def test_the_start_command_survives_a_shell(model):
    command = start_command("/models/a model", rollout_config(model), "http://localhost:8123")
    words = shlex.split(command)
    assert words[:4] == ["VLLM_SERVER_DEV_MODE=1", "vllm", "serve", "/models/a model"]
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert options["--port"] == "8123"
    assert json.loads(options["--hf-overrides"]) == {"quantization_config": rollout_config(model)}
    assert json.loads(options["--weight-transfer-config"]) == {"backend": "nccl"}
    assert options["--logprobs-mode"] == "processed_logprobs"


def test_a_server_that_ties_a_head_of_its_own_is_refused_and_the_command_unties_it(folder):
    model = load_qat(folder)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert model.config.tie_word_embeddings
    stream = RolloutStream(model)
    command = start_command(str(folder), stream.quantization_config, "http://localhost", stream.tied_settings)
    overrides = json.loads(shlex.split(command)[shlex.split(command).index("--hf-overrides") + 1])
    assert overrides == {"quantization_config": stream.quantization_config, "tie_word_embeddings": False}
    answer = dict(model=str(folder), quantization="compressed-tensors")
    with answering(200, **answer, hf_overrides=overrides) as url:
        check_server(url, model, stream.quantization_config, timeout=0)
    with answering(200, **answer, hf_overrides={**overrides, "tie_word_embeddings": True}) as url:
        with pytest.raises(ValueError, match=r"serves another model, .*: tie_word_embeddings True \(trainer: False\)"):
            check_server(url, model, stream.quantization_config, timeout=0)


def test_a_missing_server_is_named_with_the_command_that_starts_it(model):
    url = f"http://127.0.0.1:{free_port()}"
    command = start_command(model.name_or_path, rollout_config(model), url)
    with pytest.raises(ConnectionError) as caught, with_start_command(command):
        check_server(url, model, rollout_config(model), timeout=0.1)
    assert f"No vLLM server answers at {url} after 0.1 s" in str(caught.value)
    assert command in str(caught.value)


def test_a_server_outside_development_mode_is_refused(model):
    with answering(404) as url, pytest.raises(ValueError, match="development mode"):
        check_server(url, model, rollout_config(model), timeout=0)


def test_a_server_of_bfloat16_weights_is_refused(model, folder):
    with answering(200, model=str(folder), quantization=None, hf_overrides={}) as url:
        with pytest.raises(ValueError, match="must run nvfp4-pack-quantized weights; it serves .* quantization None"):
            check_server(url, model, rollout_config(model), timeout=0)


def test_a_server_of_another_format_is_refused(model, folder):
    overrides = {"quantization_config": {**rollout_config(model), "format": "pack-quantized"}}
    with answering(200, model=str(folder), quantization="compressed-tensors", hf_overrides=overrides) as url:
        with pytest.raises(ValueError, match="format 'pack-quantized'"):
            check_server(url, model, rollout_config(model), timeout=0)


def test_a_server_that_quantizes_other_layers_is_refused(model, folder):
    overrides = {"quantization_config": rollout_config(load_qat(folder, NVFP4QATConfig(preset="ffn_only")))}
    with answering(200, model=str(folder), quantization="compressed-tensors", hf_overrides=overrides) as url:
        with pytest.raises(ValueError, match=r"same layers unquantized.*8 differ.*self_attn\.k_proj"):
            check_server(url, model, rollout_config(model), timeout=0)


def test_a_server_with_nvfp4_inputs_is_refused(model, folder):
    config = quantization_config(rollout_config(model)["ignore"], quantizes_input=True)
    overrides = {"quantization_config": config}
    with answering(200, model=str(folder), quantization="compressed-tensors", hf_overrides=overrides) as url:
        with pytest.raises(ValueError, match="must compute with 16-bit inputs"):
            check_server(url, model, rollout_config(model), timeout=0)


def test_a_server_of_another_model_is_refused(model, tmp_path):
    tiny_qwen3(**{**SIZES, "intermediate_size": 512}).save_pretrained(tmp_path)
    overrides = {"quantization_config": rollout_config(model)}
    with answering(200, model=str(tmp_path), quantization="compressed-tensors", hf_overrides=overrides) as url:
        with pytest.raises(ValueError, match=r"another model.*intermediate_size 512 \(trainer: 256\)"):
            check_server(url, model, rollout_config(model), timeout=0)


def test_a_server_whose_model_cannot_be_compared_is_accepted_by_its_name_only(model):
    overrides = {"quantization_config": rollout_config(model)}
    answer = dict(quantization="compressed-tensors", hf_overrides=overrides)
    with answering(200, model="/not/here", **answer) as url:
        with pytest.raises(ValueError, match=r"serves /not/here, whose config cannot be read here"):
            check_server(url, model, rollout_config(model), timeout=0)
        model.name_or_path = "/not/here"
        check_server(url, model, rollout_config(model), timeout=0)


def test_what_an_exported_checkpoint_says_of_itself_decides_whether_its_server_is_accepted(model, folder, tmp_path):
    save_nvfp4(model, tmp_path / "same")
    save_nvfp4(load_qat(folder, NVFP4QATConfig(preset="ffn_only")), tmp_path / "other")
    answer = dict(quantization="compressed-tensors", hf_overrides={})
    with answering(200, model=str(tmp_path / "same"), **answer) as url:
        check_server(url, model, rollout_config(model), timeout=0)
    with answering(200, model=str(tmp_path / "other"), **answer) as url:
        with pytest.raises(ValueError, match=r"same layers unquantized.*8 differ"):
            check_server(url, model, rollout_config(model), timeout=0)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the CPU build's module path; on GPUs servers are tested with TRL"
)
def test_a_real_server_started_by_the_command_is_accepted(model, folder):
    url = f"http://127.0.0.1:{free_port()}"
    words = shlex.split(start_command(str(folder), rollout_config(model), url))[3:]
    # The CPU build has neither the `vllm` command nor NCCL.
    options = [word for word in words[1:] if word not in ("--weight-transfer-config", '{"backend":"nccl"}')]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", words[0], *options]
    command += ["--enforce-eager", "--max-model-len", "64", "--skip-tokenizer-init"]
    command += ["--kv-cache-memory-bytes", str(SMALL_ENGINE["kv_cache_memory_bytes"])]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        check_server(url, model, rollout_config(model), timeout=180)
        with pytest.raises(ValueError, match="another model"):
            model.config.vocab_size = 1024
            check_server(url, model, rollout_config(model), timeout=0)
    finally:
        server.terminate()
        server.wait(30)
    with pytest.raises(URLError):
        time.sleep(0.5)
        urlopen(url, timeout=2)
