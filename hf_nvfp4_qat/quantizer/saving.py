"""A QAT model saves by its own rule: folders that a Trainer resumes from get master weights, all else packed NVFP4.

Transformers' own `save_pretrained` is not enough for a quantized model: it throws the caller's `state_dict` away
(which FSDP and ZeRO savers depend on), and it would write a packed training checkpoint, from which a resumed run
silently restarts at its initial weights. So the class of the model becomes a subclass of itself, of the same name, with
two other methods.

Methods, not attributes of the instance: an attribute that holds its model is a cycle, and then ``del model`` does not
free the weights. What others set on the instance stays and comes first.
"""

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hf_nvfp4_qat.checkpoint.save import DEFAULT_SHARD_SIZE, is_sharded_model, save_nvfp4
from hf_nvfp4_qat.distributed.gather import on_main_process
from hf_nvfp4_qat.formats.files import replaced_weights
from hf_nvfp4_qat.sharding.parts import full_tensor

_HUB_OPTIONS = ("repo_id", "commit_message", "create_pr", "private", "revision", "base_model", "evaluation", "tags")

logger = logging.getLogger(__name__)


class QATSaving:
    """Mixed into the class of a model by ``save_as_qat``.

    Attributes:
        original_class: of the class, the one it was made from.
        nvfp4_save_format: of the model, as in ``NVFP4QATConfig.save_format``.
    """

    original_class: Any
    nvfp4_save_format: str

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """``type(model)(config)`` and ``type(model).from_pretrained(...)`` make models without QAT."""
        return cls.original_class(*args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = DEFAULT_SHARD_SIZE,
        variant: str | None = None,
        token: str | bool | None = None,
        dialect: str = "compressed-tensors",
        **kwargs: Any,
    ) -> None:
        """As ``PreTrainedModel.save_pretrained``, but for what is written.

        ``checkpoint-<int>`` folders hold master weights in their own dtype and no `quantization_config`: ``Trainer``
        resumes from them to the bit. Every other directory, and ``push_to_hub``, gets the packed checkpoint.
        `save_format` "master" or "nvfp4" overrides.

        Args:
            save_directory: its name decides between master weights and the packed checkpoint.
            is_main_process: only the main process writes; under DDP give ``rank == 0``, or call on one process. A model
                sharded by FSDP2 takes all processes to save, if no `state_dict` is given, and the first one writes.
            state_dict: full master weights by module name; honoured, unlike upstream for quantized models.
            push_to_hub: also upload the directory; `repo_id` and the like are taken from `kwargs`.
            max_shard_size: bytes, or a string such as "5GB".
            variant: as upstream for master weights; a packed checkpoint has none.
            token, kwargs: as upstream.
            dialect: of a packed checkpoint, as for ``save_nvfp4``.

        Raises:
            ValueError: as ``save_nvfp4``, or a `variant` for a packed checkpoint.
        """
        model: Any = self
        upstream: Any = super()
        resumable = re.fullmatch(r"checkpoint-\d+", Path(save_directory).name) is not None
        if self.nvfp4_save_format == "master" or (self.nvfp4_save_format == "auto" and resumable):
            if resumable:
                # The Trainer resumes with load_state_dict, which knows module names and fused parameters only.
                kwargs.setdefault("save_original_format", False)
            kwargs |= {"push_to_hub": push_to_hub, "max_shard_size": max_shard_size, "variant": variant, "token": token}

            def write_masters(is_main_process: bool, state_dict: dict[str, torch.Tensor] | None) -> None:
                # Upstream leaves older weights that it does not overwrite, and a loader may take those.
                replaces = is_main_process and variant is None
                with _as_unquantized(model), replaced_weights(save_directory) if replaces else nullcontext():
                    upstream.save_pretrained(
                        save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs
                    )

            def write_gathered(masters: Iterator[tuple[list[str], torch.Tensor]]) -> list[str]:
                gathered: dict[str, torch.Tensor] = {}
                for names, weight in masters:
                    gathered.update(dict.fromkeys(names, weight.cpu()))
                write_masters(True, gathered)
                return []

            if state_dict is None and is_sharded_model(model):
                on_main_process(write_gathered, _gathered(model))
            else:
                write_masters(is_main_process, state_dict)
        elif is_main_process or (state_dict is None and is_sharded_model(model)):
            hub_options = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
            if kwargs:
                logger.warning("Saving a packed checkpoint ignores %s.", ", ".join(sorted(kwargs)))
            if variant is not None:
                raise ValueError(
                    f"A packed checkpoint has no variants; got variant={variant!r}. Give it a directory of its own."
                )
            files = save_nvfp4(
                model, save_directory, state_dict=state_dict, dialect=dialect, max_shard_size=max_shard_size
            )
            if push_to_hub and files:
                _publish_saved(model, save_directory, files, token=token, **hub_options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        max_shard_size: int | str = DEFAULT_SHARD_SIZE,
        dialect: str = "compressed-tensors",
        **options: Any,
    ) -> Any:
        """Pack the model and publish it with a model card, in one commit.

        Every process that has the whole model publishes when it calls this: under DDP call it in one of them, under
        FSDP2 in all.

        Args:
            repo_id: created if missing.
            max_shard_size: bytes, or a string such as "5GB".
            dialect: "compressed-tensors" or "modelopt".
            options: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr` and `tags`, as
                upstream; `base_model`, `original` and `evaluation` for the card, as for ``publish_checkpoint``.

        Returns:
            What huggingface_hub says of the commit; None in processes that do not write.

        Raises:
            ValueError: as ``save_nvfp4`` and ``publish_checkpoint``.
        """
        model: Any = self
        if self.nvfp4_save_format == "master":
            upstream: Any = super()
            return upstream.push_to_hub(repo_id, max_shard_size=max_shard_size, **options)
        with tempfile.TemporaryDirectory() as directory:
            files = save_nvfp4(model, directory, max_shard_size=max_shard_size, dialect=dialect)
            return _publish_saved(model, directory, files, repo_id=repo_id, **options) if files else None

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class is made at run time, so copies and pickles name the class it was made from.
        return _new_model, (self.original_class,), self.__getstate__()


