"""The packed weights of a model as a stream of tensors, in the order in which an engine takes them module by module.

Tensors are fresh unless a receiver in the same process says it needs no copies: an optimizer or a sharding library may
overwrite a training weight while a sender still reads it. A weight is packed on the device where it lies.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from hf_nvfp4_qat.checkpoint.sources import ExpertsSource, LinearSource, PlainSource, ShardedSource, Source
from hf_nvfp4_qat.checkpoint.stream import is_tied, wrong_tied_settings
from hf_nvfp4_qat.formats.names import layer_of, quantization_config, to_checkpoint
from hf_nvfp4_qat.numerics.quantize import quantize_unchecked
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor
from hf_nvfp4_qat.rollout.plan import input_scales, plan_of
from hf_nvfp4_qat.rollout.report import SyncReport
from hf_nvfp4_qat.selection.fused_groups import fused_group_key
from hf_nvfp4_qat.sharding.packed import gather_packed
from hf_nvfp4_qat.sharding.parts import own_rows

NamedTensor = tuple[str, torch.Tensor]


class RolloutStream:
    """One push of a QAT model's packed weights.

    Of a sharded model every process iterates, to the end. One that cannot go on calls ``take_part`` instead.

    Attributes:
        layout: the tensors that will come, in order.
        num_packed: quantized weights among them; fused experts count once.
        num_bytes, num_bf16_bytes: of the whole push, and of the same weights in bfloat16.
        experts: name of each quantized fused weight to its parts in a checkpoint.
        is_stacked: whether each of these comes in one piece.
        quantizes_input: whether inputs are NVFP4 too (W4A4).
        architecture: name of the model's class, as config.json has it.
        tied_settings: settings of config.json that the model has outgrown: embeddings that it says are tied.
    """

    def __init__(self, model: nn.Module) -> None:
        """Refresh the model's global scales, and plan its pushes if this is the first.

        Raises:
            ValueError: `model` has no QAT layers, a weight is not finite, siblings differ in their global scale, or the
                count does not add up.
        """
        self._plan = plan = plan_of(model)
        _check_scales(plan.packed)
        self._groups, self.experts = plan.groups, plan.experts
        self.is_stacked = False
        self._group_layouts, self.layout = plan.layouts(is_stacked=False)
        self.num_packed, self.num_bf16_bytes = len(plan.packed), plan.num_bf16_bytes
        self.quantizes_input, self.ignored_layers = plan.quantizes_input, plan.ignored_layers
        self.architecture = type(model).__name__.removeprefix("FSDP")
        self.tied_settings = wrong_tied_settings(model.config, is_tied(model)) if hasattr(model, "config") else {}
        # What takes all processes and is still to come, in the order that is the same on all of them.
        self._gathers: Iterator[Callable[[], Any]] = iter(())
        self._gathered: dict[str, NVFP4Tensor] = {}

    def stack_experts(self, is_stacked: bool = True) -> None:
        """Let each fused weight come in one piece, under its module's name, or not; before anything is read."""
        if is_stacked != self.is_stacked and self.experts:
            self.is_stacked = is_stacked
            self._group_layouts, self.layout = self._plan.layouts(is_stacked=is_stacked)

    @property
    def num_bytes(self) -> int:  # noqa: D102
        return sum(item.nbytes for item in self.layout)

    @property
    def quantization_config(self) -> dict[str, Any]:
        """What an engine that takes this stream must be configured with."""
        return quantization_config(
            self.ignored_layers, scale_rule=self._plan.packed[0].scale_rule, quantizes_input=self.quantizes_input
        )

    def report(self, seconds: float) -> SyncReport:
        """What the push took."""
        return SyncReport(seconds, self.num_bytes, self.num_bf16_bytes, self.num_packed, len(self.layout))

    def __iter__(self) -> Iterator[NamedTensor]:
        return self.tensors()

    def tensors(
        self,
        observe: Callable[[str, torch.Tensor, NVFP4Tensor], None] = lambda name, weight, packed: None,
        *,
        fresh: bool = True,
    ) -> Iterator[NamedTensor]:
        """(name, tensor) pairs as `layout` says.

        Args:
            observe: called with the checkpoint name, master weight and packed weight of each quantized one, or with
                those rows of both that this process holds.
            fresh: copy pass-through weights that need no conversion. False is for a receiver that has copied
                everything before the next training step, and saves it a copy of the embedding.
        """
        self._gathers, self._gathered = self._gathers_of_a_push(), {}
        return self._tensors(observe, fresh)

    def _tensors(self, observe: Callable[[str, torch.Tensor, NVFP4Tensor], None], fresh: bool) -> Iterator[NamedTensor]:
        for group, layout in zip(self._groups, self._group_layouts, strict=True):
            tensors = {}
            for source in group:
                if isinstance(source, PlainSource):
                    weight = next(self._gathers)()
                    tensors[source.name] = weight.to(source.dtype, memory_format=torch.contiguous_format, copy=fresh)
                    del weight
                    continue
                assert isinstance(source, LinearSource)
                if isinstance(source, ShardedSource):
                    if source.name not in self._gathered:
                        next(self._gathers)()
                    observe(source.name, *next(self._gathers)())
                    packed = self._gathered.pop(source.name)
                else:
                    weight = source.master()
                    packed = quantize_unchecked(weight, source.global_decode_scale(), scale_rule=source.scale_rule)
                    observe(source.name, weight, packed)
                    del weight
                tensors |= self._under_names(source, packed)
            for item in layout:
                # Popped: by the time the next tensor is asked for, only the receiver holds the last one.
                yield item.name, tensors.pop(item.name)
        self._gathers = iter(())  # which held this object, and with it the weights

    def take_part(self) -> None:
        """After an error, run the gathers that the other processes still wait for, and drop what they bring.

        A gather that itself fails, for want of memory say, leaves the others waiting, as any collective does.
        """
        self._gathered = {}
        for gather in self._gathers:
            with suppress(Exception):
                gather()
            self._gathered = {}

    def _gathers_of_a_push(self) -> Iterator[Callable[[], Any]]:
        """One call each, in the order in which ``tensors`` needs them."""
        seen: set[str] = set()
        for number, group in enumerate(self._groups):
            for source in group:
                if not source.is_quantized:
                    yield source.master
                elif isinstance(source, ShardedSource):
                    if source.name not in seen:
                        layer = self._rest_of_layer(number)
                        seen.update(other.name for other in layer)
                        yield partial(self._gather, layer)
                    yield partial(self._own_rows, source)

    def _under_names(self, source: LinearSource, packed: NVFP4Tensor) -> dict[str, torch.Tensor]:
        if self.is_stacked and isinstance(source, ExpertsSource):
            return to_checkpoint(source.name, packed)
        tensors = source.named(packed)
        one = torch.ones(1, dtype=torch.float32, device=packed.packed.device)
        return tensors | dict.fromkeys(input_scales(source), one)

    def _rest_of_layer(self, number: int) -> list[ShardedSource]:
        """The sharded weights of group `number` and of the groups behind it in the same decoder layer."""
        layer = _decoder_layer(self._groups[number][0].name)
        same_layer = takewhile(lambda group: _decoder_layer(group[0].name) == layer, self._groups[number:])
        return [source for group in same_layer for source in group if isinstance(source, ShardedSource)]

    def _gather(self, sources: list[ShardedSource]) -> None:
        """All of `sources`, in one all-gather."""
        scales = [source.global_decode_scale() for source in sources]
        shards = [source.read() for source in sources]
        packed = gather_packed(shards, scales, sources[0].scale_rule)
        self._gathered = {source.name: tensor for source, tensor in zip(sources, packed, strict=True)}

    def _own_rows(self, source: LinearSource) -> tuple[torch.Tensor, NVFP4Tensor]:
        # None where `take_part` runs: a weight that is not sharded by rows is gathered all the same.
        return own_rows(source.read(), self._gathered.get(source.name))  # type: ignore[arg-type]

    def weights(self) -> Iterator[tuple[Source, torch.Tensor]]:
        """(source, whole master weight), in the same order, unpacked: to compare an engine with."""
        sources = [source for group in self._groups for source in group]
        self._gathers = iter([source.master for source in sources])
        return ((source, next(self._gathers)()) for source in sources)


