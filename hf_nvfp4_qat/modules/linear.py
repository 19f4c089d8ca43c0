"""QATLinear: nn.Linear whose forward computes with NVFP4 values while the optimizer keeps the master weight.

Autograd would keep the fake-quantized weight of every layer alive from forward to backward: a second bf16 copy of
the model. The function here keeps the parameter, which is alive anyway, and fake-quantizes it again in backward:
a few passes over the weight instead of 2 bytes an element.

The gradient is the identity straight-through estimator: what reaches the fake-quantized weight goes to the master, and
with W4A4 what reaches the fake-quantized input goes to the input. The input, too, is kept as it came and quantized
again in backward: layers that share one keep it once.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from hf_nvfp4_qat.modules.global_scale import GlobalScales
from hf_nvfp4_qat.modules.weights import QATModule, TrainedWeight, refuse_computed_weight
from hf_nvfp4_qat.numerics.activations import activation_amax, fake_quantize_activation
from hf_nvfp4_qat.numerics.format import check_weight
from hf_nvfp4_qat.numerics.quantize import fake_quantize_unchecked, global_decode_scale_of_amax, straight_through


class _Kept(torch.autograd.Function):
    """Saves `x` and `weight` for the product's backward, before the product is computed.

    Gradient checkpointing stops computing a block again once the block's last saved tensor is there. A function saves
    after its forward, so one that computed the product too would have each block's last product computed for nothing:
    a quarter of the recomputation of a decoder layer.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, _):
        return None, None


