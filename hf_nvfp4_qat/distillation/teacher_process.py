"""A teacher in a process of its own: on another device, or on the CPU, out of the trainer's memory."""

import os
from collections.abc import Mapping
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
        try:
            self._receive("could not load its model")
        except RuntimeError as error:
            raise ValueError(str(error)) from None

    def __call__(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Logits ``[B, T, V]`` on the CPU, in the teacher's dtype.

        Raises:
            RuntimeError: the teacher failed, or its process has ended.
        """
        try:
            self._connection.send({
                name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in batch.items()
            })  # fmt: skip
        except OSError as error:
            raise RuntimeError("The teacher's process has ended. Start another `TeacherProcess`.") from error
        return self._receive("failed on a batch")

    def _receive(self, what: str) -> Any:
        try:
            answer, error = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise RuntimeError(f"The teacher's process ended (exit code {self._process.exitcode}).") from None
        if error:
            raise RuntimeError(f"The teacher {what}: {error}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
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

    try:
        model = AutoModelForCausalLM.from_pretrained(path, **options)
        if getattr(model, "quantization_method", None) is None:  # those that are quantized are where they must be
            model = model.to(device)
        model.eval()
    except Exception as error:
        connection.send((None, f"{type(error).__name__}: {error}"))
        return
    connection.send((None, ""))
    while True:
        try:
            batch = connection.recv()
        except EOFError:
            return
        try:
            moved = {name: value.to(model.device) if hasattr(value, "to") else value for name, value in batch.items()}
            with torch.no_grad():
                answer = model(**moved, use_cache=False).logits.cpu(), ""
        except Exception as error:
            answer = None, f"{type(error).__name__}: {error}"
        try:
            connection.send(answer)
        except OSError:
            return
