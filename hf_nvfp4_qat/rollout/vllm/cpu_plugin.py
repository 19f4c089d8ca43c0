"""A vLLM plugin that lets the CPU engine run NVFP4 weights, which vLLM itself runs on GPUs only.

It supplies the weight-only GEMM, for linears and for experts, lets vLLM's own emulation run W4A4, and nothing else:
config parsing, parameters, weight loaders, fusion, routing and reloading stay vLLM's own. The GEMM is a reference, not
Marlin: it decodes a weight once, after loading, and multiplies in float32.

Entry point group ``vllm.general_plugins``; vLLM calls ``register`` in each of its processes.
"""

import logging
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F

from hf_nvfp4_qat.rollout.vllm.versions import NEWEST_TESTED, OLDEST, installed_vllm, is_tested

# Below vLLM's logger, whose handler shows the line in every process of the engine.
logger = logging.getLogger("vllm.hf_nvfp4_qat")


def register() -> None:
    """On a CPU, put our kernel where vLLM looks for Marlin's; anywhere else, do nothing.

    vLLM calls this whenever it starts, also where nobody needs NVFP4. So it raises nothing: where vLLM does not have
    what is replaced here, one line says so and vLLM starts without us.
    """
    try:
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
        replacements = _replacements(current_platform._enum)
    except Exception as error:
        logger.warning(
            "hf_nvfp4_qat: NVFP4 weights do not run on this CPU, because this version of vLLM has other names "
            "(%s: %s); versions %s to %s are tested. Everything else runs.",
            type(error).__name__,
            error,
            OLDEST,
            NEWEST_TESTED,
        )
        return
    # Nothing can fail from here on, so nothing is half replaced.
    for owner, name, value in replacements:
        setattr(owner, name, value)
    if replacements:
        logger.info("hf_nvfp4_qat: NVFP4 weights run on this CPU through a reference GEMM (not vLLM's own kernel).")


def _replacements(cpu: Any) -> list[tuple[Any, str, Any]]:
    """What to replace in vLLM, as (module, name, new value); nothing if that is done already.

    Args:
        cpu: vLLM's name of the platform.
    """
    linear = import_module("vllm.model_executor.kernels.linear")
    experts = import_module(
        "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"
        ".compressed_tensors_moe_w4a4_nvfp4"
    )
    kernel, method = linear.MarlinNvFp4LinearKernel, experts.CompressedTensorsW4A4Nvfp4MoEMethod
    if issubclass(kernel, _Marker):
        return []
    if not is_tested(version := installed_vllm()):
        logger.warning(
            "hf_nvfp4_qat: NVFP4 on a CPU is tested with vLLM %s to %s; %s is installed.",
            OLDEST,
            NEWEST_TESTED,
            version,
        )
    kernels = {cpu: [linear.EmulationNvFp4LinearKernel], **linear._POSSIBLE_NVFP4_KERNELS}
    return [
        (linear, "_POSSIBLE_NVFP4_KERNELS", kernels),
        (linear, "MarlinNvFp4LinearKernel", _make_kernel(kernel)),
        (experts, "CompressedTensorsW4A4Nvfp4MoEMethod", _make_experts_method(method)),
    ]


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


def _make_experts_method(original: type) -> type:
    """The method class for experts, made here for the same reason."""

    class ReferenceNvFp4MoEMethod(_Marker, original):  # type: ignore[misc, valid-type]
        """Experts one after the other, rounded to bfloat16 where Marlin rounds: after each of both products."""

        def __init__(self, moe: Any, layer_name: str | None = None, use_a16: bool = False) -> None:
            # Past the original, which looks for a kernel of a GPU.
            super(original, self).__init__(moe)  # type: ignore[arg-type]
            if not use_a16:
                raise ValueError(
                    "On a CPU, NVFP4 experts run with 16-bit activations only (W4A16); this checkpoint has NVFP4 ones "
                    "(W4A4). Serve it on a GPU."
                )
            self.group_size = 16
            self.use_a16 = use_a16
            self.use_global_sf = False

        def process_weights_after_loading(self, layer: Any) -> None:
            for name in ("w13", "w2"):
                packed, block_scale = getattr(layer, f"{name}_weight_packed"), getattr(layer, f"{name}_weight_scale")
                setattr(layer, f"{name}_weight", torch.nn.Parameter(_decode(packed, block_scale), requires_grad=False))
                delattr(layer, f"{name}_weight_packed")

        def get_fused_moe_quant_config(self, layer: Any) -> None:
            return None

        def apply(
            self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, **kwargs: Any
        ) -> torch.Tensor:
            if layer.activation.value != "silu" or layer.apply_router_weight_on_input:
                raise ValueError(
                    f"On a CPU, NVFP4 experts run with SiLU, and router weights on their outputs; got "
                    f"{layer.activation.value}, router weights on "
                    f"{'inputs' if layer.apply_router_weight_on_input else 'outputs'}. Run this model on a GPU."
                )
            out = torch.zeros_like(x, dtype=torch.float32)
            for expert in topk_ids.unique().tolist():
                token, slot = torch.where(topk_ids == expert)
                gate, up = expert_product(layer, "w13", expert, x[token]).chunk(2, dim=-1)
                product = expert_product(layer, "w2", expert, F.silu(gate) * up, topk_weights[token, slot])
                out.index_add_(0, token, product.float())
            return out.to(x.dtype)

    return ReferenceNvFp4MoEMethod


def expert_product(
    layer: Any, name: str, expert: int, x: torch.Tensor, share: torch.Tensor | None = None
) -> torch.Tensor:
    """bf16(share * global_scale * (x @ W.T)) for one expert, accumulated in float32.

    Args:
        layer: vLLM's ``RoutedExperts``, after loading.
        name: "w13" or "w2".
        expert: which.
        x: ``[T, K]``.
        share: the router's, ``[T]``.
    """
    scale = 1.0 / getattr(layer, f"{name}_weight_global_scale")[expert].view(-1)[0]
    product = F.linear(x.float(), getattr(layer, f"{name}_weight")[expert].float()) * scale
    return (product if share is None else product * share[:, None]).to(x.dtype)


def _decode(packed: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    """Codes times block scales, exact in bfloat16 ``[..., N, K]``, the global scale left out."""
    from hf_nvfp4_qat.numerics.format import global_scale_shape
    from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor

    one = torch.ones(global_scale_shape(packed.shape), dtype=torch.float32, device=packed.device)
    return NVFP4Tensor(packed.data.contiguous(), block_scale.data.contiguous(), one).dequantize()
