"""Recipe: which weights become NVFP4, and how their block scales are chosen."""

import re
from dataclasses import FrozenInstanceError, dataclass, fields
from typing import Any

from hf_nvfp4_qat.numerics.quantize import check_scale_rule

PRESETS = ("full", "ffn_only")
ACTIVATIONS = ("bf16", "nvfp4")


@dataclass(unsafe_hash=True)
class Recipe:
    """What ``NVFP4QATConfig`` says about training, without what it says about saving. Cannot be changed.

    Attributes: as documented there.

    Raises:
        ValueError: a value that is not among those documented.
    """

    preset: str = "full"
    exclude: tuple[str, ...] = ()
    scale_rule: str = "amax"
    bf16_first_layers: int = 0
    bf16_last_layers: int = 0
    activations: str = "bf16"

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"`preset` is one of {', '.join(PRESETS)}; got {self.preset!r}.")
        check_scale_rule(self.scale_rule)
        if self.activations not in ACTIVATIONS:
            raise ValueError(f"`activations` is one of {', '.join(ACTIVATIONS)}; got {self.activations!r}.")
        if isinstance(self.exclude, str) or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise ValueError(f"`exclude` is a list of strings; got {self.exclude!r}.")
        for pattern in self.exclude:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ValueError(f"`exclude` holds {pattern!r}, which is no regular expression: {error}.") from None
        for name in ("bf16_first_layers", "bf16_last_layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"`{name}` counts decoder layers; got {value!r}.")
        # Lists come from JSON and from users; a frozen record keeps a tuple.
        object.__setattr__(self, "exclude", tuple(self.exclude))

    def __setattr__(self, name: str, value: Any) -> None:
        # Frozen by hand: the configuration is also a dataclass of Transformers, which a frozen one may not inherit.
        if name in self.__dict__ or name not in {field.name for field in fields(self)}:
            raise FrozenInstanceError(f"{type(self).__name__} is frozen; make another one to change `{name}`.")
        super().__setattr__(name, value)
