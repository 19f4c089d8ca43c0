"""TrainedWeight: one weight that trains in NVFP4, as a value, and the modules that have such weights.

    master                    a parameter of the module; what the optimizer moves is `parameters()`
    operand(), trained()      what is quantized, in forward and for checkpoints (a subclass may add a low-rank part)
    fake_quantized_weight()   what forward multiplies with, and what is served

A linear has one such weight, a module of fused experts several. Scales, gathers, checkpoints and pushes work on these
objects and never ask which kind of module a weight is in.
"""

from collections import ChainMap
from collections.abc import Callable
from typing import Any, NoReturn, cast
from weakref import ref

import torch
from torch import nn
from torch.nn.utils import parametrize

from hf_nvfp4_qat.modules.state_dict import check_master_weight
from hf_nvfp4_qat.numerics.quantize import fake_quantize_unchecked
from hf_nvfp4_qat.sharding.parts import own_experts, own_part


class TrainedWeight:
    """One weight that trains in NVFP4.

    Its module holds this object, so this object holds the module weakly: a cycle would outlive ``del model``.

    Attributes:
        name: the master's name in its module.
        scale_group: key of its group in `global_scales`; the members of one share their scales.
        global_scales: the ``GlobalScales`` of the model, which keep `global_decode_scale` fresh.
        scale_rule: how block scales are chosen.
        is_gathered: whether FSDP2 hands the fake-quantized values to forward in the master's place.
        is_quantized: whether forward quantizes the master. False computes with the master itself, to compare.
    """

    def __init__(self, module: nn.Module, name: str, *, scale_group: str, global_scales: Any, scale_rule: str) -> None:
        self.bind(module)
        self.name = name
        self.scale_group = scale_group
        self.global_scales = global_scales
        self.scale_rule = scale_rule
        self.is_gathered = False
        self.is_quantized = True
        master = self.master
        # A weight [N, K] has one scale, experts [E, N, K] have one each.
        ones = torch.ones(master.shape[:-2], dtype=torch.float32, device=master.device)
        module.register_buffer(self._buffer_name, ones, persistent=False)

    @property
    def _buffer_name(self) -> str:
        return "global_decode_scale" if self.name == "weight" else f"{self.name}_global_decode_scale"

    @property
    def places(self) -> list[tuple[nn.Module, str]]:
        """What the optimizer moves: the module that holds it and its name there, the master first."""
        module = self._module()
        assert module is not None
        return [(module, self.name)]

    def parameters(self) -> list[Any]:
        """The tensors at `places`."""
        return [self.master]

    @property
    def master(self) -> Any:
        """Parameter ``[N, K]``, or experts ``[E, N, K]``, any floating dtype; a DTensor where it is sharded."""
        return self._read(self.name)

    @property
    def global_decode_scale(self) -> torch.Tensor:
        """float32 ``[]``, or ``[E]``."""
        return self._read(self._buffer_name)

    @global_decode_scale.setter
    def global_decode_scale(self, scale: torch.Tensor) -> None:
        setattr(self.places[0][0], self._buffer_name, scale)

    @property
    def input_amax(self) -> torch.Tensor | None:
        """Of a linear with NVFP4 inputs, the largest that it has seen, float32 ``[]``; else None."""
        return getattr(self._module(), "input_amax", None)

    @property
    def reads_as_it_is(self) -> bool:
        """Whether forward takes what the module has under `name` without quantizing it."""
        return self.is_gathered or not self.is_quantized

    def bind(self, module: nn.Module) -> None:
        """Say whose weight it is."""
        self._module = ref(module)
        self._tensors = ChainMap(cast(dict, module._parameters), cast(dict, module._buffers))

    def _read(self, name: str) -> Any:
        module = self._module()
        # A weight that somebody keeps longer than its model stays what it was.
        return self._tensors[name] if module is None else getattr(module, name)

    def operand(self) -> torch.Tensor:
        """What forward quantizes, and what gets the gradient."""
        return self.master

    def trained(self) -> torch.Tensor:
        """What is quantized: the part that this process holds, no gradient."""
        return own_part(self.operand()).detach()

    def fake_quantized_weight(self) -> torch.Tensor:
        """What forward multiplies with: bfloat16, no gradient; of a sharded weight, the part this process holds."""
        self.global_scales.refresh_if_stale(self)
        scale = self.global_decode_scale[own_experts(self.master)]
        return fake_quantize_unchecked(self.trained(), scale, scale_rule=self.scale_rule)

    def __getstate__(self) -> dict:
        # A copy has no hooks that gather it, and its module binds it.
        state = {**vars(self), "is_gathered": False, "is_quantized": True}
        del state["_module"], state["_tensors"]
        return state


class QATModule(nn.Module):
    """Mixed into a module class some of whose parameters train in NVFP4.

    Parameters keep their names and shapes; state dicts hold the master weights alone.

    Attributes:
        nvfp4_weights: parameter name to its ``TrainedWeight``.
    """

    nvfp4_weights: dict[str, TrainedWeight]

    def refuse_computed_weights(self) -> None:
        """Refuse to compute with a weight that a parametrization computes.

        Raises:
            ValueError: as ``refuse_computed_weight``.
        """
        if "parametrizations" in self._modules:
            for name, weight in self.nvfp4_weights.items():
                if parametrize.is_parametrized(self, name):
                    refuse_computed_weight(f"a layer of group {weight.scale_group}")

    def __setstate__(self, state: dict) -> None:
        # Copies and unpickled modules register with the scales they were copied with.
        super().__setstate__(state)
        for weight in self.nvfp4_weights.values():
            weight.bind(self)
            weight.global_scales.add(weight)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QATModule":
        scales = {name: weight.global_decode_scale for name, weight in self.nvfp4_weights.items()}
        super()._apply(fn, recurse)
        for name, weight in self.nvfp4_weights.items():
            # `.to(dtype)` casts buffers too, and float16 cannot hold a scale.
            if weight.global_decode_scale.dtype != torch.float32:
                weight.global_decode_scale = scales[name].to(weight.global_decode_scale.device)
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self.nvfp4_weights:
            check_master_weight(state_dict, prefix, name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # A compiled forward does not check for staleness, so do not leave it to the next forward.
        for weight in self.nvfp4_weights.values():
            weight.global_scales.refresh_if_stale(weight)


def refuse_computed_weight(name: str) -> NoReturn:
    """Refuse a layer whose weight is computed from other tensors: it can be neither kept fresh nor saved.

    Within ``parametrize.cached()`` reading such a weight to refresh its scale would also keep it without its gradient.

    Args:
        name: module path, or the layer's group.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"NVFP4 QAT trains weights that are parameters themselves; {name} computes its weight from other tensors (a "
        "parametrization, weight_norm, spectral_norm or pruning). Remove that from the layer first, for example with "
        "`torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')`, or add the layer to `exclude`."
    )
