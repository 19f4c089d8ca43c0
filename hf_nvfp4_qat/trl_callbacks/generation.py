"""NVFP4 in TRL's ``VLLMGeneration``: the engine it builds, and the weights it pushes.

    TRL                                             with an NVFP4 model
    ---------------------------------------------   -----------------------------------------------------------------
    LLM(model.name_or_path, ...)                    the same folder, with the NVFP4 configuration and no weights
    sync_weights, colocate: load_weights(bf16)      one packed push through vLLM's own reload (``rollout.sync``)
    sync_weights, server: a stream of fp32/bf16     the same call, fed by our packed stream
    generate                                        the same, after a push if weights have moved, not after a failure

TRL builds the engine inside the trainer's constructor and hands out no reference, so ``VLLMGeneration._init_vllm`` is
wrapped, once; models that no callback has marked pass through untouched. All else is replaced on the one instance.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn

from hf_nvfp4_qat.distributed.failures import failing_together, failures_of_all
from hf_nvfp4_qat.distributed.gather import reshard
from hf_nvfp4_qat.modules.swap import weights_epoch
from hf_nvfp4_qat.rollout.report import EngineCheck, SyncReport
from hf_nvfp4_qat.rollout.stream import NamedTensor, RolloutStream
from hf_nvfp4_qat.rollout.sync import check, sync
from hf_nvfp4_qat.rollout.vllm.engine import VLLMEngine
from hf_nvfp4_qat.rollout.vllm.reading import kernel_name
from hf_nvfp4_qat.rollout.vllm.server import (
    check_alignment,
    check_server,
    reset_server_caches,
    start_command,
    with_start_command,
)
from hf_nvfp4_qat.rollout.vllm.versions import engine_arguments, vllm_version
from hf_nvfp4_qat.trl_callbacks.metrics import WeightSample, record
from hf_nvfp4_qat.trl_callbacks.trl_versions import check_trl, private, sharding_of, weights_sleep

logger = logging.getLogger(__name__)

_ASLEEP = "sleep mode discarded its weights"


Build = Callable[[Any, Callable[[], None]], None]
"""Makes the engine of a ``VLLMGeneration``, given TRL's own way to make it."""

# Models for which TRL has not built an engine yet.
_marked: WeakKeyDictionary[nn.Module, Build] = WeakKeyDictionary()


def mark(model: nn.Module, build: Build) -> None:
    """Have TRL call `build` when it would build an engine for `model`.

    Raises:
        ValueError: a TRL version without the seam this needs.
    """
    _wrap_engine_construction()
    _marked[model] = build


def _wrap_engine_construction() -> None:
    check_trl()
    from trl.generation.vllm_generation import VLLMGeneration

    original = VLLMGeneration._init_vllm
    if getattr(original, "nvfp4", False):
        return

    @wraps(original)
    def _init_vllm(self: Any) -> None:
        # Taken out: what it builds refers to the model, and a weak dictionary would keep both for ever.
        build = _marked.pop(self.model, None)
        if build is None:
            original(self)
        else:
            build(self, lambda: original(self))

    _init_vllm.nvfp4 = True  # type: ignore[attr-defined]
    VLLMGeneration._init_vllm = _init_vllm


