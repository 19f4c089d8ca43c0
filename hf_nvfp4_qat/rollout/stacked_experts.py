"""Where the experts of a layer go when they come in one piece.

vLLM's loaders know experts one by one: 128 experts, 48 layers, 3 projections and 4 tensors each are 74,000 calls. All
experts of a layer go to the same parameter in the same way, so the loaders are asked about the first and the last, and
where those two agree but for the expert's number, the whole goes there at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from hf_nvfp4_qat.checkpoint.origins import ExpertPart
from hf_nvfp4_qat.formats.names import GLOBAL_ENCODE_SCALE, INPUT_GLOBAL_SCALE, PACKED, layer_of
from hf_nvfp4_qat.rollout.placement import Placement, Region
from hf_nvfp4_qat.rollout.stream import TensorLayout


class StackedExperts:
    """The stacked tensors of a layout.

    Attributes:
        probes: the layout with each stacked tensor replaced by those of its first and last expert.
    """

    def __init__(self, layout: Sequence[TensorLayout], experts: Mapping[str, Sequence[ExpertPart]]) -> None:
        """Plan the probes.

        Args:
            layout: what will be pushed.
            experts: of each stacked weight among it, the parts under whose names vLLM's loaders know them.
        """
        self.probes: list[TensorLayout] = []
        self._num_experts: dict[str, int] = {}
        # Probe to (stacked tensor, part).
        self._part_of: dict[str, tuple[str, ExpertPart]] = {}
        for item in layout:
            name, _, kind = item.name.rpartition(".")
            if name not in experts:
                self.probes.append(item)
                continue
            num_experts = self._num_experts[item.name] = item.shape[0]
            for part in experts[name]:
                if part.expert not in (0, num_experts - 1):
                    continue
                layer = layer_of(part.name)
                if kind == GLOBAL_ENCODE_SCALE:
                    probe = TensorLayout(f"{layer}.{kind}", torch.float32, (1,))
                else:
                    probe = TensorLayout(f"{layer}.{kind}", item.dtype, (part.shape[0], item.shape[-1]))
                self.probes.append(probe)
                self._part_of[probe.name] = (item.name, part)
                if kind == PACKED:
                    # Not pushed: a constant that vLLM expects of experts.
                    constant = TensorLayout(f"{layer}.{INPUT_GLOBAL_SCALE}", torch.float32, (1,))
                    self.probes.append(constant)
                    self._part_of[constant.name] = (item.name, part)

    def placements(self, placements: list[Placement]) -> list[Placement]:
        """Placements of the layout, from those of the probes.

        Raises:
            ValueError: the engine keeps the experts of a layer otherwise than one behind the other.
        """
        found = []
        by_expert: dict[tuple, dict[int, Placement]] = {}
        for placement in placements:
            if placement.tensor not in self._part_of:
                found.append(placement)
                continue
            name, part = self._part_of[placement.tensor]
            expert, *rest = placement.target
            if expert != (part.expert, part.expert + 1) or placement.source is None:
                raise ValueError(
                    f"The engine must keep expert {part.expert} of {name} as number {part.expert} of "
                    f"{placement.module}.{placement.parameter}; it keeps it at {placement.target}. Expert parallelism "
                    "is not supported. Nothing was sent."
                )
            kind = placement.tensor.rpartition(".")[2]
            experts = (0, self._num_experts[name])
            source: Region | None = (experts,)
            if kind == INPUT_GLOBAL_SCALE:
                source = None
            elif kind != GLOBAL_ENCODE_SCALE:
                (start, stop), columns = placement.source
                source = (experts, (part.rows.start + start, part.rows.start + stop), columns)
            whole = replace(
                placement,
                tensor=name,
                target=(experts, *rest),
                source=source,
                constant=1.0 if kind == INPUT_GLOBAL_SCALE else 0.0,
            )
            by_expert.setdefault((whole.module, whole.parameter, whole.target, source), {})[part.expert] = whole
        for same in by_expert.values():
            last = next(iter(same.values()))
            if set(same) != {0, self._num_experts[last.tensor] - 1}:
                raise ValueError(
                    f"The engine must take all experts of {last.tensor} in the same way; the first and the last go to "
                    f"other places of {last.module}.{last.parameter}. Nothing was sent."
                )
            found.append(last)
        return found
