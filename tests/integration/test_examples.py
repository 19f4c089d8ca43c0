"""Every script of examples/ runs in miniature, in a copy, so that what it writes beside itself is not kept.

Those that only a GPU can run are imported, and say what their options are.
"""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, load_qat, tiny_qwen3
from safetensors.torch import load_file, save_file

from hf_nvfp4_qat import save_nvfp4, verify_nvfp4

EXAMPLES = Path(__file__).parents[2] / "examples"
NEED_A_GPU = [f"benchmarks/{name}.py" for name in ("fsdp", "pushes", "rollout", "train_step", "weight_kernels")]
# `make demo` runs the first, which is no miniature.
RUN_ELSEWHERE = ["demo.py"]
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"

pytestmark = pytest.mark.slow


@pytest.fixture
def examples(tmp_path):
    return Path(shutil.copytree(EXAMPLES, tmp_path / "examples"))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A bfloat16 checkpoint with a tokenizer that knows chats."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    path = tmp_path_factory.mktemp("examples") / "model"
    tiny_qwen3(
        vocab_size=512, hidden_size=128, intermediate_size=256, head_dim=32, max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ).to(torch.bfloat16).save_pretrained(path)  # fmt: skip
    tokenizer.save_pretrained(path)
    return path


def run(script: Path, *arguments: object) -> str:
    """What a script prints."""
    command = [sys.executable, str(script), *map(str, arguments)]
    with socket.socket() as free:  # the default port may be that of an engine in another process
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_PORT": str(port), "VLLM_CPU_KVCACHE_SPACE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=script.parent, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


def test_every_script_is_run_here_or_elsewhere():
    scripts = [path for path in EXAMPLES.rglob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    here = Path(__file__).read_text(encoding="utf-8")
    for script in scripts:
        name = str(script.relative_to(EXAMPLES))
        assert name in NEED_A_GPU or name in RUN_ELSEWHERE or f'"{name}"' in here, name


@pytest.mark.parametrize("script", NEED_A_GPU)
def test_what_needs_a_gpu_is_imported_and_names_its_options(examples, script):
    if script.endswith("weight_kernels.py"):
        pytest.importorskip("triton")
    assert "--layers" in run(examples / script, "--help")


def test_follow_one_tensor_prints_every_stop(examples):
    output = run(examples / "follow_one_tensor.py")
    stops = [
        "load",
        "global scale",
        "forward",
        "backward",
        "optimizer step",
        "pack",
        "save",
        "back: plain",
        "back: training",
    ]
    found = [stop for stop in stops for line in output.splitlines() if line.startswith(f"== {stop}")]
    assert found == stops
    assert "equal to what forward multiplied with: True" in output and "all 36,864 weights keep their values" in output


def test_what_a_user_of_a_checkpoint_sees_is_what_was_trained(examples, model_dir, tmp_path):
    model = load_qat(model_dir)
    save_nvfp4(model, tmp_path / "packed")
    generator = torch.Generator().manual_seed(0)
    parts = {
        name: torch.randint(0, 256, (2, 32), generator=generator) for name in ("probe", "held_out", "out_of_domain")
    }
    save_file(parts, tmp_path / "tokens.safetensors")
    run(examples / "served_loss.py", tmp_path / "packed", tmp_path / "tokens.safetensors", tmp_path / "result")
    served = load_file(tmp_path / "result")
    with torch.no_grad():
        expected = torch.stack([model(row[None], labels=row[None]).loss for row in parts["held_out"]]).mean()
    assert served["held_out"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_cpu_benchmark_appends_its_table(examples):
    pytest.importorskip("matplotlib")
    before = (examples / "benchmarks" / "RESULTS.md").read_text()
    run(examples / "benchmarks/cpu.py", "--shape", "32x64", "--repeats", 1, "--plot", examples / "bars.png")
    after = (examples / "benchmarks" / "RESULTS.md").read_text()
    table = after.removeprefix(before)
    assert "### One weight on a CPU, 32x64" in table and table.count("\n| ") == 8
    assert (examples / "bars.png").stat().st_size > 1000


RECOVERY = """
steps = 2
sequences_per_step = 1
seeds = [0]
num_train = 2
num_eval = 2

[[run]]
name = "fine-tuned"
start = "base"
learning_rate = 1e-4

[[quantized]]
name = "PTQ"
start = "base"
recipe = {}

[[run]]
name = "QAD"
start = "base"
teacher = "base"
learning_rate = 1e-3
recipe = {}

[[run]]
name = "QAT"
start = "base"
reference = "fine-tuned"
learning_rate = 1e-4
recipe = {}
"""


def test_the_recovery_experiment(examples, model_dir, tmp_path):
    pytest.importorskip("reasoning_gym")
    shutil.copytree(model_dir, tmp_path / "cache" / "SmolLM2-135M-Instruct")
    (tmp_path / "recovery.toml").write_text(RECOVERY)
    options = ("--config", tmp_path / "recovery.toml", "--cache", tmp_path / "cache", "--output", tmp_path / "output")
    table = run(examples / "experiments/recovery.py", *options)
    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "output" / "recovery.csv").open())}
    assert rows.keys() == {"base", "fine-tuned", "PTQ", "QAD", "QAT"}
    assert rows["QAT"]["reference"] == "fine-tuned" and "| QAD |" in table
    # The model is untrained: all that is certain is that it finds one byte of 256 about as likely as the other.
    assert all(4 < float(row["held_out"]) < 8 for row in rows.values())
    assert float(rows["QAD"]["held_out"]) != float(rows["PTQ"]["held_out"]) != float(rows["base"]["held_out"])
    assert (tmp_path / "output" / "recovery.png").stat().st_size > 1000


