"""GlobalScales: one global decode scale per weight or fused group, kept fresh without the user's help.

The scale is module state (a non-persistent fp32 buffer). Forward, gather, export and sync only read it, so they
agree. Somebody must write it whenever weights change; that is done here, at three moments:

    optimizer.step()            a global post hook of torch.optim refreshes every model whose weights were stepped:
                                plain loops, Trainer, Accelerate and TRL all end there. After an optimizer that steps
                                something else (ZeRO, FSDP1: flat copies), the next forward refreshes
    load_state_dict, in-place   QATLinear compares its weight's identity and version counter with the ones last
    edits, assignment           seen, before each forward, and refreshes its fused group when they differ
    saving                      refreshes everything first, which also covers edits through `.data`,
                                the one kind of write that PyTorch does not count

Under torch.compile the check before the forward is not traced; the two hooks (optimizer, load_state_dict) remain.

Members are held weakly and register themselves again after deepcopy and unpickling, so copying a model, or one
layer of it, gives independent scales.
"""

from collections.abc import Iterable
from itertools import accumulate
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_nvfp4_qat.numerics.group_amax import GroupAmax
from hf_nvfp4_qat.numerics.quantize import global_decode_scale_of_amax

_live: "WeakSet[GlobalScales]" = WeakSet()
_optimizer_hook: Any = None


class QATWeight(Protocol):
    """A weight that trains in NVFP4: a ``QATLinear``, or one of the fused weights of an experts module.

    Attributes:
        weight: master weight ``[N, K]``, or experts ``[E, N, K]``.
        scale_group: key of its group; the members of one share their scales.
        global_scales: the groups it belongs to.
        global_decode_scale: float32 buffer to write the scale to, ``[]`` or ``[E]``.
        scale_rule: how block scales are chosen.
        weight_is_fake_quantized: whether `weight` holds the fake-quantized values whenever forward runs.
    """

    scale_group: str
    global_scales: "GlobalScales"
    scale_rule: str
    weight_is_fake_quantized: bool

    @property
    def weight(self) -> Any: ...  # noqa: D102

    @property
    def global_decode_scale(self) -> torch.Tensor: ...  # noqa: D102

    @global_decode_scale.setter
    def global_decode_scale(self, scale: torch.Tensor) -> None: ...

    def fake_quantized_weight(self) -> torch.Tensor:
        """What forward multiplies with."""
        ...


class GlobalScales:
    """The scale groups of one model."""

    def __init__(self) -> None:
        # Members in the order they came: under ZeRO-3 reading a weight gathers it, so all processes must read alike.
        self._groups: dict[str, WeakKeyDictionary[QATWeight, None]] = {}
        # Weight, its version counter and the scale's tensor at the last refresh, by module; tensors weakly.
        self._seen: WeakKeyDictionary[QATWeight, tuple[ref, int, ref]] = WeakKeyDictionary()
        self._amaxes: dict[tuple[torch.device, Any], GroupAmax] = {}
        # Whether an optimizer was ever seen to own one of the weights themselves.
        self.is_stepped = False
        _live.add(self)
        global _optimizer_hook
        if _optimizer_hook is None:
            _optimizer_hook = register_optimizer_step_post_hook(_refresh_stepped_weights)

    def __deepcopy__(self, memo: dict) -> "GlobalScales":
        memo[id(self)] = copy = GlobalScales()
        return copy

    def __reduce__(self) -> tuple[type["GlobalScales"], tuple[()]]:
        return GlobalScales, ()

    def add(self, module: QATWeight) -> None:
        """Register a module under its `scale_group`."""
        self._groups.setdefault(module.scale_group, WeakKeyDictionary())[module] = None

    def is_fresh(self, module: QATWeight) -> bool:
        """Whether the scale of the fused group of `module` was computed from the weights the group has now."""
        return all(self._is_seen(member) for member in self._groups[module.scale_group])

    def refresh_if_stale(self, module: QATWeight) -> None:
        """Refresh the fused group of `module` if one of its weights changed since the last refresh."""
        if not self.is_fresh(module):
            self._refresh([module.scale_group])

    def refresh_stale(self) -> None:
        """Refresh every fused group one of whose weights changed, all together.

        For sharded weights every process must call it: all of them see the same weights change.
        """
        stale = [name for name, group in self._groups.items() if not all(map(self._is_seen, group))]
        if stale:
            self._refresh(stale)

    def refresh(self) -> None:
        """Recompute every scale from the weights as they are now."""
        self._refresh(self._groups)

    def _is_seen(self, module: QATWeight) -> bool:
        seen, version, scale = self._seen.get(module, (_nothing, 0, _nothing))
        if scale() is not module.global_decode_scale:
            return False  # the buffer was replaced: Accelerate puts old ones back after loading, `.to` makes new ones
        last, weight = seen(), module.weight
        if isinstance(last, DTensor) and _mesh(last) != _mesh(weight):
            # FSDP2 has put the gathered weight in the place of the shard that the scale was computed from.
            weight = last
        return weight is last and version == weight_version(weight)

    @torch.no_grad()
    def _refresh(self, groups: Iterable[str]) -> None:
        """One batched pass a device: a handful of launches for all weights together, nothing read back."""
        by_place: dict[tuple[torch.device, Any], list[list[QATWeight]]] = {}
        for group in groups:
            # Offloaded weights are on the meta device between forwards and have nothing to read.
            members = [module for module in self._groups[group] if module.weight.device.type != "meta"]
            if members:
                mesh = next((mesh for module in members if (mesh := _mesh(module.weight)) is not None), None)
                by_place.setdefault((members[0].weight.device, mesh), []).append(members)
        for place, grouped in by_place.items():
            modules = [module for members in grouped for module in members]
            # A group has one scale, or one for each expert.
            num_scales = [members[0].global_decode_scale.numel() for members in grouped]
            starts = list(accumulate(num_scales, initial=0))
            first_scales = [
                start + (own_slice(module.weight).start if module.weight.ndim == 3 else 0)
                for start, members in zip(starts, grouped, strict=False)
                for module in members
            ]
            weights = [own_part(module.weight) for module in modules]
            amax = self._amaxes.get(place)
            if amax is None or not amax.fits(weights, first_scales):
                amax = self._amaxes[place] = GroupAmax(weights, first_scales, starts[-1])
            shared_amax = amax(weights)
            if place[1] is not None:
                _maximum_over_shards(shared_amax, place[1])
            scales = global_decode_scale_of_amax(shared_amax).split(num_scales)
            torch._foreach_copy_(
                [own_part(module.global_decode_scale).view(-1) for module in modules],
                [scale for scale, members in zip(scales, grouped, strict=True) for _ in members],
            )
            for module in modules:
                if module.global_decode_scale.device.type != "meta":  # else there is nothing to have written to
                    version = weight_version(module.weight)
                    self._seen[module] = (ref(module.weight), version, ref(module.global_decode_scale))

    def refresh_stepped(self, stepped: set[int]) -> bool:
        """Refresh the groups of which a weight is among the stepped ones, by id; whether there was any."""
        groups = [name for name, group in self._groups.items() if any(id(m.weight) in stepped for m in group)]
        self._refresh(groups)
        self.is_stepped |= bool(groups)
        return bool(groups)

    @torch.no_grad()
    def share_input_amaxes(self) -> None:
        """Give all processes the largest inputs that any of them has seen: one all-reduce, and none without W4A4."""
        modules = [module for group in self._groups.values() for module in group]
        amaxes = [own_part(amax) for module in modules if (amax := getattr(module, "input_amax", None)) is not None]
        if amaxes and torch.distributed.is_available() and torch.distributed.is_initialized():
            shared = torch.stack(amaxes)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
            torch._foreach_copy_(amaxes, list(shared.unbind()))

    def forget(self) -> None:
        """Take every scale for stale."""
        self._seen.clear()


