"""compressed-tensors as an independent witness: the same bytes from its packer, the same values from its decoder."""

import pytest
import torch

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from their_packing import SCHEME, their_pack

from hf_nvfp4_qat import quantize_nvfp4
from hf_nvfp4_qat.formats.names import BLOCK_SCALE, GLOBAL_ENCODE_SCALE, PACKED, to_checkpoint


def random_weight(seed: int) -> torch.Tensor:
    """Heavy-tailed bfloat16 values of a random size."""
    generator = torch.Generator().manual_seed(seed)
    rows, blocks = (int(torch.randint(1, 65, (1,), generator=generator)) for _ in range(2))
    normal = torch.randn(rows, blocks * 16, generator=generator)
    spread = torch.randn(rows, 1, generator=generator).mul(0.3).exp()
    size = 10.0 ** float(torch.rand(1, generator=generator) * 6 - 4)
    return (normal * spread * size).bfloat16()


@pytest.mark.parametrize("seed", range(50))
def test_their_packer_and_ours_give_the_same_bytes_and_their_decoder_reads_ours_exactly(seed):
    weight = random_weight(seed)
    ours_packed = quantize_nvfp4(weight)
    assert ours_packed.block_scale.float().min() > 2.0**-6, "the comparison is for scales above the floor"
    ours = {name.removeprefix("x."): tensor for name, tensor in to_checkpoint("x", ours_packed).items()}
    theirs = their_pack(weight, ours[GLOBAL_ENCODE_SCALE])
    assert torch.equal(theirs[BLOCK_SCALE].view(torch.uint8), ours[BLOCK_SCALE].view(torch.uint8))
    # They write negative zero where a small negative value rounds to zero; we never do. No other byte may differ.
    codes = torch.stack((theirs[PACKED] & 15, theirs[PACKED] >> 4), -1)
    codes = torch.where(codes == 8, 0, codes)
    assert torch.equal(codes[..., 0] | codes[..., 1] << 4, ours[PACKED])
    decoded = NVFP4PackedCompressor.decompress(dict(ours), SCHEME)["weight"]
    assert torch.equal(decoded.to(torch.bfloat16), ours_packed.dequantize())


def test_the_test_vector_of_the_format_document_is_packed_as_written_there():
    """The vector that compressed-tensors' own code was dumped for, with our global scale in place of theirs."""
    row = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    row += [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, 6, -6]
    weight = quantize_nvfp4(torch.tensor([row]))
    assert (1 / weight.global_decode_scale).item() == 256.0
    assert weight.block_scale.view(torch.uint8).tolist() == [[0x78, 0x78]]  # 256, 256
    # As theirs, but for -0.25 (byte 11), which they pack as negative zero: a8 there, a0 here... low nibble first.
    assert weight.packed.numpy().tobytes().hex() == "1032547690badcfe20426406aacceef7"
