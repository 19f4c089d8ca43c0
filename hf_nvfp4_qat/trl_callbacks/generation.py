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
from functools import wraps
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import broadcast_object_list
from packaging.version import Version
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_nvfp4_qat.modules.global_scale import weight_version
from hf_nvfp4_qat.rollout.engine import kernel_name
from hf_nvfp4_qat.rollout.server import check_alignment, check_server, start_command, with_start_command
from hf_nvfp4_qat.rollout.stream import NamedTensor, RolloutStream
from hf_nvfp4_qat.rollout.sync import (
    EngineCheck,
    SyncReport,
    allow_to_generate,
    check,
    engine_arguments_of,
    prepare,
    refuse_to_generate,
    sync,
    worker_of,
)
from hf_nvfp4_qat.rollout.vllm_versions import vllm_version
from hf_nvfp4_qat.trl_callbacks.metrics import WeightSample

logger = logging.getLogger(__name__)

OLDEST_TRL = Version("1.16.0")


class Rollout(Protocol):
    """What a marked model brings: options, and what to call when TRL has built its engine and after each push."""

    engine_kwargs: dict[str, Any]
    check_every: int

    def adopt(self, generation: "NVFP4Generation") -> None:
        """Take the generation of the marked model."""

    def pushed(self, generation: "NVFP4Generation") -> None:
        """A push has succeeded."""


_marked: WeakKeyDictionary[nn.Module, Rollout] = WeakKeyDictionary()

_num_optimizer_steps = [0]
_optimizer_hook: Any = None


def _count_optimizer_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    _num_optimizer_steps[0] += 1


def mark(model: nn.Module, rollout: Rollout) -> None:
    """Have TRL roll out on the packed weights of `model`, from the moment it builds an engine for it.

    Raises:
        ValueError: a TRL version without the seam this needs.
    """
    _wrap_engine_construction()
    global _optimizer_hook
    if _optimizer_hook is None:
        _optimizer_hook = register_optimizer_step_post_hook(_count_optimizer_step)
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
            generation = NVFP4Generation(self, rollout)
            generation.build(lambda: original(self))
            rollout.adopt(generation)

    _init_vllm.nvfp4 = True  # type: ignore[attr-defined]
    VLLMGeneration._init_vllm = _init_vllm


