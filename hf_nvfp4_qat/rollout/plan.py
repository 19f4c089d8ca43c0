"""What every push of a model repeats: which tensors, in which order. Nothing of their values.

    order within one fused module of vLLM          why
    -------------------------------------          -------------------------------------------------------------
    global scales   float32        [1]             first: receivers cut tensors out of one byte buffer, and a float32
    pass-through    bfloat16       any             must start at a multiple of 4 bytes
    packed codes    uint8          [N, K / 2]
    block scales    float8_e4m3fn  [N, K / 16]

Siblings that vLLM fuses (q/k/v, gate/up, the experts of a layer) travel together, so that the engine never holds more
than one unfinished module.

Experts travel one by one, as checkpoints hold them, with a constant input scale: vLLM counts it, and holds the experts
of all layers back until it comes. Or, for a receiver that knows where they go, stacked: one tensor for all of a layer.

A plan is worked out at the first push of a model, kept as long as the model lives, and dropped when its structure is
another: other modules, names, shapes or dtypes, other weights in NVFP4, another conversion to checkpoint names.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import chain
from operator import is_
from weakref import WeakKeyDictionary

import torch
from torch import nn

from hf_nvfp4_qat.checkpoint.sources import ExpertsSource, LinearSource, Source
from hf_nvfp4_qat.checkpoint.stream import LiveWeights, ignored_layers, make_ready, packed_sources
from hf_nvfp4_qat.distributed.gather import reshard
from hf_nvfp4_qat.formats.names import GLOBAL_ENCODE_SCALE, INPUT_GLOBAL_SCALE, checkpoint_layout, layer_of
from hf_nvfp4_qat.modules.swap import qat_weights
from hf_nvfp4_qat.selection.fused_groups import fused_group_key
from hf_nvfp4_qat.sharding.parts import is_sharded


@dataclass(frozen=True)
class TensorLayout:
    """What a receiver must know of a tensor before it comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @property
    def dtype_name(self) -> str:
        """As vLLM and TRL write dtypes: ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.name} {self.dtype_name} {list(self.shape)}"


class RolloutPlan:
    """Which tensors the pushes of a model consist of. What reads them reads what the model has at the time.

    Attributes:
        groups: sources that land in one module of the engine, group by group.
        packed: those that are packed.
        experts: name of each quantized fused weight to its parts in a checkpoint.
        quantizes_input: whether inputs are NVFP4 too (W4A4).
        num_bf16_bytes: of all weights in bfloat16.
        ignored_layers: names of matrices that are not packed.
    """

    def __init__(self, model: nn.Module) -> None:
        """Refresh the model's global scales, and plan.

        Raises:
            ValueError: `model` has no QAT layers, or the count does not add up.
        """
        sources = packed_sources(model, live=True)
        self.packed = [source for source in sources if isinstance(source, LinearSource)]
        if not self.packed:
            raise ValueError(
                f"Rollouts take the packed weights of a QAT model; {type(model).__name__} has no QAT layers. Load it "
                "with `quantization_config=NVFP4QATConfig()` or call `prepare_qat(model)`."
            )
        self.groups = _fused_groups(sources)
        self.experts = {source.name: source.parts for source in self.packed if isinstance(source, ExpertsSource)}
        self.quantizes_input = self.packed[0].input_amax is not None
        self.num_bf16_bytes = sum(2 * torch.Size(source.shape).numel() for source in sources)
        self.ignored_layers = ignored_layers(model, sources)
        # Not if values are kept: of what is computed from several weights, and of shards gathered for several tensors.
        names, weights = Counter(source.module_name for source in sources), LiveWeights(model)
        self._is_lasting = all(name and (num == 1 or not is_sharded(weights[name])) for name, num in names.items())
        self._layouts: dict[bool, tuple[list[list[TensorLayout]], tuple[TensorLayout, ...]]] = {}
        self._facts, self._objects = _structure(model)

    def fits(self, model: nn.Module) -> bool:
        """Whether the model is still built as it was."""
        facts, objects = _structure(model)
        is_same = len(objects) == len(self._objects) and all(map(is_, objects, self._objects))
        return self._is_lasting and is_same and facts == self._facts

    def layouts(self, *, is_stacked: bool) -> tuple[list[list[TensorLayout]], tuple[TensorLayout, ...]]:
        """The tensors that come, group by group and one after the other."""
        if is_stacked not in self._layouts:
            groups = [_group_layout(group, is_stacked=is_stacked) for group in self.groups]
            self._layouts[is_stacked] = groups, tuple(chain.from_iterable(groups))
        return self._layouts[is_stacked]


_plans: WeakKeyDictionary[nn.Module, RolloutPlan] = WeakKeyDictionary()


def plan_of(model: nn.Module) -> RolloutPlan:
    """The plan of a model, and the model ready to be read, with fresh scales; all processes of a sharded one call.

    Raises:
        ValueError: as ``RolloutPlan``; the model cannot be pushed any more, with adapters for example.
    """
    reshard(model)
    plan = _plans.pop(model, None)
    if plan is not None and plan.fits(model):
        make_ready(model)
    else:
        plan = RolloutPlan(model)
    _plans[model] = plan
    return plan


def _structure(model: nn.Module) -> tuple[list[tuple], list[object]]:
    """All of a model that decides about its plan: facts to compare, and objects that must be the very same."""
    trained = qat_weights(model)
    facts: list[tuple] = [
        (name, tensor.shape, tensor.dtype, is_sharded(tensor)) for name, tensor in LiveWeights(model).items()
    ]
    facts += [(name, weight.scale_rule, weight.input_amax is None) for name, weight in trained.items()]
    objects = [tensors for module in model.modules() for tensors in (module._parameters, module._buffers)]
    return facts, [*objects, *trained.values(), getattr(model, "_weight_conversions", None)]


def _fused_groups(sources: list[Source]) -> list[list[Source]]:
    """Sources that land in one module of vLLM, biases included, side by side; groups in order of first appearance."""
    groups: dict[str, list[Source]] = {}
    for source in sources:
        layer = source.name.rpartition(".")[0]
        groups.setdefault(layer if isinstance(source, ExpertsSource) else fused_group_key(layer), []).append(source)
    return list(groups.values())


def input_scales(source: Source) -> list[str]:
    """Names of the constant input scales of experts that come one by one."""
    parts = source.parts if isinstance(source, ExpertsSource) else ()
    return [f"{layer_of(part.name)}.{INPUT_GLOBAL_SCALE}" for part in parts]


def _group_layout(group: list[Source], *, is_stacked: bool) -> list[TensorLayout]:
    layout = []
    for source in group:
        tensors = source.layout()
        if isinstance(source, ExpertsSource):
            if is_stacked:
                tensors = checkpoint_layout(source.name, source.shape)
            else:
                tensors |= dict.fromkeys(input_scales(source), (torch.float32, (1,)))
        layout += [TensorLayout(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    # Stable: siblings keep their order. Widest elements first keeps every tensor aligned to its own element size.
    scales = (GLOBAL_ENCODE_SCALE, INPUT_GLOBAL_SCALE)
    return sorted(layout, key=lambda item: (not item.name.endswith(scales), -item.dtype.itemsize))
