"""Push a model's packed weights into a vLLM engine of this process, and prove that they arrived.

    LLM(name, **engine_arguments(model))    an engine that waits for its first push

    sync(engine, model)     every weight, every time; the engine then computes with exactly the weights in training
    check(engine, model)    read the engine's weights back through its own GEMMs and compare them bit for bit

An engine that has not been filled yet, or whose last push failed half-way, refuses to generate. A push empties the
engine's caches first: what they hold was computed with the old weights.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_nvfp4_qat.checkpoint.sources import ExpertsSource, LinearSource, PlainSource, Source
from hf_nvfp4_qat.distributed.failures import failing_together, failures_of_all, sharding_groups
from hf_nvfp4_qat.formats.names import INPUT_GLOBAL_SCALE, PACKED, layer_of
from hf_nvfp4_qat.numerics.quantize import fake_quantize_unchecked, global_decode_scale_of_amax
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor
from hf_nvfp4_qat.rollout.engine import (
    EngineReader,
    Replay,
    check_kernel,
    is_compared,
    load_tensors,
    place_tensors,
    slices,
)
from hf_nvfp4_qat.rollout.placement import Placement, Region
from hf_nvfp4_qat.rollout.stream import NamedTensor, RolloutStream, TensorLayout
from hf_nvfp4_qat.rollout.vllm_versions import register_empty_loader, vllm_version

# Attribute of vLLM's worker.
_PLAN = "nvfp4_rollout_plan"
# Attribute of vLLM's `llm_engine`: why it must not generate.
_REFUSAL = "nvfp4_refusal"


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
        different: checkpoint name to number of values that differ or are missing, for tensors with such.
        not_compared: tensors that vLLM rearranges while it loads them, so that nothing is known of where values go.
    """

    num_weights: int
    different: dict[str, int]
    not_compared: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all of them are equal."""
        return not self.different


def sync(
    engine: Any,
    model: nn.Module,
    *,
    restart_requests: bool = False,
    observe: Callable[[str, torch.Tensor, NVFP4Tensor], None] = lambda name, weight, packed: None,
) -> SyncReport:
    """Push all weights of a QAT model, packed, into an engine, in place.

    Args:
        engine: a ``vllm.LLM`` that runs in this process with the NVFP4 configuration of `model`.
        model: the QAT model; if sharded, every process calls, each with its own engine.
        restart_requests: what happens to requests that the engine has not finished. False refuses the push. True keeps
            the tokens they have, and computes everything about them anew, with the new weights, as they go on.
        observe: called with the checkpoint name, master weight and packed weight of each quantized weight.

    Raises:
        ValueError: the engine does not run in this process, expects other tensors, or has unfinished requests. Nothing
            was sent.
        RuntimeError: the push failed half-way. The engine refuses to generate until a later push succeeds. If the model
            is sharded, a failure of one process is raised on all of them.
    """
    vllm_version()
    start = time.perf_counter()
    stream = RolloutStream(model)
    groups = sharding_groups(model)  # after the stream, which puts shards in place of gathered weights
    with failing_together(groups):
        worker = worker_of(engine)
        plan = _plan(worker, stream)
        reset_caches(engine, restart_requests=restart_requests)
    failure: Exception | None = None
    try:
        plan.load(stream.tensors(observe, fresh=False), stream.layout)
        _wait_for_device(worker)
    except Exception as error:
        failure = error
        stream.take_part()
    except BaseException as error:
        refuse_to_generate(engine, f"its last weight push was interrupted ({type(error).__name__})")
        raise
    failures = failures_of_all(failure, groups)
    if failures:
        refuse_to_generate(engine, f"its last weight push failed half-way ({failures[0]})")
        raise RuntimeError(
            f"The push of weights into vLLM failed half-way: {failures[0]} The engine holds some new and some old "
            "weights and refuses to generate until a push succeeds."
        ) from failure
    allow_to_generate(engine)
    return SyncReport(
        seconds=time.perf_counter() - start,
        num_bytes=stream.num_bytes,
        num_bf16_bytes=stream.num_bf16_bytes,
        num_packed=stream.num_packed,
        num_tensors=len(stream.layout),
    )


def check(engine: Any, model: nn.Module) -> EngineCheck:
    """Compare the engine's weights, as its GEMMs compute with them, with the trainer's dequantized ones, bit for bit.

    With NVFP4 inputs the engine's input scales are compared too. What is not quantized is compared after its rounding
    to bfloat16, in which the engine computes.

    Args, Raises: as ``sync``; if sharded, every process calls.
    """
    stream = RolloutStream(model)
    with failing_together(sharding_groups(model)):
        try:
            return _compare(worker_of(engine), stream)
        except Exception:
            stream.take_part()
            raise


def _compare(worker: Any, stream: RolloutStream) -> EngineCheck:
    plan = _plan(worker, stream)
    reader = EngineReader(worker)
    is_whole = worker.parallel_config.tensor_parallel_size == 1
    different: dict[str, int] = {}
    not_compared = []
    num_weights = 0
    for source, weight in stream.weights():
        placements = [placement for placement in plan.placements(source) if is_compared(placement)]
        if not all(placement.is_plain for placement in placements):
            not_compared.append(source.name)
            continue
        if isinstance(source, LinearSource):
            weight = fake_quantize_unchecked(weight, source.global_decode_scale(), scale_rule=source.scale_rule)
        elif isinstance(source, PlainSource):
            weight = weight.to(source.dtype)
        num_different = 0
        # By source: an engine may keep the same values twice, as keys and as values say.
        num_found: dict[Region | None, int] = {}
        for placement in placements:
            assert placement.source is not None  # else it is not compared
            found = reader.read(placement)
            expected = weight[slices(placement.source, widen=1 + source.is_quantized)].to(found.device, found.dtype)
            num_different += int((found.view(expected.shape) != expected).sum())
            num_found[placement.source] = found.numel()
        if is_whole:
            num_different += weight.numel() - sum(num_found.values())
        if isinstance(source, LinearSource) and source.input_amax is not None:
            expected = 1 / global_decode_scale_of_amax(source.input_amax())
            for placement in plan.by_tensor[f"{layer_of(source.name)}.{INPUT_GLOBAL_SCALE}"]:
                num_different += int((reader.read(placement) != expected).sum())
        if num_different:
            different[source.name] = num_different
        num_weights += sum(num_found.values())
    return EngineCheck(num_weights, different, tuple(not_compared))


def engine_arguments(model: nn.Module) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for an engine that is to be filled by ``sync``.

    ``LLM("path/or/id", **engine_arguments(model))`` reads the unquantized model's config and tokenizer, and no weights.
    Set VLLM_ENABLE_V1_MULTIPROCESSING=0 first, so that the engine lives in this process.
    """
    return engine_arguments_of(RolloutStream(model))


