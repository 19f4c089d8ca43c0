"""One global scale for several weights, without changing a value: powers of two move into the block scales.

    code * block_scale * g  ==  code * (block_scale * 2**e) * (g * 2**-e)

holds exactly as long as the block scales stay E4M3 values, and all of [2**-6, 448] times a power of two are while they
stay inside. This mends two faults of other tools' weights: global scales that differ where vLLM keeps one, and
block scales below 2**-6, which Marlin may flush to zero.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from hf_nvfp4_qat.numerics.format import E4M3_MAX, E4M3_MIN_NORMAL, GLOBAL_SCALE_MAX_EXPONENT
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor

_ELEMENTS_AT_ONCE = 2**24
_MAGNITUDES = 0x7777777777777777
_SIGNS = ~_MAGNITUDES
"""The bits of 16 codes in an integer."""


@dataclass
class ScaleFacts:
    """What the scales of one weight hold.

    Attributes:
        global_decode_scale: as a Python float.
        num_bad: block scales that are NaN or negative.
        num_zero: block scales of zero under codes that are not.
        num_subnormal: block scales below 2**-6, but not zero, under codes that are not zero.
        num_negative_zeros: codes.
        num_lost_rows: rows that have only zeros for codes, but three block scales or more.
        num_zero_rows: the other rows that have only zeros for codes.
        smallest, largest: block scale, neither bad nor zero, under codes that are not zero; None if there is none.
    """

    global_decode_scale: float
    num_bad: int = 0
    num_zero: int = 0
    num_subnormal: int = 0
    num_negative_zeros: int = 0
    num_lost_rows: int = 0
    num_zero_rows: int = 0
    smallest: float | None = None
    largest: float | None = None

    @property
    def has_good_global_scale(self) -> bool:
        """Whether it is finite and positive."""
        return math.isfinite(self.global_decode_scale) and self.global_decode_scale > 0


def scale_facts(weight: NVFP4Tensor) -> ScaleFacts:
    """Look at every scale of a weight ``[N, K]``, some rows at a time."""
    facts = ScaleFacts(weight.global_decode_scale.item())
    for rows in _row_pieces(weight):
        scale, codes = rows.block_scale.float(), rows.packed
        is_bad = scale.isnan() | (scale < 0)
        # The 16 codes of a block are one integer of 8 bytes; without their signs it is zero or not.
        blocks = codes.contiguous().view(torch.int64)
        magnitudes = blocks & _MAGNITUDES
        live = (magnitudes != 0) & ~is_bad
        used = scale[live & (scale > 0)]
        facts.num_bad += int(is_bad.sum())
        facts.num_zero += int((live & (scale == 0)).sum())
        facts.num_subnormal += int((used < E4M3_MIN_NORMAL).sum())
        # Packers give blocks of zeros one scale, and blocks that round to zeros at most one other, their least.
        is_third = (scale != scale.amin(1, keepdim=True)) & (scale != scale.amax(1, keepdim=True))
        is_zero_row = (magnitudes == 0).all(1) & ~is_bad.any(1)
        facts.num_lost_rows += int((is_zero_row & is_third.any(1)).sum())
        facts.num_zero_rows += int((is_zero_row & ~is_third.any(1)).sum())
        # Adding 7 sets the sign bit of every magnitude but zero. We write no negative zero: ours are never counted.
        if (blocks & ~(magnitudes + _MAGNITUDES) & _SIGNS).any():
            facts.num_negative_zeros += int(((codes & 0x0F) == 0x08).sum()) + int(((codes & 0xF0) == 0x80).sum())
        if used.numel():
            facts.smallest = min(facts.smallest or math.inf, float(used.min()))
            facts.largest = max(facts.largest or 0.0, float(used.max()))
    return facts


def shared_exponents(facts: Mapping[str, ScaleFacts]) -> dict[str, int] | None:
    """By which power of two each weight's global scale has to grow for all to be the same and every block scale normal.

    The common scale is the one that puts the largest block scale into (224, 448], as our own weights have it.

    Args:
        facts: of the weights of one fused group, by name; one weight is a group too.

    Returns:
        Name to exponent; None if no common scale decodes all of them to the same values.
    """
    if not all(fact.has_good_global_scale and fact.num_bad == 0 for fact in facts.values()):
        return None
    mantissas, exponents = zip(*(math.frexp(fact.global_decode_scale) for fact in facts.values()), strict=True)
    if len(set(mantissas)) > 1:
        return None
    # In units of the first weight's global scale.
    relative = [exponent - exponents[0] for exponent in exponents]
    used = [(fact, shift) for fact, shift in zip(facts.values(), relative, strict=True) if fact.largest is not None]
    shared = 0
    if used:
        largest = max(math.ldexp(fact.largest or 0.0, shift) for fact, shift in used)
        smallest = min(math.ldexp(fact.smallest or 0.0, shift) for fact, shift in used)
        mantissa, exponent = math.frexp(largest / E4M3_MAX)
        shared = exponent - 1 if mantissa == 0.5 else exponent
        if math.ldexp(smallest, -shared) < E4M3_MIN_NORMAL:
            return None
    # The scale and its reciprocal must both be normal float32.
    if abs(exponents[0] + shared) > GLOBAL_SCALE_MAX_EXPONENT + 20:
        return None
    return {name: shared - shift for name, shift in zip(facts, relative, strict=True)}


def rescaled(weight: NVFP4Tensor, exponent: int) -> NVFP4Tensor:
    """The same values with a global scale that is ``2**exponent`` times as large.

    Blocks of zeros have any scale: theirs stay within the range. Scales of zero stay zero.
    """
    scale = weight.block_scale.float()
    moved = torch.ldexp(scale, torch.tensor(-exponent)).clamp(E4M3_MIN_NORMAL, E4M3_MAX)
    result = NVFP4Tensor(
        weight.packed,
        torch.where(scale > 0, moved, scale).to(torch.float8_e4m3fn),
        torch.ldexp(weight.global_decode_scale, torch.tensor(exponent)),
    )
    for before, after in zip(_row_pieces(weight), _row_pieces(result), strict=True):
        # As integers, so that zeros keep their signs.
        values = (piece.dequantize(torch.float32).view(torch.int32) for piece in (before, after))
        assert torch.equal(*values), "rescaling changed a value"
    return result


def is_exact_in_bfloat16(weight: NVFP4Tensor) -> bool:
    """Whether every decoded value of a weight ``[N, K]`` is a finite bfloat16 number."""
    for rows in _row_pieces(weight):
        values = rows.dequantize(torch.float32)
        if not values.isfinite().all() or not torch.equal(values, values.bfloat16().float()):
            return False
    return True


def _row_pieces(weight: NVFP4Tensor) -> Iterator[NVFP4Tensor]:
    num_rows = max(1, _ELEMENTS_AT_ONCE // weight.shape[-1])
    for codes, scales in zip(weight.packed.split(num_rows), weight.block_scale.split(num_rows), strict=True):
        yield NVFP4Tensor(codes, scales, weight.global_decode_scale)
