"""What a push took, and what a comparison of an engine with a model found."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SyncReport:
    """What one push took.

    Attributes:
        seconds: wall time, the device's work included.
        num_bytes: pushed.
        num_bf16_bytes: the same weights in bfloat16.
        num_packed, num_tensors: quantized weights, and tensors in all.
    """

    seconds: float
    num_bytes: int
    num_bf16_bytes: int
    num_packed: int
    num_tensors: int

    @property
    def compression(self) -> float:
        """How many times fewer bytes than bfloat16."""
        return self.num_bf16_bytes / self.num_bytes


@dataclass(frozen=True)
class EngineCheck:
    """Comparison of an engine's weights with a model's.

    Attributes:
        num_weights: values compared.
        different: checkpoint name to number of values that differ or are missing, for tensors with such.
        not_compared: tensors that vLLM rearranges while it loads them, so that nothing is known of where values go.
    """

    num_weights: int
    different: dict[str, int]
    not_compared: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all of them are equal."""
        return not self.different
