"""PEFT adapters are refused on layers that train in NVFP4, and the model is put back as it was.

An adapter is added beside the quantized weight, so the merged weight, which is served, is not the trained one. A copy
of a layer (`modules_to_save`) has global scales of its own, while vLLM wants one for a fused group.

PEFT has no hook to refuse a layer. But each of its methods registers the layer that it wraps as a submodule: as
`base_layer`, or as `original_module` for a copy. By then other layers may be wrapped already, so the children and the
trainable parameters of a model are noted when PEFT's tuner takes the model.
"""

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from hf_nvfp4_qat.modules.weights import QATModule

ADAPTER_MESSAGE = (
    "PEFT adapters on NVFP4 QAT layers are not supported yet: the adapter would be added outside the quantized weight, "
    "so the merged, served weight is not the trained one; {name} got an adapter. Train without `peft_config`, or "
    "keep the adapted layers out of NVFP4 with `exclude`."
)

# By PEFT's tuner: of each module of its model the children, and of each parameter whether it trains.
_before: "WeakKeyDictionary[nn.Module, tuple[list[tuple[nn.Module, dict]], list[tuple[nn.Parameter, bool]]]]"
_before = WeakKeyDictionary()
_hook: Any = None


def refuse_adapters_from_now_on() -> None:
    """Watch the registrations of submodules in this process, for all models."""
    global _hook
    if _hook is None:
        _hook = register_module_module_registration_hook(_refuse_adapter)


def _refuse_adapter(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    # This runs for every submodule that anything registers, so it looks at the name first.
    if name == "model" and submodule is not None and hasattr(module, "inject_adapter"):
        children = [(parent, dict(parent._modules)) for parent in submodule.modules()]
        _before[module] = children, [(weight, weight.requires_grad) for weight in submodule.parameters()]
    elif name in ("base_layer", "original_module") and submodule is not None:
        wrapped = [submodule] if name == "base_layer" else submodule.modules()
        layer = next((layer for layer in wrapped if isinstance(layer, QATModule)), None)
        if layer is not None:
            raise ValueError(ADAPTER_MESSAGE.format(name=_undo_adapter(layer)))


def _undo_adapter(layer: QATModule) -> str:
    """Put the model of a layer back to what it was before the adapter; returns the path of the layer."""
    tuner: Any
    for tuner, (children, trainable) in _before.items():
        model = tuner.model
        path = next((path for path, module in model.named_modules() if module is layer), None)
        if path is None:
            continue
        if len(tuner.peft_config) > 1:
            # The model had an adapter before, on other layers. PEFT takes a further one off by itself.
            tuner.delete_adapter(list(tuner.peft_config)[-1])
            return path
        for parent, modules in children:
            if parent._modules != modules:
                parent._modules.clear()
                parent._modules.update(modules)
        for weight, requires_grad in trainable:
            weight.requires_grad_(requires_grad)
        if "_hf_peft_config_loaded" in vars(model):
            model._hf_peft_config_loaded = False  # `model.add_adapter` sets it first
        vars(model).pop("peft_config", None)
        return path
    return f"a layer of group {next(iter(layer.nvfp4_weights.values())).scale_group}"
