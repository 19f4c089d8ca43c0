"""NVFP4RolloutCallback in TRL's real trainers with a real vLLM engine, in colocate mode."""

import logging

import pytest
import torch
from conftest import SMALL_ENGINE, byte_tokenizer, load_qat
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl_trainers import MEMORY, ON_GPU, greedy, keep_alive, logged, make_trainer, rollouts

from hf_nvfp4_qat import NVFP4RolloutCallback, save_nvfp4, verify_nvfp4
from hf_nvfp4_qat.modules.linear import QATLinear
from hf_nvfp4_qat.modules.swap import qat_modules
from hf_nvfp4_qat.rollout import sync as sync_module

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MISMATCH = "sampling/sampling_logp_difference/mean"
METRICS = ("sync_seconds", "sync_mib", "compression", "weight_error", "mismatch_kl", "masked_fraction")


def test_qat_closes_the_gap_between_sampler_and_trainer(folder, tmp_path, monkeypatch):
    """The point of it all: with QAT the mismatch is BF16's; without, on the same NVFP4 rollouts, many times that."""
    from trl.generation import vllm_generation
    from vllm.model_executor.layers import utils as vllm_layers

    def keep_weights(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    def mismatch(kind):
        set_seed(0)
        if kind == "bf16":
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            engine = vllm_generation.LLM
            with monkeypatch.context() as patch:
                small = {**SMALL_ENGINE, "dtype": "bfloat16"}
                patch.setattr(vllm_generation, "LLM", lambda **kwargs: engine(**kwargs, **small))
                # Where a CPU build packs weights as it loads them, TRL's own sync finds nothing to load into.
                patch.setattr(vllm_layers, "dispatch_cpu_unquantized_gemm", keep_weights)
                trainer = make_trainer(model, folder, tmp_path, [])
        else:
            model = load_qat(folder)
            if kind == "without qat":
                for layer in qat_modules(model).values():
                    layer.nvfp4_weight.is_quantized = False  # so forward takes it as it is
            trainer = make_trainer(model, folder, tmp_path, [rollouts()])
        trainer.train()
        assert len(logged(trainer, MISMATCH)) == 3
        return sum(logged(trainer, MISMATCH)) / 3

    bf16, qat, without_qat = (mismatch(kind) for kind in ("bf16", "qat", "without qat"))
    assert qat <= 1.2 * bf16
    assert without_qat >= 5 * bf16


def test_the_engine_runs_the_exported_checkpoint(folder, tmp_path):
    from vllm import LLM

    model = load_qat(folder)
    trainer = make_trainer(model, folder, tmp_path, [rollouts(check_every=1)], learning_rate=1e-2)
    trainer.train()
    trainer.vllm_generation.sync_weights()
    trainer.save_model(tmp_path / "served")
    assert verify_nvfp4(tmp_path / "served", model).ok
    fresh = LLM(str(tmp_path / "served"), max_model_len=128, gpu_memory_utilization=MEMORY, **SMALL_ENGINE)
    keep_alive(fresh)
    assert greedy(trainer.vllm_generation.llm) == greedy(fresh)


class Recorder(TrainerCallback):
    """Stands for a tracker: what it is given in on_log is what it would draw."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_metrics_reach_the_history_and_trackers(folder, tmp_path, capfd):
    tracker = Recorder()
    callback = rollouts()
    trainer = make_trainer(load_qat(folder), folder, tmp_path, [tracker, callback], learning_rate=1e-2)
    trainer.train()
    for name in METRICS:
        assert len(logged(trainer, f"nvfp4/{name}")) == 3, name
        assert all(f"nvfp4/{name}" in logs for logs in tracker.seen[:3]), name
    assert len(logged(trainer, "nvfp4/code_flips")) == 2
    assert all(0 < share < 1 for share in logged(trainer, "nvfp4/code_flips"))
    stream = sync_module.RolloutStream(trainer.model)
    assert logged(trainer, "nvfp4/sync_mib")[0] == pytest.approx(stream.num_bytes / 2**20)
    assert 0.08 < logged(trainer, "nvfp4/weight_error")[0] < 0.11
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("NVFP4 rollouts:")]
    for part in ("colocate mode", "14 weights packed", "NvFp4LinearKernel", "vLLM", "TRL"):
        assert part in line


def count_pushes(trainer):
    pushes = []
    push = trainer.vllm_generation.sync_weights
    trainer.vllm_generation.sync_weights = lambda: (pushes.append(trainer.state.global_step), push())
    return pushes


def test_one_push_before_each_round_of_generation(folder, tmp_path):
    trainer = make_trainer(
        load_qat(folder), folder, tmp_path, [rollouts()], max_steps=4, num_iterations=2, gradient_accumulation_steps=2
    )
    pushes = count_pushes(trainer)
    trainer.train()
    # Two optimizer steps learn from each round.
    assert pushes == [0, 2]


def test_evaluation_generates_with_the_weights_of_that_moment(folder, tmp_path):
    callback = rollouts(check_every=1)
    trainer = make_trainer(
        load_qat(folder), folder, tmp_path, [callback], max_steps=2, per_device_eval_batch_size=4, learning_rate=1e-2
    )
    trainer.eval_dataset = Dataset.from_dict({"prompt": ["hello"] * 4})
    pushes = count_pushes(trainer)
    trainer.train()
    trainer.evaluate()
    assert pushes == [0, 1, 2]
    assert callback.generation.last_check.ok
    assert "eval_nvfp4/mismatch_kl" in trainer.state.log_history[-1]


def test_training_resumes_from_a_checkpoint(folder, tmp_path):
    options = dict(max_steps=2, save_strategy="steps", save_steps=1, learning_rate=1e-2)
    make_trainer(load_qat(folder), folder, tmp_path, [rollouts()], **options).train()
    callback = rollouts(check_every=1)
    trainer = make_trainer(load_qat(folder), folder, tmp_path, [callback], **{**options, "max_steps": 3})
    pushes = count_pushes(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert pushes == [2]
    assert callback.generation.last_check.ok


def test_a_second_call_of_train_rolls_out_on_the_weights_of_that_moment(folder, tmp_path):
    """TRL's step counter is back at 0 then, where it was at its last push."""
    model = load_qat(folder)
    callback = rollouts()
    trainer = make_trainer(model, folder, tmp_path, [callback], max_steps=1, learning_rate=1e-2)
    trainer.train()
    states = []
    generate = callback.generation._generate_of_trl
    callback.generation._generate_of_trl = lambda *args, **kwargs: (
        states.append(sync_module.check(trainer.vllm_generation.llm, model).ok),
        generate(*args, **kwargs),
    )[1]
    trainer.train()
    assert states == [True]


def test_weights_written_between_two_evaluations_are_rolled_out(folder, tmp_path):
    model = load_qat(folder)
    trainer = make_trainer(model, folder, tmp_path, [rollouts()], max_steps=1, per_device_eval_batch_size=4)
    trainer.eval_dataset = Dataset.from_dict({"prompt": ["hello"] * 4})
    trainer.train()
    trainer.evaluate()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.7)
    trainer.evaluate()
    assert sync_module.check(trainer.vllm_generation.llm, model).ok
    assert trainer.state.log_history[-1]["eval_nvfp4/mismatch_kl"] < 1e-3


