"""GlobalScales: one global decode scale per weight or fused group, kept fresh without the user's help.

The scale is module state (a non-persistent fp32 buffer). Forward, gather, export and sync only read it, so they
agree. Somebody must write it whenever weights change. Whether they did is the clock's to say (weight_clock.py); scales
are compared with it, and written, at three moments:

    optimizer.step()            a global post hook of torch.optim refreshes, in one pass, the scales of the weights that
                                were stepped: plain loops, Trainer, Accelerate and TRL all end there
    before each forward         QATLinear asks whether its fused group changed: in-place edits, assignment,
                                load_state_dict, an optimizer that steps copies of the weights (ZeRO, FSDP1)
    saving and pushing          refresh everything first, which also covers edits through `.data`,
                                the one kind of write that leaves no trace. So does each forward in evaluation of a
                                model that no optimizer trains: references and averages are written in that way

Under torch.compile the question before the forward is not traced; the two hooks (optimizer, load_state_dict) remain.

Sharded weights are refreshed by all processes of their mesh together, models in the order in which they were made; a
step of an optimizer that owns none of them sends nothing.

Members are held weakly and register themselves again after deepcopy and unpickling, so copying a model, or one
layer of it, gives independent scales.
"""

import logging
import sys
from collections.abc import Iterable
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_nvfp4_qat.modules.weight_clock import Sight, WeightClock, held, nothing
from hf_nvfp4_qat.modules.weights import QATModule, TrainedWeight
from hf_nvfp4_qat.numerics.group_amax import GroupAmax
from hf_nvfp4_qat.numerics.quantize import global_decode_scale_of_amax
from hf_nvfp4_qat.sharding.parts import is_sharded, maximum_over_group, maximum_over_mesh, mesh_of, own_part, own_slice

logger = logging.getLogger(__name__)

_live: "WeakSet[GlobalScales]" = WeakSet()
# Of each optimizer, its tensors that belong to no model here, by id.
_strangers: "WeakKeyDictionary[torch.optim.Optimizer, dict[int, ref]]" = WeakKeyDictionary()
_hooks: list[Any] = []


class _Member:
    """A weight's part in its group: its parameters as last seen, when its scale was written, and into which tensor."""

    __slots__ = ("sights", "refreshed", "scale")

    def __init__(self, sights: list[Sight]) -> None:
        self.sights = sights
        self.refreshed = -1
        self.scale: Any = nothing


