"""Repairs of other libraries, each made only when asked for.

Plain Transformers decodes the experts of an NVFP4 checkpoint without their global scales (transformers#48371): the
load report is clean or says "unexpected", and the model answers nonsense. The checkpoints are right; vLLM reads them,
and so does ``load_nvfp4``.
"""

import logging
from typing import Any

import torch
import transformers
from packaging.version import Version

from hf_nvfp4_qat.formats.names import BLOCK_SCALE, GLOBAL_ENCODE_SCALE, PACKED, SERVED_DTYPE
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor

_OLDEST = Version("5.17.0")
_NEWEST_TESTED = Version("5.24.0")
_FIRST_REFUSED = Version("6.0.0")

logger = logging.getLogger(__name__)


def fix_expert_loading() -> None:
    """Let ``from_pretrained`` decode the experts of packed NVFP4 checkpoints with their global scales.

    Changes Transformers' compressed-tensors loading in this process, for NVFP4 experts alone. Once is enough.

    A minor version newer than those tested is repaired with a warning.

    Raises:
        ValueError: a major version of Transformers in which this was not tested.
    """
    version = Version(Version(transformers.__version__).base_version)
    if not _OLDEST <= version < _FIRST_REFUSED:
        raise ValueError(
            f"The repair of expert loading is for Transformers {_OLDEST} to 5.x; {version} is installed. "
            "It may read experts rightly by itself: compare with `load_nvfp4`, which needs no repair."
        )
    if version > _NEWEST_TESTED:
        logger.warning(
            f"The repair of expert loading was tested up to Transformers {_NEWEST_TESTED}; {version} is installed. "
            "Compare with `load_nvfp4`, which needs no repair."
        )
    from transformers.integrations.compressed_tensors import DecompressExperts
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    if getattr(DecompressExperts.convert, "nvfp4", False):
        return
    DecompressExperts.convert = _with_global_scales(DecompressExperts.convert)
    if not hasattr(CompressedTensorsHfQuantizer, "serialized_names"):  # 5.17 does not even read the scales
        CompressedTensorsHfQuantizer.update_weight_conversions = _reading_global_scales(
            CompressedTensorsHfQuantizer.update_weight_conversions, DecompressExperts
        )


def _with_global_scales(convert: Any) -> Any:
    def decode(self: Any, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        packed = [name for name in input_dict if PACKED in name]
        if not packed or any(name.replace(PACKED, GLOBAL_ENCODE_SCALE) not in input_dict for name in packed):
            return convert(self, input_dict, *args, **kwargs)
        decoded = {}
        for name in packed:
            parts = (input_dict[name.replace(PACKED, part)] for part in (PACKED, BLOCK_SCALE, GLOBAL_ENCODE_SCALE))
            experts = [
                NVFP4Tensor(codes, scales, 1.0 / encode_scale.float().reshape(())).dequantize(SERVED_DTYPE)
                for codes, scales, encode_scale in zip(*parts, strict=True)
            ]
            decoded[name] = torch.stack(experts)
        return decoded

    decode.nvfp4 = True  # type: ignore[attr-defined]
    return decode


def _reading_global_scales(update: Any, decompress_class: type) -> Any:
    def update_with_scales(self: Any, weight_conversions: list) -> list:
        from transformers.core_model_loading import WeightConverter

        updated = []
        for conversion in update(self, weight_conversions):
            operations = getattr(conversion, "operations", None) or []
            if any(isinstance(operation, decompress_class) for operation in operations):
                packed = [name for name in conversion.source_patterns if name.endswith(f"{PACKED}$")]
                scales = [name.replace(PACKED, GLOBAL_ENCODE_SCALE) for name in packed]
                conversion = WeightConverter(
                    source_patterns=[*conversion.source_patterns, *scales],
                    target_patterns=conversion._original_target_patterns,
                    operations=operations,
                )
            updated.append(conversion)
        return updated

    return update_with_scales
