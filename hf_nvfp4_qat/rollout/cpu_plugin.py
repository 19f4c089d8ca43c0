"""A vLLM plugin that lets the CPU engine run NVFP4 weights, which vLLM itself runs on GPUs only.

It supplies the weight-only GEMM and nothing else: config parsing, parameters, weight loaders, fusion and reloading stay
vLLM's own. It is a reference, not Marlin: it decodes a weight once, after loading, and multiplies in float32.

Entry point group ``vllm.general_plugins``; vLLM calls ``register`` in each of its processes.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F

# Below vLLM's logger, whose handler shows the line in every process of the engine.
logger = logging.getLogger("vllm.hf_nvfp4_qat")


def register() -> None:
    """On a CPU, put our kernel where vLLM looks for Marlin's; anywhere else, do nothing."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.kernels import linear

    if issubclass(linear.MarlinNvFp4LinearKernel, _Marker):
        return
    linear.MarlinNvFp4LinearKernel = _make_kernel(linear.MarlinNvFp4LinearKernel)
    logger.info("hf_nvfp4_qat: NVFP4 weights run on this CPU through a reference GEMM (not vLLM's own kernel).")


class _Marker:
    """Tells our kernel from vLLM's when the plugin is loaded twice in a process."""


def _make_kernel(marlin: type) -> type:
    """The kernel class, made here because its base exists only inside vLLM."""

    class ReferenceNvFp4LinearKernel(_Marker, marlin):  # type: ignore[misc, valid-type]
        """y = bf16(global_scale * (x @ (codes * block_scale).T)), accumulated in float32, as Marlin rounds."""

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            packed, block_scale = layer.weight.data, layer.weight_scale.data
            layer.weight = torch.nn.Parameter(_decode(packed, block_scale), requires_grad=False)

        def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            product = F.linear(x.float(), layer.weight.float()) * layer.weight_global_scale
            return product.to(x.dtype) if bias is None else product.to(x.dtype) + bias

    return ReferenceNvFp4LinearKernel


def _decode(packed: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    """Codes times block scales, exact in bfloat16 ``[N, K]``, the global scale left out."""
    from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor

    one = torch.ones((), dtype=torch.float32, device=packed.device)
    return NVFP4Tensor(packed.contiguous(), block_scale.contiguous(), one).dequantize()
