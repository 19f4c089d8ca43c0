"""Reinforcement learning with 4-bit rollouts: BF16, NVFP4 rollouts without QAT, QAT, QAT of feed-forward layers alone.

    python examples/experiments/grpo.py                           every kind and seed of grpo.toml, table, plot
    python examples/experiments/grpo.py --kind QAT --seed 0

Each run is a process of its own: GRPO (TRL, vLLM in the training process) from the same warmed-up model, with fp32
masters and bf16 autocast. Logged per step: reward, mismatch KL between sampler and trainer, entropy, completion
length. Before and after, the engine, which has the weights that are served, greedily answers problems that no run is
trained on.
"""

import csv
import json
import os
import queue
import shutil
import socket
import statistics
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

sys.path.insert(0, str(Path(__file__).parents[1]))

CONFIG = Path(__file__).with_name("grpo.toml")
LOGGED = {
    "reward": "rewards/correct/mean",
    "mismatch_kl": "nvfp4/mismatch_kl",
    "masked": "nvfp4/masked_fraction",
    "entropy": "entropy",
    "length": "completions/mean_length",
    "seconds": "step_time",
}
COLUMNS = ["kind", "seed", "step", *LOGGED]
SCORES = ["kind", "seed", "score_before", "score", "kl_before", "kl_after"]
"""The scores: before and after reinforcement learning. The divergences: from the warmed-up model, before and after
distillation, at tokens of the answer."""
# reasoning-gym makes the n-th problem of a set from the number seed + n: seeds that lie close give the same problems.
APART = 10**6
WARM_UP, UNSEEN, SCORED = 100 * APART, 200 * APART, 300 * APART


def problems(task: dict, size: int, seed: int, *, without: set[str] | None = None) -> list[dict]:
    """Chat prompts with their answers; to measure with, none twice and none whose prompt is one of `without`."""
    import reasoning_gym
    from grpo_qat_vllm import INSTRUCTION

    options = {name: value for name, value in task.items() if name != "name"}
    found: list[dict] = []
    known = set(without or ())
    for entry in reasoning_gym.create_dataset(
        task["name"], size=size if without is None else APART, seed=seed, **options
    ):
        prompt = f"{entry['question']}\n{INSTRUCTION}"
        if without is None or prompt not in known:
            known.add(prompt)
            found.append({"prompt": [{"role": "user", "content": prompt}], "answer": entry["answer"]})
        if len(found) == size:
            return found
    raise ValueError(f"The task {task} has {len(found)} problems that are new, not {size}.")


def problems_of_steps(settings: dict, stage: str, seed: int) -> list[dict]:
    """Those of a stage, "warm_up", "distillation" or "training", in the order of its steps."""
    options = settings[stage]
    size = options.get("batch_size") or options["per_device_train_batch_size"] // options.get("num_generations", 1)
    num_steps = options["max_steps"] * options.get("gradient_accumulation_steps", 1)
    return problems(settings["task"], num_steps * size, WARM_UP if stage != "training" else APART * seed)


def trained_on(settings: dict) -> set[str]:
    """Prompts that any run of any seed is trained on."""
    stages = [("warm_up", 0), ("distillation", 0), *(("training", seed) for seed in settings["seeds"])]
    return {
        example["prompt"][0]["content"]
        for stage, seed in stages
        for example in problems_of_steps(settings, stage, seed)
    }


def new_problems(settings: dict, size: int, seed: int) -> list[dict]:
    """Problems to measure with, none of which any run is trained on."""
    return problems(settings["task"], size, seed, without=trained_on(settings))


def spell(tokenizer, example: dict) -> tuple[list[int], list[int]]:
    """Tokens of a prompt, and of its answer."""
    prompt = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, return_dict=False)
    return prompt, tokenizer(str(example["answer"])).input_ids + [tokenizer.eos_token_id]


