"""What all processes that train a model do together when it is saved or pushed."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_nvfp4_qat.distributed.failures import failures_of_all

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def reshard(model: nn.Module) -> None:
    """Put the shards in place of the weights that FSDP2 has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def on_main_process(write: Callable[[Iterator[_Item]], list[_Result]], items: Iterator[_Item]) -> list[_Result]:
    """Let the first process write what all processes of the default group make together.

    Args:
        write: consumes the items to their end, on the first process, before it makes anything final: the end raises if
            another process failed to make an item, which is garbage on all of them then.
        items: each takes all processes to make, so all of them go through it to the end, whatever happens to `write` or
            to an item. So it must go on after an error, as ``map`` does and a generator does not, and what makes an
            item must take part in every collective before it raises.

    Returns:
        What `write` returns; an empty list on the other processes.

    Raises:
        Exception: on a process that failed, what `write` or the making of an item raised; on the others a RuntimeError
            that says which process failed and why.
    """
    world = [dist.group.WORLD]
    error: Exception | None = None
    written: list[_Result] = []
    failures: list[str] | None = None

    def until_all_are_made() -> Iterator[_Item]:
        nonlocal failures
        yield from items
        failures = failures_of_all(None, world)
        if failures:
            raise RuntimeError(f"Nothing was saved, because a process failed. It is {failures[0]}")

    try:
        if dist.get_rank() == 0:
            written = write(until_all_are_made())
    except Exception as raised:
        error = raised
    if failures is None:
        while True:
            try:
                next(items)
            except StopIteration:
                break
            except Exception as raised:
                error = error or raised
        failures = failures_of_all(error, world)
    failures = failures or failures_of_all(error, world)  # the first process may fail after all are made
    if error is not None:
        raise error
    if failures:
        raise RuntimeError(f"Nothing was saved, because a process failed. It is {failures[0]}")
    return written