def engine_arguments_of(stream: RolloutStream) -> dict[str, Any]:
    """``engine_arguments`` of the model that `stream` is of."""
    return {
        "hf_overrides": {"quantization_config": stream.quantization_config, **stream.tied_settings},
        "load_format": register_empty_loader(),
        # What weights decode to, exactly.
        "dtype": "bfloat16",
    }


def prepare(engine: Any, stream: RolloutStream) -> None:
    """Work out where the stream's tensors go in the engine, and check that they fit, before anything is trained.

    Raises:
        ValueError: as ``sync``.
    """
    _plan(worker_of(engine), stream)


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


def reset_caches(engine: Any, *, restart_requests: bool = False) -> None:
    """Empty every cache of what the engine computed with its weights: prefixes, also those in other stores, and images.

    Args:
        engine: a ``vllm.LLM``.
        restart_requests: as for ``sync``.

    Raises:
        ValueError: the engine has unfinished requests, or something else that keeps a cache in use.
    """
    llm_engine = engine.llm_engine
    num_unfinished = llm_engine.get_num_unfinished_requests()
    if num_unfinished and not restart_requests:
        raise ValueError(
            "vLLM's caches hold results of the weights it has, and cannot be emptied while requests are unfinished; "
            f"this engine has {num_unfinished}. Nothing was sent. Let them finish, abort them with "
            "`llm.llm_engine.abort_request`, or let them go on with the new weights: "
            "`sync(..., restart_requests=True)`."
        )
    try:
        is_reset = llm_engine.reset_prefix_cache(reset_running_requests=restart_requests, reset_connector=True)
    except RuntimeError as error:
        raise ValueError(f"{_CACHE_IN_USE} {error}") from error
    if not is_reset:
        raise ValueError(_CACHE_IN_USE)
    llm_engine.reset_encoder_cache()


_CACHE_IN_USE = (
    "vLLM could not empty its prefix cache, which holds results of the old weights: some of it is still in use. "
    "Nothing was sent. Let the engine finish what it does (`llm.llm_engine.step()`), and push again."
)


