"""A QAT model saves by its own rule: its class becomes a subclass of itself, of the same name, with two other methods.

Methods, not attributes of the instance: an attribute that holds its model is a cycle, and then ``del model`` does not
free the weights. What others set on the instance stays and comes first.
"""

import tempfile
from functools import cache, wraps
from typing import Any

from hf_nvfp4_qat.checkpoint.save import DEFAULT_SHARD_SIZE, SavePretrained, save_nvfp4

_METHODS = ("save_pretrained", "push_to_hub")


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

    @wraps(SavePretrained.__call__)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        parent: Any = super()
        save = SavePretrained(
            self,  # type: ignore[arg-type]
            save_format=self.nvfp4_save_format,
            upstream=parent.save_pretrained,
            publish=_publish_saved,
        )
        save(*args, **kwargs)

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
    """Make a model save by the rule of ``SavePretrained``.

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
    if patched := [name for name in _METHODS if name in vars(model)]:
        raise ValueError(
            f"QAT replaces how a model is saved; this {type(model).__name__} carries a patched `{patched[0]}` of its "
            "own, which would go on saving unquantized weights. Prepare the model before it is patched."
        )


@cache
def _qat_class(model_class: Any) -> Any:
    names = {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (QATSaving, model_class), {**names, "original_class": model_class})


def _new_model(model_class: Any) -> Any:
    return object.__new__(_qat_class(model_class))
