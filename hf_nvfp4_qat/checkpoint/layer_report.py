"""What NVFP4 does to each layer of a checkpoint: error, use of the scale range, blocks that lost something."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hf_nvfp4_qat.checkpoint.convert import Progress, ptq_sources
from hf_nvfp4_qat.checkpoint.load import check_packed
from hf_nvfp4_qat.checkpoint.sources import LinearSource
from hf_nvfp4_qat.formats.files import CheckpointReader, resolve_checkpoint
from hf_nvfp4_qat.formats.modelopt import open_checkpoint
from hf_nvfp4_qat.formats.names import from_checkpoint, layer_of, quantized_layers
from hf_nvfp4_qat.modules.recipe import Recipe
from hf_nvfp4_qat.numerics.format import BLOCK_SIZE, E2M1_MAX, E4M3_MAX, E4M3_MIN_NORMAL
from hf_nvfp4_qat.numerics.quantize import quantize_nvfp4
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor

# Rounding a block scale to E4M3 leaves the block's largest element at up to 6 * (1 + 1/16) of it, which still
# rounds to 6. Further out the element has been cut.
_CLIPPED_ABOVE = E2M1_MAX * (1 + 1 / 16)


@dataclass(frozen=True)
class LayerInspection:
    """One layer.

    Attributes:
        name: checkpoint name of the layer.
        shape: ``(N, K)``.
        relative_error: root of summed squared error over root of summed squares; None without the original weight.
        scale_use: largest block scale over 448; at least 0.53 for one layer of each fused group, which share a scale.
        num_blocks: blocks of 16.
        num_clipped: blocks whose largest element was cut to 6; None without the original weight.
        num_floored: blocks at the smallest scale, 2**-6, where resolution is lost.
        num_zero: blocks that decode to zeros.
        bits_per_weight: bits stored per element, scales included.
    """

    name: str
    shape: tuple[int, int]
    relative_error: float | None
    scale_use: float
    num_blocks: int
    num_clipped: int | None
    num_floored: int
    num_zero: int
    bits_per_weight: float


def inspect_weight(name: str, weight: NVFP4Tensor, original: torch.Tensor | None = None) -> LayerInspection:
    """Inspect one quantized weight ``[N, K]``, against its original ``[N, K]`` if given."""
    scale = weight.block_scale.float()
    is_zero = ((weight.codes() & 7) == 0).view(*scale.shape, BLOCK_SIZE).all(-1)
    relative_error = num_clipped = None
    if original is not None:
        original = original.to(torch.bfloat16).float()
        error = weight.dequantize(torch.float32) - original
        relative_error = float(error.norm() / original.norm()) if original.any() else 0.0
        block_max = original.view(*scale.shape, BLOCK_SIZE).abs().amax(-1)
        num_clipped = int((block_max > _CLIPPED_ABOVE * scale * weight.global_decode_scale).sum())
    return LayerInspection(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        relative_error=relative_error,
        scale_use=float(scale.max()) / E4M3_MAX,
        num_blocks=scale.numel(),
        num_clipped=num_clipped,
        num_floored=int(((scale <= E4M3_MIN_NORMAL) & ~is_zero).sum()),
        num_zero=int(is_zero.sum()),
        bits_per_weight=8 * weight.nbytes / weight.shape.numel(),
    )


def fold_experts(layers: list[LayerInspection]) -> list[LayerInspection]:
    """One row for the experts of a layer: the largest error and scale use among them, and the sums of their blocks."""
    groups: dict[str, list[LayerInspection]] = {}
    for layer in layers:
        groups.setdefault(re.sub(r"(?<=experts\.)\d+(?=\.)", "*", layer.name), []).append(layer)
    return [
        replace(
            same[0],
            name=name,
            relative_error=None
            if same[0].relative_error is None
            else max(layer.relative_error or 0.0 for layer in same),
            scale_use=max(layer.scale_use for layer in same),
            num_blocks=sum(layer.num_blocks for layer in same),
            num_clipped=None if same[0].num_clipped is None else sum(layer.num_clipped or 0 for layer in same),
            num_floored=sum(layer.num_floored for layer in same),
            num_zero=sum(layer.num_zero for layer in same),
        )
        for name, same in groups.items()
    ]


def inspect_checkpoint(
    path: str | os.PathLike,
    *,
    original: str | os.PathLike | None = None,
    scale_rule: str = "amax",
    progress: Progress = lambda stage, done, total: None,
) -> list[LayerInspection]:
    """Inspect a checkpoint: a packed one as it is, an unquantized one as post-training quantization would make it.

    Args:
        path: directory or Hub id.
        original: unquantized checkpoint to measure a packed one against; directory or Hub id.
        scale_rule: how block scales of an unquantized checkpoint would be chosen.
        progress: called after each layer.

    Raises:
        ValueError: nothing to inspect at `path`, or `original` lacks a layer.
    """
    directory = resolve_checkpoint(path)
    reader = open_checkpoint(directory)
    if not quantized_layers(reader.names):
        return list(_inspect_unquantized(directory, Recipe(scale_rule=scale_rule), progress))
    check_packed(reader)
    originals = None if original is None else open_checkpoint(resolve_checkpoint(original))
    return list(_inspect_packed(reader, originals, progress))


def _inspect_unquantized(directory: Path, recipe: Recipe, progress: Progress) -> Iterator[LayerInspection]:
    sources, _, _ = ptq_sources(directory, recipe, progress=progress)
    quantized = [source for source in sources if isinstance(source, LinearSource)]
    for num_done, source in enumerate(quantized, start=1):
        weight = source.master()
        packed = quantize_nvfp4(weight, global_decode_scale=source.global_decode_scale(), scale_rule=source.scale_rule)
        yield inspect_weight(layer_of(source.name), packed, weight)
        progress("inspecting", num_done, len(quantized))


def _inspect_packed(
    reader: CheckpointReader, original: CheckpointReader | None, progress: Progress
) -> Iterator[LayerInspection]:
    layers = quantized_layers(reader.names)
    for num_done, layer in enumerate(layers, start=1):
        weight = None
        if original is not None:
            if f"{layer}.weight" not in original.file_of:
                raise ValueError(
                    f"`original` must hold the weights that were packed; {original.directory} has no {layer}.weight. "
                    f"Give the checkpoint that {reader.directory} was made from."
                )
            weight = original.get_tensor(f"{layer}.weight")
        yield inspect_weight(layer, from_checkpoint(layer, reader.get_tensor), weight)
        progress("inspecting", num_done, len(layers))


def plot_layers(layers: list[LayerInspection], path: str | os.PathLike) -> None:
    """Plot relative error (where known) and scale use per layer to an image file.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("Plots need matplotlib. `pip install matplotlib`, or leave out `--plot`.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = sorted({layer.name.rpartition(".")[2] for layer in layers})
    panels = [("scale_use", "largest block scale / 448")]
    if all(layer.relative_error is not None for layer in layers):
        panels.insert(0, ("relative_error", "relative error"))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(10, 3.2 * len(panels)), squeeze=False, sharex=True)
    for axis, (attribute, label) in zip(axes[:, 0], panels, strict=True):
        for kind in kinds:
            points = [layer for layer in layers if layer.name.rpartition(".")[2] == kind]
            axis.plot([getattr(layer, attribute) for layer in points], marker=".", label=kind)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(ncols=4, fontsize="small")
    axes[-1, 0].set_xlabel("layer")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
