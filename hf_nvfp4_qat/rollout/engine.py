"""What a rollout engine is to a push: the one door between a model in training and whatever generates.

``engine_of`` puts the right kind in front of an object of the user's. Another kind is a folder beside ``vllm/`` with a
subclass of ``Engine``, and a line in ``_KINDS``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

import torch

from hf_nvfp4_qat.rollout.placement import Placement
from hf_nvfp4_qat.rollout.plan import TensorLayout
from hf_nvfp4_qat.rollout.stream import NamedTensor, RolloutStream

# Found by name when they are needed: nothing else here knows any of them.
_KINDS = {"vllm": "hf_nvfp4_qat.rollout.vllm.engine:VLLMEngine"}


class Engine(ABC):
    """A running engine in this process.

    Attributes:
        name: of its kind, for messages.
        is_whole: whether it holds all of each weight, and does not share it with engines in other processes.
    """

    name: str

    @abstractmethod
    def __init__(self, llm: Any) -> None:
        """Stand in front of `llm`. Raises ValueError if it is none of this kind, or not in this process."""

    @property
    @abstractmethod
    def is_whole(self) -> bool: ...  # noqa: D102

    @staticmethod
    @abstractmethod
    def is_mine(llm: Any) -> bool:
        """Whether `llm` is an engine of this kind."""

    @staticmethod
    @abstractmethod
    def arguments(stream: RolloutStream) -> dict[str, Any]:
        """What an engine is made with, beside the path of the model, to wait for the first push of this stream."""

    @abstractmethod
    def place(self, stream: RolloutStream) -> Mapping[str, Sequence[Placement]]:
        """Where the tensors of a stream go, by name; worked out once for a layout.

        From here on experts come stacked or one by one, as the engine can take them (``stream.stack_experts``).

        Raises:
            ValueError: the engine cannot compute with these weights, or they do not fit. It is unchanged.
        """

    @abstractmethod
    def push(self, tensors: Iterable[NamedTensor], layout: Sequence[TensorLayout]) -> None:
        """Take tensors that were placed, in place, and wait until all are there.

        Raises:
            ValueError: a tensor that differs from what `layout` announces.
            Exception: whatever `tensors` or the engine raises. It then holds some new and some old weights.
        """

    @abstractmethod
    def reader(self) -> Callable[[Placement], torch.Tensor]:
        """Reads what it computes with at the `target` of a placement; packed codes decoded, so twice as wide."""

    @abstractmethod
    def reset_caches(self, *, restart_requests: bool = False) -> None:
        """Empty every cache of what was computed with the weights, and make sure that it is empty.

        Raises:
            ValueError: there are unfinished requests, and not `restart_requests`; or a cache stays in use.
        """

    @abstractmethod
    def refuse(self, reason: str) -> None:
        """Make the engine raise when it is to generate, saying why."""

    @abstractmethod
    def allow(self) -> None:
        """Undo ``refuse``."""


def engine_kind(name: str) -> type[Engine]:
    """The kind of engine that is called `name` here."""
    return resolve_name(_KINDS[name])


def engine_of(llm: Any) -> Engine:
    """What stands in front of `llm`. Raises ValueError if no kind of engine knows it."""
    kinds = [engine_kind(name) for name in _KINDS]
    # Nobody's: the first says what it needs.
    return next((kind for kind in kinds if kind.is_mine(llm)), kinds[0])(llm)