def _publish_saved(*args: Any, **options: Any) -> Any:
    """``publish_saved``; the card, and the doctor that it asks, are loaded when something is published."""
    from hf_nvfp4_qat.hub.publish import publish_saved

    return publish_saved(*args, **options)


def save_as_qat(model: Any, save_format: str) -> None:
    """Make a model save by the rule of ``QATSaving``.

    Args:
        model: a ``PreTrainedModel``.
        save_format: as in ``NVFP4QATConfig``.
    """
    model_class: Any = type(model)
    model.__class__ = _qat_class(model_class)
    model.nvfp4_save_format = save_format


def refuse_patched_saving(model: Any) -> None:
    """Refuse a model whose saving somebody has replaced on the instance: that would call upstream's, past QAT.

    Raises:
        ValueError: `model` has an attribute of its own where the class has a method.
    """
    if patched := [name for name in ("save_pretrained", "push_to_hub") if name in vars(model)]:
        raise ValueError(
            f"QAT replaces how a model is saved; this {type(model).__name__} carries a patched `{patched[0]}` of its "
            "own, which would go on saving unquantized weights. Prepare the model before it is patched."
        )


def _gathered(model: Any) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Whole master weights one at a time, with the names of each: tied weights stay one."""
    state_dict = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, weight in state_dict.items():
        names.setdefault(id(weight), []).append(name)
    return map(lambda same: (same, full_tensor(state_dict[same[0]])), names.values())


@contextmanager
def _as_unquantized(model: Any) -> Iterator[None]:
    """Let upstream's save_pretrained see a plain model, so that it honours `state_dict` and writes a plain config."""
    quantizer, config = model.hf_quantizer, model.config.quantization_config
    model.hf_quantizer = None
    del model.config.quantization_config
    try:
        yield
    finally:
        model.hf_quantizer = quantizer
        model.config.quantization_config = config


@cache
def _qat_class(model_class: Any) -> Any:
    names = {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (QATSaving, model_class), {**names, "original_class": model_class})


def _new_model(model_class: Any) -> Any:
    return object.__new__(_qat_class(model_class))