def warm_up(settings: dict, base: Path, folder: Path) -> None:
    """Supervised steps until the model answers a share of the problems; every run starts from the result."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    if folder.exists():
        return
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    options = settings["warm_up"]

    def encode(examples: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        spelled = [spell(tokenizer, example) for example in examples]
        rows = [torch.tensor(prompt + answer) for prompt, answer in spelled]
        labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in spelled]
        pad = torch.nn.utils.rnn.pad_sequence  # on the right, where it does not count
        return pad(rows, True, tokenizer.eos_token_id).to(device), pad(labels, True, -100).to(device)

    size = options["batch_size"]
    examples = problems_of_steps(settings, "warm_up", 0)
    unseen = new_problems(settings, options["unseen"], UNSEEN)
    unseen_batches = [encode(unseen[first : first + 128]) for first in range(0, len(unseen), 128)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=options["learning_rate"], weight_decay=0.0)
    for step in range(options["max_steps"]):
        if step % options["check_every"] == 0:
            num_right = 0
            for ids, labels in unseen_batches:
                with torch.no_grad(), torch.autocast(device, torch.bfloat16):
                    predicted = model(input_ids=ids).logits[:, :-1].argmax(-1)
                # All tokens of the answer the likeliest: what greedy decoding would say.
                num_right += int(((predicted == labels[:, 1:]) | (labels[:, 1:] == -100)).all(1).sum())
            share = num_right / len(unseen)
            print(f"warm-up: {share:.3f} of the problems answered after {step} steps", flush=True)
            if share >= options["until"]:
                break
        ids, labels = encode(examples[step * size : (step + 1) * size])
        with torch.autocast(device, torch.bfloat16):
            model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def distil(model, tokenizer, settings: dict, seed: int, output: Path) -> dict[str, float]:
    """Train a model's NVFP4 form toward the model it was made of, on problems as those of the warm-up.

    Returns:
        Its divergence before and after, on problems that no run is trained on.
    """
    from transformers import DataCollatorForSeq2Seq, TrainingArguments

    from hf_nvfp4_qat import QADTrainer

    on_gpu = torch.cuda.is_available()
    options = {"output_dir": str(output / "training"), "seed": seed, "bf16": on_gpu, "use_cpu": not on_gpu,
               "report_to": [], "save_strategy": "no", "disable_tqdm": True, **settings["distillation"]}  # fmt: skip
    tokenizer.pad_token = tokenizer.eos_token  # not counted: labels of padding are -100

    def rows(examples: list[dict]) -> list[dict]:
        spelled = [spell(tokenizer, example) for example in examples]
        return [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer} for prompt, answer in spelled]

    trainer = QADTrainer(
        model,
        TrainingArguments(**options),
        train_dataset=rows(problems_of_steps(settings, "distillation", seed)),
        eval_dataset=rows(new_problems(settings, settings["warm_up"]["unseen"], UNSEEN)),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    return {"kl_before": before, "kl_after": trainer.evaluate()["eval_kl"]}


def run(settings: dict, kind: str, seed: int, start: Path, output: Path) -> None:
    """One training; writes `<kind> <seed>.csv` and its score."""
    from datasets import Dataset
    from grpo_qat_vllm import correct
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import GRPOConfig, GRPOTrainer
    from trl.generation import vllm_generation

    from hf_nvfp4_qat import NVFP4QATConfig, NVFP4RolloutCallback
    from hf_nvfp4_qat.modules.linear import QATLinear
    from hf_nvfp4_qat.trl_callbacks.metrics import record_mismatch

    set_seed(seed)
    vllm_generation.LLM = partial(vllm_generation.LLM, **settings["engine"])  # TRL has no option for these
    options = settings["kinds"][kind]
    recipe = options.get("recipe")
    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        start, dtype=torch.float32, quantization_config=None if recipe is None else NVFP4QATConfig(**recipe)
    )
    if not options.get("fake_quantize", True):
        for layer in model.modules():
            if isinstance(layer, QATLinear):
                # What one gets from quantizing the rollouts alone: the trainer computes with other weights.
                layer.nvfp4_weight.is_quantized = False
    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    divergence = distil(model, tokenizer, settings, seed, output) if options.get("distil") else {}
    trainer = GRPOTrainer(
        model,
        reward_funcs=correct,
        args=GRPOConfig(
            **{
                "output_dir": str(output / "training"), "use_vllm": True, "bf16": on_gpu, "use_cpu": not on_gpu,
                "seed": seed, "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
                **settings["training"],
            }
        ),
        train_dataset=Dataset.from_list(problems_of_steps(settings, "training", seed)),
        processing_class=tokenizer,
        callbacks=[] if recipe is None else [NVFP4RolloutCallback()],
    )  # fmt: skip
    if recipe is None:
        record_mismatch(trainer)
    scored = new_problems(settings, settings["held_out"], SCORED)
    score_before = accuracy(trainer, scored)
    trainer.train()
    found = {"kind": kind, "seed": seed, "score_before": score_before, "score": accuracy(trainer, scored), **divergence}
    with (output / f"{file_name(kind, seed)}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for entry in trainer.state.log_history:
            if LOGGED["reward"] in entry:
                values = {name: f"{entry[key]:.5g}" if key in entry else "" for name, key in LOGGED.items()}
                writer.writerow({"kind": kind, "seed": seed, "step": entry["step"], **values})
    (output / f"{file_name(kind, seed)}.json").write_text(json.dumps(found) + "\n")


def accuracy(trainer, held_out: list[dict]) -> float:
    """Share of problems that the engine answers correctly, greedily, with the weights of this moment."""
    from grpo_qat_vllm import last_number
    from vllm import SamplingParams

    trainer.vllm_generation.sync_weights()
    tokenizer = trainer.processing_class
    prompts = [
        {
            "prompt_token_ids": tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, return_dict=False
            )
        }
        for row in held_out
    ]
    parameters = SamplingParams(temperature=0, max_tokens=trainer.args.max_completion_length)
    outputs = trainer.vllm_generation.llm.generate(prompts, parameters, use_tqdm=False)
    given = [last_number(tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)) for output in outputs]
    right = [number == float(row["answer"]) for number, row in zip(given, held_out, strict=True)]
    return sum(right) / len(right)


def file_name(kind: str, seed: int) -> str:
    """Of a run's results, without ending."""
    return f"{kind} {seed}".replace(" ", "_").replace(",", "")


