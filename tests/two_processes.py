"""A function in two processes of one gloo group."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _enter(rank: int, function: Callable[[int], Any], store: str, results: dict) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results[rank] = function(rank)
    dist.destroy_process_group()


def in_two_processes(function: Callable[[int], Any]) -> list:
    """What `function`, called with the rank, returns on each rank."""
    with tempfile.NamedTemporaryFile() as store, mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_enter, args=(function, store.name + ".store", results), nprocs=2)
        return [results[rank] for rank in range(2)]
