"""The whole main job on a laptop: train a real model with NVFP4 weights, save it packed, serve it elsewhere, compare.

SmolLM2-135M-Instruct is distilled from its own bfloat16 copy: the student computes with NVFP4 weights, the teacher does
not, the loss is the KL divergence between their predictions. Then the packed checkpoint is loaded in fresh processes by
plain Transformers, beside the bfloat16 model and the one quantized without training (PTQ).

Usage: python examples/demo.py [--steps 60] [--output demo_output]
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import torch
import typer
from datasets import Dataset
from demo_data import SEQUENCE_LENGTH, load_text, prepare_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from hf_nvfp4_qat import NVFP4QATConfig, QADTrainer, verify_nvfp4

console = Console()


def train(base: Path, tokens: torch.Tensor, output: Path, *, steps: int, learning_rate: float):
    """Distil; returns the trained QAT model and the log of (step, loss)."""
    set_seed(0)
    teacher = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # fp32 master weights: at this learning rate most updates are smaller than a bfloat16 step.
    student = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=NVFP4QATConfig())
    # Embeddings and norms stay as they are: they are not quantized, so there is nothing to recover in them.
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name.endswith("proj.weight"))
    trainer = QADTrainer(
        model=student,
        teacher=teacher,
        train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens}).with_format("torch"),
        args=TrainingArguments(
            output_dir=str(output / "training"),
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            weight_decay=0.0,
            optim="adamw_torch_fused",
            logging_steps=1,
            save_steps=max(1, steps // 2),
            save_total_limit=1,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
        ),
    )
    trainer.train()
    history = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return student, history


def measure_as_served(name: str, checkpoint: Path, tokens_file: Path, output: Path) -> dict[str, torch.Tensor]:
    """Held-out and out-of-domain loss, and logits of the probe, from a fresh process without this package."""
    result_file = output / f"served_{name}.safetensors"
    script = Path(__file__).with_name("served_loss.py")
    console.print(f"loading [bold]{checkpoint}[/] in a fresh process with plain Transformers")
    subprocess.run([sys.executable, str(script), str(checkpoint), str(tokens_file), str(result_file)], check=True)
    return load_file(result_file)


def size_on_disk(checkpoint: Path) -> float:
    """Weights files, in MB."""
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) / 1e6


def plot(history: list[tuple[int, float]], results: dict[str, dict[str, torch.Tensor]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curve, bars) = pyplot.subplots(1, 2, figsize=(11, 4))
    curve.plot(*zip(*history, strict=True))
    curve.set(
        xlabel=f"step ({SEQUENCE_LENGTH} tokens each)",
        ylabel="KL to the BF16 teacher, nats",
        yscale="log",
        title="training",
    )
    curve.grid(alpha=0.3)
    base = results["BF16"]
    for offset, name in ((-0.2, "PTQ"), (0.2, "QAT")):
        gaps = [float(results[name][part] - base[part]) for part in ("held_out", "out_of_domain")]
        bars.bar([position + offset for position in range(2)], gaps, width=0.4, label=f"{name}, as served")
    bars.set_xticks(range(2), ["held-out", "out of domain"])
    bars.set(ylabel="loss above BF16, nats", title="what 4 bits cost")
    bars.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(
    steps: int = 60, learning_rate: float = 1e-4, output: Path = Path("demo_output"), cache: Path = Path(".cache")
):
    started = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    console.rule("model and text")
    base = prepare_model(cache / "SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = load_text(tokenizer, num_train=steps, num_eval=12)
    tokens_file = output / "tokens.safetensors"
    probe = text["held_out"][:1].clone()
    save_file({"held_out": text["held_out"], "out_of_domain": text["out_of_domain"], "probe": probe}, tokens_file)

    console.rule("post-training quantization, for comparison")
    ptq, qat = output / "ptq", output / "qat"
    subprocess.run(
        [sys.executable, "-m", "hf_nvfp4_qat.cli", "quantize", str(base), str(ptq), "--overwrite"], check=True
    )

    console.rule("training with NVFP4 weights")
    student, history = train(base, text["train"], output, steps=steps, learning_rate=learning_rate)
    student.save_pretrained(qat)
    tokenizer.save_pretrained(qat)
    with torch.no_grad():
        trained_logits = student.eval()(probe).logits
    verification = verify_nvfp4(qat, student)
    console.print(str(verification))

    console.rule("as served")
    checkpoints = {"BF16": base, "PTQ": ptq, "QAT": qat}
    results = {name: measure_as_served(name, path, tokens_file, output) for name, path in checkpoints.items()}
    is_equal = verification.ok and torch.equal(results["QAT"]["probe_logits"], trained_logits)

    table = Table(
        title=f"SmolLM2-135M-Instruct, {steps} steps of {SEQUENCE_LENGTH} tokens; loss in nats a token, as served"
    )
    for column in ("", "held-out", "out of domain", "gap recovered (held-out / o.o.d.)", "MB on disk"):
        table.add_column(column, justify="left" if not column else "right")
    recovered = {}
    for name, path in checkpoints.items():
        shares = {
            part: float((results["PTQ"][part] - results[name][part]) / (results["PTQ"][part] - results["BF16"][part]))
            for part in ("held_out", "out_of_domain")
        }
        recovered[name] = shares
        shown = f"{shares['held_out']:.0%} / {shares['out_of_domain']:.0%}" if name == "QAT" else ""
        losses = [f"{float(results[name][part]):.4f}" for part in ("held_out", "out_of_domain")]
        table.add_row(name, *losses, shown, f"{size_on_disk(path):.1f}")
    console.print(table)
    console.print(f"served weights equal trained weights: {'yes' if is_equal else 'NO'}", style="bold")
    plot(history, results, output / "loss.png")
    summary = {
        "steps": steps,
        "loss": {name: {part: float(result[part]) for part in shares} for name, result in results.items()},
        "recovered": recovered["QAT"],
        "served_equals_trained": is_equal,
        "minutes": (time.monotonic() - started) / 60,
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    console.print(f"{summary['minutes']:.1f} minutes; packed model in {qat}, plot in {output / 'loss.png'}")
    if not is_equal:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
