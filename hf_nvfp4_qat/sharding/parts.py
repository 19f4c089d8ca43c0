"""The parts of a weight that is cut across processes: the one place that tells plain tensors from DTensors.

A plain tensor is whole on its process. A DTensor (FSDP2, tensor parallelism) is a part of a weight, with a mesh of the
processes that hold the others. Everything else of the package asks here: what is mine, what is the whole, the maximum
over all parts, which axis cuts the rows.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor


def is_sharded(weight: Any) -> bool:
    """Whether this process may hold a part of the weight only."""
    return isinstance(weight, DTensor)


def mesh_of(weight: Any) -> Any:
    """The ``DeviceMesh`` of the processes that hold parts of a weight; None for a plain tensor."""
    return weight.device_mesh if isinstance(weight, DTensor) else None


def stands_for_shard(tensor: Any, shard: Any) -> bool:
    """Whether FSDP2 may have put `tensor`, gathered, in the place of the parameter `shard`, for as long as it computes.

    What is gathered is a plain tensor or, with tensor parallelism besides, a DTensor over fewer axes.
    """
    return isinstance(shard, DTensor) and tensor is not shard and mesh_of(tensor) != shard.device_mesh


def own_part(tensor: Any) -> torch.Tensor:
    """The part of a sharded tensor that this process has, differentiably; a plain tensor as it is.

    Scales are whole everywhere, but tensor parallelism makes DTensors of them too.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_storage(tensor: Any) -> Any:
    """The tensor object in which a DTensor keeps this process's part, to put attributes on; a plain tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def own_slice(weight: Any) -> slice:
    """Which rows ``[N, K]``, or experts ``[E, N, K]``, of a weight this process has."""
    if not isinstance(weight, DTensor):
        return slice(0, len(weight))
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return slice(offset[0], offset[0] + shape[0])


def own_experts(weight: Any) -> Any:
    """Index of the scales of the part of a weight that this process has, into all of the weight's.

    Args:
        weight: ``[N, K]``, which has one scale, or experts ``[E, N, K]``, sharded or not.
    """
    return own_slice(weight) if weight.ndim == 3 else ()


def own_rows(weight: torch.Tensor, packed: NVFP4Tensor) -> tuple[torch.Tensor, NVFP4Tensor]:
    """What of a weight sharded by rows, or by experts, this process holds, and the same part of it in NVFP4.

    A weight that is sharded otherwise is gathered.
    """
    if row_axis(weight) is None:
        return full_tensor(weight), packed
    rows = own_slice(weight)
    scale = packed.global_decode_scale[own_experts(weight)]
    return own_part(weight).detach(), NVFP4Tensor(packed.packed[rows], packed.block_scale[rows], scale)


def full_tensor(weight: torch.Tensor) -> torch.Tensor:
    """The whole weight on this process, without gradient; every process of its mesh must call.

    Args:
        weight: a plain tensor (returned as it is) or a DTensor.
    """
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach()


def row_axis(weight: torch.Tensor) -> int | None:
    """The one axis of its mesh over which a weight is sharded, if that is by rows; else None."""
    if not isinstance(weight, DTensor):
        return None
    sharded = [axis for axis, placement in enumerate(weight.placements) if not isinstance(placement, Replicate)]
    return sharded[0] if len(sharded) == 1 and weight.placements[sharded[0]] == Shard(0) else None


def maximum_over_mesh(values: torch.Tensor, mesh: Any) -> None:
    """Let every process of `mesh` have the elementwise maximum, in place: one all-reduce an axis.

    Every process of the mesh must call, with values of the same things in the same order.

    Args:
        values: floating, any shape. A NaN comes back as infinity: reductions may drop a NaN.
        mesh: a ``DeviceMesh``; None for what is whole on each process, and then nothing happens.
    """
    if mesh is not None:
        for axis in range(mesh.ndim):
            maximum_over_group(values, mesh.get_group(axis))


def maximum_over_group(values: torch.Tensor, group: Any) -> None:
    """As ``maximum_over_mesh``, over one process group."""
    values.nan_to_num_(nan=torch.inf, posinf=torch.inf)
    dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
