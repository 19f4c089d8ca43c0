"""QADTrainer: Transformers' Trainer, with the divergence from a teacher in high precision as its loss."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_nvfp4_qat.distillation.divergence import IGNORED, divergence
from hf_nvfp4_qat.distributed.gather import reshard
from hf_nvfp4_qat.formats.files import CARD_FILE, CONFIG_FILE, read_json_object
from hf_nvfp4_qat.formats.names import is_nvfp4_config
from hf_nvfp4_qat.hub.card import load_card, model_card
from hf_nvfp4_qat.modules.swap import qat_weights

logger = logging.getLogger(__name__)

Teacher = Callable[[Mapping[str, Any]], torch.Tensor]
"""Logits ``[B, T, V]`` for a batch, on any device."""


class QADTrainer(Trainer):
    """Trains a model with NVFP4 weights toward the predictions of a frozen one without them: QAD.

    The loss is the KL divergence of every next-token prediction, where cross entropy on the data would pull the model
    toward the data instead: ``QADTrainer(model, teacher="path", args=..., train_dataset=...)``. Everything else is
    Trainer's. Batches need `labels` (``DataCollatorForLanguageModeling(tokenizer, mlm=False)`` makes them); tokens
    labelled -100 do not count.

    `loss` and `eval_loss` in the logs are this loss; `kl`, `cross_entropy` and `teacher_cross_entropy` come
    beside it, with `eval_` before them in evaluations; all in nats a token.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: Any = None,
        *,
        teacher: PreTrainedModel | Teacher | str | None = None,
        temperature: float = 1.0,
        cross_entropy_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        """Set up.

        Args:
            model, args, kwargs: as for ``Trainer``.
            teacher: a model with the same vocabulary, on any device, quantized or not; a function from a batch to
                logits; a path or Hub id, loaded in bfloat16 beside the model. None loads the checkpoint that `model`
                comes from. Where the model is sharded by FSDP or ZeRO-3 an unquantized teacher is, too.
            temperature: of both softmaxes.
            cross_entropy_weight: of the cross entropy on the labels that is added to the divergence.

        Raises:
            ValueError: `temperature` or `cross_entropy_weight` out of range, no teacher to load, or a teacher that
                itself trains in NVFP4.
        """
        if temperature <= 0 or cross_entropy_weight < 0:
            raise ValueError(
                f"`temperature` must be positive and `cross_entropy_weight` not negative; got {temperature} and "
                f"{cross_entropy_weight}."
            )
        self.temperature = temperature
        self.cross_entropy_weight = cross_entropy_weight
        self._teacher_logits: torch.Tensor | None = None
        # Sums of KL and both cross entropies, and the number of tokens, since the last log, by mode.
        self._sums: dict[str, torch.Tensor] = {}
        super().__init__(model, args, compute_loss_func=self._loss, **kwargs)
        if not qat_weights(self.model):
            logger.warning("%s has no NVFP4 weights; this is plain distillation.", type(self.model).__name__)
        self.teacher = self._prepare_teacher(teacher)

    def _prepare_teacher(self, teacher: PreTrainedModel | Teacher | str | None) -> Teacher:
        if teacher is None:
            teacher = getattr(self.model, "name_or_path", "")
            if not teacher:
                raise ValueError("The model comes from no checkpoint, so `teacher` must be given: a model, or a path.")
        is_loaded_here = isinstance(teacher, str)
        if isinstance(teacher, str):
            teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16)
        if not isinstance(teacher, nn.Module):
            return cast(Teacher, teacher)
        if qat_weights(teacher):
            raise ValueError("The teacher computes with NVFP4 weights; give one in high precision.")
        teacher.requires_grad_(False).eval()
        if getattr(teacher, "quantization_method", None) is not None:
            return _ModelTeacher(teacher)  # where it was loaded, and whole: such weights cannot be sharded
        if self.accelerator.is_fsdp2:
            return _ModelTeacher(_sharded(teacher, self.accelerator), self.accelerator.device)
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            return _ModelTeacher(_prepared_by_trl(teacher, self.accelerator), self.accelerator.device)
        if is_loaded_here or self.is_deepspeed_enabled:
            teacher.to(self.args.device)
        return _ModelTeacher(teacher)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's, after the teacher has seen the batch.

        Raises:
            ValueError: a batch without `labels`.
        """
        if "labels" not in inputs:
            raise ValueError(
                f"Batches need `labels`, which say what tokens count; this one has {', '.join(inputs)}. "
                "DataCollatorForLanguageModeling(tokenizer, mlm=False) makes them."
            )
        with torch.no_grad():
            batch = {name: value for name, value in inputs.items() if name != "labels"}
            self._teacher_logits = self.teacher(batch)
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self._teacher_logits = None

    def _loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        assert self._teacher_logits is not None
        logits = outputs["logits"]
        settings: Any = {"temperature": self.temperature, "cross_entropy_weight": self.cross_entropy_weight}
        theirs = self._teacher_logits.to(logits.device)
        loss, *parts = divergence(logits, theirs, labels.to(logits.device), **settings)
        num_tokens = (labels[:, 1:] != IGNORED).sum().to(logits.device)
        mode = "train" if self.model.training else "eval"
        sums = torch.stack([part.double() for part in (*parts, num_tokens)])
        self._sums[mode] = self._sums.get(mode, 0) + sums
        num_items = num_tokens if num_items_in_batch is None else num_items_in_batch
        return loss / (num_items + (num_items == 0))  # where no token counts the loss is 0, not NaN

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, with the section of ``model_card`` where packed weights are what is published."""
        super().create_model_card(*args, **kwargs)
        directory = Path(self.args.output_dir)
        if self.is_world_process_zero() and (directory / CONFIG_FILE).is_file():
            if is_nvfp4_config(read_json_object(directory / CONFIG_FILE).get("quantization_config")):
                card = load_card(directory / CARD_FILE)
                model_card(directory, repo_id=self.hub_model_id or "", existing=card).save(directory / CARD_FILE)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with the parts of the loss among the metrics."""
        self._sums.pop("eval", None)
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in self._averages("eval").items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with the parts of the training loss beside it."""
        super().log({**logs, **(self._averages("train") if "loss" in logs else {})}, *args, **kwargs)

    def _averages(self, mode: str) -> dict[str, float]:
        sums = self._sums.pop(mode, None)
        if sums is None:
            return {}
        *parts, num_tokens = self.accelerator.gather(sums).view(-1, 4).sum(0).tolist()
        names = ("kl", "cross_entropy", "teacher_cross_entropy")
        return {name: part / num_tokens for name, part in zip(names, parts, strict=True)} if num_tokens else {}


