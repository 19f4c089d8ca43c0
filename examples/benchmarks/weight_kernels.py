"""What NVFP4 costs for one weight on a GPU: this package beside a device copy, torch.compile and its peers.

    python examples/benchmarks/weight_kernels.py
    python examples/benchmarks/weight_kernels.py --shapes 4096x4096 --plot kernels.png

Same tensors, one process, bf16. What a CUDA graph of calls on several weights takes, a call: no launch overhead, and
more memory than the L2 cache holds. A device copy of the weight reads and writes 2 bytes an element, as fake
quantization must; encoding and decoding each move 2.56. Peers run where they are installed, with their amax computed
beforehand, as ours is. (Not named kernels.py: Transformers imports a package of that name, and would find this file.)
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import torch
import typer
from plain import plain_formula
from report import plot_bars, record
from triton.testing import do_bench

from hf_nvfp4_qat.numerics import triton_kernels
from hf_nvfp4_qat.numerics.activations import fake_quantize_activation
from hf_nvfp4_qat.numerics.group_amax import GroupAmax
from hf_nvfp4_qat.numerics.quantize import (
    fake_quantize_unchecked,
    global_amax,
    global_decode_scale_of_amax,
    quantize_unchecked,
)

# The weights of one Qwen3-8B decoder layer; there are 36.
QWEN3_8B_LAYER = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (12288, 4096), (12288, 4096), (4096, 12288)]


def modelopt(weight: torch.Tensor) -> Callable[[], object]:
    from modelopt.torch.kernels.quantization.gemm.fp4_kernel_hopper import fp4_fake_quant_block

    amax = weight.abs().max()
    return lambda: fp4_fake_quant_block(weight, amax)


def verl(weight: torch.Tensor) -> Callable[[], object]:
    spec = find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'verl'")
    # The file alone: the package needs ray.
    file = Path(spec.submodule_search_locations[0]) / "utils" / "qat" / "linear.py"
    spec = spec_from_file_location("verl_qat_linear", file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    amax = weight.abs().max().float()
    return lambda: module.fp4_fake_quant_weight(weight, global_amax=amax)


def torchao(weight: torch.Tensor) -> Callable[[], object]:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    scale = per_tensor_amax_to_scale(weight.abs().max())
    return lambda: NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale).dequantize(weight.dtype)


def compiled_formula(weight: torch.Tensor) -> Callable[[], object]:
    compiled = torch.compile(plain_formula, dynamic=False)
    scale = own_scale(weight)
    return lambda: compiled(weight, scale)


PEERS = {"plain formula, torch.compile": compiled_formula, "ModelOpt": modelopt, "verl": verl, "torchao": torchao}


def microseconds(make: Callable[[torch.Tensor], Callable[[], object]], weights: list[torch.Tensor]) -> float:
    """Of one call, median of many replays of a graph with a call a weight; results stay alive within the graph."""
    functions = [make(weight) for weight in weights]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            for function in functions:
                function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [function() for function in functions]
    time = do_bench(graph.replay, warmup=50, rep=200, return_mode="median")
    del results
    return 1e3 * time / len(functions)


def copy(weight: torch.Tensor) -> Callable[[], object]:
    target = torch.empty_like(weight)
    return lambda: target.copy_(weight)


def own_scale(weight: torch.Tensor) -> torch.Tensor:
    return global_decode_scale_of_amax(global_amax(weight))


def fake_quantize(weight: torch.Tensor, scale_rule: str = "amax") -> Callable[[], object]:
    scale = own_scale(weight)
    return lambda: fake_quantize_unchecked(weight, scale, scale_rule=scale_rule)


def fake_quantize_input(x: torch.Tensor) -> Callable[[], object]:
    scale = own_scale(x)
    return lambda: fake_quantize_activation(x, scale)


def encode(weight: torch.Tensor, scale_rule: str = "amax") -> Callable[[], object]:
    scale = own_scale(weight)
    return lambda: triton_kernels.quantize(weight, scale, scale_rule)


def decode(weight: torch.Tensor) -> Callable[[], object]:
    encoded = quantize_unchecked(weight, own_scale(weight))
    return encoded.dequantize


OURS = {
    "device copy": copy,
    "fake quantize": fake_quantize,
    "encode": encode,
    "decode": decode,
    "fake quantize, four_over_six": partial(fake_quantize, scale_rule="four_over_six"),
    "fake quantize, mse": partial(fake_quantize, scale_rule="mse"),
    "encode, four_over_six": partial(encode, scale_rule="four_over_six"),
    "encode, mse": partial(encode, scale_rule="mse"),
    "fake quantize an input (W4A4)": fake_quantize_input,
}


def of_one_weight(rows: int, columns: int) -> tuple[dict[str, float], list[str]]:
    """Microseconds by name, and the peers that could not run."""
    number = max(2, (256 << 20) // (rows * columns))
    weights = [torch.randn(rows, columns, device="cuda").mul_(0.02).bfloat16() for _ in range(number)]
    times = {name: microseconds(make, weights) for name, make in OURS.items()}
    missing = []
    for name, make in PEERS.items():
        try:
            times[name] = microseconds(make, weights)
        except Exception as error:  # a peer that is not installed or does not run here is no reason to stop
            missing.append(f"{name} ({type(error).__name__}: {str(error).splitlines()[0][:80]})")
            torch.cuda.synchronize()
    times["device copy, again"] = microseconds(copy, weights)
    return times, missing


def of_all_amaxes(num_layers: int) -> tuple[float, float, int]:
    """Microseconds for all amaxes of a Qwen3-8B-shaped model, and for a copy that moves as many bytes; the bytes."""
    weights = [torch.randn(shape, device="cuda").bfloat16() for _ in range(num_layers) for shape in QWEN3_8B_LAYER]
    amax = GroupAmax(weights, list(range(len(weights))), len(weights))
    num_bytes = sum(weight.nbytes for weight in weights)
    # A copy of half as much moves as many bytes.
    half = torch.empty(num_bytes // 4, dtype=torch.bfloat16, device="cuda")
    return microseconds(lambda _: partial(amax, weights), weights[:1]), microseconds(copy, [half]), num_bytes


def main(
    shapes: str = "4096x4096,4096x14336,28672x8192",
    layers: int = 36,
    plot: str = typer.Option("", help="a PNG to draw"),
) -> None:
    """Measure, print, append to RESULTS.md."""
    measured, missing = {}, []
    for shape in shapes.split(","):
        rows, columns = (int(size) for size in shape.split("x"))
        measured[shape], missing = of_one_weight(rows, columns)
    names = list(dict.fromkeys(name for times in measured.values() for name in times))
    table = []
    for name in names:
        cells = [
            f"{times[name]:.1f} ({times[name] / times['device copy']:.2f})" if name in times else "-"
            for times in measured.values()
        ]
        table.append([name, *cells])
    amax, read, num_bytes = of_all_amaxes(layers)
    record(
        "One weight, microseconds (and as a multiple of the device copy)",
        ["", *measured],
        table,
        notes=f"Amaxes of {len(QWEN3_8B_LAYER) * layers} weights, {num_bytes / 2**30:.2f} GiB, together: "
        f"{amax:.0f} us, {num_bytes / amax / 1e6:.2f} TB/s, {read / amax:.2f} of what a copy of as many bytes reaches."
        + (f" Did not run: {'; '.join(missing)}." if missing else ""),
    )
    if plot:
        groups = {name: [times.get(name, float("nan")) for times in measured.values()] for name in names}
        plot_bars(plot, "One weight through NVFP4", "microseconds", list(measured), groups)


if __name__ == "__main__":
    typer.run(main)
