"""NVFP4 by compressed-tensors' own code."""

import torch
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import NVFP4A16
from compressed_tensors.quantization.utils import calculate_qparams

from hf_nvfp4_qat.formats.names import BLOCK_SCALE, GLOBAL_ENCODE_SCALE

SCHEME = QuantizationScheme(targets=["Linear"], **NVFP4A16)


def their_pack(weight: torch.Tensor, encode_scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Their block scales and codes for our global scale, from fp32 input: in bf16 they round amax / 6 once more."""
    blocks = weight.float().view(weight.shape[0], -1, 16)
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), SCHEME.weights, global_scale=encode_scale)
    state = {"weight": weight.float(), BLOCK_SCALE: scale.float(), GLOBAL_ENCODE_SCALE: encode_scale}
    return NVFP4PackedCompressor.compress(state, SCHEME)