def refuse_to_generate(engine: Any, reason: str) -> None:
    """Make `engine` raise when it is to generate, saying why."""
    llm_engine = engine.llm_engine
    setattr(llm_engine, _REFUSAL, reason)
    # On the instance: every way to generate (generate, chat, beam search) adds its requests here. And requests that
    # are there already would go on by steps.
    for name in ("add_request", "step"):
        if not isinstance(getattr(llm_engine, name), _Gate):
            setattr(llm_engine, name, _Gate(llm_engine, name))


def allow_to_generate(engine: Any) -> None:
    """Undo ``refuse_to_generate``."""
    llm_engine = engine.llm_engine
    setattr(llm_engine, _REFUSAL, "")
    for name in ("add_request", "step"):
        while isinstance(gate := getattr(llm_engine, name), _Gate):
            gate.remove()


class _Gate:
    """Stands before a method of one object, and lets calls through unless there is a refusal.

    Somebody may have put a function of his own there before, or put one around the gate. The first comes back when the
    gate is removed. Under the second a gate stays, open.
    """

    def __init__(self, llm_engine: Any, name: str) -> None:
        self._llm_engine = llm_engine
        self._name = name
        self._was_replaced = name in vars(llm_engine)
        self._original = getattr(llm_engine, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if reason := getattr(self._llm_engine, _REFUSAL):
            raise RuntimeError(
                f"This engine must not generate: {reason}. Push the weights with hf_nvfp4_qat.rollout.sync.sync."
            )
        return self._original(*args, **kwargs)

    def remove(self) -> None:
        """Put back what was there before."""
        if self._was_replaced:
            setattr(self._llm_engine, self._name, self._original)
        else:
            delattr(self._llm_engine, self._name)


class _EnginePlan:
    """What was worked out for one engine and one layout: where tensors go, and how the next push gets there."""

    def __init__(self, worker: Any, stream: RolloutStream) -> None:
        if worker.model_config.dtype != torch.bfloat16:
            raise ValueError(
                f"Decoded NVFP4 weights are exact in bfloat16; the engine computes in {worker.model_config.dtype}. "
                'Make it with dtype="bfloat16".'
            )
        if stream.quantizes_input:
            check_kernel(worker)
        self._worker = worker
        self.layout = stream.layout
        self.by_tensor: dict[str, list[Placement]] = {}
        for placement in place_tensors(worker, stream.layout, stream.experts):
            self.by_tensor.setdefault(placement.tensor, []).append(placement)
        self._replay: Replay | None = Replay(worker, self.by_tensor) if stream.is_stacked else None
        # vLLM's own loaders do not take stacked experts, so these must go by copies.
        self.is_stacked = self._replay is not None and self._replay.is_possible

    def placements(self, source: Source) -> list[Placement]:
        """Where the weight `source` goes, of a quantized one its codes; as regions of all of it."""
        if not source.is_quantized:
            return self.by_tensor.get(source.name, [])
        if not isinstance(source, ExpertsSource) or self.is_stacked:
            return self.by_tensor.get(f"{layer_of(source.name)}.{PACKED}", [])
        return [
            replace(placement, source=((part.expert, part.expert + 1), (start + first, start + last), columns))
            for part in source.parts
            for placement in self.by_tensor.get(f"{layer_of(part.name)}.{PACKED}", [])
            if placement.source is not None
            for start in [part.rows.start]
            for (first, last), columns in [placement.source]
        ]

    def load(self, tensors: Iterator[NamedTensor], layout: Sequence[TensorLayout]) -> None:
        """The first push, and any after a failure, go through vLLM's loaders; the others repeat their copies.

        Stacked experts are always copied.
        """
        replay, self._replay = self._replay, None
        if self.is_stacked:
            replay = replay or Replay(self._worker, self.by_tensor)
        if replay is not None and replay.is_possible:
            replay.load(tensors, layout)
        else:
            load_tensors(self._worker, tensors, layout)
        self._replay = replay or Replay(self._worker, self.by_tensor)


def _plan(worker: Any, stream: RolloutStream) -> _EnginePlan:
    """The engine's plan, made and checked once, and again if the stream changes; it lives and dies with the worker.

    Experts go stacked where they can.
    """
    plan = getattr(worker, _PLAN, None)
    stream.stack_experts(plan is None or plan.is_stacked)
    if plan is None or plan.layout != stream.layout:
        plan = _EnginePlan(worker, stream)
        if stream.is_stacked and not plan.is_stacked:
            stream.stack_experts(False)
            plan = _EnginePlan(worker, stream)
        setattr(worker, _PLAN, plan)
    return plan


def _wait_for_device(worker: Any) -> None:
    device = torch.device(worker.device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