class _Product(torch.autograd.Function):
    """``F.linear(x, fake_quantize(weight))`` that saves nothing of its own; `kept` is what ``_Kept`` returned.

    `input_scale` is the global scale to quantize `x` with, or None.
    """

    @staticmethod
    def forward(ctx, kept, x, weight, bias, global_decode_scale, scale_rule, input_scale, compute_dtype):
        ctx.kept, ctx.scale_rule, ctx.input_scale = kept.grad_fn, scale_rule, input_scale
        # The scale is not saved through autograd: refreshing it in place is no error while the weight stands still,
        # and if the weight moved, its own version counter raises.
        ctx.global_decode_scale = global_decode_scale
        return _product(x, weight, bias, global_decode_scale, scale_rule, input_scale, compute_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, weight = (None, None) if ctx.kept is None else ctx.kept.saved_tensors  # None if only the bias trains
        return None, *_gradients(ctx, grad_output, x, weight, ctx.needs_input_grad[1:4]), None, None, None, None


class _CompiledLinear(torch.autograd.Function):
    """The same in one piece, for torch.compile, which arranges recomputation by itself."""

    @staticmethod
    def forward(ctx, x, weight, bias, global_decode_scale, scale_rule, input_scale, compute_dtype):
        ctx.global_decode_scale, ctx.scale_rule, ctx.input_scale = global_decode_scale, scale_rule, input_scale
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return _product(x, weight, bias, global_decode_scale, scale_rule, input_scale, compute_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        return *_gradients(ctx, grad_output, x, weight, ctx.needs_input_grad[:3]), None, None, None, None


def _product(x, weight, bias, global_decode_scale, scale_rule, input_scale, compute_dtype):
    fake_quantized = fake_quantize_unchecked(weight, global_decode_scale, scale_rule=scale_rule)
    return F.linear(_quantized_input(x, input_scale), fake_quantized.to(compute_dtype), bias)


def _quantized_input(x, input_scale):
    return x if input_scale is None else fake_quantize_activation(x, input_scale)


def _gradients(ctx, grad_output, x, weight, needed):
    """Gradients of `x`, `weight` and bias, None where not needed."""
    grad_x = grad_weight = grad_bias = None
    rows = grad_output.reshape(-1, grad_output.shape[-1])  # [M, N]
    if needed[0]:
        scale, rule = ctx.global_decode_scale, ctx.scale_rule
        fake_quantized = fake_quantize_unchecked(weight, scale, scale_rule=rule, after=grad_output)
        grad_x = grad_output @ fake_quantized.to(grad_output.dtype)
    if needed[1]:
        x = _quantized_input(x, ctx.input_scale)
        grad_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)  # [N, M] @ [M, K]
    if needed[2]:
        grad_bias = rows.sum(0)
    return grad_x, grad_weight, grad_bias


def check_adoptable(linear: nn.Linear, *, name: str) -> None:
    """Refuse a layer that cannot become a QATLinear.

    Raises:
        ValueError: a weight without NVFP4 form or that is computed, or a forward patched on the instance by somebody
            else.
    """
    if "weight" not in linear._parameters:
        refuse_computed_weight(name)
    check_weight(linear.weight, name=name)
    if "forward" in vars(linear) and "_old_forward" not in vars(linear):
        raise ValueError(
            f"QAT replaces the forward of nn.Linear; {name} carries a patched forward of its own, which would go on "
            "computing with unquantized weights. Prepare the model before it is patched, or exclude the layer."
        )


class QATLinear(QATModule, nn.Linear):
    """A linear layer trained with NVFP4 weights (W4A16), and with NVFP4 inputs if asked to (W4A4).

    Made from an existing ``nn.Linear`` by ``QATLinear.adopt``; parameters keep their names, dtype, ties, hooks and
    `requires_grad`, and state dicts hold the master weight alone.

    Attributes:
        weight: master weight ``[N, K]``, any floating dtype.
        global_decode_scale: float32 ``[]`` buffer, not persistent, shared in value by the fused group.
        input_amax: largest magnitude of the inputs seen in training or calibration, which the inputs' global scale
            follows: a persistent float32 ``[]`` buffer, 0 before the first; None for W4A16. Equal in all processes
            after each optimizer step.
    """

    global_decode_scale: torch.Tensor
    input_amax: torch.Tensor | None

    @classmethod
    def adopt(
        cls,
        linear: nn.Linear,
        *,
        name: str,
        scale_group: str,
        global_scales: GlobalScales,
        scale_rule: str = "amax",
        quantize_input: bool = False,
    ) -> "QATLinear":
        """Turn `linear` itself into a QATLinear: the same object, the same Parameter objects.

        Args:
            linear: exactly ``nn.Linear``, in_features divisible by 16.
            name: module path, for messages.
            scale_group: modules with the same key share one global scale.
            global_scales: the model's scale groups.
            scale_rule: how block scales are chosen.
            quantize_input: whether inputs are NVFP4 too.

        Raises:
            ValueError: as ``check_adoptable``.
        """
        check_adoptable(linear, name=name)
        if "_old_forward" in vars(linear):
            # Accelerate's dispatch hooks (device_map) call the forward the module had when they were put on.
            vars(linear)["_old_forward"] = MethodType(cls.forward, linear)
        linear.__class__ = cls
        assert isinstance(linear, cls)
        weight = TrainedWeight(
            linear, "weight", scale_group=scale_group, global_scales=global_scales, scale_rule=scale_rule
        )
        linear.nvfp4_weights = {"weight": weight}
        zero = torch.zeros((), dtype=torch.float32, device=linear.weight.device)
        linear.register_buffer("input_amax", zero if quantize_input else None)
        global_scales.add(weight)
        return linear

    @property
    def nvfp4_weight(self) -> TrainedWeight:
        """The weight as what it is trained, scaled and served as."""
        return self.nvfp4_weights["weight"]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., K]`` to ``[..., N]`` with the fake-quantized weight, in the dtype nn.Linear would compute in."""
        self.refuse_computed_weights()
        compute_dtype = self.weight.dtype
        if torch.is_autocast_enabled(input.device.type):
            compute_dtype = torch.get_autocast_dtype(input.device.type)
            input = input.to(compute_dtype)
        input_scale = self._input_scale(input)
        weight = self.nvfp4_weight
        if weight.reads_as_it_is:
            if input_scale is not None:
                input = straight_through(input, fake_quantize_activation(input, input_scale))
            return super().forward(input)
        if not torch.compiler.is_compiling():
            weight.global_scales.refresh_if_stale(weight)
        operand = weight.operand()
        bias: torch.Tensor | None = self.bias
        if bias is not None and torch.is_autocast_enabled(input.device.type):
            bias = bias.to(compute_dtype)
        arguments = (input, operand, bias, self.global_decode_scale, weight.scale_rule, input_scale, compute_dtype)
        if torch.compiler.is_compiling():
            return _CompiledLinear.apply(*arguments)
        return _Product.apply(_Kept.apply(input, operand), *arguments)

    def _input_scale(self, input: torch.Tensor) -> torch.Tensor | None:
        """Global decode scale of the inputs: that of the largest so far, in training of this one too."""
        if self.input_amax is None:
            return None
        amax = activation_amax(input)
        if self.training:
            with torch.no_grad():
                amax = self.input_amax.copy_(torch.maximum(self.input_amax, amax)).clone()
        else:
            amax = torch.where(self.input_amax > 0, self.input_amax, amax)
        return global_decode_scale_of_amax(amax)

    def fake_quantized_weight(self) -> torch.Tensor:
        """The weight that forward multiplies with, and that is served: bfloat16 ``[N, K]``, no gradient.

        Of a sharded weight, the rows that this process holds.
        """
        return self.nvfp4_weight.fake_quantized_weight()

    def extra_repr(self) -> str:
        """What ``print(model)`` shows beside the sizes."""
        return f"{super().extra_repr()}, weight=nvfp4" + ("" if self.input_amax is None else ", input=nvfp4")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QATLinear":
        input_amax = self.input_amax
        super()._apply(fn, recurse)
        if input_amax is not None and self.input_amax is not None and self.input_amax.dtype != torch.float32:
            self.input_amax = input_amax.to(self.input_amax.device)
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.input_amax is not None and f"{prefix}input_amax" not in state_dict:
            # Weights of a model that was not W4A4: what was measured of the inputs stays.
            state_dict = {**state_dict, f"{prefix}input_amax": self.input_amax}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