class NVFP4Generation:
    """One ``VLLMGeneration`` of TRL, made to roll out on packed weights, and what is known of its pushes.

    Attributes:
        trl_generation: TRL's object; its ``sync_weights``, ``generate`` and, for a server, ``_iter_named_params`` are
            replaced.
        last_report, last_check: of the last push; in server mode there is no check.
        num_pushes: that succeeded.
        sample: weight statistics of the last push.
    """

    def __init__(
        self,
        trl_generation: Any,
        find_trainer: Callable[[], Any] = lambda: None,
        *,
        check_every: int = 100,
        engine_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Before ``build``.

        Args:
            trl_generation: the ``VLLMGeneration`` that is being made.
            find_trainer: the trainer whose metrics get what is measured, if it is still there.
            check_every, engine_kwargs: as for ``NVFP4RolloutCallback``.
        """
        self.trl_generation = trl_generation
        self._find_trainer = find_trainer
        self._check_every = check_every
        self._engine_kwargs = engine_kwargs or {}
        self.num_pushes = 0
        self.sample = WeightSample()
        self.last_report: SyncReport | None = None
        self.last_check: EngineCheck | None = None
        self.kernel = ""
        self.num_packed = 0
        self._engine: VLLMEngine
        self._push_of_trl = trl_generation.sync_weights
        self._generate_of_trl = trl_generation.generate
        self._push: Callable[[], None]
        self._stream: RolloutStream | None = None
        self._failure: Exception | None = None
        self._groups: list[Any] = []
        # Why generation is refused, and the epoch of the weights that the engine has.
        self._refusal = "no weights were pushed yet"
        self._pushed_epoch = -1

    def build(self, original: Callable[[], None]) -> None:
        """Build TRL's engine or connect to its server, the NVFP4 way.

        Raises:
            ValueError: FSDP1, ZeRO, a server without NVFP4 or with another model, an engine without NVFP4.
        """
        vllm_version()
        fsdp_version, zero_stage = sharding_of(self.trl_generation)
        if fsdp_version == 1:
            raise ValueError(
                "NVFP4 rollouts need FSDP2: TRL loses track of the root of an FSDP1 model. Set fsdp_version: 2."
            )
        if zero_stage:
            raise ValueError(
                f"NVFP4 rollouts do not work with DeepSpeed ZeRO yet; got stage {zero_stage}. Training without "
                "rollouts does. Use FSDP2, or plain data parallelism."
            )
        if self.trl_generation.accelerator.num_processes > 1 and (fsdp_version or self.trl_generation.mode == "server"):
            # Every process pushes at the same time, and none can push without the others.
            self._groups = [dist.group.WORLD]
        stream = RolloutStream(self.trl_generation.model)
        self.num_packed = stream.num_packed
        if self.trl_generation.mode == "server":
            self._connect(original, stream)
        else:
            with _engine_made_with(self._engine_kwargs, VLLMEngine.arguments(stream)):
                original()
            self._take_over_engine(stream)
        self.trl_generation.sync_weights = self._push_and_remember
        self.trl_generation.generate = self._generate

    def _take_over_engine(self, stream: RolloutStream) -> None:
        weights_sleep(self.trl_generation)  # raises now what would raise later
        engine = self._engine = VLLMEngine(self.trl_generation.llm)
        self.kernel = kernel_name(engine.worker)
        if not self.kernel:
            raise ValueError(
                "The engine runs no layer in NVFP4; vLLM ignored the configuration of the rollouts. Leave "
                "`quantization` and `hf_overrides` out of `engine_kwargs`."
            )
        engine.refuse(self._refusal)
        if not self.trl_generation.enable_sleep_mode:
            # While nothing is lost yet. A sleeping engine has no weights to look at before the first push.
            engine.place(stream)
        self._push = self._push_into_engine

    def _connect(self, original: Callable[[], None], stream: RolloutStream) -> None:
        trl_generation = self.trl_generation
        if stream.quantizes_input:
            raise ValueError(
                "The model trains with NVFP4 inputs (W4A4), and a server does not tell whether its kernel quantizes "
                "them: GPUs before Blackwell leave it out. Use colocate mode, or train with `activations='bf16'`."
            )
        private(trl_generation, "_weight_metadata")  # raises now what would raise later
        config = stream.quantization_config
        base_url = trl_generation.server_base_url or f"http://{trl_generation.server_host}:{trl_generation.server_port}"
        arguments = engine_arguments(quantizes_input=False, has_experts=bool(stream.experts))
        command = start_command(trl_generation.model.name_or_path, config, base_url, stream.tied_settings, arguments)
        check_alignment(stream.layout)
        if trl_generation.accelerator.is_main_process:
            with with_start_command(command):
                check_server(base_url, trl_generation.model, config, timeout=trl_generation.server_timeout)
        with with_start_command(command):
            original()
        self.kernel = "in the server"
        trl_generation._weight_metadata = _metadata(stream)
        trl_generation._iter_named_params = self._tensors_for_server
        self._push = partial(self._push_to_server, base_url)

    def _push_and_remember(self) -> None:
        """Replaces TRL's ``sync_weights``. Generation is refused until it has succeeded."""
        self._refusal = "its last weight push failed"
        self.sample.start()
        reshard(self.trl_generation.model)  # what FSDP2 has gathered is not what it shards
        epoch = weights_epoch(self.trl_generation.model)
        self._push()
        self._pushed_epoch = epoch
        self._refusal = ""
        self.num_pushes += 1
        trainer, report = self._find_trainer(), self.last_report
        if trainer is not None and report is not None:
            record(
                trainer,
                sync_seconds=report.seconds,
                sync_mib=report.num_bytes / 2**20,
                compression=report.compression,
                **self.sample.metrics(),
            )

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces TRL's ``generate``, with the weights of this moment.

        TRL pushes when its step counter moves. Weights also move without: a second ``train()``, a checkpoint loaded
        between two evaluations, an average swapped in.
        """
        if self._is_outdated():
            self.trl_generation.sync_weights()
        if self._refusal and not (self.trl_generation.mode == "colocate" and weights_sleep(self.trl_generation)):
            raise RuntimeError(f"vLLM must not generate: {self._refusal}.")
        try:
            return self._generate_of_trl(*args, **kwargs)
        finally:
            if self.trl_generation.mode == "colocate" and self.trl_generation.enable_sleep_mode:
                self._engine.refuse(_ASLEEP)

    def _is_outdated(self) -> bool:
        """Whether the weights may have changed, on any process, since they were pushed; all processes ask together."""
        is_outdated = not self._refusal and weights_epoch(self.trl_generation.model) != self._pushed_epoch
        accelerator = self.trl_generation.accelerator
        if accelerator.num_processes == 1:
            return is_outdated
        return bool(accelerator.reduce(torch.tensor(float(is_outdated), device=accelerator.device)).item())

    def _push_into_engine(self) -> None:
        """Wake the weights, push, and prove the first pushes and every few more."""
        trl_generation, engine = self.trl_generation, self._engine
        with failing_together(self._groups):
            if trl_generation.enable_sleep_mode:
                from trl.generation.vllm_generation import empty_cache

                engine.refuse(_ASLEEP)
                empty_cache()
                trl_generation.llm.wake_up(tags=["weights"])
        self.last_report = sync(trl_generation.llm, trl_generation.model, observe=self.sample.observe)
        every = self._check_every
        # The second push is the first that repeats recorded copies.
        if self.num_pushes < 2 or (every and self.num_pushes % every == 0):
            engine.refuse("its weights were not compared with the trainer's yet")
            self.last_check = check(trl_generation.llm, trl_generation.model)
            with failing_together(self._groups):
                if not self.last_check.ok:
                    self._refuse_different(self.last_check)
            if skipped := self.last_check.not_compared:
                logger.warning(
                    "%d weights could not be compared with the engine's, since vLLM rearranges them while it loads "
                    "them; the first is %s.",
                    len(skipped),
                    skipped[0],
                )
            engine.allow()
        trl_generation._llm_weights_sleeping = False

    def _refuse_different(self, found: EngineCheck) -> None:
        name, count = next(iter(found.different.items()))
        reason = (
            f"it does not compute with the weights in training: {len(found.different)} of them differ, the first is "
            f"{name} with {count} values"
        )
        self._refusal = reason
        self._engine.refuse(reason)
        raise RuntimeError(f"vLLM took the push, but {reason} (kernel {self.kernel}, vLLM {vllm_version()}).")

    def _push_to_server(self, base_url: str) -> None:
        start = time.perf_counter()
        # Here, and not in the generator: the server would wait for ever for tensors that an error keeps back.
        stream = self._stream = RolloutStream(self.trl_generation.model)
        with failing_together(self._groups):
            if _metadata(stream) != self.trl_generation._weight_metadata:
                raise ValueError(
                    "The model's tensors changed since the server was told of them. Restart trainer and server."
                )
        self._failure = None
        try:
            self._push_of_trl()
            if self.trl_generation.accelerator.is_main_process:
                # TRL asks for this too, and does not look at the answer.
                reset_server_caches(base_url, timeout=self.trl_generation.server_timeout)
        except Exception as error:
            # The error of the packing comes first: it may be why the transfer fails too.
            self._failure = self._failure or error
            stream.take_part()
        if failures := failures_of_all(self._failure, self._groups):
            self._refusal = f"the last push of weights to the server failed half-way ({failures[0]})"
            raise RuntimeError(
                f"The push of weights to the server failed half-way: {failures[0]} The server holds some new weights, "
                "and is not asked to generate until a push succeeds."
            ) from self._failure
        self.last_report = stream.report(time.perf_counter() - start)

    def _tensors_for_server(self) -> Iterator[NamedTensor]:
        """Replaces TRL's parameter generator.

        The server waits for everything that was announced, the trainer for the server, and each process for the others.
        So after an error this process goes on to take part, sends the rest as zeros, and the error is raised when the
        transfer is over.
        """
        stream = self._stream
        assert stream is not None
        num_sent = 0
        try:
            for name, tensor in stream.tensors(self.sample.observe):
                yield name, tensor
                num_sent += 1
        except Exception as error:
            logger.error("Packing weights for the server failed: %s", error)
            self._failure = error
            stream.take_part()
            device = self.trl_generation.accelerator.device
            for item in stream.layout[num_sent:]:
                yield item.name, torch.zeros(item.shape, dtype=item.dtype, device=device)


def _metadata(stream: RolloutStream) -> list[tuple[str, str, list[int]]]:
    """As TRL announces tensors to a server."""
    return [(item.name, item.dtype_name, list(item.shape)) for item in stream.layout]


@contextmanager
def _engine_made_with(given: dict[str, Any], required: dict[str, Any]) -> Iterator[None]:
    """Add what TRL has no argument for to the engine that it builds in this context."""
    from trl.generation import vllm_generation

    original = vllm_generation.LLM

    def make_engine(*args: Any, **kwargs: Any) -> Any:
        overrides = {**(given.get("hf_overrides") or {}), **required["hf_overrides"]}
        fixed = {name: required[name] for name in ("load_format", "dtype")}
        return original(*args, **{**kwargs, **required, **given, **fixed, "hf_overrides": overrides})

    vllm_generation.LLM = make_engine
    try:
        yield
    finally:
        if vllm_generation.LLM is make_engine:  # else somebody has put his own in its place
            vllm_generation.LLM = original
