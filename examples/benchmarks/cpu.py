"""What NVFP4 costs for one weight on a CPU, beside the plain formula.

python examples/benchmarks/cpu.py
python examples/benchmarks/cpu.py --shape 4096x4096 --plot cpu.png
"""

import time
from collections.abc import Callable

import torch
import typer
from plain import plain_formula
from report import plot_bars, record

from hf_nvfp4_qat.numerics.quantize import (
    fake_quantize_unchecked,
    global_amax,
    global_decode_scale_of_amax,
    quantize_unchecked,
)


def best_milliseconds(function: Callable[[], object], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats + 1):  # the first call warms up
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def main(shape: str = "2048x4096", repeats: int = 10, plot: str = typer.Option("", help="a PNG to draw")) -> None:
    """Measure, print, append to RESULTS.md."""
    rows, columns = (int(size) for size in shape.split("x"))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    scale = global_decode_scale_of_amax(global_amax(weight))
    encoded = quantize_unchecked(weight, scale)
    compiled = torch.compile(plain_formula, dynamic=False)
    functions = {
        "fake quantize": lambda: fake_quantize_unchecked(weight, scale),
        "encode": lambda: quantize_unchecked(weight, scale),
        "decode": lambda: encoded.dequantize(),
        "amax": lambda: global_amax(weight),
        "reference": lambda: fake_quantize_unchecked(weight, scale, impl="reference"),
        "plain formula": lambda: plain_formula(weight, scale),
        "plain formula, torch.compile": lambda: compiled(weight, scale),
    }
    times = {name: best_milliseconds(function, repeats) for name, function in functions.items()}
    record(
        f"One weight on a CPU, {shape}",
        ["", "ms", "as a multiple of fake quantize"],
        [[name, f"{time:.1f}", f"{time / times['fake quantize']:.2f}"] for name, time in times.items()],
    )
    if plot:
        plot_bars(plot, "One weight through NVFP4 on a CPU", "milliseconds", list(times), {shape: list(times.values())})


if __name__ == "__main__":
    typer.run(main)
