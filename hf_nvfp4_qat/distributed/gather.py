"""What all processes that train a model do together when it is saved or pushed."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def reshard(model: nn.Module) -> None:
    """Put the shards in place of the weights that FSDP2 has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def on_main_process(write: Callable[[Iterator[_Item]], list[_Result]], items: Iterator[_Item]) -> list[_Result]:
    """Let the first process write what all processes of the default group make together.

    An error that one process alone meets while it makes an item (it ran out of memory, say) leaves the others waiting
    for it, as any collective does.

    Args:
        write: consumes the items, on the first process.
        items: each takes all processes to make, so all of them go through it to the end, whatever happens to `write`.

    Returns:
        What `write` returns; an empty list on the other processes.

    Raises:
        Exception: on the first process what `write` raised, on the others a RuntimeError that says so; on any process
            what making an item raised.
    """
    error: Exception | None = None
    written: list[_Result] = []
    try:
        if dist.get_rank() == 0:
            written = write(items)
    except Exception as raised:
        error = raised
    try:
        for _ in items:
            pass
    except Exception as raised:
        error = error or raised
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if failed := [(rank, message) for rank, message in enumerate(messages) if message]:
        raise RuntimeError(f"Nothing was saved: process {failed[0][0]} failed with {failed[0][1]}")
    return written
