"""A ``vllm.LLM`` of this process as an engine that takes packed weights.

What it holds for later pushes lives on vLLM's worker, and dies with it. Refusals live on its ``llm_engine``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from hf_nvfp4_qat.rollout.engine import Engine
from hf_nvfp4_qat.rollout.placement import Placement
from hf_nvfp4_qat.rollout.plan import TensorLayout
from hf_nvfp4_qat.rollout.stream import NamedTensor, RolloutStream
from hf_nvfp4_qat.rollout.vllm.reading import EngineReader, check_kernel
from hf_nvfp4_qat.rollout.vllm.replay import EnginePlan
from hf_nvfp4_qat.rollout.vllm.versions import (
    engine_arguments,
    refuse_transformers_backend,
    register_empty_loader,
    vllm_version,
)

# Attribute of vLLM's worker.
_PLAN = "nvfp4_rollout_plan"
# Attribute of vLLM's `llm_engine`: why it must not generate.
_REFUSAL = "nvfp4_refusal"


class VLLMEngine(Engine):
    """A ``vllm.LLM`` and its worker."""

    name = "vLLM"

    def __init__(self, llm: Any) -> None:  # noqa: D102
        vllm_version()
        self._llm_engine: Any = getattr(llm, "llm_engine", None)
        self.worker = worker_of(llm)

    @staticmethod
    def is_mine(llm: Any) -> bool:  # noqa: D102
        return hasattr(llm, "llm_engine")

    @staticmethod
    def arguments(stream: RolloutStream) -> dict[str, Any]:  # noqa: D102
        refuse_transformers_backend(stream.architecture)
        return {
            **engine_arguments(quantizes_input=stream.quantizes_input, has_experts=bool(stream.experts)),
            "hf_overrides": {"quantization_config": stream.quantization_config, **stream.tied_settings},
            "load_format": register_empty_loader(),
            # What weights decode to, exactly.
            "dtype": "bfloat16",
        }

    @property
    def is_whole(self) -> bool:  # noqa: D102
        return self.worker.parallel_config.tensor_parallel_size == 1

    def place(self, stream: RolloutStream) -> Mapping[str, Sequence[Placement]]:  # noqa: D102
        plan = getattr(self.worker, _PLAN, None)
        stream.stack_experts(plan is None or plan.is_stacked)
        if plan is None or plan.layout != stream.layout:
            self._refuse_unfit(stream)
            plan = EnginePlan(self.worker, stream)
            if stream.is_stacked and not plan.is_stacked:
                stream.stack_experts(False)
                plan = EnginePlan(self.worker, stream)
            setattr(self.worker, _PLAN, plan)
        return plan.by_tensor

    def _refuse_unfit(self, stream: RolloutStream) -> None:
        dtype = self.worker.model_config.dtype
        if dtype != torch.bfloat16:
            raise ValueError(
                f"Decoded NVFP4 weights are exact in bfloat16; the engine computes in {dtype}. Make it with "
                'dtype="bfloat16".'
            )
        if stream.quantizes_input:
            check_kernel(self.worker)

    def push(self, tensors: Iterable[NamedTensor], layout: Sequence[TensorLayout]) -> None:  # noqa: D102
        getattr(self.worker, _PLAN).load(tensors, layout)
        _wait_for_device(torch.device(self.worker.device))

    def reader(self) -> Callable[[Placement], torch.Tensor]:  # noqa: D102
        return EngineReader(self.worker).read

    def reset_caches(self, *, restart_requests: bool = False) -> None:
        """Prefixes, also those in other stores, and images."""
        num_unfinished = self._llm_engine.get_num_unfinished_requests()
        if num_unfinished and not restart_requests:
            raise ValueError(
                "vLLM's caches hold results of the weights it has, and cannot be emptied while requests are "
                f"unfinished; this engine has {num_unfinished}. Nothing was sent. Let them finish, abort them with "
                "`llm.llm_engine.abort_request`, or let them go on with the new weights: "
                "`sync(..., restart_requests=True)`."
            )
        try:
            is_reset = self._llm_engine.reset_prefix_cache(
                reset_running_requests=restart_requests, reset_connector=True
            )
        except RuntimeError as error:
            raise ValueError(f"{_CACHE_IN_USE} {error}") from error
        if not is_reset:
            raise ValueError(_CACHE_IN_USE)
        self._llm_engine.reset_encoder_cache()

    def refuse(self, reason: str) -> None:  # noqa: D102
        setattr(self._llm_engine, _REFUSAL, reason)
        # On the instance: every way to generate (generate, chat, beam search) adds its requests here. And requests that
        # are there already would go on by steps.
        for name in ("add_request", "step"):
            if not isinstance(getattr(self._llm_engine, name), _Gate):
                setattr(self._llm_engine, name, _Gate(self._llm_engine, name))

    def allow(self) -> None:  # noqa: D102
        setattr(self._llm_engine, _REFUSAL, "")
        for name in ("add_request", "step"):
            while isinstance(gate := getattr(self._llm_engine, name), _Gate):
                gate.remove()


def worker_of(llm: Any) -> Any:
    """vLLM's worker, if it lives in this process.

    Raises:
        ValueError: it does not.
    """
    executor = getattr(getattr(llm, "llm_engine", None), "model_executor", None)
    worker = getattr(executor, "driver_worker", None)
    # The worker is wrapped, to start it in the process where it is to live.
    worker = getattr(worker, "worker", worker)
    if worker is None or not hasattr(worker, "model_runner"):
        raise ValueError(
            f"A push needs a vllm.LLM that runs in this process; got {type(llm).__name__} without one. Set "
            "VLLM_ENABLE_V1_MULTIPROCESSING=0 before the engine is made, or use server mode."
        )
    return worker


_CACHE_IN_USE = (
    "vLLM could not empty its prefix cache, which holds results of the old weights: some of it is still in use. "
    "Nothing was sent. Let the engine finish what it does (`llm.llm_engine.step()`), and push again."
)


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


def _wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
