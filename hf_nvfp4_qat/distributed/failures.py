"""A failure of one process is a failure of all of them: every process learns of it, and none waits for another."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn

from hf_nvfp4_qat.sharding.parts import mesh_of


def sharding_groups(model: nn.Module) -> list[dist.ProcessGroup]:
    """The process groups over which the parameters of `model` are sharded; none if it is not sharded.

    Args:
        model: one whose weights FSDP2 has not left gathered.
    """
    meshes = dict.fromkeys(mesh_of(weight) for weight in model.parameters())
    return [group for mesh in meshes if mesh is not None for group in mesh.get_all_groups()]


def failures_of_all(error: Exception | None, groups: Sequence[dist.ProcessGroup | None]) -> list[str]:
    """What failed on any process. Every process of `groups` calls, whether it failed or not.

    Args:
        error: what failed on this process.
        groups: as ``sharding_groups`` gives them, or ``[dist.group.WORLD]``; with none of them, this process is alone.

    Returns:
        One line for each process that failed, the same lines on every process: ``process 1: OSError: disk full``.
        Without groups the line names no process.
    """
    text = f"{type(error).__name__}: {error}"
    if not groups:
        return [] if error is None else [text]
    found = [] if error is None else [(dist.get_rank(), text)]
    for group in groups:
        gathered: list[list[tuple[int, str]]] = [[]] * dist.get_world_size(group)
        dist.all_gather_object(gathered, found, group=group)
        # Over a mesh of several axes a failure travels along one axis after the other.
        found = sorted({failure for part in gathered for failure in part})
    return [f"process {rank}: {text}" for rank, text in found]


@contextmanager
def failing_together(groups: Sequence[dist.ProcessGroup | None]) -> Iterator[None]:
    """Let an error of one process be raised on all of them, when all of them are at the end of the context.

    What runs inside must take part in every collective of the others before it raises.

    Raises:
        Exception: on a process that failed, its own error; on the others a RuntimeError that says which process failed
            and why.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failures = failures_of_all(failure, groups)
    if failure is not None:
        raise failure
    if failures:
        raise RuntimeError(f"This process stops because another one failed. It is {failures[0]}")