def test_a_callback_can_serve_one_trainer_after_the_other(folder, tmp_path):
    callback = rollouts(check_every=0)
    make_trainer(load_qat(folder), folder, tmp_path, [callback], use_vllm=False)
    for _ in range(2):
        trainer = make_trainer(load_qat(folder), folder, tmp_path, [callback], max_steps=1)
        trainer.train()
        assert callback.generation.trl_generation is trainer.vllm_generation
        assert callback.generation.last_check.ok


def test_a_trainer_does_not_push_for_what_another_has_trained(folder, tmp_path):
    callbacks = [rollouts(check_every=0), rollouts(check_every=0)]
    first, second = (
        make_trainer(load_qat(folder), folder, tmp_path, [callback], max_steps=1, per_device_eval_batch_size=4)
        for callback in callbacks
    )
    prompts = Dataset.from_dict({"prompt": ["hello"] * 8})
    for num_pushes in (1, 2):
        second.evaluate(prompts)
        first.train()
        assert [callback.generation.num_pushes for callback in callbacks] == [num_pushes, 1]


def test_rloo_rolls_out_on_packed_weights_too(folder, tmp_path):
    from trl import RLOOConfig, RLOOTrainer

    callback = rollouts(check_every=1)
    trainer = make_trainer(
        load_qat(folder), folder, tmp_path, [callback], RLOOTrainer, RLOOConfig, max_steps=2, beta=0.0
    )
    trainer.train()
    assert callback.generation.num_pushes == 2
    assert callback.generation.last_check.ok
    assert len(logged(trainer, "nvfp4/sync_seconds")) == 2


@pytest.mark.parametrize("quantize", [True, False])
def test_the_reference_model_is_quantized_on_request(folder, tmp_path, quantize):
    trainer = make_trainer(
        load_qat(folder), folder, tmp_path, [rollouts(quantize_ref_model=quantize)], beta=0.1, max_steps=1
    )
    trainer.train()
    assert len(qat_modules(trainer.ref_model)) == (14 if quantize else 0)
    first = logged(trainer, "kl")[0]
    # The policy has not moved: against its own quantized self the penalty is nil.
    assert first == pytest.approx(0, abs=1e-6) if quantize else first > 1e-4


