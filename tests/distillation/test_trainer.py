"""QADTrainer brings a quantized model back to its teacher, with all that Trainer does; and TRL's trainer works too."""

import copy
import sys

import pytest
import torch
from conftest import load_qat, tiny_qwen3, tiny_qwen3_moe
from datasets import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments, set_seed

from hf_nvfp4_qat import prepare_qat, save_nvfp4, verify_nvfp4
from hf_nvfp4_qat.distillation import trainer as module
from hf_nvfp4_qat.distillation.divergence import divergence
from hf_nvfp4_qat.distillation.trainer import QADTrainer


def batches(num: int = 64, length: int = 24) -> Dataset:
    ids = torch.randint(0, 128, (num, length), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def arguments(path, **changes) -> TrainingArguments:
    options = dict(
        output_dir=str(path), max_steps=60, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=20,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0, lr_scheduler_type="cosine",
    )  # fmt: skip
    return TrainingArguments(**{**options, **changes})


def logged(trainer, name) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(("make", "learning_rate", "steps"), [(tiny_qwen3, 3e-4, 60), (tiny_qwen3_moe, 1e-3, 150)])
def test_the_student_comes_back_to_its_teacher_and_is_what_is_saved(make, learning_rate, steps, tmp_path):
    set_seed(0)
    teacher = make(initializer_range=0.15)
    student = prepare_qat(copy.deepcopy(teacher))
    trainer = QADTrainer(
        student, arguments(tmp_path, learning_rate=learning_rate, max_steps=steps), teacher=teacher,
        train_dataset=batches(2048), eval_dataset=batches(8),
    )  # fmt: skip
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(before["eval_kl"]) and before["eval_cross_entropy"] > 4
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_kl"] < 0.9 * before["eval_kl"]  # with experts 0.7 on some CPUs, 0.83 on others
    losses, kls = logged(trainer, "loss"), logged(trainer, "kl")
    assert losses == pytest.approx(kls, rel=1e-3) and len(logged(trainer, "cross_entropy")) == steps // 20
    save_nvfp4(student, tmp_path / "packed")
    assert verify_nvfp4(tmp_path / "packed", student).ok
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path):
    """With different numbers of counted tokens in each."""
    data = batches(8)
    data = data.map(lambda row, index: {"labels": [-100] * (3 * index) + row["labels"][3 * index :]}, with_indices=True)
    weights = []
    for micro in (8, 2):
        set_seed(0)
        student = prepare_qat(tiny_qwen3())
        options = dict(max_steps=1, per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro)
        trainer = QADTrainer(
            student, arguments(tmp_path, optim="sgd", **options), teacher=tiny_qwen3(seed=1), train_dataset=data
        )
        trainer.train()
        weights.append([parameter.detach().clone() for parameter in student.parameters()])
    for mine, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_teachers_come_from_the_models_own_checkpoint_from_a_path_or_from_anywhere(qwen3_dir, tmp_path):
    model = load_qat(qwen3_dir)
    own = QADTrainer(model, arguments(tmp_path), train_dataset=batches())
    path = QADTrainer(model, arguments(tmp_path), teacher=str(qwen3_dir), train_dataset=batches())
    twin = AutoModelForCausalLM.from_pretrained(qwen3_dir)
    seen = []

    def anywhere(batch):
        seen.append(set(batch))
        return twin(input_ids=batch["input_ids"]).logits

    function = QADTrainer(model, arguments(tmp_path), teacher=anywhere, train_dataset=batches())
    values = [trainer.evaluate(batches(8))["eval_kl"] for trainer in (own, path, function)]
    assert values[0] == values[1] and values[2] == pytest.approx(values[0], rel=1e-3)
    assert seen == [{"input_ids"}]
    assert next(own.teacher.model.parameters()).dtype == torch.bfloat16


def test_the_teacher_may_be_in_8_bit(qwen3_dir, tmp_path):
    pytest.importorskip("bitsandbytes")
    in_8_bit = BitsAndBytesConfig(load_in_8bit=True)
    teacher = AutoModelForCausalLM.from_pretrained(qwen3_dir, quantization_config=in_8_bit, device_map="cpu")
    assert teacher.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    kls = []
    for other in (teacher, None):
        options = arguments(tmp_path, max_steps=2)
        trainer = QADTrainer(load_qat(qwen3_dir), options, teacher=other, train_dataset=batches(8))
        kls.append(trainer.evaluate(batches(8))["eval_kl"])
        trainer.train()
    assert kls[0] == pytest.approx(kls[1], rel=0.3)


