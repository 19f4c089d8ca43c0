"""Push a model's packed weights into an engine of this process, and prove that they arrived.

    LLM(name, **engine_arguments(model))    an engine that waits for its first push

    sync(engine, model)     every weight, every time; the engine then computes with exactly the weights in training
    check(engine, model)    read the engine's weights back through its own GEMMs and compare them bit for bit

An engine that has not been filled yet, or whose last push failed half-way, refuses to generate. A push empties the
engine's caches first: what they hold was computed with the old weights.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_nvfp4_qat.checkpoint.sources import ExpertsSource, LinearSource, PlainSource, Source
from hf_nvfp4_qat.distributed.failures import failing_together, failures_of_all, sharding_groups
from hf_nvfp4_qat.formats.names import INPUT_GLOBAL_SCALE, PACKED, layer_of
from hf_nvfp4_qat.numerics.quantize import fake_quantize_unchecked, global_decode_scale_of_amax
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor
from hf_nvfp4_qat.rollout.engine import Engine, engine_kind, engine_of
from hf_nvfp4_qat.rollout.placement import Placement, Region, is_compared, slices
from hf_nvfp4_qat.rollout.report import EngineCheck, SyncReport
from hf_nvfp4_qat.rollout.stream import RolloutStream


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
    start = time.perf_counter()
    stream = RolloutStream(model)
    groups = sharding_groups(model)  # after the stream, which puts shards in place of gathered weights
    with failing_together(groups):
        receiver = engine_of(engine)
        receiver.place(stream)
        receiver.reset_caches(restart_requests=restart_requests)
    failure: Exception | None = None
    try:
        receiver.push(stream.tensors(observe, fresh=False), stream.layout)
    except Exception as error:
        failure = error
        stream.take_part()
    except BaseException as error:
        receiver.refuse(f"its last weight push was interrupted ({type(error).__name__})")
        raise
    failures = failures_of_all(failure, groups)
    if failures:
        receiver.refuse(f"its last weight push failed half-way ({failures[0]})")
        raise RuntimeError(
            f"The push of weights into {receiver.name} failed half-way: {failures[0]} The engine holds some new and "
            "some old weights and refuses to generate until a push succeeds."
        ) from failure
    receiver.allow()
    return stream.report(time.perf_counter() - start)


def check(engine: Any, model: nn.Module) -> EngineCheck:
    """Compare the engine's weights, as its GEMMs compute with them, with the trainer's dequantized ones, bit for bit.

    With NVFP4 inputs the engine's input scales are compared too. What is not quantized is compared after its rounding
    to bfloat16, in which the engine computes.

    Args, Raises: as ``sync``; if sharded, every process calls.
    """
    stream = RolloutStream(model)
    with failing_together(sharding_groups(model)):
        try:
            return _compare(engine_of(engine), stream)
        except Exception:
            stream.take_part()
            raise


def _compare(engine: Engine, stream: RolloutStream) -> EngineCheck:
    by_tensor, read = engine.place(stream), engine.reader()
    different: dict[str, int] = {}
    not_compared = []
    num_weights = 0
    for source, weight in stream.weights():
        placements = [
            placement
            for placement in _placements(source, by_tensor, is_stacked=stream.is_stacked)
            if is_compared(placement)
        ]
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
            found = read(placement)
            expected = weight[slices(placement.source, widen=1 + source.is_quantized)].to(found.device, found.dtype)
            num_different += int((found.view(expected.shape) != expected).sum())
            num_found[placement.source] = found.numel()
        if engine.is_whole:
            num_different += weight.numel() - sum(num_found.values())
        if isinstance(source, LinearSource) and source.input_amax is not None:
            expected = 1 / global_decode_scale_of_amax(source.input_amax())
            for placement in by_tensor[f"{layer_of(source.name)}.{INPUT_GLOBAL_SCALE}"]:
                num_different += int((read(placement) != expected).sum())
        if num_different:
            different[source.name] = num_different
        num_weights += sum(num_found.values())
    return EngineCheck(num_weights, different, tuple(not_compared))


def _placements(
    source: Source, by_tensor: Mapping[str, Sequence[Placement]], *, is_stacked: bool
) -> Sequence[Placement]:
    """Where the weight `source` goes, of a quantized one its codes; as regions of all of it."""
    if not source.is_quantized:
        return by_tensor.get(source.name, [])
    if not isinstance(source, ExpertsSource) or is_stacked:
        return by_tensor.get(f"{layer_of(source.name)}.{PACKED}", [])
    return [
        replace(placement, source=((part.expert, part.expert + 1), (start + first, start + last), columns))
        for part in source.parts
        for placement in by_tensor.get(f"{layer_of(part.name)}.{PACKED}", [])
        if placement.source is not None
        for start in [part.rows.start]
        for (first, last), columns in [placement.source]
    ]


def engine_arguments(model: nn.Module, engine: str = "vllm") -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for an engine that is to be filled by ``sync``.

    ``LLM("path/or/id", **engine_arguments(model))`` reads the unquantized model's config and tokenizer, and no weights.
    Set VLLM_ENABLE_V1_MULTIPROCESSING=0 first, so that the engine lives in this process.

    Args:
        model: the QAT model.
        engine: the kind of engine.
    """
    return engine_kind(engine).arguments(RolloutStream(model))
