"""What NVFP4 QAT costs in a training step: a decoder stack of Qwen3's shape, BF16 beside QAT, in one process.

    python examples/benchmarks/train_step.py
    python examples/benchmarks/train_step.py --layers 8 --tokens 8192 --plot train_step.png
    python examples/benchmarks/train_step.py --shape Qwen3-30B-A3B --layers 8 --tokens 8192 --no-compiled

Forward, backward, AdamW (fused), bf16 throughout, sequences of 2048 tokens, no embeddings and no output head: what is
left is what QAT touches, so shares are not flattered. BF16 and QAT take turns, twice; the median of all steps counts.
Peak memory is PyTorch's, of the steps. "compiled": each decoder layer through torch.compile.
"""

import gc
import statistics
from typing import Annotated

import torch
import typer
from report import plot_bars, record
from shapes import Shape
from transformers import AutoModel, PreTrainedModel

from hf_nvfp4_qat import prepare_qat

SEQUENCE = 2048


def make_stack(shape: Shape, num_layers: int, *, qat: bool, compiled: bool, checkpointing: bool) -> PreTrainedModel:
    """Decoder layers with random weights, in training mode, on the GPU."""
    config = shape.config(vocab_size=16, num_hidden_layers=num_layers, use_cache=False)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModel.from_config(config, dtype=torch.bfloat16)
    if qat:
        model = prepare_qat(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    if compiled:
        for layer in model.layers:
            layer.compile()
    return model.train()


def measure(num_tokens: int, shape: Shape, num_layers: int, steps: int, **kind: bool) -> tuple[list[float], int]:
    """Milliseconds of each step, and the peak memory in bytes; the first three steps warm up."""
    torch.compiler.reset()  # else a new number of tokens compiles for all numbers of tokens
    model = make_stack(shape, num_layers, **kind)
    parameters = [parameter for name, parameter in model.named_parameters() if "embed_tokens" not in name]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    size = (num_tokens // SEQUENCE, SEQUENCE, model.config.hidden_size)
    inputs = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    events = []
    for step in range(steps + 3):
        if step == 3:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        model(inputs_embeds=inputs).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events[3:]], torch.cuda.max_memory_allocated()


def compare(
    num_tokens: int, shape: Shape, num_layers: int, steps: int, **kind: bool
) -> dict[bool, tuple[float, int]] | None:
    """Median milliseconds and peak bytes, without and with QAT; None if it does not fit on the GPU."""
    times: dict[bool, list[float]] = {False: [], True: []}
    peaks: dict[bool, int] = {}
    for qat in (False, True, False, True):
        try:
            found, peaks[qat] = measure(num_tokens, shape, num_layers, steps, qat=qat, **kind)
        except torch.OutOfMemoryError:
            return None
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        times[qat] += found
    return {qat: (statistics.median(times[qat]), peaks[qat]) for qat in (False, True)}


def main(
    shape: Shape = Shape.dense,
    layers: int = 16,
    steps: int = 10,
    tokens: Annotated[list[int], typer.Option(help="tokens a step")] = [2048, 8192, 32768],  # noqa: B006
    compiled: Annotated[bool | None, typer.Option(help="only with, or only without, torch.compile")] = None,
    checkpointing: Annotated[bool | None, typer.Option(help="only with, or only without")] = None,
    plot: Annotated[str, typer.Option(help="a PNG to draw")] = "",
) -> None:
    """Measure, print, append to RESULTS.md."""
    rows, labels, ratios = [], [], []
    for is_compiled in [False, True] if compiled is None else [compiled]:
        for checkpoints in [True, False] if checkpointing is None else [checkpointing]:
            for num_tokens in tokens:
                found = compare(num_tokens, shape, layers, steps, compiled=is_compiled, checkpointing=checkpoints)
                label = [f"{num_tokens}", "compiled" if is_compiled else "eager", "yes" if checkpoints else "no"]
                if found is None:
                    rows.append([*label, *["does not fit"] + ["-"] * 5])
                    continue
                (bf16_ms, bf16_peak), (qat_ms, qat_peak) = found[False], found[True]
                rows.append([
                    *label, f"{bf16_ms:.1f}", f"{qat_ms:.1f}", f"{qat_ms / bf16_ms:.3f}",
                    f"{bf16_peak / 2**30:.2f}", f"{qat_peak / 2**30:.2f}", f"{100 * (qat_peak / bf16_peak - 1):+.2f} %",
                ])  # fmt: skip
                print(rows[-1], flush=True)
                labels.append("\n".join([label[0], label[1], "checkpoints" if checkpoints else "no checkpoints"]))
                ratios.append((qat_ms / bf16_ms, qat_peak / bf16_peak))
    record(
        f"Training step: {layers} decoder layers of {shape.value}",
        ["tokens", "", "gradient checkpointing", "BF16 ms", "QAT ms", "QAT / BF16", "BF16 GiB", "QAT GiB", "more"],
        rows,
    )
    if plot:
        groups = {"step time": [time for time, _ in ratios], "peak memory": [peak for _, peak in ratios]}
        plot_bars(plot, "NVFP4 QAT beside BF16", "QAT / BF16", labels, groups)


if __name__ == "__main__":
    typer.run(main)
