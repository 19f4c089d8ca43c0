"""Checkpoint keys and stored scale directions: compressed-tensors `nvfp4-pack-quantized`.

For a layer ``x`` the checkpoint holds, instead of ``x.weight`` [N, K]:

    x.weight_packed         uint8          [N, K / 2]    two codes a byte, even column in the low nibble
    x.weight_scale          float8_e4m3fn  [N, K / 16]   block scales, row-major
    x.weight_global_scale   float32        [1]           the encode direction: 1 / global_decode_scale
    x.input_global_scale    float32        [1]           the same of the inputs; only where they are NVFP4 too (W4A4)

A power of two has an exact reciprocal, so the stored scale and ours carry the same information. No other file has these
keys, but modelopt.py, which translates them.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

from hf_nvfp4_qat.numerics.format import BLOCK_SIZE, block_scale_shape, packed_shape
from hf_nvfp4_qat.numerics.quantize import check_scale_rule
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor

PACKED = "weight_packed"
BLOCK_SCALE = "weight_scale"
GLOBAL_ENCODE_SCALE = "weight_global_scale"
# Only in W4A4 checkpoints; of experts vLLM waits for it all the same.
INPUT_GLOBAL_SCALE = "input_global_scale"

# Among the `observer_kwargs` of weights; where it is missing, the rule is "amax".
_SCALE_RULE = "scale_rule"

QUANT_METHOD = "compressed-tensors"
FORMAT = "nvfp4-pack-quantized"
TAGS = ("nvfp4", "4-bit", "vllm")
"""Of model cards, and of models whose cards Transformers writes."""
OF_AN_EXPERT = re.compile(r"(.+\.experts)\.([0-9]{1,6})\.(.+)", re.DOTALL)
"""A layer or tensor of one expert: the path of the experts, which one it is, and the rest."""
SERVED_DTYPE = torch.bfloat16
"""Dtype of everything in a packed checkpoint that is not quantized."""


def layer_of(weight_name: str) -> str:
    """``model.layers.0.mlp.up_proj`` of ``model.layers.0.mlp.up_proj.weight``."""
    return weight_name.removesuffix(".weight")


def to_checkpoint(
    layer: str, weight: NVFP4Tensor, input_decode_scale: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a quantized layer under their checkpoint names.

    Args:
        layer: checkpoint name of the layer, without ``.weight``.
        weight: its weight ``[N, K]``.
        input_decode_scale: global scale of its inputs, float32 ``[]``, if they are quantized.
    """
    tensors = {
        f"{layer}.{PACKED}": weight.packed,
        f"{layer}.{BLOCK_SCALE}": weight.block_scale,
        f"{layer}.{GLOBAL_ENCODE_SCALE}": (1.0 / weight.global_decode_scale).reshape(-1),
    }
    if input_decode_scale is not None:
        tensors[f"{layer}.{INPUT_GLOBAL_SCALE}"] = (1.0 / input_decode_scale).reshape(-1)
    return tensors


