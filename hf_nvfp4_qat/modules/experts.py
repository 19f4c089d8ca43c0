"""QATExperts: mixture-of-experts modules whose fused 3-D weights train in NVFP4.

Since version 5 Transformers keeps the experts of a layer in two parameters: `gate_up_proj` [E, 2I, H] and `down_proj`
[E, H, I]. The module's own forward runs unchanged, with fake-quantized weights in the place of the parameters, so
every implementation of it (eager, batched_mm, grouped_mm) keeps its meaning, and switching between them its effect.

Autograd would keep those fake-quantized weights from forward to backward: a second copy of most of the model. What
it is given to keep instead is the place of the saved tensor in the weight; backward quantizes that part again. Under
torch.compile, selective checkpointing has the same effect.
"""

from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, cast
from weakref import ref

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hf_nvfp4_qat.modules.global_scale import GlobalScales, keep_float32
from hf_nvfp4_qat.modules.linear import refuse_computed_weight
from hf_nvfp4_qat.modules.state_dict import check_master_weight
from hf_nvfp4_qat.modules.weight_clock import version_of
from hf_nvfp4_qat.numerics.format import BLOCK_SIZE
from hf_nvfp4_qat.numerics.quantize import fake_quantize_unchecked, straight_through
from hf_nvfp4_qat.sharding.parts import own_experts, own_part


class ExpertWeight:
    """One fused parameter of an experts module, with what a ``QATLinear`` has for its only one.

    The module holds this object, so this object holds the module weakly: a cycle would outlive ``del model``.

    Attributes:
        name: the parameter's name in its module.
        scale_group: key within `global_scales`; experts share no scales between parameters.
        global_scales: keeps `global_decode_scale` fresh.
        scale_rule: how block scales are chosen.
        weight_is_fake_quantized: as in ``QATLinear``.
    """

    def __init__(
        self, module: nn.Module, name: str, *, scale_group: str, global_scales: GlobalScales, scale_rule: str
    ) -> None:
        self.bind(module)
        self.name = name
        self.scale_group = scale_group
        self.global_scales = global_scales
        self.scale_rule = scale_rule
        self.weight_is_fake_quantized = False
        weight = self.weight
        ones = torch.ones(len(weight), dtype=torch.float32, device=weight.device)
        module.register_buffer(self._buffer_name, ones, persistent=False)

    @property
    def _buffer_name(self) -> str:
        return f"{self.name}_global_decode_scale"

    @property
    def place(self) -> tuple[nn.Module, str]:
        """The experts module, and the name of the weight in it."""
        module = self._module()
        assert module is not None
        return module, self.name

    @property
    def weight(self) -> Any:
        """Master weight ``[E, N, K]``."""
        return self._read(self.name)

    @property
    def global_decode_scale(self) -> torch.Tensor:
        """float32 ``[E]``, one for each expert."""
        return self._read(self._buffer_name)

    @global_decode_scale.setter
    def global_decode_scale(self, scale: torch.Tensor) -> None:
        module = self._module()
        assert module is not None
        setattr(module, self._buffer_name, scale)

    def bind(self, module: nn.Module) -> None:
        """Say whose weight it is."""
        self._module = ref(module)
        self._tensors = ChainMap(cast(dict, module._parameters), cast(dict, module._buffers))

    def _read(self, name: str) -> Any:
        module = self._module()
        # A weight that somebody keeps longer than its model stays what it was.
        return self._tensors[name] if module is None else getattr(module, name)

    def fake_quantized_weight(self) -> torch.Tensor:
        """bfloat16 ``[E, N, K]``, no gradient; of a sharded weight, the experts that this process holds."""
        self.global_scales.refresh_if_stale(self)
        own = own_part(self.weight).detach()
        scale = self.global_decode_scale[own_experts(self.weight)]
        return fake_quantize_unchecked(own, scale, scale_rule=self.scale_rule)

    def __getstate__(self) -> dict:
        # A copy has no hooks that see to it, and its module binds it.
        state = {**vars(self), "weight_is_fake_quantized": False}
        del state["_module"], state["_tensors"]
        return state