def test_cross_entropy_can_be_added(qwen3_dir, tmp_path):
    model, teacher = load_qat(qwen3_dir), AutoModelForCausalLM.from_pretrained(qwen3_dir)
    trainer = QADTrainer(model, arguments(tmp_path), teacher=teacher, temperature=2.0, cross_entropy_weight=0.5)
    metrics = trainer.evaluate(batches(8))
    ids = torch.tensor(batches(8)["input_ids"])
    with torch.no_grad():
        expected = divergence(model(ids).logits, teacher(ids).logits, ids, temperature=2.0, cross_entropy_weight=0.5)
    names = ("eval_loss", "eval_kl", "eval_cross_entropy", "eval_teacher_cross_entropy")
    for name, value in zip(names, expected, strict=True):
        assert metrics[name] == pytest.approx(float(value) / (8 * 23), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": None}, "comes from no checkpoint, so `teacher` must be given"),
        ({"teacher": "qat"}, "The teacher computes with NVFP4 weights"),
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"cross_entropy_weight": -1.0}, "`cross_entropy_weight` not negative"),
    ],
)
def test_refusals(options, message, tmp_path):
    if options.get("teacher") == "qat":
        options = {"teacher": prepare_qat(tiny_qwen3())}
    with pytest.raises(ValueError, match=message):
        QADTrainer(prepare_qat(tiny_qwen3()), arguments(tmp_path), **{"teacher": tiny_qwen3(), **options})


def test_batches_without_labels_and_other_vocabularies_are_refused(tmp_path):
    student = prepare_qat(tiny_qwen3())
    data = batches().remove_columns("labels")
    trainer = QADTrainer(student, arguments(tmp_path), teacher=tiny_qwen3(), train_dataset=data)
    with pytest.raises(ValueError, match="Batches need `labels`, which say what tokens count; this one has input_ids"):
        trainer.train()
    teacher = tiny_qwen3(vocab_size=144)
    trainer = QADTrainer(student, arguments(tmp_path), teacher=teacher, train_dataset=batches())
    with pytest.raises(ValueError, match="Use a teacher with the same vocabulary"):
        trainer.train()


@pytest.mark.parametrize("how", ["zero3", "fsdp1"])
def test_under_zero3_and_fsdp1_the_teacher_is_what_trl_makes_of_reference_models(how, tmp_path, monkeypatch):
    models = pytest.importorskip("trl.models")
    prepared = []

    def prepare(teacher, accelerator):
        prepared.append(accelerator)
        return torch.nn.ModuleDict({"wrapped": teacher})

    name = "prepare_deepspeed" if how == "zero3" else "prepare_fsdp"
    monkeypatch.setattr(models, name, prepare)
    monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: how == "zero3")
    trainer = QADTrainer(prepare_qat(tiny_qwen3()), arguments(tmp_path), teacher=tiny_qwen3())
    trainer.is_fsdp_enabled = how == "fsdp1"
    teacher = tiny_qwen3()
    ready = trainer._prepare_teacher(teacher)
    assert ready.model["wrapped"] is teacher and prepared[-1] is trainer.accelerator
    assert ready._device == trainer.accelerator.device  # its weights may be offloaded to another
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    monkeypatch.setitem(sys.modules, "trl.models", None)
    with pytest.raises(ValueError, match="TRL is not installed"):
        trainer._prepare_teacher(teacher)


def test_a_batch_without_tokens_that_count_costs_nothing(tmp_path):
    data = batches(8).map(lambda row: {"labels": [-100] * len(row["labels"])})
    trainer = QADTrainer(prepare_qat(tiny_qwen3()), arguments(tmp_path), teacher=tiny_qwen3(), eval_dataset=data)
    assert trainer.evaluate()["eval_loss"] == 0


def test_a_run_resumes_where_it_was(qwen3_dir, tmp_path):
    teacher = tiny_qwen3()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))

    def run(path, **options):
        set_seed(0)
        trainer = QADTrainer(
            load_qat(qwen3_dir), arguments(path, max_steps=8, save_strategy="steps", save_steps=4, logging_steps=1),
            teacher=teacher, train_dataset=batches(),
        )  # fmt: skip
        trainer.train(**options)
        return logged(trainer, "kl"), list(trainer.model.parameters())

    whole, weights = run(tmp_path / "a")
    resumed, again = run(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a/checkpoint-4"))
    assert resumed == whole
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, weights, strict=True))
