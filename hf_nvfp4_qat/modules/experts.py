"""QATExperts: mixture-of-experts modules whose fused 3-D weights train in NVFP4.

Since version 5 Transformers keeps the experts of a layer in two parameters: `gate_up_proj` [E, 2I, H] and `down_proj`
[E, H, I]. The module's own forward runs unchanged, with fake-quantized weights in the place of the parameters, so
every implementation of it (eager, batched_mm, grouped_mm) keeps its meaning, and switching between them its effect.

Autograd would keep those fake-quantized weights from forward to backward: a second copy of most of the model. What
it is given to keep instead is the place of the saved tensor in the weight; backward quantizes that part again. Under
torch.compile, selective checkpointing has the same effect.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hf_nvfp4_qat.modules.global_scale import GlobalScales
from hf_nvfp4_qat.modules.weight_clock import version_of
from hf_nvfp4_qat.modules.weights import QATModule, TrainedWeight
from hf_nvfp4_qat.numerics.format import BLOCK_SIZE
from hf_nvfp4_qat.numerics.quantize import fake_quantize_unchecked, straight_through


class QATExperts(QATModule):
    """Mixed into the class of an experts module by ``adopt_experts``.

    Attributes:
        original_class: of the class, the one it was made from.
    """

    original_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with fake-quantized weights."""
        self.refuse_computed_weights()
        quantized = {name: weight for name, weight in self.nvfp4_weights.items() if not weight.reads_as_it_is}
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
        sizes = ", ".join(f"{name}={list(weight.master.shape)}" for name, weight in self.nvfp4_weights.items())
        return f"{sizes}, weight=nvfp4"

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class is made at run time, so copies and pickles name the class it was made from.
        return _new_experts, (self.original_class,), self.__getstate__()


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
        parameter: TrainedWeight(
            module, parameter, scale_group=f"{name}.{parameter}", global_scales=global_scales, scale_rule=scale_rule
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

    def __init__(self, weight: TrainedWeight, values: torch.Tensor) -> None:
        self.weight, self.scale, self.dtype = weight.master, weight.global_decode_scale, values.dtype
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


def _fake_quantized(weight: TrainedWeight) -> torch.Tensor:
    """The values that forward computes with, in the dtype that the module would compute in."""
    master = weight.operand()
    dtype = master.dtype
    if torch.is_autocast_enabled(master.device.type):
        dtype = torch.get_autocast_dtype(master.device.type)
    scale, rule = weight.global_decode_scale, weight.scale_rule
    return straight_through(master, fake_quantize_unchecked(master.detach(), scale, scale_rule=rule).to(dtype))


def _compiled_forward(module: QATExperts, quantized: dict[str, TrainedWeight], *args: Any, **kwargs: Any) -> Any:
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
