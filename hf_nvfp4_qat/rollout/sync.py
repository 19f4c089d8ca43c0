"""Push a model's packed weights into a vLLM engine of this process, and prove that they arrived.

    sync(engine, model)     every weight, every time; the engine then computes with exactly the weights in training
    check(engine, model)    read the engine's weights back through its own GEMMs and compare them bit for bit

An engine that has not been filled yet, or whose last push failed half-way, refuses to generate.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_nvfp4_qat.checkpoint.names import PACKED, layer_of
from hf_nvfp4_qat.numerics.quantize import fake_quantize_unchecked
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor
from hf_nvfp4_qat.rollout.engine import Placement, Replay, load_tensors, place_tensors, read_weights, slices
from hf_nvfp4_qat.rollout.stream import NamedTensor, RolloutStream, TensorLayout
from hf_nvfp4_qat.rollout.vllm_versions import vllm_version

logger = logging.getLogger(__name__)

# Attribute of vLLM's worker.
_PLAN = "nvfp4_rollout_plan"


@dataclass(frozen=True)
class SyncReport:
    """What one push took.

    Attributes:
        seconds: wall time, the device's work included.
        num_bytes: pushed.
        num_bf16_bytes: the same weights in bfloat16.
        num_packed, num_tensors: quantized weights, and tensors in all.
    """

    seconds: float
    num_bytes: int
    num_bf16_bytes: int
    num_packed: int
    num_tensors: int

    @property
    def compression(self) -> float:
        """How many times fewer bytes than bfloat16."""
        return self.num_bf16_bytes / self.num_bytes


@dataclass(frozen=True)
class EngineCheck:
    """Comparison of an engine's weights with a model's.

    Attributes:
        num_weights: values compared.
        different: checkpoint name to number of values that differ, for tensors with differences.
    """

    num_weights: int
    different: dict[str, int]

    @property
    def ok(self) -> bool:
        """Whether all of them are equal."""
        return not self.different


def sync(
    engine: Any,
    model: nn.Module,
    *,
    observe: Callable[[str, torch.Tensor, NVFP4Tensor], None] = lambda name, weight, packed: None,
) -> SyncReport:
    """Push all weights of a QAT model, packed, into an engine, in place.

    Args:
        engine: a ``vllm.LLM`` that runs in this process with the NVFP4 configuration of `model`.
        model: the QAT model; if sharded, every process calls, each with its own engine.
        observe: called with the checkpoint name, master weight and packed weight of each quantized weight.

    Raises:
        ValueError: the engine does not run in this process, or expects other tensors. Nothing was sent.
        RuntimeError: the push failed half-way. The engine refuses to generate until a later push succeeds.
    """
    vllm_version()
    start = time.perf_counter()
    worker = worker_of(engine)
    stream = RolloutStream(model)
    plan = _plan(worker, stream)
    try:
        plan.load(stream.tensors(observe, fresh=False), stream.layout)
    except BaseException as error:
        refuse_to_generate(engine, f"its last weight push failed half-way ({type(error).__name__}: {error})")
        if not isinstance(error, Exception):
            raise
        raise RuntimeError(
            f"The push of weights into vLLM failed half-way: {type(error).__name__}: {error} The engine holds some new "
            "and some old weights and refuses to generate until a push succeeds."
        ) from error
    allow_to_generate(engine)
    engine.reset_prefix_cache()
    _wait_for_device(worker)
    return SyncReport(
        seconds=time.perf_counter() - start,
        num_bytes=stream.num_bytes,
        num_bf16_bytes=stream.num_bf16_bytes,
        num_packed=stream.num_packed,
        num_tensors=len(stream.layout),
    )


def check(engine: Any, model: nn.Module) -> EngineCheck:
    """Compare the engine's weights, as its GEMMs compute with them, with the trainer's dequantized ones, bit for bit.

    Args, Raises: as ``sync``; if sharded, every process calls.
    """
    worker = worker_of(engine)
    stream = RolloutStream(model)
    read = read_weights(worker, _plan(worker, stream).placements)
    pending: dict[str, list[tuple[Placement, torch.Tensor]]] = {}
    different: dict[str, int] = {}
    num_weights = 0
    for source, weight in stream.weights():
        # The engine is read module by module, in its own order; the model in the order of the push.
        key = f"{layer_of(source.name)}.{PACKED}" if source.is_quantized else source.name
        while key not in pending:
            placement, found = next(read, (None, None))
            if placement is None or found is None:
                break
            pending.setdefault(placement.tensor, []).append((placement, found))
        if source.global_decode_scale is not None:
            weight = fake_quantize_unchecked(weight, source.global_decode_scale())
        weight = weight.to(source.dtype) if not source.is_quantized else weight
        for placement, found in pending.pop(key, []):
            expected = weight[slices(placement.source, widen=1 + source.is_quantized)].to(found.dtype)
            num_weights += found.numel()
            if count := int((found != expected.to(found.device)).sum()):
                different[source.name] = different.get(source.name, 0) + count
    return EngineCheck(num_weights, different)


def worker_of(engine: Any) -> Any:
    """vLLM's worker, if it lives in this process.

    Raises:
        ValueError: it does not.
    """
    executor = getattr(getattr(engine, "llm_engine", None), "model_executor", None)
    worker = getattr(executor, "driver_worker", None)
    # The worker is wrapped, to start it in the process where it is to live.
    worker = getattr(worker, "worker", worker)
    if worker is None or not hasattr(worker, "model_runner"):
        raise ValueError(
            f"A push needs a vllm.LLM that runs in this process; got {type(engine).__name__} without one. Set "
            "VLLM_ENABLE_V1_MULTIPROCESSING=0 before the engine is made, or use server mode."
        )
    return worker


def refuse_to_generate(engine: Any, reason: str) -> None:
    """Make `engine` raise on the next request, saying why."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            f"This engine must not generate: {reason}. Push the weights with hf_nvfp4_qat.rollout.sync.sync."
        )

    # On the instance: every way to generate (generate, chat, beam search) adds its requests here.
    engine.llm_engine.add_request = refuse


def allow_to_generate(engine: Any) -> None:
    """Undo ``refuse_to_generate``."""
    vars(engine.llm_engine).pop("add_request", None)


class _EnginePlan:
    """What was worked out for one engine and one layout: where tensors go, and how the next push gets there."""

    def __init__(self, worker: Any, layout: Sequence[TensorLayout]) -> None:
        self._worker = worker
        self.layout = tuple(layout)
        self.placements = place_tensors(worker, layout)
        self._replay: Replay | None = None

    def load(self, tensors: Iterator[NamedTensor], layout: Sequence[TensorLayout]) -> None:
        """The first push, and any after a failure, go through vLLM's loaders; the others repeat their copies."""
        replay, self._replay = self._replay, None
        if replay is not None and replay.is_possible:
            replay.load(tensors, layout)
        else:
            load_tensors(self._worker, tensors, layout)
        self._replay = replay or Replay(self._worker, self.placements)


def _plan(worker: Any, stream: RolloutStream) -> _EnginePlan:
    """The engine's plan, made and checked once, and again if the stream changes; it lives and dies with the worker."""
    plan = getattr(worker, _PLAN, None)
    if plan is None or plan.layout != stream.layout:
        plan = _EnginePlan(worker, stream.layout)
        setattr(worker, _PLAN, plan)
    return plan


def _wait_for_device(worker: Any) -> None:
    device = torch.device(worker.device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