class GlobalScales:
    """The scale groups of one model.

    Attributes:
        clock: says when its weights changed.
    """

    def __init__(self, clock: WeightClock | None = None) -> None:
        """Start without members.

        Args:
            clock: the model's, made with its root module.
        """
        self.clock = clock or WeightClock()
        # Members in the order they came: under ZeRO-3 reading a weight gathers it, so all processes must read alike.
        self._groups: dict[str, WeakKeyDictionary[TrainedWeight, _Member]] = {}
        self._amaxes: dict[tuple[torch.device, Any], GroupAmax] = {}
        # Wrappers (DDP, FSDP1) whose processes train the model together, each on data of its own.
        self._wrappers: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()
        self._has_warned = False
        _live.add(self)
        if not _hooks:
            _hooks.append(register_optimizer_step_post_hook(_after_step))
            _hooks.append(register_module_module_registration_hook(_notice_wrapper))

    def __deepcopy__(self, memo: dict) -> "GlobalScales":
        memo[id(self)] = copy = GlobalScales(self.clock.copied(memo))
        return copy

    def __reduce__(self) -> tuple[type["GlobalScales"], tuple[()]]:
        return GlobalScales, ()

    def add(self, weight: TrainedWeight) -> None:
        """Register a weight under its `scale_group`."""
        members = self._groups.setdefault(weight.scale_group, WeakKeyDictionary())
        members[weight] = _Member([self.clock.sight(*place) for place in weight.places])

    def is_fresh(self, weight: TrainedWeight) -> bool:
        """Whether the scale of the fused group of `weight` was computed from the weights the group has now."""
        return self._is_group_fresh(self._groups[weight.scale_group])

    def refresh_if_stale(self, weight: TrainedWeight) -> None:
        """Refresh the fused group of `weight` if one of its weights changed since the last refresh."""
        if not self.is_fresh(weight):
            self._refresh([weight.scale_group])

    def refresh_stale(self) -> None:
        """Refresh every fused group one of whose weights changed, all together.

        For sharded weights every process must call it: all of them see the same weights change.
        """
        self._refresh([name for name, group in self._groups.items() if not self._is_group_fresh(group)])

    def refresh(self) -> None:
        """Recompute every scale from the weights as they are now."""
        self._refresh(self._groups)

    def _is_group_fresh(self, group: "WeakKeyDictionary[TrainedWeight, _Member]") -> bool:
        for weight, member in group.items():
            if self._last_change(weight, member) > member.refreshed:
                return False
            if member.scale() is not weight.global_decode_scale:
                return False  # replaced: Accelerate puts old buffers back after loading, `.to` makes new ones
        return True

    def _last_change(self, weight: TrainedWeight, member: _Member) -> int:
        return max(map(self.clock.look, member.sights, weight.parameters()))

    @torch.no_grad()
    def _refresh(self, groups: Iterable[str]) -> None:
        """One batched pass a device: a handful of launches for all weights together, nothing read back."""
        by_place: dict[tuple[torch.device, Any], list[list[tuple[TrainedWeight, _Member]]]] = {}
        for group in groups:
            # Offloaded weights are on the meta device between forwards and have nothing to read.
            members = [item for item in self._groups[group].items() if item[0].master.device.type != "meta"]
            if members:
                mesh = next((mesh for weight, _ in members if (mesh := mesh_of(weight.master)) is not None), None)
                by_place.setdefault((members[0][0].master.device, mesh), []).append(members)
        for place, grouped in by_place.items():
            trained = [weight for members in grouped for weight, _ in members]
            # A group has one scale, or one for each expert.
            num_scales = [members[0][0].global_decode_scale.numel() for members in grouped]
            starts = list(accumulate(num_scales, initial=0))
            first_scales = [
                start + (own_slice(weight.master).start if weight.master.ndim == 3 else 0)
                for start, members in zip(starts, grouped, strict=False)
                for weight, _ in members
            ]
            weights = [weight.trained() for weight in trained]
            amax = self._amaxes.get(place)
            if amax is None or not amax.fits(weights, first_scales):
                amax = self._amaxes[place] = GroupAmax(weights, first_scales, starts[-1])
            shared_amax = amax(weights)
            maximum_over_mesh(shared_amax, place[1])
            scales = global_decode_scale_of_amax(shared_amax).split(num_scales)
            torch._foreach_copy_(
                [own_part(weight.global_decode_scale).view(-1) for weight in trained],
                [scale for scale, members in zip(scales, grouped, strict=True) for _ in members],
            )
            for weight, member in (item for members in grouped for item in members):
                scale = weight.global_decode_scale
                if scale.device.type != "meta":  # else there is nothing to have written to
                    self._last_change(weight, member)
                    member.refreshed, member.scale = self.clock.epoch, ref(scale)

    def refresh_untrained(self) -> None:
        """Refresh everything if no optimizer trains the model, in one pass, but for what takes all processes."""
        if self.clock.is_trained:
            return
        names = [
            name
            for name, members in self._groups.items()
            if all(_is_whole(held(*place)) for weight in members for place in weight.places)
        ]
        self._refresh(names)

    def after_step(self, optimizer: torch.optim.Optimizer, owned: dict[int, Any], *, may_be_copies: bool) -> None:
        """An optimizer has made a step: refresh the scales of the weights it owns.

        Args:
            optimizer: it.
            owned: its tensors by id.
            may_be_copies: whether some of them belong to no model here, and so may be copies of weights.
        """
        if not self.clock.stepped(optimizer, owned, may_be_copies=may_be_copies):
            return
        epoch = self.clock.epoch
        stepped = [
            name
            for name, members in self._groups.items()
            if any(sight.changed == epoch for member in members.values() for sight in member.sights)
        ]
        if stepped:
            self._refresh(stepped)
            self.share_input_amaxes(stepped)

    @torch.no_grad()
    def share_input_amaxes(self, stepped: Iterable[str] | None = None, *, process_group: Any = None) -> None:
        """Give the processes that train the model together the largest inputs that any of them has seen (W4A4).

        These are the mesh of sharded weights, and the processes of a DDP or FSDP1 wrapper; all of them must call.

        Args:
            stepped: scale groups; sharded weights over meshes that hold none of these are left alone. None for all.
            process_group: more processes, each with data of its own.
        """
        amaxes: dict[Any, list[torch.Tensor]] = {}
        meshes = set()
        for name, members in self._groups.items():
            for weight, member in members.items():
                mesh = mesh_of(member.sights[0].current(weight.master))
                if (amax := weight.input_amax) is not None:
                    amaxes.setdefault(mesh, []).append(own_part(amax))
                if stepped is None or name in stepped:
                    meshes.add(mesh)
        groups = [wrapper.process_group for wrapper in self._wrappers]
        if process_group is not None:
            groups.append(process_group)
        for mesh, of_mesh in amaxes.items():
            if mesh not in meshes:
                continue
            if mesh is None and not groups:
                self._warn_of_unshared_inputs()
                continue
            shared = torch.stack(of_mesh)
            maximum_over_mesh(shared, mesh)
            for group in dict.fromkeys(groups):
                maximum_over_group(shared, group)
            torch._foreach_copy_(of_mesh, list(shared.unbind()))

    def wrapped_by(self, wrapper: nn.Module) -> None:
        """Share the largest inputs with the processes of a DDP or FSDP1 wrapper from now on."""
        self._wrappers[wrapper] = None

    def _warn_of_unshared_inputs(self) -> None:
        if not self._has_warned and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            self._has_warned = True
            logger.warning(
                "Each process measures the largest inputs of NVFP4 activations (W4A4) by itself: the model is neither "
                "sharded by FSDP2 nor wrapped by DDP. If several processes train it together, call "
                "`hf_nvfp4_qat.modules.calibration.share_input_amaxes(model, process_group)` on all of them."
            )