class QATExperts(nn.Module):
    """Mixed into the class of an experts module by ``adopt_experts``.

    Parameters keep their names and shapes; state dicts hold the master weights alone.

    Attributes:
        original_class: of the class, the one it was made from.
        nvfp4_weights: parameter name to its ``ExpertWeight``.
    """

    original_class: type[nn.Module]
    nvfp4_weights: dict[str, ExpertWeight]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with fake-quantized weights."""
        if "parametrizations" in self._modules:
            for name, weight in self.nvfp4_weights.items():
                if parametrize.is_parametrized(self, name):
                    refuse_computed_weight(weight.scale_group)
        quantized = {name: weight for name, weight in self.nvfp4_weights.items() if not weight.weight_is_fake_quantized}
        if not quantized:
            return super().forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            forward = partial(_compiled_forward, self, quantized)
            return checkpoint(forward, *args, use_reentrant=False, context_fn=_recompute_weights, **kwargs)
        for weight in quantized.values():
            weight.global_scales.refresh_if_stale(weight)
        values = {name: _fake_quantized(weight) for name, weight in quantized.items()}
        with _saved_by_place([_Recipe(weight, values[name]) for name, weight in quantized.items()]):
            return self.original_class.forward(cast(Any, _Stand(self, values)), *args, **kwargs)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        sizes = ", ".join(f"{name}={list(weight.weight.shape)}" for name, weight in self.nvfp4_weights.items())
        return f"{sizes}, weight=nvfp4"

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class is made at run time, so copies and pickles name the class it was made from.
        return _new_experts, (self.original_class,), self.__getstate__()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for weight in self.nvfp4_weights.values():
            weight.bind(self)
            weight.global_scales.add(weight)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QATExperts":
        scales = {name: weight.global_decode_scale for name, weight in self.nvfp4_weights.items()}
        super()._apply(fn, recurse)
        for name, weight in self.nvfp4_weights.items():
            keep_float32(weight, scales[name])
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self.nvfp4_weights:
            check_master_weight(state_dict, prefix, name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # A compiled forward does not check for staleness, so do not leave it to the next forward.
        for weight in self.nvfp4_weights.values():
            weight.global_scales.refresh_if_stale(weight)


def adopt_experts(module: nn.Module, *, name: str, global_scales: GlobalScales, scale_rule: str = "amax") -> QATExperts:
    """Turn an experts module into one that trains in NVFP4: the same object, the same Parameter objects.

    Args:
        module: one that ``why_not_trainable`` has nothing against.
        name: module path.
        global_scales: the model's scale groups.
        scale_rule: how block scales are chosen.
    """
    experts_class: Any = type(module)
    module.__class__ = _qat_class(experts_class)
    assert isinstance(module, QATExperts)
    module.nvfp4_weights = {
        parameter: ExpertWeight(
            module,
            parameter,
            scale_group=f"{name}.{parameter}",
            global_scales=global_scales,
            scale_rule=scale_rule,
        )
        for parameter in expert_parameters(module)
    }
    for weight in module.nvfp4_weights.values():
        global_scales.add(weight)
    return module


def expert_parameters(module: nn.Module) -> list[str]:
    """Names of the fused weights of an experts module: its parameters with three dims."""
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]


def why_not_trainable(module: nn.Module) -> str | None:
    """Why fused experts cannot train in NVFP4; None if they can."""
    if not hasattr(module, "is_transposed") or not hasattr(module, "has_bias"):
        return "its class does not go through Transformers' experts interface, so the layout of its weights is unknown"
    if module.is_transposed:
        return "its weights are stored transposed [E, K, N], and NVFP4 blocks must lie along K"
    if module.has_bias:
        return "its experts have biases"
    if not getattr(module, "is_concatenated", True):
        return "its gate and up rows are interleaved"
    if "forward" in vars(module):
        return "it carries a patched forward of its own"
    for name in expert_parameters(module):
        columns = getattr(module, name).shape[-1]
        if columns % BLOCK_SIZE:
            return f"{name} has {columns} columns, which {BLOCK_SIZE} does not divide"
    return None


@cache
def _qat_class(experts_class: Any) -> type[QATExperts]:
    return type(f"QAT{experts_class.__name__}", (QATExperts, experts_class), {"original_class": experts_class})


def _new_experts(experts_class: Any) -> QATExperts:
    qat_class: Any = _qat_class(experts_class)
    return qat_class.__new__(qat_class)


class _Stand:
    """Stands in for an experts module in its own forward: the same, but for some weights."""

    def __init__(self, module: nn.Module, values: dict[str, torch.Tensor]) -> None:
        self._module = module
        for name, value in values.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Recipe:
    """How to make any part of a fake-quantized weight again.

    The scale is the buffer itself: refreshing it in place is no error while the weight stands still. That it does is
    checked by its version, as autograd would.
    """

    def __init__(self, weight: ExpertWeight, values: torch.Tensor) -> None:
        self.weight, self.scale, self.dtype = weight.weight, weight.global_decode_scale, values.dtype
        self.scale_rule = weight.scale_rule
        self.version = version_of(self.weight)
        self.storage = values.untyped_storage().data_ptr()

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a view of the fake-quantized weight."""
        return tensor.numel() > 0 and tensor.untyped_storage().data_ptr() == self.storage

    def place(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """What makes the view again."""
        size, stride, offset = tensor.shape, tensor.stride(), tensor.storage_offset()
        expert_numel = self.weight[0].numel()
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        first_expert, last_expert = offset // expert_numel, last // expert_numel

        def make() -> torch.Tensor:
            if version_of(self.weight) != self.version:
                raise RuntimeError(
                    "A weight needed for backward was changed after the forward that used it (an NVFP4 expert weight "
                    f"{list(self.weight.shape)}: version {version_of(self.weight)}, not {self.version}). Call "
                    "backward before the optimizer's step."
                )
            experts = slice(first_expert, last_expert + 1)
            own, scale = self.weight.detach()[experts], self.scale[experts]
            values = fake_quantize_unchecked(own, scale, scale_rule=self.scale_rule).to(self.dtype)
            return values.as_strided(size, stride, offset - first_expert * expert_numel)

        return make


def _fake_quantized(weight: ExpertWeight) -> torch.Tensor:
    """The values that forward computes with, in the dtype that the module would compute in."""
    master = weight.weight
    dtype = master.dtype
    if torch.is_autocast_enabled(master.device.type):
        dtype = torch.get_autocast_dtype(master.device.type)
    scale, rule = weight.global_decode_scale, weight.scale_rule
    return straight_through(master, fake_quantize_unchecked(master.detach(), scale, scale_rule=rule).to(dtype))


def _compiled_forward(module: QATExperts, quantized: dict[str, ExpertWeight], *args: Any, **kwargs: Any) -> Any:
    values = {name: _fake_quantized(weight) for name, weight in quantized.items()}
    return module.original_class.forward(cast(Any, _Stand(module, values)), *args, **kwargs)


def _recompute_weights() -> Any:
    """For torch.compile: backward quantizes again, and everything else is kept as it would be."""
    return create_selective_checkpoint_contexts(_recompute_policy)


def _recompute_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op is torch.ops.hf_nvfp4_qat.fake_quantize.default:
        return CheckpointPolicy.MUST_RECOMPUTE
    # What stands between the weight and the products: views, a cast, and the experts that batched_mm picks.
    is_cast = op is torch.ops.aten._to_copy.default
    is_picking = op is torch.ops.aten.index.Tensor and args[0].ndim == 3
    if is_cast or is_picking or getattr(op, "is_view", False):
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.PREFER_SAVE


@contextmanager
def _saved_by_place(recipes: list[_Recipe]) -> Iterator[None]:
    """Let autograd keep, of views of fake-quantized weights, only where they lie; all else goes to the hooks around.

    Those hooks (gradient checkpointing, offloading) would be switched off by ours otherwise: the innermost alone count.
    """
    if not torch.is_grad_enabled():
        yield
        return
    around = torch._C._autograd._top_saved_tensors_default_hooks(False)
    pack_around, unpack_around = around or (lambda tensor: tensor, lambda kept: kept)

    def pack(tensor: torch.Tensor) -> tuple[Any, Any]:
        for recipe in recipes:
            if recipe.has(tensor):
                return recipe.place(tensor), None
        return None, pack_around(tensor)

    def unpack(kept: tuple[Any, Any]) -> torch.Tensor:
        make, other = kept
        return unpack_around(other) if make is None else make()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
