"""The yardstick of the benchmarks: fake quantization in plain PyTorch."""

import torch

from hf_nvfp4_qat.numerics.format import E2M1_MAGNITUDES, E2M1_TIES


def plain_formula(weight: torch.Tensor, global_decode_scale: torch.Tensor) -> torch.Tensor:
    """Fake quantization as one writes it down at first: fp32 tensors of full size, one torch.where a level."""
    blocks = weight.float().view(-1, 16)
    block_scale = (blocks.abs().amax(-1, keepdim=True) / 6 / global_decode_scale).clamp(2**-6, 448)
    scale = block_scale.to(torch.float8_e4m3fn).float() * global_decode_scale
    scaled = blocks / scale
    magnitude = torch.zeros_like(scaled)
    for lower, tie in enumerate(E2M1_TIES):
        goes_up = scaled.abs() >= tie if lower % 2 else scaled.abs() > tie
        magnitude = torch.where(goes_up, E2M1_MAGNITUDES[lower + 1], magnitude)
    return (torch.copysign(magnitude, scaled) * scale).to(torch.bfloat16).view(weight.shape)
