"""What the NVFP4 gather saves under FSDP2: a Qwen3-8B-shaped model in BF16, with QAT in forward, with packed gathers.

    torchrun --nproc-per-node 2 examples/benchmarks/fsdp.py
    torchrun --nproc-per-node 2 examples/benchmarks/fsdp.py --layers 12 --tokens 4096 --plot fsdp.png

fp32 master weights, bf16 compute, AdamW (fused), random weights and tokens, one unit a decoder layer. The three take
turns, twice; the median of all steps counts. Bytes: what each process sends in FSDP2's all-gathers in one step. Peak
memory is PyTorch's, the larger of the processes'.
"""

import gc
import os
import statistics
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from counted_gather import CountedGather, count_gathers
from report import plot_bars, record
from shapes import Shape
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM

from hf_nvfp4_qat import prepare_qat
from hf_nvfp4_qat.distributed.packed_gather import use_packed_gather

KINDS = ("BF16", "QAT in forward", "QAT, packed gather")
POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)


def make_model(kind: str, num_layers: int, *, checkpointing: bool) -> tuple[torch.nn.Module, CountedGather]:
    config = Shape.dense.config(num_hidden_layers=num_layers, use_cache=False)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if kind != "BF16":
        model = prepare_qat(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=POLICY)
    fully_shard(model, mp_policy=POLICY)
    model.to_empty(device="cuda")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
        # Not a weight, so still empty.
        rotary = model.model.rotary_emb
        rotary.inv_freq.copy_(1e6 ** (-torch.arange(0, 128, 2, device="cuda") / 128))
    if kind == KINDS[2]:
        use_packed_gather(model)
    return model.train(), count_gathers(model)


def measure(kind: str, num_layers: int, num_tokens: int, steps: int, *, checkpointing: bool) -> dict:
    model, counted = make_model(kind, num_layers, checkpointing=checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(0, 151936, (num_tokens // 2048, 2048), device="cuda")
    events = []
    for step in range(steps + 3):
        if step == 3:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            counted.num_bytes = 0
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    peak = torch.tensor(torch.cuda.max_memory_allocated(), device="cuda")
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return {
        "milliseconds": [start.elapsed_time(end) for start, end in events[3:]],
        "peak": int(peak),
        "bytes": counted.num_bytes // steps,
        "loss": loss.item(),
    }


def main(
    layers: int = 36,
    tokens: Annotated[int, typer.Option(help="a process and step, in sequences of 2048")] = 8192,
    steps: int = 8,
    checkpointing: bool = True,
    plot: Annotated[str, typer.Option(help="a PNG to draw")] = "",
) -> None:
    """Measure, print, append to RESULTS.md."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    found: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for kind in KINDS * 2:
        found[kind].append(measure(kind, layers, tokens, steps, checkpointing=checkpointing))
        gc.collect()
        torch.cuda.empty_cache()
        if dist.get_rank() == 0:
            print(kind, found[kind][-1], flush=True)
    if dist.get_rank() == 0:
        times = {
            kind: statistics.median(ms for run in runs for ms in run["milliseconds"]) for kind, runs in found.items()
        }
        peaks = {kind: max(run["peak"] for run in runs) for kind, runs in found.items()}
        rows = [
            [
                kind, f"{times[kind]:.1f}", f"{times[kind] / times['BF16']:.3f}", f"{peaks[kind] / 2**30:.2f}",
                f"{100 * (peaks[kind] / peaks['BF16'] - 1):+.1f} %", f"{found[kind][0]['bytes'] / 2**30:.2f}",
                f"{found[kind][0]['loss']:.6f}",
            ]
            for kind in KINDS
        ]  # fmt: skip
        record(
            f"FSDP2, {dist.get_world_size()} GPUs: {layers} layers of Qwen3-8B",
            ["", "ms a step", "/ BF16", "peak GiB", "more", "sent in all-gathers, GiB a process and step", "last loss"],
            rows,
            notes=f"{tokens} tokens a process and step, gradient checkpointing {'on' if checkpointing else 'off'}.",
        )
        if plot:
            groups = {
                "step time": [times[kind] / times["BF16"] for kind in KINDS],
                "peak memory": [peaks[kind] / peaks["BF16"] for kind in KINDS],
                "bytes gathered": [found[kind][0]["bytes"] / found["BF16"][0]["bytes"] for kind in KINDS],
            }
            plot_bars(plot, "FSDP2 with NVFP4 QAT", "relative to BF16", list(KINDS), groups)
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
