"""WeightClock: one number for each model that says whether its tensors may have changed.

    epoch       rises whenever a tensor of the model may have been written or replaced
    look        compares one tensor with what it was at the last look, and returns the epoch of its last change

Scales, pushes and checks keep the epoch they were made at and compare. Nothing else asks tensors for their identity,
address or version. What a clock notices:

    optimizer.step()         tensors that the optimizer owns. One that owns tensors of no prepared model may step copies
                             of the weights (ZeRO and FSDP1 step flat ones): then every unsharded weight may have
                             changed that the same step has not written itself. Decided anew at each step
    in-place writes          PyTorch's version counter
    assignment, `.data = x`  identity and address
    explicit                 ``tick``, called by ``refresh_global_scales``

An in-place write through `.data` outside an optimizer's step leaves no trace, so it is not noticed. A model that no
optimizer trains may be written so all the time, as references and averages are: ``is_trained`` tells.

Sharded tensors are compared by what all processes see alike, the DTensor's own identity and version, because a change
makes all of them meet in a collective. Writes into the local part alone count for the epoch, but not for ``look``.
"""

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from hf_nvfp4_qat.sharding.parts import is_sharded, own_storage, stands_for_shard

_numbers = count()


def version_of(tensor: Any) -> int:
    """PyTorch's count of in-place writes to a tensor; inference tensors keep none."""
    return 0 if tensor.is_inference() else tensor._version


class Sight:
    """What a clock saw last of one parameter or buffer of a module.

    Attributes:
        tensor: weak reference to the tensor that was there; of a gathered FSDP2 parameter, to its shard.
        stamp: what tells a write, alike on all processes.
        own_stamp: what tells a write into the part of a sharded tensor that this process holds; None until the first
            ``look_at`` after a change.
        changed: epoch of the last change.
    """

    __slots__ = ("tensor", "stamp", "own_stamp", "changed")

    def __init__(self) -> None:
        self.tensor: Any = nothing
        self.stamp: Any = None
        self.own_stamp: Any = None
        self.changed = 0

    def current(self, tensor: Any) -> Any:
        """The tensor that is there now, where `tensor` is what the module shows: of a gathered one, its shard."""
        last = self.tensor()
        return last if last is not None and stands_for_shard(tensor, last) else tensor


