"""A function in several processes of one group: gloo on CPUs, NCCL with a GPU each."""

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _serve(rank: int, calls: Connection, store: str, num_processes: int, on_gpus: bool) -> None:
    """Answer each function that comes with what it returns for the rank, until none comes any more."""
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
    while (function := pickle.loads(calls.recv_bytes())) is not None:
        try:
            answer = (function(rank), None)
        except BaseException:
            answer = (None, traceback.format_exc())
        calls.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


class ProcessFailed(Exception):
    """One process of a group raised an error, or is gone."""


class Group:
    """Processes that stay, and run one function after the other: ``with Group(2) as group: group.run(function)``.

    After a failure all of them end, and the next call starts others.
    """

    def __init__(self, num_processes: int = 2, *, on_gpus: bool = False) -> None:
        self.num_processes, self._on_gpus = num_processes, on_gpus
        self._processes: list[mp.Process] = []
        self._calls: list[Connection] = []

    def run(self, function: Callable[[int], Any]) -> list:
        """What `function`, called with the rank, returns on each rank."""
        if not self._processes:
            self._start()
        for calls in self._calls:
            # By value where a module was imported again since: a parameter of a test is of the first import.
            calls.send_bytes(cloudpickle.dumps(function))
        results: dict[int, Any] = {}
        while len(results) < self.num_processes:
            for calls in wait([calls for rank, calls in enumerate(self._calls) if rank not in results]):
                rank = self._calls.index(calls)
                try:
                    results[rank], error = pickle.loads(calls.recv_bytes())
                except EOFError:
                    error = "it is gone"
                if error:
                    self._kill()  # the others may wait for it
                    raise ProcessFailed(f"process {rank}: {error}")
        return [results[rank] for rank in range(self.num_processes)]

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = f"{self._folder.name}/store"
        for rank in range(self.num_processes):
            calls, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs, store, self.num_processes, self._on_gpus))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._calls.append(calls)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        self._end()

    def _end(self) -> None:
        for process in self._processes:
            process.join()
        if self._processes:
            self._folder.cleanup()
        self._processes, self._calls = [], []

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_) -> None:
        for calls in self._calls:
            calls.send_bytes(pickle.dumps(None))
        self._end()


def in_processes(function: Callable[[int], Any], num_processes: int = 2, *, on_gpus: bool = False) -> list:
    """What `function` returns on each rank of a group made for it alone; on GPUs its tensors are made there."""
    if on_gpus and torch.cuda.device_count() < num_processes:
        pytest.skip(f"needs {num_processes} GPUs")
    with Group(num_processes, on_gpus=on_gpus) as group:
        return group.run(function)


def raised(function: Callable[[], Any]) -> str:
    """The type and message of the error that `function` raises, or "nothing": text, which travels between processes."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Broken(Exception):
    """What a function that a test breaks raises."""


@contextmanager
def failing_at(owner: Any, name: str, failing_call: int) -> Iterator[None]:
    """``owner.<name>`` raises at one of its calls, the first being 1."""
    original, num_calls = getattr(owner, name), 0

    def failing(*args, **kwargs):
        nonlocal num_calls
        num_calls += 1
        if num_calls == failing_call:
            raise Broken(f"in {name}")
        return original(*args, **kwargs)

    setattr(owner, name, failing)
    try:
        yield
    finally:
        setattr(owner, name, original)
