"""Activations in NVFP4 (W4A4): block scales of the moment, one global scale that stays.

Blackwell quantizes the input of a product on the fly, and its kernels do not choose scales as we do for weights: a
block scale may be subnormal or zero, so that a small block keeps its own scale beside an outlier 100,000 times as
large, and a block larger than the global scale has room for is clipped. With ``e = 1 / g`` a power of two:

    s = e4m3(min(e * (max|x| * (1 / 6)), 448))        per block of 16 columns
    q = e2m1(x * (1 / (s * g)))                       0 where s is 0
    x' = q * (s * g)                                  exact in bfloat16

(Source: vLLM, ``nvfp4_emulation_utils.ref_nvfp4_quant_dequant``; compressed-tensors calls it ``dynamic: "local"``.)
"""

import torch

from hf_nvfp4_qat.numerics.eager import round_to_e2m1_
from hf_nvfp4_qat.numerics.format import BLOCK_SIZE, E2M1_MAX, E4M3_MAX
from hf_nvfp4_qat.numerics.implementations import resolve


def activation_amax(x: torch.Tensor) -> torch.Tensor:
    """Largest finite magnitude: float32 ``[]``; 0 of an empty tensor, and of one that holds an infinity or a NaN."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    low, high = torch.aminmax(x.detach())
    amax = torch.maximum(-low, high).float()
    return torch.where(amax.isfinite(), amax, torch.zeros_like(amax))


def fake_quantize_activation(x: torch.Tensor, global_decode_scale: torch.Tensor) -> torch.Tensor:
    """The values that are left of `x`, without gradient: one graph node under torch.compile.

    Args:
        x: ``[..., K]``, bfloat16, float16 or float32, K % 16 == 0. A block with a NaN or an infinity
            becomes NaN.
        global_decode_scale: float32 ``[]``, a power of two.

    Returns:
        Tensor of the shape and dtype of `x`, contiguous.
    """
    if torch.compiler.is_compiling():
        return torch.ops.hf_nvfp4_qat.fake_quantize_activation(x, global_decode_scale)
    return _fake_quantize_activation(x, global_decode_scale)


def _fake_quantize_activation(x: torch.Tensor, global_decode_scale: torch.Tensor) -> torch.Tensor:
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = x.detach().contiguous()
    if resolve("auto", x.device) == "triton":
        from hf_nvfp4_qat.numerics.triton_activations import fake_quantize

        return fake_quantize(x, global_decode_scale)
    blocks = x.view(-1, BLOCK_SIZE).float()
    block_max = blocks.abs().amax(dim=-1, keepdim=True)
    scale = ((1 / global_decode_scale) * (block_max * (1 / E2M1_MAX))).clamp_(max=E4M3_MAX)
    scale = scale.to(torch.float8_e4m3fn).float().mul_(global_decode_scale)
    scale = torch.where(block_max.isfinite(), scale, torch.nan)
    inverse = torch.where(scale == 0, scale, 1 / scale)
    scaled = blocks * inverse
    return round_to_e2m1_(scaled, torch.empty_like(scaled)).mul_(scale).view(x.shape).to(x.dtype)


@torch.library.custom_op("hf_nvfp4_qat::fake_quantize_activation", mutates_args=())
def _fake_quantize_activation_op(x: torch.Tensor, global_decode_scale: torch.Tensor) -> torch.Tensor:
    return _fake_quantize_activation(x, global_decode_scale)


@_fake_quantize_activation_op.register_fake
def _(x: torch.Tensor, global_decode_scale: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)
