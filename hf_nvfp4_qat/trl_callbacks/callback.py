"""NVFP4RolloutCallback: one entry in ``callbacks=[...]``, and a TRL trainer rolls out on packed weights."""

import inspect
import logging
from collections.abc import Callable, Iterator
from functools import wraps
from importlib.util import find_spec
from typing import Any
from weakref import ref

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_nvfp4_qat.modules.swap import qat_weights, refresh_global_scales
from hf_nvfp4_qat.quantizer.hf_quantizer import prepare_qat
from hf_nvfp4_qat.rollout.vllm.routing import routing_arguments
from hf_nvfp4_qat.trl_callbacks.generation import NVFP4Generation, mark
from hf_nvfp4_qat.trl_callbacks.metrics import record_mismatch, record_routing

logger = logging.getLogger(__name__)


class NVFP4RolloutCallback(TrainerCallback):
    """Roll out on the packed NVFP4 weights of a QAT model, in TRL's trainers that generate with vLLM.

    ``GRPOTrainer(model, ..., args=GRPOConfig(use_vllm=True), callbacks=[NVFP4RolloutCallback()])``: before each
    generation the engine gets exactly the weights that training computes with, in 4.5 bits each. The callback must be
    in `callbacks` when the trainer is made, because that is when TRL builds its engine.

    Metrics, beside the trainer's own:
        nvfp4/sync_seconds, nvfp4/sync_mib: of a push.
        nvfp4/compression: times fewer bytes than bfloat16.
        nvfp4/weight_error: ``||decoded - master|| / ||master||``, on a sample of rows.
        nvfp4/code_flips: share of 4-bit codes that changed since the last push, on the same sample.
        nvfp4/mismatch_kl: nats per token between sampler and trainer, where TRL computes both log-probabilities.
        nvfp4/masked_fraction: of the sequences (or tokens) that TRL's importance sampling masks out.
        nvfp4/routing_difference: with `routing_every`, share of (generated token, layer) that got another set of
            experts in the engine than in training.
        nvfp4/rerouted_tokens: share of generated tokens with another set in at least one layer.
    """

    def __init__(
        self,
        *,
        check_every: int = 100,
        quantize_ref_model: bool = False,
        routing_every: int = 0,
        engine_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Set up; nothing happens before the trainer is made.

        Args:
            check_every: pushes between two comparisons of the engine's weights with the trainer's, bit for bit. The
                first two are always compared; 0 compares no other. Colocate mode only.
            quantize_ref_model: compute the KL penalty against the reference model with NVFP4 weights.
            routing_every: batches of rollouts between two comparisons of the experts that engine and trainer chose; 0
                compares none. Colocate mode only.
            engine_kwargs: more arguments of ``vllm.LLM`` in colocate mode, which TRL has no option for.

        Raises:
            ValueError: a negative `check_every` or `routing_every`.
        """
        if check_every < 0:
            raise ValueError(f"`check_every` counts pushes; got {check_every}. 0 checks the first two only.")
        if routing_every < 0:
            raise ValueError(f"`routing_every` counts batches of rollouts; got {routing_every}. 0 compares none.")
        self.check_every = check_every
        self.routing_every = routing_every
        self.quantize_ref_model = quantize_ref_model
        self.engine_kwargs = {**(routing_arguments() if routing_every else {}), **(engine_kwargs or {})}
        self.generation: NVFP4Generation | None = None
        self._trainer: ref[Trainer] | None = None
        self._is_idle = False
        if find_spec("trl") is not None:
            _watch_generation()

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the model, before TRL builds the engine.

        Raises:
            ValueError: `model` does not train in NVFP4, or a TRL or vLLM version without what this needs.
        """
        model = kwargs["model"]
        trainer = _calling_trainer(model)
        self._trainer = ref(trainer)
        self.generation, self._is_idle = None, False
        if not getattr(args, "use_vllm", False):
            self._is_idle = True
            logger.warning(
                "NVFP4RolloutCallback does nothing: %s does not generate with vLLM (`use_vllm=True` is not set).",
                type(trainer).__name__,
            )
            return
        if not qat_weights(model):
            raise ValueError(
                f"NVFP4RolloutCallback needs a model that trains in NVFP4; {type(model).__name__} has no QAT layers. "
                "Load it with `quantization_config=NVFP4QATConfig()` or call `prepare_qat(model)`."
            )
        mark(model, self._build)
        _check_before_evaluation(trainer, self)

    def _build(self, trl_generation: Any, original: Callable[[], None]) -> None:
        """Make the engine that TRL is about to make.

        Raises:
            ValueError: as ``NVFP4Generation.build``; `routing_every` with a server, or with a model without experts.
        """
        find_trainer = self._trainer or (lambda: None)
        generation = NVFP4Generation(
            trl_generation, find_trainer, check_every=self.check_every, engine_kwargs=self.engine_kwargs
        )
        generation.build(original)
        self.generation = generation
        trainer = find_trainer()
        if trainer is not None:
            record_mismatch(trainer)
            if self.routing_every:
                if trl_generation.mode != "colocate":
                    raise ValueError("`routing_every` needs an engine in this process: set vllm_mode='colocate'.")
                record_routing(trainer, trl_generation.llm, self.routing_every)
        if self.quantize_ref_model:
            self._quantize_ref_model(trainer, trl_generation.model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make sure that rollouts will use the packed weights, and say so in one line.

        Raises:
            ValueError: the callback came too late, or the trainer has an engine of its own kind.
        """
        if self._is_idle:
            return
        self.check_in_force()
        if state.is_world_process_zero:
            print(self._startup_line(), flush=True)

    def check_in_force(self) -> None:
        """Make sure that rollouts will use the packed weights. Called before anything is generated.

        Raises:
            ValueError: the callback came too late, or the trainer has an engine of its own kind.
        """
        if self._is_idle or self.generation is not None:
            return
        trainer = self._trainer() if self._trainer else None
        if trainer is None:
            raise ValueError(
                "NVFP4RolloutCallback came after TRL had built its engine, from unquantized weights. Pass it to the "
                "trainer: `callbacks=[NVFP4RolloutCallback()]`, not `add_callback`."
            )
        raise ValueError(
            "NVFP4RolloutCallback works with TRL trainers built on VLLMGeneration (GRPO, RLOO, distillation and "
            f"others); {type(trainer).__name__} generates in another way."
        )

    def _startup_line(self) -> str:
        import transformers
        import trl

        from hf_nvfp4_qat.rollout.vllm.versions import vllm_version

        generation = self.generation
        assert generation is not None
        return (
            f"NVFP4 rollouts: {generation.trl_generation.mode} mode, {generation.num_packed} weights packed, kernel "
            f"{generation.kernel}, vLLM {vllm_version()}, TRL {trl.__version__}, "
            f"transformers {transformers.__version__}, torch {torch.__version__}"
        )

    def _quantize_ref_model(self, trainer: Any, model: Any) -> None:
        ref_model = getattr(trainer, "ref_model", None)  # trainers without a KL penalty have none
        if ref_model is None:
            logger.warning("`quantize_ref_model` does nothing: there is no reference model (`beta` is 0).")
            return
        if not qat_weights(ref_model):
            prepare_qat(ref_model, getattr(getattr(model, "hf_quantizer", None), "quantization_config", None))
        if getattr(trainer.args, "sync_ref_model", False):
            # TRL moves the reference toward the policy through `.data`, which leaves no trace, after this callback's
            # own `on_step_end`. So its scales are computed anew before each forward: one pass that reads its weights.
            ref_model.register_forward_pre_hook(lambda model, args: refresh_global_scales(model))


def _watch_generation() -> None:
    """Have TRL's ``VLLMGeneration`` look for callbacks that came too late, before it generates.

    Such a callback gets no call before the first generation of `trainer.evaluate()`, and no call tells it its trainer.
    """
    from trl.generation.vllm_generation import VLLMGeneration

    original = VLLMGeneration.generate
    if getattr(original, "nvfp4", False):
        return

    @wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        for callback in _callbacks_of_calling_trainer():
            callback.check_in_force()
        return original(self, *args, **kwargs)

    generate.nvfp4 = True  # type: ignore[attr-defined]
    VLLMGeneration.generate = generate


def _check_before_evaluation(trainer: Trainer, callback: NVFP4RolloutCallback) -> None:
    """Have `trainer` ask `callback` before `evaluate()` and `predict()`, which generate before they call a callback."""
    original = trainer.evaluation_loop

    def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
        if callback in trainer.callback_handler.callbacks:
            callback.check_in_force()
        return original(*args, **kwargs)

    trainer.evaluation_loop = evaluation_loop  # type: ignore[method-assign]


def _callbacks_of_calling_trainer() -> list[NVFP4RolloutCallback]:
    trainer = next(_trainers_above(), None)
    return [cb for cb in trainer.callback_handler.callbacks if isinstance(cb, NVFP4RolloutCallback)] if trainer else []


def _calling_trainer(model: nn.Module) -> Trainer:
    """The trainer whose constructor is calling: callbacks get no reference to it, so the frames above are asked."""
    for trainer in _trainers_above():
        if getattr(trainer, "model", None) is model:
            return trainer
    raise RuntimeError("NVFP4RolloutCallback.on_init_end is called by a Trainer, from its constructor; none was found.")


def _trainers_above() -> Iterator[Trainer]:
    """Trainers whose methods are on the stack, the innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer):
            yield trainer
        frame = frame.f_back
