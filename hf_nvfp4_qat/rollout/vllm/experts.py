"""The experts of a layer in vLLM: where they go when they come in one piece, and how they are read back.

vLLM's loaders know experts one by one: 128 experts, 48 layers, 3 projections and 4 tensors each are 74,000 calls. All
experts of a layer go to the same parameter in the same way, so the loaders are asked about the first and the last, and
where those two agree but for the expert's number, the whole goes there at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from hf_nvfp4_qat.checkpoint.origins import ExpertPart
from hf_nvfp4_qat.formats.names import GLOBAL_ENCODE_SCALE, INPUT_GLOBAL_SCALE, PACKED, layer_of
from hf_nvfp4_qat.rollout.placement import Placement, Region
from hf_nvfp4_qat.rollout.plan import TensorLayout
from hf_nvfp4_qat.rollout.vllm.versions import marlin_experts_arguments


class StackedExperts:
    """The stacked tensors of a layout.

    Attributes:
        probes: the layout with each stacked tensor replaced by those of its first and last expert.
    """

    def __init__(self, layout: Sequence[TensorLayout], experts: Mapping[str, Sequence[ExpertPart]]) -> None:
        """Plan the probes.

        Args:
            layout: what will be pushed.
            experts: of each stacked weight among it, the parts under whose names vLLM's loaders know them.
        """
        self.probes: list[TensorLayout] = []
        self._num_experts: dict[str, int] = {}
        # Probe to (stacked tensor, part).
        self._part_of: dict[str, tuple[str, ExpertPart]] = {}
        for item in layout:
            name, _, kind = item.name.rpartition(".")
            if name not in experts:
                self.probes.append(item)
                continue
            num_experts = self._num_experts[item.name] = item.shape[0]
            for part in experts[name]:
                if part.expert not in (0, num_experts - 1):
                    continue
                layer = layer_of(part.name)
                if kind == GLOBAL_ENCODE_SCALE:
                    probe = TensorLayout(f"{layer}.{kind}", torch.float32, (1,))
                else:
                    probe = TensorLayout(f"{layer}.{kind}", item.dtype, (part.shape[0], item.shape[-1]))
                self.probes.append(probe)
                self._part_of[probe.name] = (item.name, part)
                if kind == PACKED:
                    # Not pushed: a constant that vLLM expects of experts.
                    constant = TensorLayout(f"{layer}.{INPUT_GLOBAL_SCALE}", torch.float32, (1,))
                    self.probes.append(constant)
                    self._part_of[constant.name] = (item.name, part)

    def placements(self, placements: list[Placement]) -> list[Placement]:
        """Placements of the layout, from those of the probes.

        Raises:
            ValueError: the engine keeps the experts of a layer otherwise than one behind the other.
        """
        found = []
        by_expert: dict[tuple, dict[int, Placement]] = {}
        for placement in placements:
            if placement.tensor not in self._part_of:
                found.append(placement)
                continue
            name, part = self._part_of[placement.tensor]
            expert, *rest = placement.target
            if expert != (part.expert, part.expert + 1) or placement.source is None:
                raise ValueError(
                    f"The engine must keep expert {part.expert} of {name} as number {part.expert} of "
                    f"{placement.module}.{placement.parameter}; it keeps it at {placement.target}. Expert parallelism "
                    "is not supported. Nothing was sent."
                )
            kind = placement.tensor.rpartition(".")[2]
            experts = (0, self._num_experts[name])
            source: Region | None = (experts,)
            if kind == INPUT_GLOBAL_SCALE:
                source = None
            elif kind != GLOBAL_ENCODE_SCALE:
                (start, stop), columns = placement.source
                source = (experts, (part.rows.start + start, part.rows.start + stop), columns)
            whole = replace(
                placement,
                tensor=name,
                target=(experts, *rest),
                source=source,
                constant=1.0 if kind == INPUT_GLOBAL_SCALE else 0.0,
            )
            by_expert.setdefault((whole.module, whole.parameter, whole.target, source), {})[part.expert] = whole
        for same in by_expert.values():
            last = next(iter(same.values()))
            if set(same) != {0, self._num_experts[last.tensor] - 1}:
                raise ValueError(
                    f"The engine must take all experts of {last.tensor} in the same way; the first and the last go to "
                    f"other places of {last.module}.{last.parameter}. Nothing was sent."
                )
            found.append(last)
        return found


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
        from hf_nvfp4_qat.rollout.vllm.cpu_plugin import expert_product

        num_experts, _, num_columns = getattr(module, f"{name}_weight").shape
        identity = torch.eye(num_columns, dtype=torch.bfloat16)
        return torch.stack([expert_product(module, name, expert, identity).t() for expert in range(num_experts)])
    if type(experts).__name__ != "MarlinExperts":
        raise ValueError(
            f"Experts are read back through Marlin's kernel; this engine runs {type(experts).__name__}. Make it with "
            'moe_backend="marlin" (`engine_kwargs` of NVFP4RolloutCallback), which is what it gets by itself.'
        )
    return _marlin_weights(module, name)


def _marlin_weights(module: Any, name: str) -> torch.Tensor:
    import vllm._custom_ops as ops
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
    from vllm.scalar_type import scalar_types

    permutations, workspace, options = marlin_experts_arguments(module)
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
            identity, product, weight, None, scale, None, global_scale, None, *permutations, workspace,
            sorted_ids, expert_ids, num_padded, share, moe_block_size=64, top_k=1, mul_topk_weights=False,
            b_q_type=scalar_types.float4_e2m1f, size_m=num_columns, size_n=num_rows, size_k=num_columns,
            use_atomic_add=False, use_fp32_reduce=True, is_zp_float=False, **options,
        )  # fmt: skip
        out[expert] = product.t()
    return out
