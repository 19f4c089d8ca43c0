"""How long one fake quantization of a weight takes, against the plain formula; prints a row for RESULTS.md.

Usage: python examples/benchmarks/quantize.py [--device cpu] [--shape 2048x4096]
"""

import platform
import time

import torch
import typer

from hf_nvfp4_qat.numerics.format import E2M1_MAGNITUDES, E2M1_TIES
from hf_nvfp4_qat.numerics.quantize import fake_quantize_unchecked, global_amax, global_decode_scale_of_amax


def plain_formula(weight: torch.Tensor, global_decode_scale: torch.Tensor) -> torch.Tensor:
    """Fake quantization as one writes it down at first: fp32 tensors of full size, one torch.where a level."""
    blocks = weight.float().view(-1, 16)
    block_scale = (blocks.abs().amax(-1, keepdim=True) / 6 / global_decode_scale).clamp(2**-6, 448)
    scale = block_scale.to(torch.float8_e4m3fn).float() * global_decode_scale
    scaled = blocks / scale
    magnitude = torch.zeros_like(scaled)
    for lower, tie in enumerate(E2M1_TIES):
        goes_up = scaled.abs() >= tie if lower % 2 else scaled.abs() > tie
        magnitude = torch.where(goes_up, E2M1_MAGNITUDES[lower + 1], magnitude)
    return (torch.copysign(magnitude, scaled) * scale).to(torch.bfloat16).view(weight.shape)


def best_milliseconds(function, device: str, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats + 1):  # the first call warms up
        start = time.perf_counter()
        function()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def main(device: str = "cpu", shape: str = "2048x4096", repeats: int = 10) -> None:
    rows, columns = (int(size) for size in shape.split("x"))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16().to(device)
    scale = global_decode_scale_of_amax(global_amax(weight))
    times = {
        impl: best_milliseconds(lambda impl=impl: fake_quantize_unchecked(weight, scale, impl=impl), device, repeats)
        for impl in ("eager", "reference")
    }
    times["plain"] = best_milliseconds(lambda: plain_formula(weight, scale), device, repeats)
    times["amax"] = best_milliseconds(lambda: global_amax(weight), device, repeats)
    if device == "cpu":
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    else:
        machine = torch.cuda.get_device_name()
    print("| date | machine | torch | shape | eager ms | plain formula ms | ratio | reference ms | amax ms |")
    print(
        f"| {time.strftime('%Y-%m-%d')} | {machine} | {torch.__version__} | {shape} | {times['eager']:.1f} "
        f"| {times['plain']:.1f} | {times['plain'] / times['eager']:.1f} | {times['reference']:.1f} "
        f"| {times['amax']:.2f} |"
    )


if __name__ == "__main__":
    typer.run(main)