def checkpoint_layout(
    layer: str, shape: tuple[int, ...], *, quantizes_input: bool = False
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name to (dtype, shape) of the tensors of a quantized layer whose weight is `shape` ``[N, K]``.

    Fused experts ``[E, N, K]``, which no checkpoint holds, have the same with E in front, and E global scales.
    """
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{layer}.{PACKED}": (torch.uint8, packed_shape(shape)),
        f"{layer}.{BLOCK_SCALE}": (torch.float8_e4m3fn, block_scale_shape(shape)),
        f"{layer}.{GLOBAL_ENCODE_SCALE}": (torch.float32, (shape[0] if len(shape) == 3 else 1,)),
    }
    return layout | ({f"{layer}.{INPUT_GLOBAL_SCALE}": (torch.float32, (1,))} if quantizes_input else {})


def from_checkpoint(layer: str, get_tensor: Callable[[str], torch.Tensor]) -> NVFP4Tensor:
    """Read a quantized layer back.

    Args:
        layer: checkpoint name of the layer.
        get_tensor: reads a tensor by checkpoint name.

    Raises:
        ValueError: dtypes or shapes that do not belong together.
    """
    encode_scale = get_tensor(f"{layer}.{GLOBAL_ENCODE_SCALE}").float().reshape(())
    return NVFP4Tensor(get_tensor(f"{layer}.{PACKED}"), get_tensor(f"{layer}.{BLOCK_SCALE}"), 1.0 / encode_scale)


def quantized_layers(tensor_names: list[str]) -> list[str]:
    """Checkpoint names of the layers that have packed codes among `tensor_names`."""
    return [name.removesuffix(f".{PACKED}") for name in tensor_names if name.endswith(f".{PACKED}")]


def packed_tensors(layers: Iterable[str]) -> set[str]:
    """Every name that a tensor of these quantized layers may have, but for biases, which are as in any checkpoint."""
    parts = (PACKED, BLOCK_SCALE, GLOBAL_ENCODE_SCALE, INPUT_GLOBAL_SCALE)
    return {f"{layer}.{part}" for layer in layers for part in parts}


def quantization_config(
    ignore: list[str], *, scale_rule: str = "amax", quantizes_input: bool = False
) -> dict[str, Any]:
    """The `quantization_config` of a packed checkpoint's config.json: weights NVFP4, activations in 16 bits or NVFP4.

    Args:
        ignore: checkpoint names of the linear layers, as vLLM sees them, that are not quantized.
        scale_rule: how block scales were chosen. Loaders need not know; quantizing the decoded weights again does.
        quantizes_input: W4A4: block scales of the inputs are computed on the fly, their global scales are stored.
    """
    nvfp4 = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group",
        "group_size": BLOCK_SIZE,
        "scale_dtype": "torch.float8_e4m3fn",
    }
    observer = {} if scale_rule == "amax" else {"observer_kwargs": {_SCALE_RULE: scale_rule}}
    return {
        "quant_method": QUANT_METHOD,
        "format": FORMAT,
        # Without this status Transformers does not build the packed layout.
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": FORMAT,
                "weights": {**nvfp4, "dynamic": False, **observer},
                "input_activations": {**nvfp4, "dynamic": "local"} if quantizes_input else None,
                "output_activations": None,
            }
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def ignored_in_vllm(unpacked: Iterable[str], packed: Iterable[str]) -> dict[str, str]:
    """Entries of `ignore` for layers that vLLM builds under names which no checkpoint has.

    It compares `ignore` with the names it builds layers under, and calls the Mamba mixers of hybrid models
    ``model.layers.{number}.mixer`` where checkpoints say ``mamba``; of Falcon-H1 it counts them in another way too.

    Args:
        unpacked, packed: names of linear layers.

    Returns:
        A layer of each entry, to the entry.
    """

    def local_names(layers: Iterable[str]) -> dict[str, str]:
        return {match[1]: layer for layer in layers if (match := re.search(r"\.mamba\.(\w+)$", layer))}

    taken = local_names(packed)
    return {layer: rf"re:.*mixer[.]{name}$" for name, layer in local_names(unpacked).items() if name not in taken}


def activations_of(config: dict[str, Any]) -> str:
    """What a packed checkpoint says of its inputs, as `NVFP4QATConfig.activations` does: "nvfp4" or "bf16"."""
    groups = (config.get("config_groups") or {}).values()
    return "nvfp4" if any(group.get("input_activations") for group in groups) else "bf16"


def scale_rule_of(config: dict[str, Any]) -> str:
    """The rule by which the block scales of a packed checkpoint were chosen; "amax" where its config names none."""
    for group in (config.get("config_groups") or {}).values():
        rule = ((group.get("weights") or {}).get("observer_kwargs") or {}).get(_SCALE_RULE)
        if rule is not None:
            check_scale_rule(rule)
            return rule
    return "amax"


def is_nvfp4_config(config: dict[str, Any] | None) -> bool:
    """Whether a `quantization_config` describes packed NVFP4 weights in this format."""
    config = config or {}
    return config.get("quant_method") == QUANT_METHOD and config.get("format") == FORMAT