def test_an_unmarked_model_gets_trls_own_engine_and_push(folder, tmp_path):
    from trl.generation.vllm_generation import VLLMGeneration

    make_trainer(load_qat(folder), folder, tmp_path, [rollouts()], max_steps=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = make_trainer(model, folder, tmp_path, [], max_steps=1)
    assert trainer.vllm_generation.sync_weights.__func__ is VLLMGeneration.sync_weights
    assert trainer.vllm_generation.llm.llm_engine.model_config.quantization is None


def test_trls_own_push_does_not_run_beside_ours(folder, tmp_path, monkeypatch):
    from trl.generation.vllm_generation import VLLMGeneration

    def no_push(*args):
        raise AssertionError("TRL pushed")

    monkeypatch.setattr(VLLMGeneration, "sync_weights", no_push)
    monkeypatch.setattr(VLLMGeneration, "_iter_named_params", no_push)
    callback = rollouts()
    make_trainer(load_qat(folder), folder, tmp_path, [callback], max_steps=1).train()
    assert callback.generation.num_pushes == 1


@pytest.mark.gpu
def test_sleep_mode_wakes_to_the_trained_weights(folder, tmp_path):
    callback = rollouts(check_every=1)
    trainer = make_trainer(
        load_qat(folder), folder, tmp_path, [callback], vllm_enable_sleep_mode=True, learning_rate=1e-2
    )
    trainer.train()
    assert callback.generation.num_pushes == 3
    assert callback.generation.last_check.ok
    assert max(logged(trainer, "nvfp4/mismatch_kl")) < 1e-2


# Faults


def test_the_engine_generates_nothing_before_the_first_push(folder, tmp_path):
    trainer = make_trainer(load_qat(folder), folder, tmp_path, [rollouts()])
    with pytest.raises(RuntimeError, match="no weights were pushed yet"):
        greedy(trainer.vllm_generation.llm)


def test_a_failing_push_stops_training_and_generation(folder, tmp_path, monkeypatch):
    model = load_qat(folder)
    trainer = make_trainer(model, folder, tmp_path, [rollouts()])
    original = sync_module.RolloutStream.tensors

    def failing(self, *args, **kwargs):
        for num_sent, item in enumerate(original(self, *args, **kwargs)):
            if trainer.state.global_step == 1 and num_sent == 10:
                raise OSError("a cable was pulled")
            yield item

    monkeypatch.setattr(sync_module.RolloutStream, "tensors", failing)
    with pytest.raises(RuntimeError, match="half-way.*a cable was pulled"):
        trainer.train()
    with pytest.raises(RuntimeError, match="must not generate.*a cable was pulled"):
        greedy(trainer.vllm_generation.llm)


def test_weights_that_arrive_changed_stop_training(folder, tmp_path, monkeypatch):
    from hf_nvfp4_qat.checkpoint import sources

    pack = sources.to_checkpoint

    def wrong(layer, packed, input_scale):
        tensors = pack(layer, packed, input_scale)
        if layer.endswith("1.self_attn.v_proj"):
            tensors[f"{layer}.weight_packed"] = tensors[f"{layer}.weight_packed"].flip(0)
        return tensors

    trainer = make_trainer(load_qat(folder), folder, tmp_path, [rollouts()])
    monkeypatch.setattr(sources, "to_checkpoint", wrong)
    with pytest.raises(RuntimeError, match=r"does not compute with the weights in training: 1 .*v_proj\.weight"):
        trainer.train()
    with pytest.raises(RuntimeError, match="must not generate"):
        greedy(trainer.vllm_generation.llm)


def test_weights_that_diverge_stop_training_before_anything_is_sent(folder, tmp_path):
    model = load_qat(folder)
    trainer = make_trainer(model, folder, tmp_path, [rollouts()])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 3] = float("inf")
    with pytest.raises(ValueError, match=r"down_proj\.weight.*diverged"):
        trainer.train()


def test_a_model_that_vllm_has_no_implementation_of_is_refused(folder, tmp_path):
    config = Olmo2Config(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=257, eos_token_id=256,
    )  # fmt: skip
    Olmo2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "olmo2")
    byte_tokenizer().save_pretrained(tmp_path / "olmo2")
    with pytest.raises(ValueError, match="no implementation of its own of Olmo2ForCausalLM.*server mode"):
        make_trainer(load_qat(tmp_path / "olmo2"), folder, tmp_path, [rollouts()])


