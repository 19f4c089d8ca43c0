"""A QAT model saves by its own rule: its class becomes a subclass of itself, of the same name, with two other methods.

Methods, not attributes of the instance: an attribute that holds its model is a cycle, and then ``del model`` does not
free the weights. What others set on the instance stays and comes first.
"""

from functools import cache, wraps
from typing import Any

from hf_nvfp4_qat.checkpoint.publish import PushToHub, publish_saved
from hf_nvfp4_qat.checkpoint.save import SavePretrained

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
            publish=publish_saved,
        )
        save(*args, **kwargs)

    @wraps(PushToHub.__call__)
    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        parent: Any = super()
        push = PushToHub(self, save_format=self.nvfp4_save_format, upstream=parent.push_to_hub)  # type: ignore[arg-type]
        return push(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class is made at run time, so copies and pickles name the class it was made from.
        return _new_model, (self.original_class,), self.__getstate__()


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
