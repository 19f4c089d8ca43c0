"""A weight on its way to a checkpoint or an engine: what it will be there, and what packs it. Four kinds.

PlainSource     a tensor that stays as it is, in its own dtype or in bfloat16
LinearSource    a weight [N, K] that is packed
ExpertsSource   fused experts [E, N, K] that are packed, and go under many names
ShardedSource   either of the two of which this process holds a part: rows are packed, packed bytes are gathered
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_nvfp4_qat.checkpoint.origins import ExpertPart
from hf_nvfp4_qat.formats.names import checkpoint_layout, layer_of, to_checkpoint
from hf_nvfp4_qat.numerics.quantize import global_decode_scale_of_amax, quantize_nvfp4
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor
from hf_nvfp4_qat.sharding.packed import gather_packed
from hf_nvfp4_qat.sharding.parts import full_tensor

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Checkpoint name to dtype and shape."""


@dataclass(frozen=True)
class Source:
    """One weight.

    Attributes:
        name: checkpoint name, ``....weight`` for a packed one; of fused experts, which have many, the module's name.
        shape: of the unquantized tensor.
        module_name: its name in the model's state dict; None if it was computed from several weights.
        read: reads what there is of it on this process: a tensor or a DTensor.
    """

    name: str
    shape: tuple[int, ...]
    module_name: str | None
    read: Callable[[], torch.Tensor]
    is_quantized: ClassVar[bool] = False
    is_sharded: ClassVar[bool] = False

    def layout(self) -> Layout:
        """What this weight becomes."""
        raise NotImplementedError

    def tensors(self) -> dict[str, torch.Tensor]:
        """Checkpoint name to tensor, packed where it is packed, on the device of the weight.

        Of a sharded weight every process gets all of it.

        Raises:
            ValueError: infinities or NaNs in a weight to be quantized; the message names it.
        """
        raise NotImplementedError

    def master(self) -> torch.Tensor:
        """The unquantized tensor, whole; gathered if it is sharded."""
        return full_tensor(self.read())

    @property
    def nbytes(self) -> int:
        """Bytes in the checkpoint."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.layout().values())


@dataclass(frozen=True)
class PlainSource(Source):
    """A tensor that is not packed.

    Attributes:
        dtype: what it is written in.
    """

    dtype: torch.dtype

    def layout(self) -> Layout:  # noqa: D102
        return {self.name: (self.dtype, self.shape)}

    def tensors(self) -> dict[str, torch.Tensor]:  # noqa: D102
        return {self.name: self.master().to(self.dtype).contiguous()}


@dataclass(frozen=True)
class LinearSource(Source):
    """A weight ``[N, K]`` that is packed.

    Attributes:
        global_decode_scale: reads the scale to quantize with, float32 ``[]``, or ``[E]`` for experts.
        scale_rule: how block scales are chosen.
        input_amax: of a layer with NVFP4 inputs, reads the largest, float32 ``[]``.
    """

    global_decode_scale: Callable[[], torch.Tensor]
    scale_rule: str = "amax"
    input_amax: Callable[[], torch.Tensor] | None = None
    is_quantized = True

    def layout(self) -> Layout:  # noqa: D102
        return checkpoint_layout(layer_of(self.name), self.shape, quantizes_input=self.input_amax is not None)

    def tensors(self) -> dict[str, torch.Tensor]:  # noqa: D102
        return self.named(self.pack())

    def pack(self) -> NVFP4Tensor:
        """The weight in NVFP4."""
        try:
            return quantize_nvfp4(
                self.master(), global_decode_scale=self.global_decode_scale(), scale_rule=self.scale_rule
            )
        except ValueError as error:
            raise ValueError(f"{self.name} cannot be packed. {error}") from error

    def named(self, packed: NVFP4Tensor) -> dict[str, torch.Tensor]:
        """The weight in NVFP4 under its checkpoint names."""
        input_scale = None if self.input_amax is None else global_decode_scale_of_amax(self.input_amax())
        return to_checkpoint(layer_of(self.name), packed, input_scale)


@dataclass(frozen=True)
class ExpertsSource(LinearSource):
    """Fused experts ``[E, N, K]`` that are packed.

    Attributes:
        parts: what checkpoints hold of them, each under a name of its own.
    """

    parts: tuple[ExpertPart, ...] = ()

    def layout(self) -> Layout:  # noqa: D102
        layout: Layout = {}
        for part in self.parts:
            layout |= checkpoint_layout(layer_of(part.name), part.shape)
        return layout

    def named(self, packed: NVFP4Tensor) -> dict[str, torch.Tensor]:
        """The experts in NVFP4 under their checkpoint names; views."""
        tensors: dict[str, torch.Tensor] = {}
        for part in self.parts:
            scale = packed.global_decode_scale[part.expert]
            own = NVFP4Tensor(part.of(packed.packed), part.of(packed.block_scale), scale)
            tensors |= to_checkpoint(layer_of(part.name), own)
        return tensors


class ShardedSource(LinearSource):
    """A packed weight of which this process holds a part; every process must pack it."""

    is_sharded = True

    def pack(self) -> NVFP4Tensor:
        """The whole weight in NVFP4."""
        scale = self.global_decode_scale()
        # Its amax was taken over all shards, so every process comes to the same verdict.
        if not scale.isfinite().all():
            raise ValueError(
                f"{self.name} cannot be packed. It, or a fused sibling, holds an infinity or a NaN: go back to an "
                "earlier checkpoint."
            )
        return gather_packed([self.read()], [scale], self.scale_rule)[0]


class ShardedExpertsSource(ShardedSource, ExpertsSource):
    """Both."""
