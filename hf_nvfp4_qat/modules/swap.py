"""Which layers of a model train in NVFP4: the rules, the swap, and the report of what was left out and why."""

import inspect
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from torch import nn

from hf_nvfp4_qat.modules.experts import adopt_experts, why_not_trainable
from hf_nvfp4_qat.modules.global_scale import GlobalScales, RefreshInEvaluation, scales_of
from hf_nvfp4_qat.modules.linear import QATLinear, check_adoptable
from hf_nvfp4_qat.modules.past_forward import watch_first_forward
from hf_nvfp4_qat.modules.recipe import Recipe
from hf_nvfp4_qat.modules.weight_clock import WeightClock
from hf_nvfp4_qat.modules.weights import QATModule, TrainedWeight
from hf_nvfp4_qat.numerics.format import BITS_PER_WEIGHT, BLOCK_SIZE
from hf_nvfp4_qat.selection.fused_groups import fused_group_key, split_fused_groups
from hf_nvfp4_qat.selection.layer_names import FEED_FORWARD
from hf_nvfp4_qat.selection.patterns import excludes
from hf_nvfp4_qat.selection.plain_loading import why_plain_loading_fails
from hf_nvfp4_qat.selection.rules import bare_routers, in_mamba_1, reasons_by_rule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerCoverage:
    """One layer of the report: module path, class name, parameters, and why it is not quantized (None if it is)."""

    name: str
    kind: str
    num_parameters: int
    reason: str | None

    @property
    def is_quantized(self) -> bool:
        """Whether the layer trains in NVFP4."""
        return self.reason is None


@dataclass(frozen=True)
class Coverage:
    """What of a model is quantized. Prints as a table; iterates over its layers.

    Attributes:
        layers: every module that owns parameters, in model order; a tied weight counts once, where it comes first.
    """

    layers: tuple[LayerCoverage, ...]

    def __iter__(self) -> Iterator[LayerCoverage]:
        return iter(self.layers)

    @property
    def quantized(self) -> tuple[str, ...]:
        """Module paths of the quantized layers."""
        return tuple(layer.name for layer in self.layers if layer.is_quantized)

    @property
    def excluded(self) -> dict[str, str]:
        """Module path to reason, for every layer that is not quantized."""
        return {layer.name: layer.reason for layer in self.layers if layer.reason is not None}

    @property
    def summary(self) -> str:
        """One line: layers, parameters, share, bits a weight."""
        total = sum(layer.num_parameters for layer in self.layers)
        quantized = sum(layer.num_parameters for layer in self.layers if layer.is_quantized)
        share = quantized / total if total else 0.0
        bits = share * BITS_PER_WEIGHT + (1 - share) * 16
        return (
            f"NVFP4: {len(self.quantized)} layers quantized, {quantized:,} of {total:,} parameters "
            f"({share:.1%}); {bits:.2f} bits a parameter as served"
        )

    def __str__(self) -> str:
        rows: dict[tuple[str, str, str], list[int]] = {}
        for layer in self.layers:
            pattern = re.sub(r"\.\d+(?=\.|$)", ".*", layer.name)
            status = "NVFP4" if layer.is_quantized else "excluded"
            rows.setdefault((status, pattern, layer.reason or ""), []).append(layer.num_parameters)
        width = max((len(pattern) for _, pattern, _ in rows), default=0)
        lines = [
            f"{status:8}  {pattern:{width}}  x{len(sizes):<4} {sum(sizes):>14,}  {reason}".rstrip()
            for (status, pattern, reason), sizes in sorted(rows.items())
        ]
        return "\n".join([*lines, self.summary])


def coverage(model: nn.Module) -> Coverage:
    """Print, and return, what of `model` is quantized, what is not, and why.

    Args:
        model: a model made with ``NVFP4QATConfig`` or ``prepare_qat``.
    """
    report = coverage_of(model)
    print(report)
    return report


