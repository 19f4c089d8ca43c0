"""What a running engine computes with: its kernel, and its weights read back through its own GEMMs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_nvfp4_qat.formats.names import INPUT_GLOBAL_SCALE, PACKED
from hf_nvfp4_qat.rollout.placement import Placement, slices
from hf_nvfp4_qat.rollout.vllm.experts import expert_weights
from hf_nvfp4_qat.rollout.vllm.versions import convolution_weight


class EngineReader:
    """What the engine computes with, region by region.

    A linear layer is asked through its own GEMM, whatever layout its kernel keeps the weight in: the identity goes in,
    the transposed weight comes out, exact since each output is one product. Other parameters are read as they are.

    A kernel that quantizes its inputs gets 6 times their global scale instead of ones: that is a value it has, alone in
    its block. And 6 times a weight, which has 6 significant bits, is exact in bfloat16.
    """

    def __init__(self, worker: Any) -> None:
        self._model = worker.model_runner.get_model()
        self._last: tuple[str, torch.Tensor] | None = None

    def read(self, placement: Placement) -> torch.Tensor:
        """The values at the `target` of a placement; of packed codes the decoded values, twice as wide."""
        module = self._model.get_submodule(placement.module)
        if placement.parameter == INPUT_GLOBAL_SCALE:
            # Of fused siblings one is left, turned around; the kernel keeps both directions.
            return module.input_global_scale_inv.detach().reshape(1)
        name = placement.parameter.removesuffix(f"_{PACKED}")
        if name != placement.parameter:
            weight = self._decoded(f"{placement.module}.{name}", partial(expert_weights, module, name))
            return weight[slices(placement.target, widen=2)]
        convolution = convolution_weight(module)
        if convolution is not None and placement.parameter == "weight":
            return convolution.detach()[slices(placement.target)]
        if convolution is not None or not _is_linear(module) or placement.parameter not in ("weight", PACKED, "bias"):
            return getattr(module, placement.parameter).detach()[slices(placement.target)]
        if placement.parameter == "bias":
            return _linear_bias(module)[slices(placement.target)]
        weight = self._decoded(placement.module, partial(_linear_weight, module))
        return weight[slices(placement.target, widen=1 + (placement.parameter == PACKED))]

    def _decoded(self, name: str, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        """One at a time: decoded, a weight is four times its packed size."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, read())
        return self._last[1]


_WEIGHT_ONLY_KERNELS = ("Marlin", "Humming", "W4A16", "Reference")


def check_kernel(worker: Any) -> None:
    """Refuse an engine that would leave out the quantization of inputs that training has.

    Raises:
        ValueError: its kernel computes W4A16.
    """
    kernel = kernel_name(worker)
    if any(name in kernel for name in _WEIGHT_ONLY_KERNELS):
        raise ValueError(
            f"The model trains with NVFP4 inputs (W4A4), and this engine would compute with 16-bit ones: its kernel is "
            f"{kernel}, as on all GPUs before Blackwell. Train with `activations='bf16'`, roll out on Blackwell, or "
            "have vLLM emulate W4A4, slowly: linear_backend='emulation' (`engine_kwargs` of NVFP4RolloutCallback)."
        )


def kernel_name(worker: Any) -> str:
    """The class that multiplies with NVFP4 weights in this engine; empty if none does."""
    for module in worker.model_runner.get_model().modules():
        kernel = getattr(getattr(module, "scheme", None), "kernel", None)
        if kernel is not None:
            return type(kernel).__name__
        if hasattr(module, "w13_weight") and hasattr(module, "w13_weight_scale"):
            return type(module.quant_method).__name__
    return ""


def _is_linear(module: nn.Module) -> bool:
    from vllm.model_executor.layers.linear import LinearBase

    # A router that has a kernel of its own is no linear in this sense, unless a CPU's kernel has taken its weight away.
    return isinstance(module, LinearBase) and (hasattr(module, "input_size_per_partition") or not module.weight.numel())


def _in_features(module: Any) -> int:
    return module.input_size_per_partition if hasattr(module, "input_size_per_partition") else module.input_size


def _linear_weight(module: Any, *, rows_at_once: int = 1024) -> torch.Tensor:
    """The weight ``[N, K]`` that a linear layer multiplies with, in the dtype of its inputs."""
    in_features, device, dtype = _in_features(module), _device(module), module.params_dtype
    input_scale = getattr(module, INPUT_GLOBAL_SCALE, None)
    one = 1.0 if input_scale is None else 6.0 * float(input_scale)
    parts = []
    for start in range(0, in_features, rows_at_once):
        rows = min(rows_at_once, in_features - start)
        identity = torch.zeros(rows, in_features, dtype=dtype, device=device)
        identity.view(-1)[start :: in_features + 1] = one
        parts.append((module.quant_method.apply(module, identity, None).t() / one).to(dtype))
    return torch.cat(parts, dim=1)


def _linear_bias(module: Any) -> torch.Tensor:
    zeros = torch.zeros(1, _in_features(module), dtype=module.params_dtype, device=_device(module))
    return module.quant_method.apply(module, zeros, module.bias)[0]


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
