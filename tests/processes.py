"""A function in several processes of one group: gloo on CPUs, NCCL with a GPU each."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _enter(
    rank: int, function: Callable[[int], Any], store: str, num_processes: int, on_gpus: bool, results: dict
) -> None:
    # As a launcher sets them: Accelerate looks at these, not at the group.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    if on_gpus:
        torch.cuda.set_device(rank)
        torch.set_default_device("cuda")
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True, warn_only=True)
    backend = "nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=num_processes)
    results[rank] = function(rank)
    dist.destroy_process_group()


def in_processes(function: Callable[[int], Any], num_processes: int = 2, *, on_gpus: bool = False) -> list:
    """What `function`, called with the rank, returns on each rank; on GPUs its tensors are made there."""
    if on_gpus and torch.cuda.device_count() < num_processes:
        pytest.skip(f"needs {num_processes} GPUs")
    with tempfile.NamedTemporaryFile() as store, mp.Manager() as manager:
        results = manager.dict()
        arguments = (function, store.name + ".store", num_processes, on_gpus, results)
        mp.spawn(_enter, args=arguments, nprocs=num_processes)
        return [results[rank] for rank in range(num_processes)]


def raised(function: Callable[[], Any]) -> str:
    """The type and message of the error that `function` raises, or "nothing": text, which travels between processes."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