GRPO = """
seeds = [0]
held_out = 4

[task]
name = "chain_sum"
min_terms = 2
max_terms = 2
min_digits = 1
max_digits = 2

[warm_up]
until = 1.0
unseen = 4
max_steps = 2
check_every = 1
batch_size = 2
learning_rate = 1e-4

[training]
max_steps = 2
per_device_train_batch_size = 4
num_generations = 2
max_completion_length = 4
learning_rate = 1e-4
vllm_gpu_memory_utilization = 0.2
vllm_max_model_length = 256

[engine]
kv_cache_memory_bytes = 67_108_864
enforce_eager = true

[distillation]
max_steps = 1
per_device_train_batch_size = 2
learning_rate = 1e-4

[kinds."QAT after distillation"]
recipe = {}
distil = true
"""


@pytest.mark.vllm
def test_the_grpo_experiment(examples, model_dir, tmp_path):
    pytest.importorskip("reasoning_gym")
    shutil.copytree(model_dir, tmp_path / "cache" / "SmolLM2-135M-Instruct")
    (tmp_path / "grpo.toml").write_text(GRPO)
    options = ("--config", tmp_path / "grpo.toml", "--cache", tmp_path / "cache", "--output", tmp_path / "output")
    table = run(examples / "experiments/grpo.py", *options)
    scores = json.loads((tmp_path / "output" / "QAT_after_distillation_0.json").read_text())
    assert scores["kind"] == "QAT after distillation" and scores["kl_before"] > 0 and 0 <= scores["score"] <= 1
    rows = list(csv.DictReader((tmp_path / "output" / "grpo.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2"] and all(float(row["mismatch_kl"]) < 1e-3 for row in rows)
    assert "| QAT after distillation |" in table and (tmp_path / "output" / "grpo.png").stat().st_size > 1000


@pytest.mark.vllm
def test_grpo_saves_a_checkpoint_of_what_it_trained(examples, model_dir, tmp_path):
    pytest.importorskip("reasoning_gym")
    output = run(
        examples / "grpo_qat_vllm.py", "--model_name_or_path", model_dir, "--output_dir", tmp_path / "trained",
        "--max_steps", 1, "--num_examples", 4, "--per_device_train_batch_size", 2, "--num_generations", 2,
        "--max_completion_length", 4, "--vllm_gpu_memory_utilization", 0.2, "--vllm_max_model_length", 256,
        "--enforce_eager", "True", "--use_cpu", "True", "--bf16", "False", "--report_to", "none",
        "--save_strategy", "no",
    )  # fmt: skip
    assert "14 packed layers, 52 tensors: good, 52 tensors equal to the model's" in output
    report = verify_nvfp4(tmp_path / "trained")
    assert report.ok and report.num_layers == 14
