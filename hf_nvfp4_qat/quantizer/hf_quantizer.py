"""NVFP4QATHfQuantizer: swaps linears before `from_pretrained` loads weights, and finishes the model after.

Written for the hooks of transformers 5.17 and of 5.23, which differ: it overrides few of them, and takes the union of
their arguments.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from hf_nvfp4_qat.checkpoint.stream import check_expert_names
from hf_nvfp4_qat.formats.names import TAGS
from hf_nvfp4_qat.modules.master_precision import watch_master_precision
from hf_nvfp4_qat.modules.swap import coverage_of, qat_modules, qat_weights, refresh_global_scales, swap_linears
from hf_nvfp4_qat.quantizer.adapters import ADAPTER_MESSAGE, refuse_adapters_from_now_on
from hf_nvfp4_qat.quantizer.config import QUANT_METHOD, NVFP4QATConfig
from hf_nvfp4_qat.quantizer.saving import refuse_patched_saving, save_as_qat
from hf_nvfp4_qat.quantizer.source import check_source

logger = logging.getLogger(__name__)


class NVFP4QATHfQuantizer(HfQuantizer):
    """Makes a model train with NVFP4 weights while it is loaded from an unquantized checkpoint."""

    requires_calibration = False
    quantization_config: NVFP4QATConfig
    _has_input_amaxes = False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse placements that cannot train.

        Raises:
            ValueError: `device_map` offloads weights to disk, or to the CPU beside an accelerator.
        """
        if not isinstance(device_map, dict):
            return
        places = {str(place) for place in device_map.values()}
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                "NVFP4 QAT trains every weight where it lies, so none may be offloaded; `device_map` places "
                f"modules on {', '.join(sorted(places))}. Use more or larger devices, or all of the model on 'cpu'."
            )

    def update_weight_conversions(self, weight_conversions: list, model: Any = None) -> list:
        """Weights load as they are: training keeps them in high precision."""
        return weight_conversions

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        check_source(model, checkpoint_files or ())
        swap_linears(model, self.quantization_config, output_embedding=model.get_output_embeddings())
        check_expert_names(model)
        if self.quantization_config.activations == "nvfp4":
            # Only checkpoints of W4A4 training hold them; Transformers leaves memory as it is where they miss.
            self._has_input_amaxes = _has_input_amaxes(model, checkpoint_files or ())
            model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), r"\.input_amax$"}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for layer in qat_modules(model).values():
            if layer.input_amax is not None:
                loaded = layer.input_amax if self._has_input_amaxes else torch.zeros_like(layer.input_amax)
                layer.input_amax = loaded.float()
        refresh_global_scales(model)
        watch_master_precision(model)
        save_as_qat(model, self.quantization_config.save_format)
        tags = (*TAGS, "quantization-aware-training")
        model.add_model_tags([tag for tag in tags if tag not in (model.model_tags or ())])
        refuse_adapters_from_now_on()
        logger.info(coverage_of(model).summary)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict]:
        """Nothing to add: the model's own ``save_pretrained`` packs."""
        return None, {}

    def is_serializable(self) -> bool:
        """The model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Trainer may train the model."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Trainer may train all of it, without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """``generate`` may compile the forward."""
        return True


def prepare_qat(model: nn.Module, config: NVFP4QATConfig | None = None) -> nn.Module:
    """Make a model that is already in memory train with NVFP4 weights, in place.

    For models made by ``from_config`` or by hand; ``from_pretrained(quantization_config=...)`` does the same while
    loading.

    Args:
        model: any module; a ``PreTrainedModel`` also gets the saving rule of ``NVFP4QATConfig.save_format``.
        config: what to quantize; the defaults if None.

    Returns:
        `model`.

    Raises:
        ValueError: the model is quantized already, carries PEFT adapters or a patched way to save, or has nothing
            to quantize.
    """
    config = config or NVFP4QATConfig()
    _refuse_quantized(model)
    if not isinstance(model, PreTrainedModel):
        swap_linears(model, config)
        refresh_global_scales(model)
        watch_master_precision(model)
        refuse_adapters_from_now_on()
        return model
    refuse_patched_saving(model)
    quantizer = NVFP4QATHfQuantizer(config, pre_quantized=False)
    quantizer.preprocess_model(model)
    model.hf_quantizer = quantizer
    return quantizer.postprocess_model(model)


def _has_input_amaxes(model: PreTrainedModel, checkpoint_files: Sequence[str]) -> bool:
    """Whether a checkpoint holds the largest inputs of as many layers as the model has; all or none count."""
    names: list[str] = []
    for file in checkpoint_files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as tensors:
                names += tensors.keys()
    num_found = sum(name.endswith(".input_amax") for name in names)
    num_expected = len(qat_modules(model))
    if num_found not in (0, num_expected):
        logger.warning(
            "The checkpoint knows the largest inputs of %d layers, and %d quantize theirs: none is used. They are "
            "measured anew in training, or by `calibrate_activations`.", num_found, num_expected,
        )  # fmt: skip
    return num_found == num_expected


def _refuse_quantized(model: nn.Module) -> None:
    if qat_weights(model):
        raise ValueError(
            f"prepare_qat was given a {type(model).__name__} that trains in NVFP4 already. Prepare a model once."
        )
    method = getattr(model, "quantization_method", None)
    if method is not None or getattr(model, "is_quantized", False):
        raise ValueError(
            f"QAT starts from unquantized weights; this {type(model).__name__} is quantized with "
            f"{getattr(method, 'value', method)}. For a packed NVFP4 checkpoint use `load_nvfp4(path)`; for other "
            "formats load the original, unquantized checkpoint."
        )
    if getattr(model, "peft_config", None):
        raise ValueError(ADAPTER_MESSAGE.format(name="the model"))


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(NVFP4QATHfQuantizer)
