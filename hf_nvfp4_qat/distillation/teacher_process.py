"""A teacher in a process of its own: on another device, or on the CPU, out of the trainer's memory."""

import os
import signal
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch
import torch.multiprocessing as mp


class TeacherProcess:
    """A frozen model that answers batches with logits: ``QADTrainer(model, teacher=TeacherProcess(path), ...)``.

    Batches and logits travel through shared memory on the CPU, ``2 * B * T * V`` bytes a batch in bfloat16. The process
    ends with the trainer's, or with ``close``; it is also a context manager.
    """

    def __init__(
        self, path: str | os.PathLike, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, **kwargs: Any
    ) -> None:
        """Start the process and wait until it has the model.

        Args:
            path: directory or Hub id.
            device: where the teacher computes, "cuda:1" for example.
            dtype: that it computes in.
            kwargs: for ``from_pretrained`` (`quantization_config`, `revision`, ...).

        Raises:
            ValueError: the model cannot be loaded; the message has the reason.
        """
        context = mp.get_context("spawn")
        self._connection, theirs = context.Pipe()
        options = {**kwargs, "dtype": dtype}
        self._process = context.Process(target=_answer, args=(theirs, str(path), device, options), daemon=True)
        self._process.start()
        theirs.close()  # else the end of the process would not be noticed
        # Only this thread uses the connection, one request after the other. An interrupt (Ctrl-C, a timeout's signal)
        # reaches the main thread alone: the thread still takes the answer off the connection, so that it is not there
        # when the next batch asks.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")
        self._answer = self._thread.submit(self._take)
        try:
            self._receive(self._answer)
        except BaseException as error:
            self.close()
            if isinstance(error, RuntimeError):
                raise ValueError(str(error)) from None
            raise

    def __call__(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Logits ``[B, T, V]`` on the CPU, in the teacher's dtype. After an interrupted call it can be called again.

        Raises:
            RuntimeError: the teacher failed, or its process has ended.
        """
        on_cpu = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        self._answer = answer = self._thread.submit(self._ask, on_cpu)
        return self._receive(answer)

    def _receive(self, answer: Future) -> Any:
        """Wait for the answer to one request."""
        logits, error = answer.result()
        if error:
            raise RuntimeError(f"The teacher {error}")
        return logits

    def _ask(self, batch: dict[str, Any]) -> tuple[torch.Tensor | None, str]:
        try:
            self._connection.send(batch)
        except OSError as error:
            raise RuntimeError("The teacher's process has ended. Start another `TeacherProcess`.") from error
        return self._take()

    def _take(self) -> tuple[torch.Tensor | None, str]:
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise RuntimeError(f"The teacher's process ended (exit code {self._process.exitcode}).") from None

    def close(self) -> None:
        """End the process."""
        if not self._answer.done():  # of an interrupted call: nobody waits for it
            self._process.kill()
        self._thread.submit(self._connection.close).result()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()

    def __enter__(self) -> "TeacherProcess":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _answer(connection: Connection, path: str, device: str, options: dict[str, Any]) -> None:
    """In the teacher's process: load, say so, and answer until nobody asks any more."""
    from transformers import AutoModelForCausalLM

    # Ctrl-C goes to all processes of a terminal or notebook; the trainer decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **options)
        if getattr(model, "quantization_method", None) is None:  # those that are quantized are where they must be
            model = model.to(device)
        model.eval()
        answer: tuple[torch.Tensor | None, str] = None, ""
    except Exception as error:
        model, answer = None, (None, f"could not load its model: {type(error).__name__}: {error}")
    with suppress(EOFError, OSError):  # what sending and receiving raise when the trainer's process is gone
        connection.send(answer)
        while model is not None:
            answer = _logits(model, connection.recv())
            connection.send(answer)


def _logits(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor | None, str]:
    try:
        moved = {name: value.to(model.device) if hasattr(value, "to") else value for name, value in batch.items()}
        with torch.no_grad():
            return model(**moved, use_cache=False).logits.cpu(), ""
    except Exception as error:
        return None, f"failed on a batch: {type(error).__name__}: {error}"
