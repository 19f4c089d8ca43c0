"""push_to_hub and loading by repository id, through the real hub client against a local server."""

import json
import os
import subprocess
import sys

import pytest
from conftest import load_qat
from fake_hub import FakeHub

from hf_nvfp4_qat import verify_nvfp4


def run_online(code: str, hub: FakeHub, tmp_path, *arguments: str) -> str:
    """Run Python with the fake hub as endpoint; huggingface_hub reads its settings at import, hence the process."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


PUSH = """
import sys, torch
from transformers import AutoModelForCausalLM
from hf_nvfp4_qat import NVFP4QATConfig
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32, quantization_config=NVFP4QATConfig()
)
if sys.argv[2] == "push_to_hub":
    model.push_to_hub("me/tiny-NVFP4")
else:
    model.save_pretrained(sys.argv[3], push_to_hub=True, repo_id="me/tiny-NVFP4")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_pushing_publishes_the_packed_checkpoint_and_loading_by_id_continues_from_it(qwen3_dir, tmp_path, how):
    with FakeHub() as hub:
        run_online(PUSH, hub, tmp_path, str(qwen3_dir), how, str(tmp_path / "saved"))
        files = hub.repos["me/tiny-NVFP4"]
        assert {"model.safetensors", "config.json", "generation_config.json", "README.md"} <= set(files)
        assert json.loads(files["config.json"])["quantization_config"]["quant_method"] == "compressed-tensors"
        copy = tmp_path / "copy"
        copy.mkdir()
        for name, content in files.items():
            if "/" not in name:
                (copy / name).write_bytes(content)
        assert verify_nvfp4(copy, load_qat(qwen3_dir)).ok
        code = (
            "from hf_nvfp4_qat import load_nvfp4, verify_nvfp4\n"
            "model = load_nvfp4('me/tiny-NVFP4')\n"
            "print(model.nvfp4_requantization); print(verify_nvfp4('me/tiny-NVFP4', model).ok)"
        )
        output = run_online(code, hub, tmp_path)
        assert "all 73,728 weights keep their values" in output and output.strip().endswith("True")


@pytest.mark.slow
def test_a_repository_that_does_not_exist_is_one_readable_error(tmp_path):
    with FakeHub() as hub:
        code = (
            "from hf_nvfp4_qat import verify_nvfp4\n"
            "try:\n    verify_nvfp4('me/nothing')\nexcept ValueError as error:\n    print(error)"
        )
        assert "'me/nothing' is neither" in run_online(code, hub, tmp_path)