def coverage_of(model: nn.Module) -> Coverage:
    """``coverage`` without the printing."""
    reasons: dict[str, str] = getattr(model, "nvfp4_excluded", {})
    layers: list[LayerCoverage] = []
    counted: set[int] = set()
    for name, module in model.named_modules():
        parameters = [p for p in module.parameters(recurse=False) if id(p) not in counted]
        counted.update(id(p) for p in parameters)
        # An excluded linear is reported even where its weight, being tied, is already counted.
        if parameters or name in reasons:
            reason = None if isinstance(module, QATModule) else reasons.get(name, "not a linear layer")
            layers.append(LayerCoverage(name, type(module).__name__, sum(p.numel() for p in parameters), reason))
    return Coverage(tuple(layers))


def swap_linears(model: nn.Module, recipe: Recipe, *, output_embedding: nn.Module | None = None) -> Coverage:
    """Make the linears and fused experts of `model` train in NVFP4, in place; remember why the others do not.

    Of linears only exact ``nn.Linear`` modules are candidates: subclasses have meanings of their own.

    Args:
        model: any module; its parameters may be on the meta device.
        recipe: what to quantize. Of linears "full" takes all that ``reasons_by_rule`` has nothing against; `exclude`
            holds patterns of ``excludes``.
        output_embedding: the model's output embedding, excluded whatever its name is.

    Returns:
        The coverage after the swap.

    Raises:
        ValueError: nothing left to quantize, fused experts in a layout that NVFP4 does not cover, in_features not
            divisible by 16, a fused group of which only a part is excluded, a pattern that names nothing, more layers
            to leave out than there are. Raised before any layer is changed.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    experts = fused_experts(model)
    _refuse_idle_patterns(model, recipe.exclude)
    by_rule = reasons_by_rule(model, linears, experts)
    reasons = _outer_layers(model, [*linears, *experts], recipe)
    reasons |= {name: by_rule[name] for name in experts if name in by_rule}
    reasons |= {name: f"exclude: {pattern}" for name in experts if (pattern := _pattern_for(name, recipe.exclude))}
    _refuse_experts(model, [name for name in experts if name not in reasons])
    # A linear that shares an embedding's weight is the output embedding, whatever it is called.
    input_embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    embeddings = [module for module in (output_embedding, *input_embeddings) if module is not None]
    embedding_weights = {id(parameter) for module in embeddings for parameter in module.parameters()}
    for name, module in linears.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        is_output_embedding = id(module.weight) in embedding_weights
        if reason := _reason_to_exclude(name, module, parent, recipe, is_output_embedding, by_rule.get(name)):
            reasons[name] = reason
    selected = {name: module for name, module in linears.items() if name not in reasons}
    selected_experts = [name for name in experts if name not in reasons]
    if selected_experts and recipe.activations == "nvfp4":
        raise ValueError(
            f"`activations='nvfp4'` covers linear layers; {type(model).__name__} has fused experts "
            f"({selected_experts[0]}), whose inputs stay in 16 bits. Leave `activations` out, or add 're:.*experts$' "
            "to `exclude`."
        )
    _refuse_indivisible(selected)
    _refuse_split_groups(set(selected), set(linears))
    if not selected and not selected_experts:
        counted = ", ".join(f"{reason}: {count}" for reason, count in Counter(reasons.values()).items())
        raise ValueError(
            f"No layer is left to quantize: of {len(linears)} nn.Linear modules in {type(model).__name__}, all are "
            f"excluded ({counted or 'there are none'}). NVFP4 covers torch.nn.Linear and fused experts; check `preset` "
            "and `exclude`."
        )
    for name, linear in selected.items():
        check_adoptable(linear, name=name)
    _warn_of_loaders(model, selected)
    global_scales = GlobalScales(WeightClock(model))
    for name, linear in selected.items():
        QATLinear.adopt(
            linear,
            name=name,
            scale_group=fused_group_key(name),
            global_scales=global_scales,
            scale_rule=recipe.scale_rule,
            quantize_input=recipe.activations == "nvfp4",
        )
    for name in selected_experts:
        adopt_experts(model.get_submodule(name), name=name, global_scales=global_scales, scale_rule=recipe.scale_rule)
    watch_first_forward(model)
    model.register_forward_pre_hook(RefreshInEvaluation(global_scales))
    # Plain data, so that deepcopy and pickle carry it along.
    model.nvfp4_excluded = cast(Any, {**bare_routers(model), **reasons})
    return coverage_of(model)


def qat_modules(model: nn.Module) -> dict[str, QATLinear]:
    """The linear QAT layers of `model` by module path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QATLinear)}


