"""push_to_hub and loading by repository id, through the real hub client against a local server."""

import json
import shutil

import pytest
import torch
from conftest import byte_tokenizer, load_qat, tiny_qwen3
from huggingface_hub import ModelCard
from online_hub import OnlineHub

from hf_nvfp4_qat import NVFP4QATConfig, save_nvfp4, verify_nvfp4
from hf_nvfp4_qat.checkpoint.layer_report import inspect_checkpoint


@pytest.fixture(scope="module")
def online_hub():
    with OnlineHub() as hub:
        yield hub


@pytest.fixture
def hub(online_hub):
    """Empty, as are the caches of those that will talk to it."""
    online_hub.forget()
    return online_hub


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
def test_pushing_publishes_the_packed_checkpoint_and_loading_by_id_continues_from_it(qwen3_dir, tmp_path, how, hub):
    hub.run(PUSH, str(qwen3_dir), how, str(tmp_path / "saved"))
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
    output = hub.run(code)
    assert "all 73,728 weights keep their values" in output and output.strip().endswith("True")


@pytest.mark.slow
def test_a_repository_that_does_not_exist_is_one_readable_error(hub):
    code = (
        "from hf_nvfp4_qat import verify_nvfp4\n"
        "try:\n    verify_nvfp4('me/nothing')\nexcept ValueError as error:\n    print(error)"
    )
    assert "'me/nothing' is neither" in hub.run(code)


CLI = "from hf_nvfp4_qat.cli import main; main()"
REPO = "me/tiny-NVFP4"


@pytest.fixture(scope="module")
def packed(qwen3_dir, tmp_path_factory):
    """A packed checkpoint in two shards, with a tokenizer and with what a Trainer leaves beside it."""
    path = tmp_path_factory.mktemp("packed")
    save_nvfp4(load_qat(qwen3_dir, NVFP4QATConfig(scale_rule="mse")), path, max_shard_size="48KB")
    byte_tokenizer().save_pretrained(path)
    (path / "trainer_state.json").write_text("{}")
    (path / "optimizer.pt").write_bytes(b"0")
    (path / "checkpoint-1").mkdir()
    assert len(list(path.glob("*.safetensors"))) == 2
    return path


GENERATE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([AutoTokenizer.from_pretrained(sys.argv[1])("onetwo").input_ids])
with torch.no_grad():
    print(model.generate(ids, max_new_tokens=8, do_sample=False).tolist(), model(ids).logits.double().sum().item())
