"""How much of what 4 bits cost a model comes back, by recipe: PTQ, QAT, QAD, block scales chosen by error, ffn_only.

    python examples/experiments/recovery.py                       everything in recovery.toml: CSV, table, PNG
    python examples/experiments/recovery.py --workers 4           four runs at a time, on one GPU
    python examples/experiments/recovery.py --only "QAD" --only "PTQ" --seed 0

SmolLM2-135M-Instruct, trained on `reasoning-gym`'s CodeIO text (demo_data.py), with fp32 masters and, on a GPU, bf16
autocast. Each model is saved, packed if it is quantized, decoded from the file and measured as served: the loss of
unseen documents of the same set (held-out) and of "In the Year 2889" (out of domain), computed in float32.
"""

import csv
import gc
import multiprocessing
import shutil
import statistics
import sys
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))
from demo_data import load_text, prepare_model

from hf_nvfp4_qat import NVFP4QATConfig, load_nvfp4, save_nvfp4, verify_nvfp4
from hf_nvfp4_qat.checkpoint.convert import dequantize_checkpoint, quantize_checkpoint
from hf_nvfp4_qat.distillation.trainer import QADTrainer

CONFIG = Path(__file__).with_name("recovery.toml")
PARTS = ("held_out", "out_of_domain")
COLUMNS = ("name", "seed", "reference", *PARTS, "minutes", "seconds_per_step", "peak_gib")


@dataclass(frozen=True)
class Run:
    """One entry of the configuration; `recipe` None trains without quantization, `teacher` None on the text."""

    name: str
    start: str
    reference: str = ""
    teacher: str | None = None
    learning_rate: float | None = None
    recipe: dict | None = None
    distillation: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)

    @property
    def has_seed(self) -> bool:
        """Whether a seed has a part in it: not in quantizing, or measuring, the published model."""
        return self.start != "base" or self.learning_rate is not None

    @property
    def quantizes_inputs(self) -> bool:
        """W4A4."""
        return self.recipe is not None and self.recipe.get("activations") == "nvfp4"

    @property
    def gap_of(self) -> str:
        """The model in high precision that a quantized one is compared with."""
        return "" if self.recipe is None else self.reference or self.start