@pytest.mark.parametrize(("backend", "message"), [({"fsdp_version": 1}, "FSDP2"), ({"zero_stage": 2}, "ZeRO yet")])
def test_sharding_that_leaves_scales_behind_is_refused(folder, tmp_path, monkeypatch, backend, message):
    from trl.distributed import DistributedBackend

    detect = DistributedBackend.__init__

    def detected(self, accelerator):
        detect(self, accelerator)
        vars(self).update(backend)

    monkeypatch.setattr(DistributedBackend, "__init__", detected)
    with pytest.raises(ValueError, match=message):
        make_trainer(load_qat(folder), folder, tmp_path, [rollouts()])


def test_a_callback_added_after_the_trainer_is_an_error_however_generation_comes(folder, tmp_path, monkeypatch):
    from trl.generation import vllm_generation

    engine, generated = vllm_generation.LLM, []
    monkeypatch.setattr(vllm_generation, "LLM", lambda **kwargs: engine(**kwargs, **SMALL_ENGINE, dtype="bfloat16"))
    # TRL's own engine, of unquantized weights.
    trainer = make_trainer(load_qat(folder), folder, tmp_path, [], max_steps=1, per_device_eval_batch_size=4)
    trainer.eval_dataset = Dataset.from_dict({"prompt": ["hello"] * 4})
    monkeypatch.setattr(trainer.vllm_generation.llm, "generate", lambda *args, **kwargs: generated.append(1))
    monkeypatch.setattr(trainer.vllm_generation, "sync_weights", lambda: None)
    trainer.add_callback(rollouts())
    for start in (trainer.evaluate, trainer.train, lambda: trainer.predict(trainer.eval_dataset)):
        with pytest.raises(ValueError, match=r"callbacks=\[NVFP4RolloutCallback\(\)\].*not `add_callback`"):
            start()
    assert not generated


class OwnWay(Trainer):
    """Generates with an engine of its own kind, before Trainer calls any callback of an evaluation."""

    generated = 0

    def prediction_step(self, *args, **kwargs):
        self.generated += 1
        return (torch.zeros((), device=self.args.device), None, None)

    def training_step(self, *args, **kwargs):
        raise AssertionError("trained")


def test_a_trainer_that_generates_in_another_way_is_an_error_however_generation_comes(folder, tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=not ON_GPU, disable_tqdm=True)
    arguments.use_vllm = True
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}] * 8
    trainer = OwnWay(load_qat(folder), arguments, train_dataset=rows, eval_dataset=rows, callbacks=[rollouts()])
    for start in (trainer.evaluate, trainer.train, lambda: trainer.predict(rows)):
        with pytest.raises(ValueError, match="VLLMGeneration.*OwnWay generates in another way"):
            start()
    assert not trainer.generated
    trainer.remove_callback(NVFP4RolloutCallback)
    trainer.evaluate()
    assert trainer.generated


def test_evaluation_alone_rolls_out_on_the_packed_weights(folder, tmp_path):
    callback = rollouts()
    trainer = make_trainer(load_qat(folder), folder, tmp_path, [callback], per_device_eval_batch_size=4)
    trainer.eval_dataset = Dataset.from_dict({"prompt": ["hello"] * 4})
    trainer.evaluate()
    assert callback.generation.num_pushes == 1 and callback.generation.last_check.ok


def test_a_model_that_does_not_train_in_nvfp4_is_an_error(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="no QAT layers.*NVFP4QATConfig"):
        make_trainer(model, folder, tmp_path, [rollouts()])


def test_without_vllm_it_warns_once_and_trains(folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_nvfp4_qat"):
        trainer = make_trainer(
            load_qat(folder), folder, tmp_path, [rollouts()], use_vllm=False, max_steps=2, max_completion_length=8
        )
        trainer.train()
    assert [record.message for record in caplog.records if "NVFP4RolloutCallback" in record.message] == [
        "NVFP4RolloutCallback does nothing: GRPOTrainer does not generate with vLLM (`use_vllm=True` is not set)."
    ]


def test_a_negative_interval_is_refused():
    with pytest.raises(ValueError, match="check_every"):
        NVFP4RolloutCallback(check_every=-1)


def test_the_trained_model_saves_packed(folder, tmp_path):
    model = load_qat(folder)
    make_trainer(model, folder, tmp_path, [rollouts()], max_steps=1).train()
    save_nvfp4(model, tmp_path / "packed")
    assert verify_nvfp4(tmp_path / "packed", model).ok
    assert all(isinstance(layer, QATLinear) for layer in qat_modules(model).values())