def keep_float32(weight: QATWeight, scale: torch.Tensor) -> None:
    """Give a weight back its scale of before ``.to(dtype)``: that casts buffers too, and float16 cannot hold it."""
    if weight.global_decode_scale.dtype != torch.float32:
        weight.global_decode_scale = scale.to(weight.global_decode_scale.device)


def own_part(tensor: Any) -> torch.Tensor:
    """The part of a sharded weight that this process has; a plain tensor as it is.

    Scales are whole everywhere, but tensor parallelism makes DTensors of them too.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_experts(weight: Any) -> Any:
    """Index of the scales of the part of a weight that this process has, into all of the weight's.

    Args:
        weight: ``[N, K]``, which has one scale, or experts ``[E, N, K]``, sharded or not.
    """
    return own_slice(weight) if weight.ndim == 3 else ()


def own_slice(weight: Any) -> slice:
    """Which rows, or experts, of a weight this process has."""
    if not isinstance(weight, DTensor):
        return slice(0, len(weight))
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return slice(offset[0], offset[0] + shape[0])


def _mesh(weight: Any) -> Any:
    return weight.device_mesh if isinstance(weight, DTensor) else None


def _maximum_over_shards(shared_amax: torch.Tensor, mesh: Any) -> None:
    """Every process of `mesh` has seen a part of each DTensor: one all-reduce an axis for all of them, in place.

    Every process refreshes the same groups in the same order.
    """
    # Reductions may drop a NaN; infinity survives them, and makes the scale NaN all the same.
    shared_amax.nan_to_num_(nan=torch.inf, posinf=torch.inf)
    for axis in range(mesh.ndim):
        torch.distributed.all_reduce(shared_amax, torch.distributed.ReduceOp.MAX, group=mesh.get_group(axis))


def _nothing() -> None:
    """Stands in for a dead weak reference."""


def weight_version(weight: Any) -> int:
    """PyTorch's count of in-place writes to a tensor; inference tensors keep none."""
    return 0 if weight.is_inference() else weight._version


def _refresh_stepped_weights(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """After any optimizer's step: refresh the scales of the weights it owns."""
    stepped = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    own = [scales for scales in list(_live) if scales.refresh_stepped(stepped)]
    if not own:
        # ZeRO and FSDP1 step flat copies of the weights, and write the weights themselves where PyTorch does not count.
        # A second optimizer, for norms and biases beside the matrices' own, is no reason.
        own = [scales for scales in list(_live) if not scales.is_stepped]
        for scales in own:
            scales.forget()
    for scales in own:
        scales.share_input_amaxes()
