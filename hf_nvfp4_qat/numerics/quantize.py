"""The only door: here, and nowhere else, a tensor becomes NVFP4.

Forward, gather, export and sync all come through ``quantize_nvfp4`` or ``fake_quantize_nvfp4``, so the weight that
is trained and the weight that is served come from one piece of code. What goes in is always the bfloat16
rounding of the master weight, whatever dtype the master is kept in.
"""

from collections.abc import Iterator
from typing import Any

import torch

from hf_nvfp4_qat.numerics import eager, reference
from hf_nvfp4_qat.numerics.format import (
    BLOCK_SIZE,
    E2M1_MAX,
    GLOBAL_SCALE_MAX_EXPONENT,
    GLOBAL_SCALE_MIN_EXPONENT,
    SCALE_RULES,
    block_scale_shape,
    check_weight,
    global_scale_shape,
    packed_shape,
)
from hf_nvfp4_qat.numerics.implementations import Impl, resolve
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor


def quantize_nvfp4(
    weight: torch.Tensor,
    *,
    global_decode_scale: torch.Tensor | None = None,
    scale_rule: str = "amax",
    impl: Impl = "auto",
) -> NVFP4Tensor:
    """Quantize a weight to packed NVFP4.

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``, any floating dtype; its bfloat16 rounding is quantized. K % 16 == 0.
        global_decode_scale: float32 ``[]`` (``[E]`` for ``[E, N, K]``), powers of two; pass the shared one for a
            weight that belongs to a fused group. None computes it from this weight alone.
        scale_rule: how block scales are chosen. "amax": a block's largest magnitude becomes 6. "four_over_six": 6 or
            4, whichever has the less squared error in the block. "mse": the least error of six scales.
        impl: "reference" (plain formula), "eager" (same numbers, faster), "triton" (same numbers in one pass, on
            NVIDIA GPUs) or "auto".

    Returns:
        The packed codes, block scales and global decode scale.

    Raises:
        ValueError: a shape or dtype without NVFP4 form, infinities or NaNs (counted), a global scale that is
            not a power of two in range, an unknown `scale_rule` or `impl`.
    """
    weight, global_decode_scale = _checked(weight, global_decode_scale, scale_rule)
    return quantize_unchecked(weight, global_decode_scale, scale_rule=scale_rule, impl=impl)


def quantize_unchecked(
    weight: torch.Tensor,
    global_decode_scale: torch.Tensor,
    *,
    scale_rule: str = "amax",
    impl: Impl = "auto",
) -> NVFP4Tensor:
    """``quantize_nvfp4`` without its checks, which read results back from the device one weight at a time.

    For callers that check all global scales of a model at once: the scale of a weight with a NaN or infinity is NaN.

    Args:
        weight: ``[..., N, K]``, any floating dtype, finite, K % 16 == 0.
        global_decode_scale: float32 of ``global_scale_shape(weight.shape)``, powers of two.
        scale_rule, impl: as ``quantize_nvfp4``.
    """
    if torch.compiler.is_compiling():
        packed, block_scale = torch.ops.hf_nvfp4_qat.quantize(weight, global_decode_scale, scale_rule, impl)
    else:
        packed, block_scale = _quantize(weight, global_decode_scale, scale_rule, resolve(impl, weight.device))
    return NVFP4Tensor(packed, block_scale, global_decode_scale.clone())


def quantize_into(
    weight: torch.Tensor,
    global_decode_scale: torch.Tensor,
    packed: torch.Tensor,
    block_scale: torch.Tensor,
    *,
    scale_rule: str = "amax",
) -> None:
    """``quantize_unchecked`` into bytes that are there already.

    Args:
        weight, global_decode_scale, scale_rule: as ``quantize_unchecked``.
        packed, block_scale: contiguous uint8 of as many bytes as the codes and the block scales have.
    """
    if weight.numel() and resolve("auto", weight.device) == "triton":
        out = (packed, block_scale)
        _triton_kernels().quantize(_readable(weight), global_decode_scale.contiguous(), scale_rule, out=out)
        return
    codes, scales = _quantize(weight, global_decode_scale, scale_rule, resolve("auto", weight.device))
    packed.copy_(codes.view(-1))
    block_scale.copy_(scales.view(-1).view(torch.uint8))


def fake_quantize_nvfp4(
    weight: torch.Tensor,
    *,
    global_decode_scale: torch.Tensor | None = None,
    scale_rule: str = "amax",
    impl: Impl = "auto",
) -> torch.Tensor:
    """Quantize and decode a weight: bit for bit ``quantize_nvfp4(weight).dequantize()``, in one go.

    Differentiable: the gradient passes straight through to `weight`.

    Args, Raises: as ``quantize_nvfp4``.

    Returns:
        bfloat16 tensor of the shape of `weight`; every value is exact.
    """
    detached, global_decode_scale = _checked(weight.detach(), global_decode_scale, scale_rule)
    values = fake_quantize_unchecked(detached, global_decode_scale, scale_rule=scale_rule, impl=impl)
    return straight_through(weight, values)


