"""NVFP4 quantization-aware training for plain Hugging Face: the weight you trained is, bit for bit, the weight served.

Importing this package registers the quantizer ``nvfp4_qat`` with Transformers and does nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Numerics: what NVFP4 is
from hf_nvfp4_qat.numerics.quantize import fake_quantize_nvfp4, quantize_nvfp4
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor

# Training: make a model train in NVFP4, and see what that covers
from hf_nvfp4_qat.modules.calibration import calibrate_activations
from hf_nvfp4_qat.modules.swap import coverage, refresh_global_scales
from hf_nvfp4_qat.quantizer.config import NVFP4QATConfig
from hf_nvfp4_qat.quantizer.hf_quantizer import prepare_qat

# Checkpoints: out, and back in
from hf_nvfp4_qat.checkpoint.save import save_nvfp4
from hf_nvfp4_qat.quantizer.load import load_nvfp4
from hf_nvfp4_qat.version import __version__ as __version__

if TYPE_CHECKING:
    # The check of a checkpoint
    from hf_nvfp4_qat.doctor.verify import verify_nvfp4

    # Across GPUs: FSDP2 that gathers QAT weights in 4 bits
    from hf_nvfp4_qat.distributed.fsdp_callback import NVFP4FSDPCallback
    from hf_nvfp4_qat.distributed.fsdp_plugin import NVFP4FSDPPlugin

    # Distillation: toward the predictions of a model in high precision
    from hf_nvfp4_qat.distillation.trainer import QADTrainer

    # Rollouts: packed weights into vLLM before each generation
    from hf_nvfp4_qat.trl_callbacks.callback import NVFP4RolloutCallback

__all__ = [
    "NVFP4FSDPCallback",
    "NVFP4FSDPPlugin",
    "NVFP4QATConfig",
    "NVFP4RolloutCallback",
    "NVFP4Tensor",
    "QADTrainer",
    "calibrate_activations",
    "coverage",
    "fake_quantize_nvfp4",
    "load_nvfp4",
    "prepare_qat",
    "quantize_nvfp4",
    "refresh_global_scales",
    "save_nvfp4",
    "verify_nvfp4",
]


# On first use: they bring the doctor, Accelerate's plugins and Transformers' trainer along, and whatever trackers are
# installed.
_LAZY = {
    "NVFP4FSDPCallback": "hf_nvfp4_qat.distributed.fsdp_callback",
    "NVFP4FSDPPlugin": "hf_nvfp4_qat.distributed.fsdp_plugin",
    "NVFP4RolloutCallback": "hf_nvfp4_qat.trl_callbacks.callback",
    "QADTrainer": "hf_nvfp4_qat.distillation.trainer",
    "verify_nvfp4": "hf_nvfp4_qat.doctor.verify",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