class NVFP4Generation:
    """One ``VLLMGeneration`` of TRL, made to roll out on packed weights.

    Attributes:
        trl: TRL's object; its ``sync_weights``, ``generate`` and, for a server, ``_iter_named_params`` are replaced.
        last_report, last_check: of the last push; in server mode there is no check.
        num_pushes: that succeeded.
        sample: weight statistics of the last push.
    """

    def __init__(self, trl_generation: Any, rollout: Rollout) -> None:
        self.trl = trl_generation
        self._rollout = rollout
        self.num_pushes = 0
        self.sample = WeightSample()
        self.last_report: SyncReport | None = None
        self.last_check: EngineCheck | None = None
        self.kernel = ""
        self.num_packed = 0
        self._push_of_trl = trl_generation.sync_weights
        self._generate_of_trl = trl_generation.generate
        self._push: Callable[[], None]
        self._stream: RolloutStream | None = None
        self._failure: Exception | None = None
        # Why generation is refused, and the state of the weights that the engine has.
        self._refusal = "no weights were pushed yet"
        self._pushed_state: tuple[int, list[tuple[int, int, int]]] = (-1, [])

    def build(self, original: Any) -> None:
        """Build TRL's engine or connect to its server, the NVFP4 way.

        Raises:
            ValueError: FSDP1, ZeRO, a server without NVFP4 or with another model, an engine without NVFP4.
        """
        vllm_version()
        if self.trl._dist.fsdp_version == 1:
            raise ValueError(
                "NVFP4 rollouts need FSDP2: TRL loses track of the root of an FSDP1 model. Set fsdp_version: 2."
            )
        if self.trl._dist.zero_stage:
            raise ValueError(
                "NVFP4 QAT does not work with DeepSpeed ZeRO yet: it writes weights in ways that leave their global "
                f"scales behind; got stage {self.trl._dist.zero_stage}. Use FSDP2, or plain data parallelism."
            )
        stream = RolloutStream(self.trl.model)
        self.num_packed = stream.num_packed
        if self.trl.mode == "server":
            self._connect(original, stream)
        else:
            with _engine_made_with(self._rollout.engine_kwargs, engine_arguments_of(stream)):
                original()
            self._take_over_engine(stream)
        self.trl.sync_weights = self._push_and_remember
        self.trl.generate = self._generate

    def _take_over_engine(self, stream: RolloutStream) -> None:
        llm = self.trl.llm
        worker = worker_of(llm)
        served = type(worker.model_runner.get_model()).__name__
        if served.startswith("Transformers"):
            raise ValueError(
                f"vLLM has no implementation of its own for this model and runs it through {served}, which changes the "
                "class of the model in training too, in the same process. Use server mode."
            )
        self.kernel = kernel_name(worker)
        if not self.kernel:
            raise ValueError(
                "The engine runs no layer in NVFP4; vLLM ignored the configuration of the rollouts. Leave "
                "`quantization` and `hf_overrides` out of `engine_kwargs`."
            )
        refuse_to_generate(llm, self._refusal)
        if not self.trl.enable_sleep_mode:
            # While nothing is lost yet. A sleeping engine has no weights to look at before the first push.
            prepare(llm, stream)
        self._push = self._push_into_engine

    def _connect(self, original: Any, stream: RolloutStream) -> None:
        trl = self.trl
        if stream.quantizes_input:
            raise ValueError(
                "The model trains with NVFP4 inputs (W4A4), and a server does not tell whether its kernel quantizes "
                "them: GPUs before Blackwell leave it out. Use colocate mode, or train with `activations='bf16'`."
            )
        config = stream.quantization_config
        base_url = trl.server_base_url or f"http://{trl.server_host}:{trl.server_port}"
        command = start_command(trl.model.name_or_path, config, base_url, stream.tied_settings)
        check_alignment(stream.layout)
        if trl.accelerator.is_main_process:
            with with_start_command(command):
                check_server(base_url, trl.model, config, timeout=trl.server_timeout)
        with with_start_command(command):
            original()
        self.kernel = "in the server"
        trl._weight_metadata = _metadata(stream)
        trl._iter_named_params = self._tensors_for_server
        self._push = self._push_to_server

    def _push_and_remember(self) -> None:
        """Replaces TRL's ``sync_weights``. Generation is refused until it has succeeded."""
        self._refusal = "its last weight push failed"
        self.sample.start()
        state = weights_state(self.trl.model)
        self._push()
        self._pushed_state = state
        self._refusal = ""
        self.num_pushes += 1
        self._rollout.pushed(self)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces TRL's ``generate``, with the weights of this moment.

        TRL pushes when its step counter moves. Weights also move without: a second ``train()``, a checkpoint loaded
        between two evaluations, an average swapped in.
        """
        if not self._refusal and weights_state(self.trl.model) != self._pushed_state:
            self.trl.sync_weights()
        if self._refusal and not (self.trl.mode == "colocate" and getattr(self.trl, "_llm_weights_sleeping", False)):
            raise RuntimeError(f"vLLM must not generate: {self._refusal}.")
        try:
            return self._generate_of_trl(*args, **kwargs)
        finally:
            if self.trl.mode == "colocate" and self.trl.enable_sleep_mode:
                refuse_to_generate(self.trl.llm, "sleep mode discarded its weights")

    def _push_into_engine(self) -> None:
        """Wake the weights, push, and prove the first pushes and every few more."""
        trl = self.trl
        if trl.enable_sleep_mode:
            from trl.generation.vllm_generation import empty_cache

            refuse_to_generate(trl.llm, "sleep mode discarded its weights")
            empty_cache()
            trl.llm.wake_up(tags=["weights"])
        self.last_report = sync(trl.llm, trl.model, observe=self.sample.observe)
        every = self._rollout.check_every
        # The second push is the first that repeats recorded copies.
        if self.num_pushes < 2 or (every and self.num_pushes % every == 0):
            refuse_to_generate(trl.llm, "its weights were not compared with the trainer's yet")
            self.last_check = check(trl.llm, trl.model)
            if not self.last_check.ok:
                self._refuse_different(self.last_check)
            if skipped := self.last_check.not_compared:
                logger.warning(
                    "%d weights could not be compared with the engine's, since vLLM rearranges them while it loads "
                    "them; the first is %s.",
                    len(skipped),
                    skipped[0],
                )
            allow_to_generate(trl.llm)
        trl._llm_weights_sleeping = False

    def _refuse_different(self, found: EngineCheck) -> None:
        name, count = next(iter(found.different.items()))
        reason = (
            f"it does not compute with the weights in training: {len(found.different)} of them differ, the first is "
            f"{name} with {count} values"
        )
        self._refusal = reason
        refuse_to_generate(self.trl.llm, reason)
        raise RuntimeError(f"vLLM took the push, but {reason} (kernel {self.kernel}, vLLM {vllm_version()}).")

    def _push_to_server(self) -> None:
        start = time.perf_counter()
        # Here, and not in the generator: the server would wait for ever for tensors that an error keeps back.
        stream = self._stream = RolloutStream(self.trl.model)
        if _metadata(stream) != self.trl._weight_metadata:
            raise ValueError(
                "The model's tensors changed since the server was told of them. Restart trainer and server."
            )
        self._failure = None
        try:
            self._push_of_trl()
        except Exception as error:
            self._failure = error
        (failure,) = broadcast_object_list([self._failure and f"{type(self._failure).__name__}: {self._failure}"])
        if failure:
            self._refusal = f"the last push of weights to the server failed half-way ({failure})"
            raise RuntimeError(
                f"The push of weights to the server failed half-way: {failure} The server holds some new weights, "
                "and is not asked to generate until a push succeeds."
            ) from self._failure
        self.last_report = SyncReport(
            seconds=time.perf_counter() - start,
            num_bytes=stream.num_bytes,
            num_bf16_bytes=stream.num_bf16_bytes,
            num_packed=stream.num_packed,
            num_tensors=len(stream.layout),
        )

    def _tensors_for_server(self) -> Iterator[NamedTensor]:
        """Replaces TRL's parameter generator.

        The server waits for everything that was announced, and the trainer for the server. So after an error the rest
        is sent as zeros, and the error is raised when the transfer is over.
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
            for item in stream.layout[num_sent:]:
                yield item.name, torch.zeros(item.shape, dtype=item.dtype, device=self.trl.accelerator.device)


def weights_state(model: nn.Module) -> tuple[int, list[tuple[int, int, int]]]:
    """What changes when a weight is written or replaced.

    Identity, address and version counter of every tensor, and the number of optimizer steps taken in this process:
    fused optimizers write without counting.
    """
    tensors = [
        getattr(tensor, "_local_tensor", tensor)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        # Global scales are refreshed by every push, and follow from the weights; those of inputs do not.
        if tensor.numel() > 1 or name.endswith("input_amax")
    ]
    versions = [(id(tensor), tensor.data_ptr(), weight_version(tensor)) for tensor in tensors]
    return _num_optimizer_steps[0], versions


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
        return original(*args, **{**kwargs, **given, **required, "hf_overrides": overrides})

    vllm_generation.LLM = make_engine
    try:
        yield
    finally:
        vllm_generation.LLM = original
