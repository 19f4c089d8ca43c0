"""The command line: `nvfp4-qat --help` lists the commands."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

BAD_INPUT = 2
"""Exit code for bad input, and of `verify` for a checkpoint that is not good."""
FOUND_FAULTS = 1
"""Exit code of `doctor` for a checkpoint that it can examine, and in which something goes wrong."""

app = typer.Typer(
    name="nvfp4-qat",
    help="Pack, check, inspect and unpack NVFP4 checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
if not console.is_terminal:
    console = Console(width=160)  # a pipe has no width: let tables keep their columns
errors = Console(stderr=True)

Source = Annotated[str, typer.Argument(help="Checkpoint directory or Hub repository id.")]
Destination = Annotated[Path, typer.Argument(help="Directory to write.")]
ShardSize = Annotated[str, typer.Option(help="Largest size of one weights file.")]
Rule = Annotated[str, typer.Option(help="How block scales are chosen: amax, four_over_six or mse.")]
Preset = Annotated[str, typer.Option(help="full or ffn_only.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Module to leave unquantized; may be repeated.")]
ExcludeFrom = Annotated[Path | None, typer.Option(help="JSON list of such modules, as `sensitivity` writes it.")]
FirstLayers = Annotated[int, typer.Option(help="Decoder layers to leave unquantized at the start.")]
LastLayers = Annotated[int, typer.Option(help="And at the end.")]
Activations = Annotated[str, typer.Option(help="bf16, or nvfp4: quantize the inputs of linears too (W4A4).")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model's code that lies beside SOURCE; read it first.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a directory that is not empty.")]


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Bad input is one line and exit code 2, never a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        from hf_nvfp4_qat.formats.files import printable

        # Markup and control characters in it may be a stranger's.
        message = escape(printable(" ".join(str(error).split()), longest=4000))
        errors.print(f"[bold red]error:[/] {message}", soft_wrap=True, highlight=False)
        raise typer.Exit(BAD_INPUT) from None


@contextmanager
def _progress_bar() -> Iterator:
    columns = (TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=not errors.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield advance


def _print_plain(text: str) -> None:
    """Text that may be a stranger's, as it is."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def _refuse_occupied(destination: Path, overwrite: bool) -> None:
    from hf_nvfp4_qat.formats.files import PARTIAL_SUFFIX

    if destination.exists() and not destination.is_dir():
        raise ValueError(f"A checkpoint is a directory; {destination} is a file. Choose another name.")
    if destination.is_dir() and not overwrite:
        if kept := [path for path in destination.iterdir() if path.suffix != PARTIAL_SUFFIX]:
            raise ValueError(
                f"The destination must be empty, so that nothing is lost; {destination} holds {len(kept)} files. "
                "Choose another, or add --overwrite."
            )


def _json(path: Path, kind: type, what: str) -> Any:
    """The content of a JSON file that must hold `what`, a Python `kind`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is not JSON: {error}. Write {what}.") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} must hold {what}, as JSON; it holds a {type(content).__name__}.")
    return content


def _config(exclude: list[str] | None, exclude_from: Path | None, **options: Any) -> Any:
    """The options that several commands share, as an ``NVFP4QATConfig``."""
    from hf_nvfp4_qat.quantizer.config import NVFP4QATConfig

    listed = [] if exclude_from is None else _json(exclude_from, list, "a list of modules")
    return NVFP4QATConfig(exclude=(*(exclude or ()), *listed), **options)


@app.command()
def quantize(
    source: Source,
    destination: Destination,
    preset: Preset = "full",
    exclude: Exclude = None,
    exclude_from: ExcludeFrom = None,
    scale_rule: Rule = "amax",
    bf16_first_layers: FirstLayers = 0,
    bf16_last_layers: LastLayers = 0,
    max_shard_size: ShardSize = "5GB",
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Post-training quantization: pack an unquantized safetensors checkpoint to NVFP4 (W4A16)."""
    with _readable_errors(), _progress_bar() as advance:
        from hf_nvfp4_qat.checkpoint.convert import quantize_checkpoint

        layers = {"bf16_first_layers": bf16_first_layers, "bf16_last_layers": bf16_last_layers}
        config = _config(exclude, exclude_from, preset=preset, scale_rule=scale_rule, **layers)
        _refuse_occupied(destination, overwrite)
        num_layers = quantize_checkpoint(
            source,
            destination,
            config,
            max_shard_size=max_shard_size,
            trust_remote_code=trust_remote_code,
            progress=advance,
        )
    console.print(f"{num_layers} layers packed to {destination}", soft_wrap=True)


