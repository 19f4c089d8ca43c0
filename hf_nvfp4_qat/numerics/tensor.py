"""NVFP4Tensor: the three tensors that are one quantized weight, as a plain frozen record.

Not a ``torch.Tensor`` subclass: nothing needs it to behave like one, and optimizers and FSDP meet only the
master weight. It knows how to turn itself back into values; making one is ``quantize.py``'s job alone.
"""

from dataclasses import dataclass

import torch

from hf_nvfp4_qat.numerics.format import (
    BLOCK_SIZE,
    E2M1_VALUES,
    block_scale_shape,
    global_scale_shape,
    packed_shape,
)
from hf_nvfp4_qat.numerics.implementations import Impl, resolve


@dataclass(frozen=True)
class NVFP4Tensor:
    """A weight ``[..., N, K]`` in NVFP4: 4.5 bits an element.

    Attributes:
        packed: uint8 ``[..., N, K / 2]``, two codes a byte, the even column in the low nibble.
        block_scale: float8_e4m3fn ``[..., N, K / 16]``, one per 16 columns of K, decode direction, row-major.
        global_decode_scale: float32 ``[]`` (or ``[E]`` for ``[E, N, K]``); multiplies the codes.

    Raises:
        ValueError: dtypes or shapes that do not belong together.
    """

    packed: torch.Tensor
    block_scale: torch.Tensor
    global_decode_scale: torch.Tensor

    def __post_init__(self) -> None:
        expected = {
            "packed": (torch.uint8, packed_shape(self.shape)),
            "block_scale": (torch.float8_e4m3fn, block_scale_shape(self.shape)),
            "global_decode_scale": (torch.float32, global_scale_shape(self.shape)),
        }
        for name, (dtype, shape) in expected.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"An NVFP4 weight {list(self.shape)} needs `{name}` as {dtype} {list(shape)}; "
                    f"got {tensor.dtype} {list(tensor.shape)}."
                )

    @property
    def shape(self) -> torch.Size:
        """Shape ``[..., N, K]`` of the weight."""
        return torch.Size((*self.packed.shape[:-1], self.packed.shape[-1] * 2))

    @property
    def device(self) -> torch.device:
        """Device of the packed codes."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors together."""
        return self.packed.nbytes + self.block_scale.nbytes + self.global_decode_scale.nbytes

    def codes(self) -> torch.Tensor:
        """The 4-bit codes, one a byte: uint8 ``[..., N, K]``."""
        return torch.stack((self.packed & 0x0F, self.packed >> 4), dim=-1).reshape(self.shape)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16, *, impl: Impl = "auto") -> torch.Tensor:
        """The values: ``E2M1[code] * block_scale * global_decode_scale``, in fp32, then rounded once to `dtype`.

        With a power-of-two global scale (every weight we quantize) the result is exact in bfloat16: a code
        has at most 2 significant bits and an E4M3 scale 4, so a product has at most 6 of bfloat16's 8.

        Args:
            dtype: floating dtype of the result.
            impl: as ``quantize_nvfp4``; "reference" and "eager" are the same here.

        Returns:
            Tensor of shape ``[..., N, K]`` on the codes' device.
        """
        if torch.compiler.is_compiling():
            return torch.ops.hf_nvfp4_qat.dequantize(
                self.packed, self.block_scale, self.global_decode_scale, dtype, impl
            )
        return _dequantize(self.packed, self.block_scale, self.global_decode_scale, dtype, impl)


def _dequantize(
    packed: torch.Tensor, block_scale: torch.Tensor, global_decode_scale: torch.Tensor, dtype: torch.dtype, impl: str
) -> torch.Tensor:
    shape = (*packed.shape[:-1], packed.shape[-1] * 2)
    if resolve(impl, packed.device) == "triton" and packed.numel():
        from hf_nvfp4_qat.numerics import triton_decode

        out = torch.empty(shape, dtype=dtype, device=packed.device)
        return triton_decode.dequantize(
            packed.contiguous(), block_scale.contiguous(), global_decode_scale.contiguous(), out
        )
    # All 256 bytes decode to a pair of values, so one lookup serves two elements.
    values = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=packed.device)
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack((values[byte & 0x0F], values[byte >> 4]), dim=-1)  # [256, 2]
    blocks = pairs[packed.int()].reshape(*block_scale.shape, BLOCK_SIZE)
    blocks *= block_scale.float().unsqueeze(-1)
    blocks *= global_decode_scale[..., None, None, None]
    return blocks.reshape(shape).to(dtype)


@torch.library.custom_op("hf_nvfp4_qat::dequantize", mutates_args=())
def _dequantize_op(
    packed: torch.Tensor, block_scale: torch.Tensor, global_decode_scale: torch.Tensor, dtype: torch.dtype, impl: str
) -> torch.Tensor:
    return _dequantize(packed, block_scale, global_decode_scale, dtype, impl)


@_dequantize_op.register_fake
def _(
    packed: torch.Tensor, block_scale: torch.Tensor, global_decode_scale: torch.Tensor, dtype: torch.dtype, impl: str
) -> torch.Tensor:
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=dtype)