def read(output: Path, settings: dict) -> dict[str, list[tuple[dict, list[dict]]]]:
    """(score and divergences, rows) of each finished run, by kind."""
    found: dict[str, list[tuple[dict, list[dict]]]] = {}
    for kind in settings["kinds"]:
        for seed in settings["seeds"]:
            scores = output / f"{file_name(kind, seed)}.json"
            if scores.exists():
                rows = list(csv.DictReader(scores.with_suffix(".csv").open()))
                found.setdefault(kind, []).append((json.loads(scores.read_text()), rows))
    return found


def table(found: dict[str, list[tuple[dict, list[dict]]]]) -> None:
    """Means over all steps and over the last 20, seed by seed."""
    header = ("", "score before", "after", "reward, last 20 steps", "mismatch KL, mean", "largest", "entropy", "length")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for kind, runs in found.items():

        def each(column: str, how, runs=runs) -> str:
            return ", ".join(how([float(row[column]) for row in rows if row[column]]) for _, rows in runs)

        last = [lambda values, digits=digits: f"{statistics.mean(values[-20:]):.{digits}f}" for digits in (3, 3, 1)]
        cells = [
            *(", ".join(f"{scores[name]:.3f}" for scores, _ in runs) for name in ("score_before", "score")),
            each("reward", last[0]),
            each("mismatch_kl", lambda values: f"{statistics.mean(values):.5f}"),
            each("mismatch_kl", lambda values: f"{max(values):.5f}"),
            each("entropy", last[1]),
            each("length", last[2]),
        ]
        print(f"| {kind} | {' | '.join(cells)} |")