@app.command()
def distill(
    source: Source,
    destination: Destination,
    text: Annotated[list[Path], typer.Option(help="Text to train on: .txt, .md, .jsonl or a folder; may be repeated.")],
    teacher: Annotated[str, typer.Option(help="Model to learn from; SOURCE itself by default.")] = "",
    teacher_device: Annotated[
        str, typer.Option(help="Run the teacher in a process of its own there: cpu, cuda:1, ...")
    ] = "",
    steps: Annotated[int, typer.Option(min=1)] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step and device.")] = 16,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Batches a step.")] = 1,
    sequence_length: Annotated[int, typer.Option(min=16)] = 512,
    learning_rate: float = 2e-4,
    cross_entropy_weight: Annotated[
        float, typer.Option(min=0.0, help="Of the text itself beside the teacher; 0.5 helped a fine-tuned model.")
    ] = 0.0,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing")] = False,
    held_out: Annotated[int, typer.Option(min=1, help="Sequences to measure with, not trained on.")] = 16,
    seed: int = 0,
    preset: Preset = "full",
    exclude: Exclude = None,
    exclude_from: ExcludeFrom = None,
    scale_rule: Rule = "amax",
    bf16_first_layers: FirstLayers = 0,
    bf16_last_layers: LastLayers = 0,
    activations: Activations = "bf16",
    overwrite: Overwrite = False,
) -> None:
    """Train a model's NVFP4 form to predict as the original does (QAD), and pack it."""
    with _readable_errors():
        from hf_nvfp4_qat.distillation.run import distill as run
        from hf_nvfp4_qat.distillation.teacher_process import TeacherProcess

        options = {"preset": preset, "scale_rule": scale_rule, "activations": activations}
        layers = {"bf16_first_layers": bf16_first_layers, "bf16_last_layers": bf16_last_layers}
        config = _config(exclude, exclude_from, **options, **layers)
        _refuse_occupied(destination, overwrite)
        process = TeacherProcess(teacher or source, device=teacher_device) if teacher_device else None
        try:
            result = run(
                source,
                destination,
                text,
                teacher=process or teacher or None,
                config=config,
                sequence_length=sequence_length,
                num_held_out=held_out,
                cross_entropy_weight=cross_entropy_weight,
                training={
                    "max_steps": steps,
                    "per_device_train_batch_size": batch_size,
                    "gradient_accumulation_steps": gradient_accumulation,
                    "learning_rate": learning_rate,
                    "gradient_checkpointing": gradient_checkpointing,
                    "seed": seed,
                },
            )
        finally:
            if process is not None:
                process.close()
    table = Table(title=f"{result.num_tokens:,} tokens, measured on {held_out} sequences held out")
    for column in ("", "loss, nats a token", "KL from the teacher"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("teacher", f"{result.teacher:.4f}")
    table.add_row("quantized", f"{result.before:.4f}", f"{result.kl_before:.4f}")
    table.add_row("distilled", f"{result.after:.4f}", f"{result.kl_after:.4f}")
    console.print(table)
    came_back = (
        "on this text NVFP4 had cost nothing"
        if math.isnan(result.recovered)
        else f"{result.recovered:.0%} of what NVFP4 cost came back"
    )
    console.print(f"{came_back}; packed to {destination}", soft_wrap=True)


@app.command()
def sensitivity(
    source: Source,
    text: Annotated[
        list[Path], typer.Option(help="Text to measure on: .txt, .md, .jsonl or a folder; may be repeated.")
    ],
    num_sequences: Annotated[int, typer.Option("--sequences", min=1)] = 8,
    sequence_length: Annotated[int, typer.Option(min=16)] = 512,
    scale_rule: Rule = "amax",
    leave_out: Annotated[int, typer.Option(min=0, help="So many of the costliest groups go into --output.")] = 4,
    output: Annotated[Path | None, typer.Option(help="Write an exclude list for --exclude-from to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Rank layers by what they cost when they alone are quantized, and write an exclude list."""
    with _readable_errors(), _progress_bar() as advance:
        from hf_nvfp4_qat.distillation.sensitivity import sensitivity as measure
        from hf_nvfp4_qat.quantizer.config import NVFP4QATConfig

        config = NVFP4QATConfig(scale_rule=scale_rule)
        if output is not None and not output.parent.is_dir():
            raise ValueError(f"--output writes into a directory that is there; {output.parent} is not.")
        ranked = measure(
            source,
            text,
            config=config,
            sequence_length=sequence_length,
            num_sequences=num_sequences,
            progress=advance,
        )
        if output is not None:
            excluded = [module for entry in ranked[:leave_out] for module in entry.modules]
            output.write_text(json.dumps(excluded, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps([asdict(entry) for entry in ranked], indent=2))
        return
    table = Table(title=f"{len(ranked)} groups of layers, each quantized alone")
    table.add_column("layers", no_wrap=True)
    for column in ("parameters", "loss, nats a token", "KL, nats a token"):
        table.add_column(column, justify="right")
    for entry in ranked:
        first, *others = entry.modules
        names = ", ".join([first, *(module.rpartition(".")[2] for module in others)])
        table.add_row(names, f"{entry.num_parameters:,}", f"{entry.loss:+.5f}", f"{entry.kl:.5f}")
    console.print(table)
    if output is not None:
        console.print(f"{len(excluded)} layers of the costliest {leave_out} groups in {output}", soft_wrap=True)


@app.command()
def dequantize(
    source: Source, destination: Destination, max_shard_size: ShardSize = "5GB", overwrite: Overwrite = False
) -> None:
    """Unpack an NVFP4 checkpoint to an ordinary bfloat16 one with the same values."""
    with _readable_errors(), _progress_bar() as advance:
        from hf_nvfp4_qat.checkpoint.convert import dequantize_checkpoint

        _refuse_occupied(destination, overwrite)
        num_layers = dequantize_checkpoint(source, destination, max_shard_size=max_shard_size, progress=advance)
    console.print(f"{num_layers} layers unpacked to {destination}", soft_wrap=True)


@app.command()
def convert(
    source: Source,
    destination: Destination,
    to: Annotated[str, typer.Option(help="modelopt or compressed-tensors.")] = "modelopt",
    overwrite: Overwrite = False,
) -> None:
    """Rewrite a packed checkpoint in ModelOpt's dialect, or back: the same numbers, losslessly."""
    with _readable_errors(), _progress_bar() as advance:
        from hf_nvfp4_qat.checkpoint.convert import convert_checkpoint

        _refuse_occupied(destination, overwrite)
        num_layers = convert_checkpoint(source, destination, to, progress=advance)
    console.print(f"{num_layers} layers in the dialect of {to} in {destination}", soft_wrap=True)


@app.command()
def push(
    path: Annotated[Path, typer.Argument(help="Directory of a packed checkpoint.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub; created if missing.")],
    base_model: Annotated[str, typer.Option(help="Hub id of the model in high precision.")] = "",
    original: Annotated[str, typer.Option(help="That model's checkpoint, to state the error of the weights.")] = "",
    evaluation: Annotated[Path | None, typer.Option(help="JSON object of names and results to state.")] = None,
    private: Annotated[bool, typer.Option("--private")] = False,
    revision: Annotated[str, typer.Option(help="Branch; created if missing.")] = "",
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "",
) -> None:
    """Publish a packed checkpoint with a model card, in one commit."""
    with _readable_errors():
        from hf_nvfp4_qat.hub.publish import publish_checkpoint

        commit = publish_checkpoint(
            path,
            repo_id,
            private=private or None,
            revision=revision or None,
            create_pr=create_pr,
            commit_message=message or None,
            base_model=base_model or None,
            original=original or None,
            evaluation=None if evaluation is None else _json(evaluation, dict, "an object of names and results"),
        )
    console.print(f"Published: {commit.pr_url or commit.commit_url}", soft_wrap=True)


@app.command()
def verify(path: Source) -> None:
    """Check a packed checkpoint tensor by tensor; exit code 2 if a loader would fail or serve other weights."""
    with _readable_errors():
        from hf_nvfp4_qat.doctor.verify import verify_nvfp4

        report = verify_nvfp4(path)
    _print_plain(str(report))
    raise typer.Exit(0 if report.ok else BAD_INPUT)  # scripts rely on it


@app.command()
def doctor(
    path: Source,
    engine: Annotated[str | None, typer.Option(help="vllm, sglang or transformers; all by default.")] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs that share each matrix.")] = 1,
    fix: Annotated[bool, typer.Option("--fix", help="Mend in place what can be mended without loss.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Say what will go wrong with an NVFP4 checkpoint, where, and what to do; exit code 1 if anything does."""
    with _readable_errors():
        from hf_nvfp4_qat.doctor.examine import examine
        from hf_nvfp4_qat.doctor.repair import repair
        from hf_nvfp4_qat.formats.files import printable

        diagnosis = examine(path, engine=engine, tensor_parallel_size=tensor_parallel_size)
        fixed, reason = [], ""
        try:
            fixed = repair(path) if fix else []
        except (ValueError, OSError) as error:
            reason = str(error)
        if fixed:
            diagnosis = examine(path, engine=engine, tensor_parallel_size=tensor_parallel_size)
    if as_json:
        outcome = {**({"fixed": fixed} if fix else {}), **({"not_fixed": reason} if reason else {})}
        print(json.dumps({**diagnosis.as_json(), **outcome}, indent=2))
    else:
        for change in fixed:
            _print_plain(f"fixed: {change}")
        _print_plain(str(diagnosis))
        if reason:
            _print_plain(printable(f"nothing was fixed: {reason}"))
    raise typer.Exit(BAD_INPUT if reason else 0 if diagnosis.ok else FOUND_FAULTS)


@app.command()
def inspect(
    path: Source,
    original: Annotated[
        str | None, typer.Option(help="Unquantized checkpoint to measure a packed one against.")
    ] = None,
    scale_rule: Rule = "amax",
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this image file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what NVFP4 does to each layer of a packed checkpoint, or would do to an unquantized one."""
    with _readable_errors():
        from hf_nvfp4_qat.checkpoint.layer_report import fold_experts, inspect_checkpoint, plot_layers

        with _progress_bar() as advance:
            layers = inspect_checkpoint(path, original=original, scale_rule=scale_rule, progress=advance)
        if plot is not None:
            plot_layers(layers, plot)
    if as_json:
        print(json.dumps([asdict(layer) for layer in layers], indent=2))
        return
    table = Table(title=f"{path}: {len(layers)} NVFP4 layers")
    table.add_column("layer", no_wrap=True)
    for column in ("shape", "rel. error", "scale use", "clipped", "floored", "zero", "blocks", "bits"):
        table.add_column(column, justify="right")
    for layer in fold_experts(layers):
        table.add_row(
            layer.name,
            f"{layer.shape[0]}x{layer.shape[1]}",
            "-" if layer.relative_error is None else f"{layer.relative_error:.4f}",
            f"{layer.scale_use:.2f}",
            "-" if layer.num_clipped is None else f"{layer.num_clipped:,}",
            f"{layer.num_floored:,}",
            f"{layer.num_zero:,}",
            f"{layer.num_blocks:,}",
            f"{layer.bits_per_weight:.3f}",
        )
    console.print(table)


def main() -> None:
    """Entry point of `nvfp4-qat`."""
    app()


if __name__ == "__main__":
    main()
