"""NVFP4QATConfig: what a user says about a model, and what config.json remembers of it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from transformers.quantizers import register_quantization_config
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_nvfp4_qat.checkpoint.save import SAVE_FORMATS
from hf_nvfp4_qat.modules.recipe import Recipe

QUANT_METHOD = "nvfp4_qat"
"""`nvfp4` is taken: it is Transformers' own inference-only quantizer."""


@dataclass(unsafe_hash=True)
class NVFP4QATConfig(Recipe, QuantizationConfigMixin):
    """Train a model with NVFP4 weights: ``from_pretrained(..., quantization_config=NVFP4QATConfig())``.

    Attributes:
        preset: which linears are quantized. "full": all of the language model but the output embedding, routers and
            token selectors; towers of other modalities and heads are no part of it. "ffn_only": of these, the
            feed-forward layers.
        exclude: modules to leave in high precision besides: an exact path, the last components of a path, or ``re:``
            and a regular expression matched from the start of the path. A pattern that names no module is an error.
        scale_rule: how block scales are chosen. "amax": a block's largest magnitude becomes 6. "four_over_six": 6 or 4,
            whichever has the less squared error in the block. "mse": the least error of six scales.
        bf16_first_layers, bf16_last_layers: so many decoder layers at each end stay in high precision.
        activations: "bf16", W4A16, which every GPU serves; or "nvfp4", W4A4: the inputs of quantized linears too, with
            block scales of the moment and a global scale that follows the largest input seen. GPUs before Blackwell
            serve W4A4 checkpoints as W4A16, without a word.
        save_format: "auto" saves master weights into ``checkpoint-<int>`` folders, which Trainer resumes from, and
            packed NVFP4 anywhere else; "master" or "nvfp4" forces one of the two.

    Raises:
        ValueError: a value that is not among those above.
    """

    save_format: str = "auto"

    quant_method: ClassVar[str] = QUANT_METHOD

    def __post_init__(self) -> None:
        if self.save_format not in SAVE_FORMATS:
            raise ValueError(f"`save_format` is one of {', '.join(SAVE_FORMATS)}; got {self.save_format!r}.")
        super().__post_init__()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make a config from its ``to_dict`` form.

        Raises:
            ValueError: an unknown key.
        """
        known = {field.name for field in fields(cls)}
        given = {key: value for key, value in config_dict.items() if key != "quant_method"}
        given.update({key: kwargs.pop(key) for key in list(kwargs) if key in known})
        if unknown := sorted(set(given) - known):
            raise ValueError(f"NVFP4QATConfig has {', '.join(sorted(known))}; got unknown {', '.join(unknown)}.")
        config = cls(**given)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable form, with `quant_method`."""
        return {"quant_method": self.quant_method, **asdict(self), "exclude": list(self.exclude)}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Upstream's hook for overriding a stored config; this one is frozen, so every key is handed back unused."""
        return kwargs


# A second import under the same method name (a reloaded module) must not fail.
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(NVFP4QATConfig)