def _decoder_layer(name: str) -> str:
    """``model.layers.3`` for everything in it; the name itself for what is in no numbered layer."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found.group() if found else name


def _check_scales(packed: list[LinearSource]) -> None:
    """One read from the device for all of them: finite, and equal among siblings."""
    scales = [source.global_decode_scale() for source in packed]
    read = torch.cat([scale.to(scales[0].device).view(-1) for scale in scales])
    split = read.split([scale.numel() for scale in scales])
    by_name = {source.name: values.tolist() for source, values in zip(packed, split, strict=True)}
    if bad := [name for name, values in by_name.items() if not all(map(math.isfinite, values))]:
        raise ValueError(
            f"NVFP4 has no infinity and no NaN; {len(bad)} weights (or fused siblings of theirs) hold some, the first "
            f"is {bad[0]}. Nothing was sent. Training has probably diverged: go back to an earlier checkpoint."
        )
    shared: dict[str, str] = {}
    for name, value in by_name.items():
        sibling = shared.setdefault(fused_group_key(layer_of(name)), name)
        if by_name[sibling] != value:
            raise ValueError(
                f"vLLM decodes fused siblings with one global scale; {sibling} has {by_name[sibling]} and {name} has "
                f"{value}. Nothing was sent. Prepare the whole model at once, so that siblings share their scale."
            )
