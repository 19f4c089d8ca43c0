"""The parts of FSDP2 that PyTorch keeps to itself, in one place. Read in 2.11 and 2.13."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo


def fsdp_parameters(model: nn.Module) -> Iterator[Any]:
    """FSDP2's record (``FSDPParam``) of every parameter that it shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)  # 2.12 has several a module, 2.11 one or none
            for group in [state._fsdp_param_group] if groups is None else groups:
                yield from group.fsdp_params if group is not None else ()


def why_no_extension(parameter: Any) -> str | None:
    """Why FSDP2 cannot gather this parameter in a form of ours; None if it can."""
    if not isinstance(parameter.mesh_info, FSDPMeshInfo):
        return "it is replicated, not sharded"
    if parameter.fsdp_placement.dim != 0:
        return "it is sharded along its columns, which would cut blocks of 16"
    if parameter.post_forward_mesh_info not in (None, parameter.mesh_info):
        return "`reshard_after_forward` is a number, and FSDP2 then cuts the gathered bytes as if they were the weight"
    return None


def gathered_shape(parameter: Any) -> torch.Size:
    """Shape of the weight when FSDP2 has gathered it; with tensor parallelism, a part of the whole."""
    return parameter._orig_size


def forget_gathers(parameter: Any) -> None:
    """Let the next gather allocate anew, after hooks were put on or taken off.

    FSDP2 sizes a parameter's buffers at its first gather and never again.

    Raises:
        ValueError: the parameter is gathered at the moment.
    """
    if parameter.sharded_state.name != "SHARDED":
        raise ValueError(
            f"How a weight is gathered changes between steps; {parameter._param_fqn} is gathered at the moment. "
            "Finish the backward pass, or call `model.reshard()`, first."
        )
    parameter.all_gather_outputs = []
    parameter._unsharded_inner_tensors = []
    if hasattr(parameter, "_unsharded_param"):
        del parameter._unsharded_param
    parameter._init_extensions()