class Experiment:
    """Base model, text, and the folders of what was made."""

    def __init__(self, config: dict, base: Path, output: Path) -> None:
        self.steps, self.batch_size = config["steps"], config["sequences_per_step"]
        self.base, self.output = base, output
        sizes = {"num_train": config.get("num_train", 10**6), "num_eval": config.get("num_eval", 200)}
        text = load_text(AutoTokenizer.from_pretrained(base), **sizes)
        self.train_data = [{"input_ids": row, "labels": row} for row in text["train"]]
        self.eval_data = {part: text[part] for part in PARTS}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def folder(self, name: str, seed: int) -> Path:
        """Where a model in high precision is, or will be."""
        return self.base if name == "base" else self.output / f"{name} {seed}".replace(" ", "_").replace(",", "")

    def evaluate(self, folder: Path, load: Callable = AutoModelForCausalLM.from_pretrained) -> dict[str, float]:
        """Nats a token by part of the text, of the checkpoint that `load` reads."""
        model = load(folder, dtype=torch.float32).to(self.device).eval()
        losses = {}
        for part, tokens in self.eval_data.items():
            batches = [batch.to(self.device) for batch in tokens.split(8)]
            with torch.no_grad():
                sums = [model(input_ids=batch, labels=batch).loss.double() * len(batch) for batch in batches]
            losses[part] = float(sum(sums)) / len(tokens)
        return losses

    def evaluate_packed(self, folder: Path, run: Run) -> dict[str, float]:
        """The same of a run's packed checkpoint: decoded into a file first; of W4A4 with inputs quantized as well."""
        if run.quantizes_inputs:
            return self.evaluate(folder, load_nvfp4)
        decoded = folder.with_name(f"{folder.name}_decoded")
        shutil.rmtree(decoded, ignore_errors=True)
        dequantize_checkpoint(folder, decoded)
        losses = self.evaluate(decoded)
        shutil.rmtree(decoded)
        return losses

    def quantize(self, run: Run, seed: int) -> dict[str, float]:
        """Post-training quantization, as served."""
        packed = self.folder(run.name, seed)
        shutil.rmtree(packed, ignore_errors=True)
        assert run.recipe is not None
        quantize_checkpoint(self.folder(run.start, seed), packed, NVFP4QATConfig(**run.recipe))
        return self.evaluate_packed(packed, run)

    def train(self, run: Run, seed: int) -> dict[str, float]:
        """Train, save and measure as served."""
        gc.collect()  # a Trainer and its models go only so: the peak is to be this run's
        config = None if run.recipe is None else NVFP4QATConfig(**run.recipe)
        options = {} if config is None else {"quantization_config": config}
        model = AutoModelForCausalLM.from_pretrained(self.folder(run.start, seed), dtype=torch.float32, **options)
        arguments = TrainingArguments(
            **{
                "output_dir": f"{self.folder(run.name, seed)}_training", "max_steps": self.steps,
                "seed": seed, "data_seed": seed,
                "per_device_train_batch_size": self.batch_size, "learning_rate": run.learning_rate,
                "lr_scheduler_type": "cosine", "warmup_steps": self.steps // 20, "adam_beta2": 0.95,
                "optim": "adamw_torch_fused", "bf16": self.device == "cuda", "use_cpu": self.device == "cpu",
                "logging_steps": 50, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
                "dataloader_pin_memory": self.device == "cuda", **run.training,
            }
        )  # fmt: skip
        if run.teacher is None:
            trainer: Trainer = Trainer(model, arguments, train_dataset=self.train_data)
        else:
            teacher = str(self.folder(run.teacher, seed))
            trainer = QADTrainer(model, arguments, teacher=teacher, train_dataset=self.train_data, **run.distillation)
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else float("nan")
        found = self._save_and_evaluate(model, run, seed)
        return {**found, "minutes": seconds / 60, "seconds_per_step": seconds / self.steps, "peak_gib": peak}

    def _save_and_evaluate(self, model: PreTrainedModel, run: Run, seed: int) -> dict[str, float]:
        folder = self.folder(run.name, seed)
        shutil.rmtree(folder, ignore_errors=True)
        if run.recipe is None:
            model.to(torch.bfloat16).save_pretrained(folder)
            return self.evaluate(folder)
        save_nvfp4(model, folder)
        assert verify_nvfp4(folder, model).ok
        return self.evaluate_packed(folder, run)