def qat_weights(model: nn.Module) -> dict[str, TrainedWeight]:
    """The weights of `model` that train in NVFP4 by parameter name: of linears, and of fused experts."""
    return {
        f"{path}.{name}".lstrip("."): weight
        for path, module in model.named_modules()
        if isinstance(module, QATModule)
        for name, weight in module.nvfp4_weights.items()
    }


def refresh_global_scales(model: nn.Module) -> None:
    """Recompute every global scale of `model` from its weights as they are now.

    Needed only after writing weights through ``.data`` outside an optimizer, which leaves no trace: rollouts then push
    the model again. If weights are sharded, every process must call.
    """
    for scales in scales_of(qat_weights(model).values()):
        scales.clock.tick()
        scales.refresh()


def weights_epoch(model: nn.Module) -> int:
    """A number that rises whenever a parameter or persistent buffer of `model` may have changed; 0 without QAT weights.

    What was made of the weights is up to date as long as this number is the one it was made at. Sharded processes may
    not agree on it: each knows of writes into its own part alone.
    """
    return sum(scales.clock.look_at(model) for scales in scales_of(qat_weights(model).values()))


@cache
def _source_of(module_class: Any) -> str:
    """Source of a class; empty for one that has none, which is then taken to call its children."""
    try:
        return inspect.getsource(module_class)
    except (OSError, TypeError):
        return ""


def _reads_weight(parent: nn.Module, local_name: str) -> bool:
    """Whether a module computes with the weight of a child itself, as Mamba mixers do, and so not with NVFP4 values.

    Only the source tells before training: of the class and of those it inherits from.
    """
    pattern = rf"self\.{re.escape(local_name)}\.weight\b(?!\.(dtype|device|shape))"
    own_classes = [base for base in type(parent).__mro__ if base not in nn.Module.__mro__]
    return any(re.search(pattern, _source_of(base)) for base in own_classes)


def _reason_to_exclude(
    name: str, module: nn.Module, parent: nn.Module, recipe: Recipe, is_output_embedding: bool, by_rule: str | None
) -> str | None:
    if pattern := _pattern_for(name, recipe.exclude):
        return f"exclude: {pattern}"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__}, a subclass of nn.Linear"
    if is_output_embedding:
        return "output embedding"
    if _reads_weight(parent, name.rpartition(".")[2]):
        return f"its weight is read by {type(parent).__name__}, past its forward"
    if by_rule is None and recipe.preset == "ffn_only" and name.rpartition(".")[2] not in FEED_FORWARD:
        return "preset ffn_only"
    return by_rule


def _pattern_for(name: str, exclude: tuple[str, ...]) -> str | None:
    return next((pattern for pattern in exclude if excludes(pattern, name)), None)


def fused_experts(model: nn.Module) -> list[str]:
    """Paths of modules that hold their experts as 3-D parameters, the Transformers 5 layout of mixture of experts."""
    return [
        name
        for name, module in model.named_modules()
        if "expert" in name.lower() + type(module).__name__.lower()
        and any(p.ndim == 3 for p in module.parameters(recurse=False))
    ]


