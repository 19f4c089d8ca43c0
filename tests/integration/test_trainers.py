"""Trainer, TRL's SFT and DPO trainers: train, checkpoint, resume to the bit, and save what is served."""

import json

import pytest
import torch
from conftest import load_qat, tiny_qwen3, tokens
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from hf_nvfp4_qat import NVFP4QATConfig, prepare_qat, verify_nvfp4
from hf_nvfp4_qat.modules.swap import qat_modules

COMMON = dict(report_to="none", use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2, learning_rate=1e-2)


def rows(count: int = 16) -> list[dict]:
    """Different token rows, so that order and position in the data matter."""
    return [{"input_ids": (tokens()[0] + 3 * i) % 128, "labels": (tokens()[0] + 3 * i) % 128} for i in range(count)]


def make_trainer(model, output, **changes) -> Trainer:
    arguments = TrainingArguments(output_dir=str(output), **{**COMMON, "save_strategy": "no", **changes})
    return Trainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=rows(2))


def assert_same_state(ours: Trainer, theirs: Trainer) -> None:
    for name, tensor in theirs.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], tensor), name
    first, second = (trainer.optimizer.state_dict()["state"] for trainer in (ours, theirs))
    assert first.keys() == second.keys()
    for index, state in first.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[index][key])), (index, key)


@pytest.mark.parametrize(
    "options", [{}, {"bf16": True}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}]
)
def test_resuming_from_a_checkpoint_is_exact_in_weights_and_optimizer_state(qwen3_dir, tmp_path, options):
    through = make_trainer(load_qat(qwen3_dir), tmp_path / "through", max_steps=6, **options)
    through.train()
    first = make_trainer(
        load_qat(qwen3_dir), tmp_path / "halves", max_steps=6, save_strategy="steps", save_steps=3, **options
    )
    first.train()
    resumed = make_trainer(load_qat(qwen3_dir), tmp_path / "halves", max_steps=6, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert_same_state(resumed, through)
    assert_same_state(first, through)
    for name, layer in qat_modules(through.model).items():
        assert torch.equal(resumed.model.get_submodule(name).global_decode_scale, layer.global_decode_scale)


def test_resuming_in_bfloat16_is_exact(qwen3_dir, tmp_path):
    def trainer(name, **changes):
        return make_trainer(load_qat(qwen3_dir, dtype=torch.bfloat16), tmp_path / name, max_steps=4, **changes)

    through = trainer("through")
    through.train()
    trainer("halves", save_strategy="steps", save_steps=2).train()
    resumed = trainer("halves")
    resumed.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-2"))
    assert_same_state(resumed, through)


def test_save_model_writes_what_the_trained_model_serves(qat_model, tmp_path):
    trainer = make_trainer(qat_model, tmp_path / "run", max_steps=3, save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert verify_nvfp4(tmp_path / "final", trainer.model).ok
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert "quantization_config" not in json.loads((checkpoint / "config.json").read_text())
    assert load_file(checkpoint / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    trained = load_qat(checkpoint, dtype=torch.bfloat16).eval()
    assert torch.equal(served(tokens()).logits, trained(tokens()).logits)


def test_the_best_model_is_loaded_at_the_end(qat_model, tmp_path):
    trainer = make_trainer(
        qat_model, tmp_path, max_steps=4, save_strategy="steps", eval_strategy="steps", save_steps=2, eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert all(torch.equal(best[name], trainer.model.state_dict()[name]) for name in best)
    saved = tmp_path / "packed"
    trainer.save_model(str(saved))
    assert verify_nvfp4(saved, trainer.model).ok


def test_torch_compile_through_the_trainer(qat_model, tmp_path):
    trainer = make_trainer(qat_model, tmp_path, max_steps=3, torch_compile=True, torch_compile_backend="aot_eager")
    trainer.train()
    trainer.save_model(str(tmp_path / "packed"))
    assert verify_nvfp4(tmp_path / "packed", qat_model).ok


def test_training_lowers_the_loss_as_served(qwen3_dir, tmp_path):
    """End to end: the loss of the packed checkpoint in plain Transformers goes down with training."""

    def served_loss(model, name):
        model.save_pretrained(tmp_path / name)
        served = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            return float(served(input_ids=rows()[0]["input_ids"][None], labels=rows()[0]["labels"][None]).loss)

    model = load_qat(qwen3_dir)
    before = served_loss(model, "before")
    make_trainer(model, tmp_path / "run", max_steps=30).train()
    assert served_loss(model, "after") < 0.85 * before


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    """A checkpoint with a tokenizer of 128 tokens, for trainers that take text."""
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("with_tokenizer")
    vocabulary = {"<pad>": 0, "<eos>": 1, **{chr(i + 30): i for i in range(2, 128)}}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<pad>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(path)
    tiny_qwen3().to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("how", ["object", "id"])
def test_trl_sft_trains_and_saves_packed(tokenizer_dir, tmp_path, how):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    options = dict(report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, max_steps=2, save_steps=1)
    if how == "id":
        options["model_init_kwargs"] = {"quantization_config": NVFP4QATConfig(), "dtype": "float32"}
    trainer = trl.SFTTrainer(
        model=str(tokenizer_dir) if how == "id" else load_qat(tokenizer_dir),
        args=trl.SFTConfig(output_dir=str(tmp_path / "run"), **options),
        train_dataset=datasets.Dataset.from_dict({"text": ["hello world", "four bits are enough"] * 4}),
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert len(qat_modules(trainer.model)) == 14
    assert all(not torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())
    trainer.save_model(str(tmp_path / "packed"))
    assert verify_nvfp4(tmp_path / "packed", trainer.model).ok


@pytest.mark.slow
def test_trl_dpo_trains_the_policy_against_a_bfloat16_reference(tokenizer_dir, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    pairs = {"prompt": ["1+1="] * 4, "chosen": ["2"] * 4, "rejected": ["3"] * 4}
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, max_steps=2
    )
    trainer = trl.DPOTrainer(
        model=load_qat(tokenizer_dir),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(pairs),
        processing_class=PreTrainedTokenizerFast.from_pretrained(tokenizer_dir),
    )
    trainer.train()
    assert len(qat_modules(trainer.model)) == 14 and not qat_modules(trainer.ref_model)
    trainer.save_model(str(tmp_path / "packed"))
    assert verify_nvfp4(tmp_path / "packed", trainer.model).ok


def test_a_from_config_model_trains_under_the_trainer(tmp_path):
    trainer = make_trainer(prepare_qat(tiny_qwen3()), tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "packed"))
    assert verify_nvfp4(tmp_path / "packed", trainer.model).ok