def _sharded(teacher: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Sharded by FSDP2 as Accelerate shards models that train, by the layers of its own architecture."""
    plugin = accelerator.state.fsdp_plugin
    before = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    # The plugin takes the first model's layers for all models'; the student's come later.
    plugin.transformer_cls_names_to_wrap = None
    try:
        return fsdp2_prepare_model(accelerator, teacher).eval()
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = before


def _prepared_by_trl(teacher: nn.Module, accelerator: Accelerator) -> nn.Module:
    """An engine of its own under ZeRO-3, or wrapped by FSDP1: what TRL does with reference models."""
    try:
        from trl.models import prepare_deepspeed, prepare_fsdp
    except ImportError as error:
        raise ValueError(
            "Under DeepSpeed ZeRO-3 and FSDP1 TRL shards the teacher, and TRL is not installed. Run `pip install trl`, "
            "or give a `TeacherProcess`, which holds the whole teacher."
        ) from error
    return (prepare_deepspeed if is_deepspeed_zero3_enabled() else prepare_fsdp)(teacher, accelerator)


class _ModelTeacher:
    """A model as a teacher: batches go to its device, or to the one where a sharded model computes."""

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        self.model = model
        self._device = device

    def __call__(self, batch: Mapping[str, Any]) -> torch.Tensor:
        device = self._device or next(self.model.parameters()).device
        moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        logits = self.model(**moved, use_cache=False).logits
        reshard(self.model)  # FSDP2 leaves the last layers whole for a backward that does not come
        return logits
