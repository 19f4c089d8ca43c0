"""TRL's real trainers with a real vLLM engine in this process, of a model of the size that kernels want."""

import gc

import torch
from conftest import SMALL_ENGINE, byte_tokenizer, tiny_qwen3
from datasets import Dataset

from hf_nvfp4_qat import NVFP4RolloutCallback

ON_GPU = torch.cuda.is_available()
# On a GPU of 80 GB, 2 GB an engine; a CPU build looks at the machine's memory.
MEMORY = 0.025 if ON_GPU else 0.2

# Engines live until the test ends: one that is collected takes the process groups of the others with it.
_alive: list = []


def keep_alive(owner) -> None:
    """Until `release_engines`, a trainer or an engine."""
    _alive.append(owner)


def release_engines() -> None:
    _alive.clear()
    gc.collect()


def small_qwen3(path) -> None:
    """A bfloat16 checkpoint with a byte tokenizer."""
    tokenizer = byte_tokenizer()
    model = tiny_qwen3(
        vocab_size=512, hidden_size=128, intermediate_size=256, head_dim=32,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            # Three times the initialization: outputs that depend on the weights, as a trained model's do.
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)


def variety(completions, **kwargs):
    """A reward that random text can raise: different characters."""
    return [float(len(set(completion))) for completion in completions]


def make_trainer(model, folder, tmp_path, callbacks, trainer_class=None, config_class=None, **options):
    from trl import GRPOConfig, GRPOTrainer

    arguments = dict(
        output_dir=str(tmp_path), use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=MEMORY,
        vllm_max_model_length=128, use_cpu=not ON_GPU, bf16=False, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=64, max_steps=3, learning_rate=1e-4, logging_steps=1, report_to=[], save_strategy="no",
        disable_tqdm=True, seed=0,
    )  # fmt: skip
    prompts = ["one two three", "the", "a longer prompt than the others", "x = 1"] * 8
    trainer = (trainer_class or GRPOTrainer)(
        model,
        reward_funcs=variety,
        args=(config_class or GRPOConfig)(**{**arguments, **options}),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=byte_tokenizer(),
        callbacks=callbacks,
    )
    keep_alive(trainer)
    return trainer


def rollouts(**kwargs):
    return NVFP4RolloutCallback(engine_kwargs=SMALL_ENGINE, **kwargs)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def greedy(engine, num_tokens=12):
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": list(range(40 + 9 * i, 52 + 7 * i))} for i in range(4)]
    parameters = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True, logprobs=0)
    return [
        (list(out.outputs[0].token_ids), [next(iter(p.values())).logprob for p in out.outputs[0].logprobs])
        for out in engine.generate(prompts, parameters, use_tqdm=False)
    ]
