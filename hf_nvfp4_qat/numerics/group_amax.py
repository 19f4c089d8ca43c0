"""GroupAmax: the largest magnitudes of all of a model's weights, each of which counts for a group that shares a scale.

On a GPU with Triton it is one launch for all weights of a dtype, whatever their number, and nothing is read back: a
table of addresses made once says where each chunk of each weight lies.
"""

from collections.abc import Sequence

import torch

from hf_nvfp4_qat.numerics.implementations import resolve
from hf_nvfp4_qat.numerics.quantize import global_amax


class GroupAmax:
    """Prepared once for given weights, of which it keeps the addresses; called with them for the amaxes of now.

    Valid while `fits` says so.

    Args:
        weights: ``[..., N, K]`` each, on one device.
        first_groups: for each weight the group of its first matrix; further matrices count for the groups after it.
        num_groups: how many groups there are.
    """

    def __init__(self, weights: Sequence[torch.Tensor], first_groups: Sequence[int], num_groups: int) -> None:
        self._num_groups = num_groups
        self._places = _places(weights, first_groups)
        device = weights[0].device
        self._plan = None
        if resolve("auto", device) == "triton":
            from hf_nvfp4_qat.numerics.triton_amax import AmaxPlan

            self._plan = AmaxPlan.of(weights, first_groups, num_groups)
        if self._plan is None:
            matrices = [
                first + offset
                for weight, first in zip(weights, first_groups, strict=True)
                for offset in range(weight.shape[:-2].numel())
            ]
            self._groups = torch.tensor(matrices, device=device)

    def fits(self, weights: Sequence[torch.Tensor], first_groups: Sequence[int]) -> bool:
        """Whether these are the same weights, at the same addresses, in the same groups."""
        return self._places == _places(weights, first_groups)

    def __call__(self, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """Largest magnitude of each group, after the bfloat16 rounding: float32 ``[num_groups]``, NaN if one is."""
        if self._plan is not None:
            # Rounding to bf16 is monotonic, so it may come last.
            return self._plan.run().to(torch.bfloat16).float()
        amax = torch.cat([global_amax(weight).view(-1) for weight in weights])
        return amax.new_zeros(self._num_groups).scatter_reduce(0, self._groups, amax, "amax")


def _places(weights: Sequence[torch.Tensor], first_groups: Sequence[int]) -> list[tuple]:
    return [
        (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, first)
        for weight, first in zip(weights, first_groups, strict=True)
    ]