class WeightClock:
    """The clock of one model.

    Attributes:
        number: clocks of a process in the order in which they were made, which is the same on all processes.
        epoch: rises, and never falls.
    """

    def __init__(self, root: nn.Module | None = None) -> None:
        """Start at epoch 0, before anything was looked at.

        Args:
            root: the model; without it, only modules that were looked at are known to belong to it.
        """
        self.number = next(_numbers)
        self.epoch = 0
        self._root: Any = nothing if root is None else ref(root)
        self._sights: WeakKeyDictionary[nn.Module, dict[str, Sight]] = WeakKeyDictionary()
        self._optimizer: Any = nothing
        # Unsharded weights may have changed then without a trace.
        self._traceless = 0
        self._parameters: dict[int, ref] = {}

    def copied(self, memo: dict) -> "WeightClock":
        """A clock for the copy that ``copy.deepcopy`` makes of the model, or of a part of it."""
        return WeightClock(memo.get(id(self._root())))

    def sight(self, module: nn.Module, name: str) -> Sight:
        """The record of a parameter or buffer, to look with; one for each name of a module."""
        return self._sights.setdefault(module, {}).setdefault(name, Sight())

    def look(self, sight: Sight, tensor: Any) -> int:
        """The epoch of the last change of a tensor; the epoch rises if it is now.

        Args:
            sight: its record.
            tensor: what the module shows.
        """
        last = sight.tensor()
        if tensor is not last and last is not None and stands_for_shard(tensor, last):
            tensor = last
        if tensor is not last or (_stamp(tensor) != sight.stamp and not _was_moved(tensor, sight.stamp)):
            self.tick()
            self._see(sight, tensor)
        if sight.changed < self._traceless and not is_sharded(tensor):
            return self._traceless
        return sight.changed

    def look_at(self, model: nn.Module) -> int:
        """Look at all parameters and persistent buffers of a model, and return the epoch."""
        for module in model.modules():
            for name, tensor in _tensors(module):
                sight = self.sight(module, name)
                self.look(sight, tensor)
                if is_sharded(shard := sight.tensor()):
                    own_stamp = _own_stamp(shard)
                    if sight.own_stamp not in (None, own_stamp):
                        self.tick()
                    sight.own_stamp = own_stamp
        return self.epoch

    def tick(self) -> None:
        """Something may have changed."""
        self.epoch += 1

    @property
    def is_trained(self) -> bool:
        """Whether an optimizer that has stepped one of the tensors still lives."""
        return self._optimizer() is not None

    def stepped(self, optimizer: Any, owned: Mapping[int, Any], *, may_be_copies: bool) -> bool:
        """An optimizer has made a step.

        Args:
            optimizer: it.
            owned: its tensors by id.
            may_be_copies: whether some of them belong to no model that has a clock.

        Returns:
            Whether a tensor that was looked at is among them.
        """
        shown = [
            (sight, sight.current(held(module, name)), name in module._parameters)
            for module, by_name in self._sights.items()
            for name, sight in by_name.items()
        ]
        written = [(sight, tensor) for sight, tensor, _ in shown if id(tensor) in owned]
        is_copied = may_be_copies and any(is_weight and not is_sharded(tensor) for _, tensor, is_weight in shown)
        if written or is_copied or self.known(owned):
            self.tick()
        if is_copied:
            self._traceless = self.epoch
        if written or is_copied:
            self._optimizer = ref(optimizer)
        for sight, tensor in written:
            self._see(sight, tensor)
        return bool(written)

    def known(self, tensors: Mapping[int, Any]) -> set[int]:
        """The ids of those tensors that are parameters of the model, as far as it was walked by ``learn``."""
        return {number for number, tensor in tensors.items() if self._parameters.get(number, nothing)() is tensor}

    def learn(self) -> None:
        """Walk the model, to know its parameters."""
        root = self._root()
        models = list(self._sights) if root is None else [root]
        self._parameters = {id(tensor): ref(tensor) for model in models for tensor in model.parameters()}

    def _see(self, sight: Sight, tensor: Any) -> None:
        sight.tensor, sight.stamp, sight.changed = ref(tensor), _stamp(tensor), self.epoch
        sight.own_stamp = None


def _stamp(tensor: Any) -> tuple[int, int]:
    """Version and address; of a sharded tensor, the address stays out: it is each process's own."""
    try:
        return tensor._version, 0 if is_sharded(tensor) else tensor.data_ptr()
    except RuntimeError:  # inference tensors keep no version, those inside a transform of torch.func have no address
        return version_of(tensor), 0


def _own_stamp(shard: Any) -> tuple[int, int]:
    """The same of the part of a sharded tensor that this process holds."""
    own = own_storage(shard)
    return version_of(own), own.data_ptr()


def _was_moved(tensor: Any, stamp: tuple[int, int]) -> bool:
    """Whether a tensor with another stamp was not written: ZeRO-3 puts a weight elsewhere each time it gathers it."""
    return hasattr(tensor, "ds_id") and version_of(tensor) == stamp[0]


def held(module: nn.Module, name: str) -> Any:
    """What a module has under a name; past ``getattr``, by which ZeRO-3 gathers a weight, in all processes at once."""
    for tensors in (module._parameters, module._buffers, vars(module)):
        if name in tensors:
            return tensors.get(name)
    return None


def _tensors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Own parameters and persistent buffers of a module, by name."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield name, tensor


def nothing() -> None:
    """Stands in for a dead weak reference."""
