"""Other versions of TRL than the tested one: a warning, and an error with the name of what is gone."""

import logging
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_nvfp4_qat.trl_callbacks import trl_versions
from hf_nvfp4_qat.trl_callbacks.generation import NVFP4Generation, mark
from hf_nvfp4_qat.trl_callbacks.metrics import record, record_mismatch, record_routing
from hf_nvfp4_qat.trl_callbacks.trl_versions import NEWEST_TESTED, compared_tensors, trl_version


def test_a_newer_trl_than_tested_gets_one_warning_and_an_older_one_an_error(monkeypatch, caplog):
    import trl

    monkeypatch.setattr(trl_versions, "_warned", set())
    with caplog.at_level(logging.WARNING, logger="hf_nvfp4_qat"):
        trl_version()
        assert not caplog.records
        monkeypatch.setattr(trl, "__version__", "99.0")
        for _ in range(3):
            trl_version()
    assert [record.getMessage() for record in caplog.records] == [
        f"NVFP4 rollouts are tested up to TRL {NEWEST_TESTED}; 99.0 is installed. If something fails, install "
        f"trl=={NEWEST_TESTED}."
    ]
    monkeypatch.setattr(trl, "__version__", "1.15.9")
    with pytest.raises(ValueError, match=r"need TRL 1\.16\.0 or newer; 1\.15\.9"):
        trl_version()


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["_init_vllm", "_iter_named_params", "sync_weights", "generate"])
def test_a_method_that_is_gone_is_named_when_the_trainer_is_made(monkeypatch, name):
    from trl.generation.vllm_generation import VLLMGeneration

    monkeypatch.delattr(VLLMGeneration, name)
    with pytest.raises(ValueError, match=rf"need `{name}` of TRL's VLLMGeneration.*trl==1\.16\.0"):
        mark(nn.Linear(1, 1), None)


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["_dist", "fsdp_version", "zero_stage"])
def test_how_the_model_is_sharded_must_be_said(name):
    backend = SimpleNamespace(fsdp_version=None, zero_stage=0)
    trl_generation = SimpleNamespace(sync_weights=None, generate=None, mode="colocate", _dist=backend)
    delattr(trl_generation if name == "_dist" else backend, name)
    with pytest.raises(ValueError, match=f"need `{name}` of TRL's"):
        NVFP4Generation(trl_generation).build(None)


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("mode", "name"), [("_take_over_engine", "_llm_weights_sleeping"), ("_connect", "_weight_metadata")]
)
def test_what_each_mode_needs_is_asked_for_before_the_first_push(mode, name):
    trl_generation = SimpleNamespace(sync_weights=None, generate=None, llm=None)
    stream = SimpleNamespace(quantizes_input=False)
    arguments = [stream] if mode == "_take_over_engine" else [None, stream]
    with pytest.raises(ValueError, match=f"need `{name}` of TRL's"):
        getattr(NVFP4Generation(trl_generation), mode)(*arguments)


def trainer_of(module: str, **attributes):
    """A trainer whose class is defined in `module`."""
    trainer = type("SomeTrainer", (), {"__module__": module})()
    vars(trainer).update(attributes)
    return trainer


GRPO = SimpleNamespace(use_vllm=True, vllm_importance_sampling_correction=True)


def test_a_trainer_of_trl_without_metrics_is_an_error_and_one_of_others_is_left_alone():
    with pytest.raises(ValueError, match="need `_metrics` of TRL's SomeTrainer"):
        record_mismatch(trainer_of("trl.trainer.some_trainer"))
    other = trainer_of("somebody.trainer")
    record_mismatch(other)
    record(other, sync_seconds=1.0)
    assert not vars(other)


def test_a_trainer_that_corrects_for_the_engine_must_let_itself_be_watched():
    trainer = trainer_of("trl.trainer.some_trainer", _metrics={}, args=GRPO)
    for watch in (record_mismatch, lambda trainer: record_routing(trainer, None, 1)):
        with pytest.raises(ValueError, match="need `_generate_and_score_completions` of TRL's SomeTrainer"):
            watch(trainer)


@pytest.mark.parametrize(
    "args",
    [
        SimpleNamespace(use_vllm=True),
        SimpleNamespace(use_vllm=True, vllm_importance_sampling_correction=False),
        SimpleNamespace(use_vllm=False, vllm_importance_sampling_correction=True),
    ],
    ids=["RLOO, distillation", "switched off", "without vLLM"],
)
def test_a_trainer_that_does_not_correct_needs_nothing(args, caplog):
    metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer = trainer_of("trl.trainer.some_trainer", _metrics=metrics, args=args)
    record_mismatch(trainer)
    assert set(vars(trainer)) == {"_metrics", "args"} and not caplog.records


@pytest.mark.parametrize(
    "name", ["sampling_per_token_logps", "old_per_token_logps", "importance_sampling_ratio", "completion_mask"]
)
def test_a_key_that_is_gone_is_named_at_the_first_batch(name):
    names = ("sampling_per_token_logps", "old_per_token_logps", "importance_sampling_ratio", "completion_mask")
    batch = {key: torch.ones(1, 2) for key in names}
    assert all(torch.equal(tensor, torch.ones(1, 2)) for tensor in compared_tensors(batch))
    with pytest.raises(ValueError, match=f"need {name} in a batch of rollouts"):
        compared_tensors({key: tensor for key, tensor in batch.items() if key != name})
