"""The model card counts what is in the files, and keeps what an earlier one says."""

from conftest import load_qat
from huggingface_hub import ModelCard

from hf_nvfp4_qat import save_nvfp4
from hf_nvfp4_qat.checkpoint.card import model_card
from hf_nvfp4_qat.checkpoint.convert import convert_checkpoint
from hf_nvfp4_qat.checkpoint.publish import _published_files


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


def test_what_is_no_part_of_a_checkpoint_is_not_published(llama_dir, tmp_path, caplog):
    save_nvfp4(load_qat(llama_dir), tmp_path, max_shard_size="48KB")
    wanted = {path.name for path in tmp_path.iterdir()}
    for name in ("LICENSE", "LICENSE.txt", "tokenizer.tiktoken", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")
        wanted.add(name)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("{}")
    wanted.add("additional_chat_templates/tools.jinja")
    unwanted = ("secrets.json", "optimizer.safetensors", "model-00001-of-00009.safetensors", "trainer_state.json")
    for name in (*unwanted, "modeling_mine.py", "hf_quant_config.json", ".env"):
        (tmp_path / name).write_text("{}")
    assert set(_published_files(tmp_path)) == wanted - {"README.md"}
    assert all(name in caplog.text for name in unwanted) and ".env" not in caplog.text
    convert_checkpoint(tmp_path, tmp_path / "there", "modelopt")
    assert (tmp_path / "there" / "additional_chat_templates" / "tools.jinja").read_text() == "{}"