"""


@pytest.mark.slow
def test_a_pushed_checkpoint_is_one_commit_that_plain_transformers_loads_by_name(packed, qwen3_dir, tmp_path, hub):
    (tmp_path / "scores.json").write_text('{"held-out loss": 1.69}')
    output = hub.run(
        CLI, "push", packed, REPO, "--original", qwen3_dir, "--base-model", "me/base",
        "--evaluation", tmp_path / "scores.json", "--private",
    )  # fmt: skip
    assert f"{hub.url}/{REPO}/commit/" in output
    assert len(hub.commits) == 1
    files = hub.repos[REPO]
    assert not {"trainer_state.json", "optimizer.pt"} & set(files)
    assert {"tokenizer.json", "model-00002-of-00002.safetensors", "README.md"} <= set(files)
    card = ModelCard(files["README.md"].decode())
    local, remote = hub.run(GENERATE, packed), hub.run(GENERATE, REPO)
    assert local == remote
    assert card.data.base_model == "me/base" and card.data.base_model_relation == "quantized"
    assert {"nvfp4", "compressed-tensors"} <= set(card.data.tags)
    assert "quantization-aware-training" not in card.data.tags  # nobody knows how these weights came about
    assert f"vllm serve {REPO}" in card.text and "| held-out loss | 1.69 |" in card.text and "(`mse`)" in card.text
    errors = [layer.relative_error for layer in inspect_checkpoint(packed, original=qwen3_dir)]
    assert f"{sum(errors) / len(errors):.4f} on average, {max(errors):.4f} at most" in card.text
    assert "14 layers, 73,728 of" in card.text and "`model.embed_tokens`" in card.text


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="an engine in a process of its own, on the CPU build")
def test_vllm_loads_it_by_name_and_generates_what_it_generates_from_the_folder(tmp_path, hub):
    changes = dict(vocab_size=512, hidden_size=128, intermediate_size=256, head_dim=32, initializer_range=0.2)
    tiny_qwen3(**changes).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    save_nvfp4(load_qat(tmp_path / "source"), tmp_path / "packed")
    code = (
        "import sys\nfrom vllm import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], skip_tokenizer_init=True, max_model_len=64, gpu_memory_utilization=0.2,"
        " kv_cache_memory_bytes=2**26, enforce_eager=True, distributed_executor_backend='uni')\n"
        "parameters = SamplingParams(max_tokens=8, temperature=0, detokenize=False, ignore_eos=True, logprobs=0)\n"
        "out = llm.generate([{'prompt_token_ids': [1, 2, 3]}], parameters, use_tqdm=False)[0].outputs[0]\n"
        "print('tokens', list(out.token_ids), [next(iter(entry.values())).logprob for entry in out.logprobs])"
    )
    hub.run(CLI, "push", tmp_path / "packed", REPO)
    found = [hub.run(code, name) for name in (tmp_path / "packed", REPO)]
    lines = [next(line for line in output.splitlines() if line.startswith("tokens")) for output in found]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_an_existing_card_keeps_its_words_and_metadata_and_old_weights_go_with_the_same_commit(packed, hub):
    old = "---\nlicense: mit\ntags:\n- mine\nlanguage: en\n---\n\n# My words\n\nStay.\n"
    hub.repos[REPO] = {
        "README.md": old.encode(), "model.safetensors": b"old", "hf_quant_config.json": b"{}", "notes.txt": b"mine",
    }  # fmt: skip
    hub.run(CLI, "push", packed, REPO)
    once = hub.repos[REPO]["README.md"].decode()
    hub.run(CLI, "push", packed, REPO)
    files = hub.repos[REPO]
    assert files["README.md"].decode() == once  # written anew, not twice
    card = ModelCard(once)
    assert "# My words" in card.text and "Stay." in card.text and card.text.count("## Use") == 1
    assert card.data.license == "mit" and card.data.language == "en" and {"mine", "nvfp4"} <= set(card.data.tags)
    assert "model.safetensors" not in files and "hf_quant_config.json" not in files and files["notes.txt"] == b"mine"
    assert len(hub.commits) == 2


@pytest.mark.slow
@pytest.mark.parametrize("status", [0, 500])
def test_a_broken_upload_is_tried_again(packed, status, hub):
    hub.trouble = [("PUT /lfs/", status)]
    hub.run(CLI, "push", packed, REPO)
    assert not hub.trouble and len(hub.commits) == 1
    assert sum(request.startswith("PUT") for request in hub.requests) == 3


@pytest.mark.slow
def test_a_connection_that_is_lost_is_one_readable_line(packed, hub):
    hub.trouble = [("/commit/", 0)]
    error = hub.run(CLI, "push", packed, REPO, fails=True)
    assert "Traceback" not in error and "cannot be reached" in error and hub.repos[REPO] == {}


@pytest.mark.slow
def test_an_upload_that_fails_is_one_readable_line(packed, hub):
    hub.trouble = [("PUT /lfs/", 403)] * 8
    error = hub.run(CLI, "push", packed, REPO, fails=True)
    assert "Traceback" not in error and "An upload failed" in error and hub.repos[REPO] == {}


@pytest.mark.slow
def test_a_card_that_cannot_be_fetched_is_not_replaced(packed, hub):
    hub.repos[REPO] = {"README.md": b"# My words\n"}
    hub.trouble = [("/resolve/main/README.md", 0)] * 8
    error = hub.run(CLI, "push", packed, REPO, fails=True)
    assert "Traceback" not in error and "cannot be reached" in error
    assert hub.repos[REPO] == {"README.md": b"# My words\n"} and not hub.commits


@pytest.mark.slow
def test_what_cannot_be_measured_or_read_makes_nothing_on_the_hub(packed, tmp_path, hub):
    error = hub.run(CLI, "push", packed, REPO, "--original", tmp_path / "nowhere", fails=True)
    assert "Traceback" not in error and not hub.repos
    shutil.copytree(packed, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    error = hub.run(CLI, "push", tmp_path / "copy", REPO, "--revision", "trial", fails=True)
    assert "Traceback" not in error and "A model card begins with YAML" in error and not hub.repos


@pytest.mark.slow
def test_a_name_without_an_owner_is_the_users(packed, hub):
    hub.run(CLI, "push", packed, "tiny-NVFP4")
    assert f"vllm serve {REPO}" in hub.repos[REPO]["README.md"].decode()


@pytest.mark.slow
def test_a_failed_commit_publishes_nothing_and_the_next_push_sends_no_weights_again(packed, hub):
    hub.trouble = [("/commit/", 500)]
    error = hub.run(CLI, "push", packed, REPO, fails=True)
    assert "Traceback" not in error and "500" in error
    assert hub.repos[REPO] == {}
    num_uploads = sum(request.startswith("PUT") for request in hub.requests)
    hub.run(CLI, "push", packed, REPO)
    assert sum(request.startswith("PUT") for request in hub.requests) == num_uploads == 2
    assert "model.safetensors.index.json" in hub.repos[REPO]


@pytest.mark.slow
def test_a_wrong_token_is_one_readable_line(packed, hub):
    error = hub.run(CLI, "push", packed, REPO, token="hf_wrong", fails=True)
    lines = [line for line in error.splitlines() if line.strip()]
    assert lines[-1].startswith("error: The Hub does not let this token write to me/tiny-NVFP4 (HTTP 401)")
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_branch_and_a_pull_request(packed, hub):
    hub.run(CLI, "push", packed, REPO, "--revision", "trial")
    assert "POST /api/models/me/tiny-NVFP4/branch/trial" in hub.requests
    assert "/commit/trial" in hub.commits[0]
    output = hub.run(CLI, "push", packed, REPO, "--create-pr")
    assert "create_pr=1" in hub.commits[1] and "/discussions/1" in output


@pytest.mark.slow
def test_a_damaged_checkpoint_is_not_published(packed, tmp_path, hub):
    shutil.copytree(packed, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    del config["quantization_config"]["quantization_status"]
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    error = hub.run(CLI, "push", tmp_path / "copy", REPO, fails=True)
    assert "Only good checkpoints are published" in error and "quantization_status" in error and REPO not in hub.repos


TRAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from hf_nvfp4_qat import NVFP4QATConfig, QADTrainer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, quantization_config=NVFP4QATConfig())
row = {"input_ids": torch.arange(16), "labels": torch.arange(16)}
arguments = TrainingArguments(
    output_dir=sys.argv[2], max_steps=1, use_cpu=True, report_to=[], push_to_hub=True, hub_model_id="me/trained",
    save_strategy="no", per_device_train_batch_size=1,
)
trainer = {"Trainer": Trainer, "QADTrainer": QADTrainer}[sys.argv[3]](model, arguments, train_dataset=[row] * 4)
trainer.train()
trainer.push_to_hub()
"""


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["Trainer", "QADTrainer"])
def test_a_trainer_publishes_packed_weights_and_tags_its_card(trainer, qwen3_dir, tmp_path, hub):
    hub.run(TRAIN, qwen3_dir, tmp_path / "output", trainer)
    files = hub.repos["me/trained"]
    assert json.loads(files["config.json"])["quantization_config"]["format"] == "nvfp4-pack-quantized"
    card = ModelCard(files["README.md"].decode())
    assert {"nvfp4", "quantization-aware-training"} <= set(card.data.tags)
    assert "### Training hyperparameters" in card.text
    assert ("vllm serve me/trained" in card.text) == (trainer == "QADTrainer")