def _is_whole(weight: Any) -> bool:
    """Whether a weight is neither a DTensor, nor partitioned by ZeRO-3, nor one of FSDP1's flat parts."""
    return weight is not None and not is_sharded(weight) and not hasattr(weight, "ds_id") and weight.ndim > 1


class RefreshInEvaluation:
    """A forward pre-hook of a model: in evaluation, the scales of one that no optimizer trains are refreshed."""

    def __init__(self, scales: GlobalScales) -> None:
        self._scales = scales  # not the model: that would be a cycle

    def __call__(self, model: nn.Module, args: Any) -> None:
        """Before the model's forward."""
        if not model.training and not torch.compiler.is_compiling():
            self._scales.refresh_untrained()


def scales_of(weights: Iterable[TrainedWeight]) -> list[GlobalScales]:
    """The scale groups of some weights, in the order in which they were made: one for each model prepared."""
    found = dict.fromkeys(weight.global_scales for weight in weights)
    return sorted(found, key=lambda scales: scales.clock.number)


def _after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """After any optimizer's step: models in the order in which they were made, as on all processes."""
    owned = {id(tensor): tensor for group in optimizer.param_groups for tensor in group["params"]}
    live = sorted(_live, key=lambda scales: scales.clock.number)  # a set of weak references has an order of its own
    may_be_copies = _owns_strangers(optimizer, owned, [scales.clock for scales in live])
    for scales in live:
        scales.after_step(optimizer, owned, may_be_copies=may_be_copies)


def _owns_strangers(optimizer: torch.optim.Optimizer, owned: dict[int, Any], clocks: list[WeightClock]) -> bool:
    """Whether some of an optimizer's tensors are parameters of no model that has a clock."""

    def unknown() -> set[int]:
        return owned.keys() - {number for clock in clocks for number in clock.known(owned)}

    remembered = _strangers.get(optimizer, {})
    strangers = unknown()
    if any(remembered.get(number, nothing)() is not owned[number] for number in strangers):
        for clock in clocks:
            clock.learn()
        strangers = unknown()
        _strangers[optimizer] = {number: ref(owned[number]) for number in strangers}
    return bool(strangers)


def _notice_wrapper(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Remember the DDP or FSDP1 wrapper that takes in a model with W4A4: it says which processes train it together."""
    fsdp1 = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    wrappers = (DistributedDataParallel, *([fsdp1.FullyShardedDataParallel] if fsdp1 else []))
    if submodule is None or not isinstance(module, wrappers):
        return
    for layer in submodule.modules():
        for weight in layer.nvfp4_weights.values() if isinstance(layer, QATModule) else ():
            if weight.input_amax is not None:
                weight.global_scales.wrapped_by(module)