def straight_through(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`values`, whose gradient goes to `weight`, of the same shape, as it is."""
    return _StraightThrough.apply(weight, values) if weight.requires_grad else values


def fake_quantize_unchecked(
    weight: torch.Tensor,
    global_decode_scale: torch.Tensor,
    *,
    scale_rule: str = "amax",
    impl: Impl = "auto",
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    """``fake_quantize_nvfp4`` for a training forward: no checks, no gradient, one graph node under torch.compile.

    Args:
        weight: ``[..., N, K]``, any floating dtype, K % 16 == 0. Never raises on NaN or infinity:
            the global scale of such a weight is NaN, so all of it decodes to NaN and the loss says so.
        global_decode_scale: float32 of ``global_scale_shape(weight.shape)``, powers of two.
        scale_rule, impl: as ``quantize_nvfp4``.
        after: any tensor; it is not read, but a compiler must compute it first. Given the incoming gradient, a second
            call in a backward cannot be merged with the one in the forward, whose result would then be kept between.

    Returns:
        bfloat16 tensor of the shape of `weight`.
    """
    if torch.compiler.is_compiling():
        return torch.ops.hf_nvfp4_qat.fake_quantize(weight, global_decode_scale, scale_rule, impl, after)
    return _fake_quantize(weight, global_decode_scale, scale_rule, resolve(impl, weight.device))


def global_amax(weight: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each ``[N, K]`` matrix, after the bfloat16 rounding.

    Args:
        weight: ``[..., N, K]``, any floating dtype.

    Returns:
        float32 of ``global_scale_shape(weight.shape)``; 0 for an empty matrix, NaN where the weight holds NaN.
    """
    if weight.numel() == 0:
        return torch.zeros(global_scale_shape(weight.shape), dtype=torch.float32, device=weight.device)
    # Matrix by matrix: with a `dim`, aminmax is forty times slower on a CPU.
    matrices = weight.detach().reshape(-1, *weight.shape[-2:]).unbind()
    magnitudes = [torch.maximum(-low, high) for low, high in map(torch.aminmax, matrices)]
    # Rounding to bf16 is monotonic, so the largest rounded magnitude is the rounded largest magnitude.
    return torch.stack(magnitudes).view(global_scale_shape(weight.shape)).to(torch.bfloat16).float()


def global_decode_scale_of_amax(amax: torch.Tensor) -> torch.Tensor:
    """The power of two that puts the top block scale into [240, 448]; from the bits, never from a float log.

    Round ``amax / 6`` to 4 significant bits, ties to even, ``= m * 2**e`` with ``1 <= m < 2``; the scale is
    ``2**(e - 8)`` where ``m <= 1.75``, else ``2**(e - 7)``. Rounding first is what lets the scale survive being
    computed again from its own decoded weights. (Source: our FORMAT.md, "The global scale".)

    Args:
        amax: float32, any shape, the largest bfloat16 magnitudes (of a weight, or over its fused group).

    Returns:
        float32 of the same shape, within ``[2**-100, 2**100]``; 1 where amax is 0, NaN where it is not finite.
    """
    amax = amax.float()
    if not torch.compiler.is_compiling() and resolve("auto", amax.device) == "triton":
        from hf_nvfp4_qat.numerics.triton_amax import decode_scales

        return decode_scales(amax.contiguous())
    bits = (amax / E2M1_MAX).view(torch.int32)
    # Keep 3 of 23 fraction bits: add just under half of the last kept bit, plus that bit itself for ties to even.
    top = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    exponent = (top >> 3) - 127 - 8 + ((top & 7) == 7)
    exponent = exponent.clamp(GLOBAL_SCALE_MIN_EXPONENT, GLOBAL_SCALE_MAX_EXPONENT)
    scale = ((exponent + 127) << 23).to(torch.int32).view(torch.float32)
    scale = torch.where(amax == 0, torch.ones_like(scale), scale)
    return torch.where(amax.isfinite(), scale, torch.full_like(scale, torch.nan))


def check_scale_rule(scale_rule: str) -> None:
    """Refuse an unknown rule.

    Raises:
        ValueError: none of "amax", "four_over_six", "mse".
    """
    if scale_rule not in SCALE_RULES:
        raise ValueError(f"`scale_rule` is one of {', '.join(SCALE_RULES)}; got {scale_rule!r}.")


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return values

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def _checked(
    weight: torch.Tensor, global_decode_scale: torch.Tensor | None, scale_rule: str
) -> tuple[torch.Tensor, torch.Tensor]:
    check_weight(weight)
    check_scale_rule(scale_rule)
    if num_bad := int((~weight.to(torch.bfloat16).isfinite()).sum()):
        raise ValueError(
            f"NVFP4 has no infinity and no NaN; the weight holds {num_bad} such values (after rounding to "
            f"bfloat16) among {weight.numel()}. Training has probably diverged: go back to an earlier checkpoint."
        )
    if global_decode_scale is None:
        return weight, global_decode_scale_of_amax(global_amax(weight))
    expected = global_scale_shape(weight.shape)
    if tuple(global_decode_scale.shape) != expected or global_decode_scale.dtype != torch.float32:
        raise ValueError(
            f"`global_decode_scale` is float32 of shape {list(expected)} for a weight {list(weight.shape)}; "
            f"got {global_decode_scale.dtype} {list(global_decode_scale.shape)}."
        )
    mantissa, exponent = torch.frexp(global_decode_scale)
    in_range = (exponent - 1 >= GLOBAL_SCALE_MIN_EXPONENT) & (exponent - 1 <= GLOBAL_SCALE_MAX_EXPONENT)
    if not bool(((mantissa == 0.5) & in_range).all()):
        raise ValueError(
            "`global_decode_scale` must be a power of two within [2**-100, 2**100], so that every decoded weight is "
            f"exact in bfloat16; got {global_decode_scale.tolist()}. Leave it out to have it computed."
        )
    return weight, global_decode_scale


# These two take one matrix at a time, as rows of blocks.
_ROWS: dict[str, Any] = {"reference": reference, "eager": eager}


def _matrices(weight: torch.Tensor, global_decode_scale: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each matrix of a non-empty ``[..., N, K]`` as bfloat16 blocks ``[B, 16]``, with its own scale ``[]``."""
    weight = weight.detach().to(torch.bfloat16).contiguous()
    matrices = weight.view(global_decode_scale.numel(), -1, BLOCK_SIZE)
    return zip(matrices, global_decode_scale.view(-1), strict=True)


def _quantize(
    weight: torch.Tensor, global_decode_scale: torch.Tensor, scale_rule: str, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed codes and the block scales."""
    if weight.numel() == 0:
        packed = torch.empty(0, dtype=torch.uint8, device=weight.device)
        block_scale = torch.empty(0, dtype=torch.float8_e4m3fn, device=weight.device)
    elif impl == "triton":
        scale = global_decode_scale.contiguous()
        packed, block_scale = _triton_kernels().quantize(_readable(weight), scale, scale_rule)
    else:
        matrices = _matrices(weight, global_decode_scale)
        parts = [_ROWS[impl].quantize(blocks, scale, scale_rule) for blocks, scale in matrices]
        packed, block_scale = (part[0] if len(part) == 1 else torch.cat(part) for part in zip(*parts, strict=True))
    return packed.view(packed_shape(weight.shape)), block_scale.view(block_scale_shape(weight.shape))


def _fake_quantize(weight: torch.Tensor, global_decode_scale: torch.Tensor, scale_rule: str, impl: str) -> torch.Tensor:
    if weight.numel() == 0:
        return weight.detach().to(torch.bfloat16, copy=True)
    if impl == "triton":
        return _triton_kernels().fake_quantize(_readable(weight), global_decode_scale.contiguous(), scale_rule)
    matrices = _matrices(weight, global_decode_scale)
    values = [_ROWS[impl].fake_quantize(blocks, scale, scale_rule) for blocks, scale in matrices]
    return (values[0] if len(values) == 1 else torch.cat(values)).view(weight.shape)


def _readable(weight: torch.Tensor) -> torch.Tensor:
    """As the kernels take it: they round fp32 and fp16 themselves."""
    return weight.detach() if weight.dtype in (torch.bfloat16, torch.float16, torch.float32) else weight.bfloat16()


def _triton_kernels() -> Any:
    from hf_nvfp4_qat.numerics import triton_kernels

    return triton_kernels


@torch.library.custom_op("hf_nvfp4_qat::fake_quantize", mutates_args=())
def _fake_quantize_op(
    weight: torch.Tensor, global_decode_scale: torch.Tensor, scale_rule: str, impl: str, after: torch.Tensor | None
) -> torch.Tensor:
    return _fake_quantize(weight, global_decode_scale, scale_rule, resolve(impl, weight.device))


@_fake_quantize_op.register_fake
def _(
    weight: torch.Tensor, global_decode_scale: torch.Tensor, scale_rule: str, impl: str, after: torch.Tensor | None
) -> torch.Tensor:
    return weight.new_empty(weight.shape, dtype=torch.bfloat16)


@torch.library.custom_op("hf_nvfp4_qat::quantize", mutates_args=())
def _quantize_op(
    weight: torch.Tensor, global_decode_scale: torch.Tensor, scale_rule: str, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize(weight, global_decode_scale, scale_rule, resolve(impl, weight.device))


@_quantize_op.register_fake
def _(
    weight: torch.Tensor, global_decode_scale: torch.Tensor, scale_rule: str, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        weight.new_empty(packed_shape(weight.shape), dtype=torch.uint8),
        weight.new_empty(block_scale_shape(weight.shape), dtype=torch.float8_e4m3fn),
    )
