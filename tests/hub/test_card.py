"""The model card counts what is in the files, and keeps what an earlier one says."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import load_qat, tiny_moe, tokens
from huggingface_hub import EvalResult, ModelCard
from safetensors.torch import load_file, save_file

from hf_nvfp4_qat import save_nvfp4
from hf_nvfp4_qat.checkpoint.convert import convert_checkpoint, quantize_checkpoint
from hf_nvfp4_qat.hub.card import license_of, load_card, model_card
from hf_nvfp4_qat.hub.publish import _published_files


def test_all_parameters_are_counted_biases_of_packed_layers_too(llama_dir, tmp_path):
    model = load_qat(llama_dir)
    save_nvfp4(model, tmp_path)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"14 layers, 73,728 of {total:,} parameters" in model_card(tmp_path).text


def test_a_later_card_keeps_base_model_and_results_and_forgets_the_other_dialect(llama_dir, tmp_path):
    save_nvfp4(load_qat(llama_dir), tmp_path / "here")
    first = model_card(tmp_path / "here", base_model="me/base", evaluation={"a|b\nc": 0.5, "loss": 1.25})
    assert "| a\\|b c | 0.5 |\n| loss | 1.25 |\n\n## Use" in first.text
    convert_checkpoint(tmp_path / "here", tmp_path / "there", "modelopt")
    second = model_card(tmp_path / "there", existing=ModelCard(first.content))
    assert "| loss | 1.25 |" in second.text and "of [me/base](https://huggingface.co/me/base)" in second.text
    assert second.data.base_model == "me/base"
    assert "modelopt" in second.data.tags and "compressed-tensors" not in second.data.tags
    third = model_card(tmp_path / "there", existing=ModelCard(second.content), evaluation={"loss": 1.0})
    assert "| loss | 1.0 |" in third.text and "1.25" not in third.text


def test_what_is_said_explicitly_comes_before_an_existing_card_and_nothing_of_it_is_lost(llama_dir, tmp_path):
    save_nvfp4(load_qat(llama_dir), tmp_path)
    old = (
        "---\nbase_model:\n- Qwen/Base\nbase_model_relation: finetune\nmodel-index:\n- name: mine\n  results:\n"
        "  - task: {type: t}\n    dataset: {name: MMLU, type: mmlu}\n    metrics: [{type: acc, value: 0.7}]\n"
        "  - task: {type: t}\n    dataset: {name: GSM8K, type: gsm8k}\n    metrics: [{type: acc, value: 0.4}]\n"
        "---\n# Mine\n\n<!-- hf_nvfp4_qat: end --> stays <!-- hf_nvfp4_qat: begin -->\n"
    )
    assert model_card(tmp_path, existing=ModelCard(old)).data.base_model_relation == "finetune"
    new = EvalResult(task_type="t", dataset_type="gsm8k", dataset_name="GSM8K", metric_type="acc", metric_value=0.5)
    license = {"license": "other", "license_name": "qwen", "license_link": "https://example.com"}
    card = model_card(tmp_path, base_model="Qwen/Mine", license=license, evaluation=[new], existing=ModelCard(old))
    again = ModelCard(card.content)
    assert (again.data.base_model, again.data.base_model_relation) == ("Qwen/Mine", "quantized")
    assert {key: again.data.to_dict()[key] for key in license} == license
    assert {(result.dataset_name, result.metric_value) for result in again.data.eval_results} == {
        ("MMLU", 0.7),
        ("GSM8K", 0.5),
    }
    assert "stays" in again.text and again.text.count("## Use") == 1
    kept = model_card(tmp_path, license={"license": "mit"}, existing=again)
    assert (
        kept.data.license == "other" and "earlier version" in kept.text and kept.text.count("| GSM8K, acc | 0.5 |") == 1
    )
    with pytest.raises(ValueError, match="'mmlu' is a dict"):
        model_card(tmp_path, evaluation={"mmlu": {"acc": 0.5}})


def test_the_code_in_a_card_runs_and_gives_what_the_model_gives(tmp_path):
    tiny_moe("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    model = load_qat(tmp_path / "source", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "packed")
    text = model_card(tmp_path / "packed", repo_id=str(tmp_path / "packed")).text
    code = text.partition("```python\n")[2].partition("```")[0].partition("from hf_nvfp4_qat import load_nvfp4")[0]
    script = (
        f"import torch\n{code}\nids = torch.arange(24)[None] * 5 % 128\n"
        "with torch.no_grad(): print(model(ids).logits.double().sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        expected = model(tokens()).logits.double().sum().item()
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(expected, rel=1e-6)
    (tmp_path / "packed" / "config.json").write_text(
        (tmp_path / "packed" / "config.json").read_text().replace("MixtralForCausalLM", "XForConditionalGeneration")
    )
    assert "import XForConditionalGeneration" in model_card(tmp_path / "packed").text


def test_a_card_states_the_dtypes_of_the_files(llama_dir, tmp_path):
    save_nvfp4(load_qat(llama_dir), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    save_file(tensors, tmp_path / "model.safetensors")
    text = model_card(tmp_path).text
    assert "| left in bfloat16 | `model.embed_tokens` |" in text and "| left in float16 | `lm_head` |" in text


def test_a_card_that_is_none_is_named(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [unclosed\n---\n# Mine\n")
    with pytest.raises(ValueError, match=r"that of .*README.md cannot be read"):
        load_card(tmp_path / "README.md")
    assert license_of(str(tmp_path)) == {}


def test_the_card_of_the_original_is_no_card_of_the_quantized_model(llama_dir, tmp_path):
    shutil.copytree(llama_dir, tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\n---\n# The original\n")
    (tmp_path / "source" / "LICENSE").write_text("MIT")
    quantize_checkpoint(tmp_path / "source", tmp_path / "packed")
    assert not (tmp_path / "packed" / "README.md").exists() and (tmp_path / "packed" / "LICENSE").exists()
    assert license_of(str(tmp_path / "source")) == {"license": "mit"}
    (tmp_path / "packed" / "README.md").write_text("# The packed one\n")
    convert_checkpoint(tmp_path / "packed", tmp_path / "there", "modelopt")
    assert (tmp_path / "there" / "README.md").read_text() == "# The packed one\n"


def test_what_is_no_part_of_a_checkpoint_is_not_published(llama_dir, tmp_path, caplog):
    save_nvfp4(load_qat(llama_dir), tmp_path, max_shard_size="48KB")
    wanted = {path.name for path in tmp_path.iterdir()}
    for name in ("LICENSE", "LICENSE.txt", "tokenizer.tiktoken", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")
        wanted.add(name)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("{}")
    wanted.add("additional_chat_templates/tools.jinja")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", null]}}')
    (tmp_path / "tokenization_mine.py").write_text("")
    wanted |= {"tokenizer_config.json", "tokenization_mine.py"}
    assert "tokenization_mine.py" in _published_files(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    wanted.remove("tokenization_mine.py")
    unwanted = ("secrets.json", "optimizer.safetensors", "model-00001-of-00009.safetensors", "trainer_state.json")
    for name in (*unwanted, "modeling_mine.py", "hf_quant_config.json", ".env"):
        (tmp_path / name).write_text("{}")
    assert set(_published_files(tmp_path)) == wanted - {"README.md"}
    assert all(name in caplog.text for name in unwanted) and ".env" not in caplog.text
    convert_checkpoint(tmp_path, tmp_path / "there", "modelopt")
    assert (tmp_path / "there" / "additional_chat_templates" / "tools.jinja").read_text() == "{}"