def plot(found: dict[str, list[tuple[dict, list[dict]]]], path: Path) -> None:
    """Reward, mismatch KL, entropy and completion length by step, over 10 steps: mean, least and most of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {"reward": "share of right answers", "mismatch_kl": "mismatch KL, nats a token", "entropy": "entropy",
              "length": "completion length, tokens"}  # fmt: skip
    figure, grid = pyplot.subplots(2, 2, figsize=(11, 7.5))
    for (column, title), axes in zip(titles.items(), grid.flat, strict=True):
        for kind, runs in found.items():
            curves = []
            for _, rows in runs:
                values = [float(row[column]) for row in rows if row[column]]
                curves.append([statistics.mean(values[max(0, end - 10) : end]) for end in range(1, len(values) + 1)])
            by_step = list(zip(*curves, strict=False))
            [line] = axes.plot([statistics.mean(values) for values in by_step], label=kind)
            least, most = [min(values) for values in by_step], [max(values) for values in by_step]
            axes.fill_between(range(len(by_step)), least, most, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(title=title, xlabel="step", yscale="log" if column == "mismatch_kl" else "linear")
        axes.grid(alpha=0.3)
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=90)


def main(
    config: Annotated[Path, typer.Option()] = CONFIG,
    output: Path = Path("grpo_output"),
    cache: Path = Path(".cache"),
    kind: Annotated[list[str] | None, typer.Option(help="All by default.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Those in the configuration by default.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time, on all GPUs together.")] = 1,
    max_steps: Annotated[int | None, typer.Option(help="That in the configuration by default.")] = None,
    here: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Make every run that has no result yet, each in a process of its own, then the table and the plot."""
    from demo_data import prepare_model

    settings = tomllib.loads(config.read_text(encoding="utf-8"))
    settings["training"]["max_steps"] = max_steps or settings["training"]["max_steps"]
    output.mkdir(parents=True, exist_ok=True)
    start = output / "warm"
    if here:
        assert kind and seed
        run(settings, kind[0], seed[0], start, output)
        return
    warm_up(settings, prepare_model(cache / "SmolLM2-135M-Instruct"), start)
    torch.cuda.empty_cache()  # the runs need it
    all_gpus = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", all_gpus).split(",")
    free_gpus: queue.SimpleQueue[str] = queue.SimpleQueue()
    for worker in range(workers):
        free_gpus.put(gpus[worker % len(gpus)])

    def make(name: str, number: int) -> int:
        if (output / f"{file_name(name, number)}.json").exists():
            return 0
        began = time.monotonic()
        command = [sys.executable, __file__, "--here", "--config", config, "--output", output]
        command += ["--cache", cache, "--kind", name, "--seed", number]
        command += ["--max-steps", settings["training"]["max_steps"]]
        with socket.socket() as free:  # the default port would be the same for all
            free.bind(("", 0))
            port = free.getsockname()[1]
        gpu = free_gpus.get()
        variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": gpu}
        log = output / f"{file_name(name, number)}.log"
        with log.open("w") as file:
            done = subprocess.run(list(map(str, command)), env={**os.environ, **variables}, stdout=file, stderr=file)
        free_gpus.put(gpu)
        print(f"{name}, seed {number}: exit {done.returncode}, {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode:
            print("\n".join(log.read_text(errors="replace").splitlines()[-15:]), flush=True)
        return done.returncode

    with ThreadPoolExecutor(workers) as pool:
        pairs = [(name, number) for number in seed or settings["seeds"] for name in kind or settings["kinds"]]
        num_failed = sum(map(bool, pool.map(make, *zip(*pairs, strict=True))))
    shutil.rmtree(output / "training", ignore_errors=True)
    if found := read(output, settings):
        table(found)
        with (output / "grpo.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(row for runs in found.values() for _, rows in runs for row in rows)
        with (output / "scores.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, SCORES)
            writer.writeheader()
            writer.writerows(scores for runs in found.values() for scores, _ in runs)
        plot(found, output / "grpo.png")
    if num_failed:
        raise SystemExit(f"{num_failed} of {len(pairs)} runs failed; the same command tries them again.")


if __name__ == "__main__":
    typer.run(main)
