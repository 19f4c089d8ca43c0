"""What an engine's experts compute with, read through the GEMM that generation uses."""

from typing import Any

import torch


def expert_weights(module: Any, name: str) -> torch.Tensor:
    """The weights of all experts of a layer: the identity goes through each, exact since each output is one product.

    Args:
        module: vLLM's ``RoutedExperts`` with NVFP4 weights, after loading.
        name: "w13" or "w2".

    Returns:
        bfloat16 ``[E, N, K]``.

    Raises:
        ValueError: a kernel that is not known here.
    """
    kernel = getattr(module.quant_method, "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    if kernel is None:
        from hf_nvfp4_qat.rollout.cpu_plugin import expert_product

        num_experts, _, num_columns = getattr(module, f"{name}_weight").shape
        identity = torch.eye(num_columns, dtype=torch.bfloat16)
        return torch.stack([expert_product(module, name, expert, identity).t() for expert in range(num_experts)])
    if type(experts).__name__ != "MarlinExperts":
        raise ValueError(
            f"Experts are read back through Marlin's kernel; this engine runs {type(experts).__name__}. Set "
            'moe_backend="marlin" in the engine, or check_every=0.'
        )
    return _marlin_weights(module, name)


def _marlin_weights(module: Any, name: str) -> torch.Tensor:
    import vllm._custom_ops as ops
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
    from vllm.scalar_type import scalar_types

    config = module.quant_method.moe_quant_config
    weight, scale = getattr(module, f"{name}_weight"), getattr(module, f"{name}_weight_scale")
    global_scale = config.g1_alphas if name == "w13" else config.g2_alphas
    num_experts, num_columns = len(weight), 16 * weight.shape[1]
    num_rows = weight.shape[2] // 2
    identity = torch.eye(num_columns, dtype=torch.bfloat16, device=weight.device)
    share = torch.ones(num_columns, 1, dtype=torch.float32, device=weight.device)
    out = torch.empty(num_experts, num_rows, num_columns, dtype=torch.bfloat16, device=weight.device)
    for expert in range(num_experts):
        ids = torch.full((num_columns, 1), expert, dtype=torch.int32, device=weight.device)
        sorted_ids, expert_ids, num_padded = moe_align_block_size(ids, 64, num_experts)
        product = torch.empty(num_columns, num_rows, dtype=torch.bfloat16, device=weight.device)
        product = ops.moe_wna16_marlin_gemm(
            identity, product, weight, None, scale, None, global_scale, None, None, None, module.workspace,
            sorted_ids, expert_ids, num_padded, share, moe_block_size=64, top_k=1, mul_topk_weights=False,
            b_q_type=scalar_types.float4_e2m1f, size_m=num_columns, size_n=num_rows, size_k=num_columns,
            is_k_full=True, use_atomic_add=False, use_fp32_reduce=True, is_zp_float=False,
        )  # fmt: skip
        out[expert] = product.t()
    return out