def _outer_layers(model: nn.Module, candidates: list[str], recipe: Recipe) -> dict[str, str]:
    """Of the candidates, those in the first and last layers of a stack: the outermost lists of modules."""
    num_first, num_last = recipe.bf16_first_layers, recipe.bf16_last_layers
    if not num_first and not num_last:
        return {}
    stacks: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer in stacks):
            layers = [f"{path}.{number}." for number in range(len(module))]
            if all(any(name.startswith(layer) for name in candidates) for layer in layers):
                stacks[path] = len(module)
    if not stacks or min(stacks.values()) <= num_first + num_last:
        raise ValueError(
            f"`bf16_first_layers` and `bf16_last_layers` must leave layers to quantize; {num_first} + {num_last} of "
            f"{min(stacks.values(), default=0)} in {type(model).__name__}. Use smaller numbers, or `exclude`."
        )
    reasons: dict[str, str] = {}
    for path, num_layers in stacks.items():
        for number in range(num_layers):
            if number < num_first or number >= num_layers - num_last:
                end = f"bf16_first_layers={num_first}" if number < num_first else f"bf16_last_layers={num_last}"
                reasons |= {name: end for name in candidates if name.startswith(f"{path}.{number}.")}
    return reasons


def _refuse_experts(model: nn.Module, experts: list[str]) -> None:
    for name in experts:
        module = model.get_submodule(name)
        if reason := why_not_trainable(module):
            raise ValueError(
                f"NVFP4 does not cover the fused experts of {type(model).__name__} ({name}, {type(module).__name__}): "
                f"{reason}. Leaving them out in silence would train most of the model in high precision; to train only "
                "the other layers in NVFP4, add 're:.*experts$' to `exclude`."
            )


def _refuse_idle_patterns(model: nn.Module, exclude: tuple[str, ...]) -> None:
    names = [name for name, _ in model.named_modules()]
    if idle := [pattern for pattern in exclude if not any(excludes(pattern, name) for name in names)]:
        raise ValueError(
            f"Every `exclude` pattern must name a module; {idle} name none of {type(model).__name__}. A pattern is an "
            "exact path, the last components of a path, or 're:' and a regular expression for the whole path."
        )


def _refuse_indivisible(selected: dict[str, nn.Linear]) -> None:
    bad = {name: linear.in_features for name, linear in selected.items() if linear.in_features % BLOCK_SIZE}
    if bad:
        listed = ", ".join(f"{name} has {in_features}" for name, in_features in list(bad.items())[:5])
        raise ValueError(
            f"NVFP4 needs in_features divisible by {BLOCK_SIZE}; {listed}"
            f"{f' (and {len(bad) - 5} more)' if len(bad) > 5 else ''}. Add {'it' if len(bad) == 1 else 'them'} "
            "to `exclude`."
        )


def _warn_of_loaders(model: nn.Module, selected: dict[str, nn.Linear]) -> None:
    """Say now, before days of training, what will not load the packed checkpoint."""
    if unquantized := in_mamba_1(model, selected):
        logger.warning(
            "vLLM 0.31 builds Mamba mixers unquantized, so it cannot load the packed checkpoint of %s (%s and %d more "
            "layers). Plain Transformers and `load_nvfp4` can.",
            type(model).__name__, unquantized[0], len(unquantized) - 1,
        )  # fmt: skip
    if failing := why_plain_loading_fails(model, selected):
        layer, reason = next(iter(failing.items()))
        logger.warning(
            "Plain Transformers cannot load the packed checkpoint of %s: of %s, %s. `load_nvfp4` can.",
            type(model).__name__, layer, reason,
        )  # fmt: skip


def _refuse_split_groups(selected: set[str], linears: set[str]) -> None:
    for quantized, excluded in split_fused_groups(selected, linears).values():
        raise ValueError(
            f"vLLM fuses {', '.join(quantized + excluded)} into one matrix, so all or none of them are quantized; "
            f"{', '.join(excluded)} is excluded. Exclude the others too, or none."
        )