def summary(rows: list[dict]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Name and part to the losses of a run, and the shares of the gap that it recovers in %, seed by seed."""
    by_name: dict[str, dict[int, dict]] = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[int(row["seed"])] = row
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for name, by_seed in by_name.items():
        for part in PARTS:
            losses, shares = [], []
            for seed, row in by_seed.items():
                high = by_name.get(row["reference"], {}).get(seed)
                ptq = by_name.get("PTQ" if row["reference"] == "base" else f"{row['reference']}, PTQ", {}).get(seed)
                losses.append(float(row[part]))
                if high and ptq and name not in (high["name"], ptq["name"]):
                    gap = float(ptq[part]) - float(high[part])
                    shares.append(100 * (float(ptq[part]) - float(row[part])) / gap)
            found.setdefault(name, {})[part] = losses, shares
    return found


def _spread(values: list[float], digits: int) -> str:
    """Mean, least and most."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if max(values) == min(values) else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def plot(rows: list[dict], path: Path) -> None:
    """Share of the gap recovered, held-out and out of domain, with the range over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = {
        name: {part: shares for part, (_, shares) in parts.items()}
        for name, parts in summary(rows).items()
        if parts[PARTS[0]][1]
    }
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(shares) + 1.5))
    for offset, part in zip((-0.2, 0.2), PARTS, strict=True):
        values = [parts[part] for parts in shares.values()]
        means = [statistics.mean(each) for each in values]
        errors = [[mean - min(each) for mean, each in zip(means, values, strict=True)],
                  [max(each) - mean for mean, each in zip(means, values, strict=True)]]  # fmt: skip
        places = [place + offset for place in range(len(shares))]
        axes.barh(places, means, height=0.38, xerr=errors, label=part.replace("_", " "), capsize=2)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set(xlabel="share of the PTQ gap recovered as served, %")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


_experiment: Experiment | None = None
"""Of this process, where runs are made."""


def _start_worker(config: Path, base: Path, output: Path) -> None:
    global _experiment
    _experiment = Experiment(tomllib.loads(config.read_text(encoding="utf-8")), base, output)


def _make(run: Run, seed: int) -> dict[str, float]:
    assert _experiment is not None
    if run.name == "base":
        return _experiment.evaluate(_experiment.base)
    return _experiment.quantize(run, seed) if run.learning_rate is None else _experiment.train(run, seed)


def main(
    config: Annotated[Path, typer.Option()] = CONFIG,
    output: Path = Path("recovery_output"),
    cache: Path = Path(".cache"),
    only: Annotated[list[str] | None, typer.Option(help="Names of runs; all by default.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Those in the configuration by default.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time; their step times mean little if more.")] = 1,
) -> None:
    """Make every run that the CSV does not have yet, then the table and the plot."""
    settings = tomllib.loads(config.read_text(encoding="utf-8"))
    output.mkdir(parents=True, exist_ok=True)
    table_file = output / "recovery.csv"
    rows: list[dict] = list(csv.DictReader(table_file.open())) if table_file.exists() else []
    runs = [Run("base", "base"), *(Run(**entry) for kind in ("run", "quantized") for entry in settings.get(kind, []))]
    if unknown := set(only or ()) - {run.name for run in runs}:
        raise typer.BadParameter(f"{config} has no run {', '.join(sorted(unknown))}; it has: {[r.name for r in runs]}.")
    done = {(row["name"], int(row["seed"])) for row in rows}
    wanted = [
        (run, number)
        for number in seed or settings["seeds"]
        for run in runs
        if (run.name, number) not in done and (not only or run.name in (*only, "base"))
    ]
    # A run that no seed has a part in is made once, for all of them.
    seeds_of: dict[tuple[str, int | None], list[int]] = {}
    for run, number in wanted:
        seeds_of.setdefault((run.name, number if run.has_seed else None), []).append(number)
    waiting = [(run, number) for run, number in wanted if run.has_seed or number == seeds_of[run.name, None][0]]
    base = prepare_model(cache / "SmolLM2-135M-Instruct")
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(workers, context, _start_worker, (config, base, output)) as pool:
        made: dict[Future, tuple[Run, int]] = {}
        while waiting or made:
            for run, number in list(waiting):
                needs = {(name, number) for name in (run.start, run.teacher) if name not in (None, "base")}
                if len(made) < workers and needs <= done:
                    made[pool.submit(_make, run, number)] = (run, number)
                    waiting.remove((run, number))
            if not made:
                raise SystemExit(f"These start from a run that is not there: {[run.name for run, _ in waiting]}.")
            for future in wait(made, return_when=FIRST_COMPLETED).done:
                run, number = made.pop(future)
                done.add((run.name, number))
                for each in seeds_of[run.name, number if run.has_seed else None]:
                    rows.append({"name": run.name, "seed": each, "reference": run.gap_of, **future.result()})
                print({key: round(value, 4) if isinstance(value, float) else value for key, value in rows[-1].items()},
                      flush=True)  # fmt: skip
                with table_file.open("w", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS, restval="")
                    writer.writeheader()
                    writer.writerows(rows)
    print("| run | held-out | recovered, % | out of domain | recovered, % |\n|---|---|---|---|---|")
    for name, parts in summary(rows).items():
        cells = [cell for losses, shares in parts.values() for cell in (_spread(losses, 4), _spread(shares, 1))]
        print(f"| {' | '.join([name, *cells])} |")
    plot(rows, output / "recovery.png")


if __name__ == "__main__":
    typer.run(main)
