"""NVFP4 in TRL's ``VLLMGeneration``: the engine it builds, and the weights it pushes.

    TRL                                             with an NVFP4 model
    ---------------------------------------------   -----------------------------------------------------------------
    LLM(model.name_or_path, ...)                    the same folder, with the NVFP4 configuration and no weights
    sync_weights, colocate: load_weights(bf16)      one packed push through vLLM's own reload (``rollout.sync``)
    sync_weights, server: a stream of fp32/bf16     the same call, fed by our packed stream
    generate                                        unchanged; refused while the weights are not the trained ones

TRL builds the engine inside the trainer's constructor and hands out no reference, so ``VLLMGeneration._init_vllm`` is
wrapped, once; models that no callback has marked pass through untouched. All else is replaced on the one instance.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from packaging.version import Version
from torch import nn

from hf_nvfp4_qat.checkpoint.names import quantization_config
from hf_nvfp4_qat.rollout.engine import kernel_name
from hf_nvfp4_qat.rollout.server import check_alignment, check_server, start_command, with_start_command
from hf_nvfp4_qat.rollout.stream import NamedTensor, RolloutStream
from hf_nvfp4_qat.rollout.sync import EngineCheck, SyncReport, check, refuse_to_generate, sync, worker_of
from hf_nvfp4_qat.rollout.vllm_versions import register_empty_loader, vllm_version
from hf_nvfp4_qat.trl_callbacks.metrics import WeightSample

logger = logging.getLogger(__name__)

OLDEST_TRL = Version("1.16.0")


class Rollout(Protocol):
    """What a marked model brings: called back when TRL builds its engine."""

    engine_kwargs: dict[str, Any]

    def adopt(self, generation: "NVFP4Generation") -> None:
        """Take the generation of the marked model."""


_marked: WeakKeyDictionary[nn.Module, Rollout] = WeakKeyDictionary()


def mark(model: nn.Module, rollout: Rollout) -> None:
    """Have TRL roll out on the packed weights of `model`, from the moment it builds an engine for it.

    Raises:
        ValueError: a TRL version without the seam this needs.
    """
    _wrap_engine_construction()
    _marked[model] = rollout


def _wrap_engine_construction() -> None:
    import trl
    from trl.generation.vllm_generation import VLLMGeneration

    original = VLLMGeneration._init_vllm
    if getattr(original, "nvfp4", False):
        return
    if Version(trl.__version__) < OLDEST_TRL or not hasattr(VLLMGeneration, "_iter_named_params"):
        raise ValueError(f"NVFP4 rollouts need TRL {OLDEST_TRL} or newer; {trl.__version__} is installed.")

    @wraps(original)
    def _init_vllm(self: Any) -> None:
        # Taken out: a rollout refers to its model, and a weak dictionary would keep both for ever.
        rollout = _marked.pop(self.model, None)
        if rollout is None:
            original(self)
        else:
            generation = NVFP4Generation(self, rollout.engine_kwargs)
            generation.build(lambda: original(self))
            rollout.adopt(generation)

    _init_vllm.nvfp4 = True  # type: ignore[attr-defined]
    VLLMGeneration._init_vllm = _init_vllm


class NVFP4Generation:
    """One ``VLLMGeneration`` of TRL, made to roll out on packed weights.

    Attributes:
        trl: TRL's object; its ``sync_weights`` and ``_iter_named_params`` are replaced.
        last_report, last_check: of the last push; in server mode there is no check.
        sample: weight statistics of the last push.
    """

    def __init__(self, trl_generation: Any, engine_kwargs: dict[str, Any]) -> None:
        self.trl = trl_generation
        self.engine_kwargs = engine_kwargs
        self.sample = WeightSample()
        self.last_report: SyncReport | None = None
        self.last_check: EngineCheck | None = None
        self.check_next = True
        self._failure: Exception | None = None
        self.kernel = ""
        self.num_packed = 0
        self._pushed_by_trl = trl_generation.sync_weights

    def build(self, original: Any) -> None:
        """Build TRL's engine or connect to its server, the NVFP4 way.

        Raises:
            ValueError: FSDP1, ZeRO-3, a server without NVFP4 or with another model, an engine without NVFP4.
        """
        vllm_version()
        if self.trl._dist.fsdp_version == 1:
            raise ValueError(
                "NVFP4 rollouts need FSDP2: TRL loses track of the root of an FSDP1 model. Set fsdp_version: 2."
            )
        if self.trl._dist.is_zero3:
            raise ValueError(
                "NVFP4 QAT does not work with DeepSpeed ZeRO-3 yet: weights are empty between forwards, and their "
                "global scales cannot be refreshed. Use FSDP2, or plain data parallelism."
            )
        stream = RolloutStream(self.trl.model)
        self.num_packed = stream.num_packed
        config = quantization_config(stream.ignored_layers)
        if self.trl.mode == "server":
            self._connect(original, stream, config)
        else:
            with _engine_arguments(config, self.engine_kwargs):
                original()
            self.kernel = kernel_name(worker_of(self.trl.llm))
            if not self.kernel:
                raise ValueError("The engine runs no layer in NVFP4; vLLM ignored the configuration of the rollouts.")
            refuse_to_generate(self.trl.llm, "no weights were pushed yet, it holds random ones")
            self.trl.sync_weights = self._sync_colocated

    def _connect(self, original: Any, stream: RolloutStream, config: dict[str, Any]) -> None:
        trl = self.trl
        base_url = trl.server_base_url or f"http://{trl.server_host}:{trl.server_port}"
        command = start_command(trl.model.name_or_path, config, base_url)
        check_alignment(stream.layout)
        if trl.accelerator.is_main_process:
            with with_start_command(command):
                check_server(base_url, trl.model, config, timeout=trl.server_timeout)
        with with_start_command(command):
            original()
        self.kernel = "in the server"
        trl._weight_metadata = [
            (item.name, str(item.dtype).removeprefix("torch."), list(item.shape)) for item in stream.layout
        ]
        trl._iter_named_params = self._tensors_for_server
        trl.sync_weights = self._sync_server

    def _sync_colocated(self) -> None:
        """Replaces TRL's ``sync_weights``: wake the weights, push, and prove the first push and every few more."""
        trl = self.trl
        if trl.enable_sleep_mode:
            from trl.generation.vllm_generation import empty_cache

            empty_cache()
            trl.llm.wake_up(tags=["weights"])
        self.last_report = sync(trl.llm, trl.model, observe=self.sample.observe)
        trl._llm_weights_sleeping = False
        if self.check_next:
            self.last_check = check(trl.llm, trl.model)
            if not self.last_check.ok:
                self._refuse_different(self.last_check)

    def _refuse_different(self, found: EngineCheck) -> None:
        name, count = next(iter(found.different.items()))
        reason = (
            f"it does not compute with the weights in training: {len(found.different)} of them differ, the first is "
            f"{name} with {count} values"
        )
        refuse_to_generate(self.trl.llm, reason)
        raise RuntimeError(f"vLLM took the push, but {reason} (kernel {self.kernel}, vLLM {vllm_version()}).")

    def _sync_server(self) -> None:
        import time

        start = time.perf_counter()
        self._failure = None
        self._pushed_by_trl()
        if self._failure is not None:
            self.trl.generate = self._refuse
            raise RuntimeError(
                f"The push of weights to the server failed half-way: {self._failure} The server holds some new weights "
                "and zeros, and is not asked to generate."
            ) from self._failure
        vars(self.trl).pop("generate", None)
        self.last_report = SyncReport(
            seconds=time.perf_counter() - start,
            num_bytes=self._stream.num_bytes,
            num_bf16_bytes=self._stream.num_bf16_bytes,
            num_packed=self._stream.num_packed,
            num_tensors=len(self._stream.layout),
        )

    def _tensors_for_server(self) -> Iterator[NamedTensor]:
        """Replaces TRL's parameter generator.

        The server waits for everything that was announced, and the trainer for the server. So after an error the rest
        is sent as zeros, and the error is raised when the transfer is over.
        """
        stream = self._stream = RolloutStream(self.trl.model)
        announced = [(item.name, str(item.dtype).removeprefix("torch."), list(item.shape)) for item in stream.layout]
        if announced != self.trl._weight_metadata:
            raise ValueError(
                "The model's tensors changed since the server was told of them. Restart trainer and server."
            )
        num_sent = 0
        try:
            for name, tensor in stream.tensors(self.sample.observe):
                yield name, tensor
                num_sent += 1
        except Exception as error:
            logger.error("Packing weights for the server failed: %s", error)
            self._failure = error
            for item in stream.layout[num_sent:]:
                yield item.name, torch.zeros(item.shape, dtype=item.dtype, device=self.trl.accelerator.device)

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"The server must not generate: its last weight push failed half-way ({self._failure}).")


@contextmanager
def _engine_arguments(config: dict[str, Any], engine_kwargs: dict[str, Any]) -> Iterator[None]:
    """Add what TRL has no argument for to the engine that it builds in this context."""
    from trl.generation import vllm_generation

    original = vllm_generation.LLM

    def make_engine(*args: Any, **kwargs: Any) -> Any:
        given = {**kwargs, **engine_kwargs}
        overrides = {**(given.pop("hf_overrides", None) or {}), "quantization_config": config}
        # No weights are read: the first push comes before the first generation. bfloat16: what weights decode to.
        given |= {"hf_overrides": overrides, "load_format": register_empty_loader(), "dtype": "bfloat16"}
        return original(*args, **given)

    vllm_generation.LLM = make_engine
    try:
        yield
    finally:
        vllm_generation.LLM = original
