"""Which packed layers plain Transformers cannot load: its own code reads weights that a packed layer does not have.

Two kinds of code do that while a checkpoint loads. Some classes initialize weights from above: `_init_weights` of an
attention module reads `module.o_proj.weight`, and it runs for modules whose own weights are all in the checkpoint. And
linears that are tied to each other (Zamba2's shared blocks) are tied by their `weight`.
"""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel


def why_plain_loading_fails(model: nn.Module, packed: Iterable[str]) -> dict[str, str]:
    """Packed layers that ``AutoModel.from_pretrained`` fails on, and why; of each class of modules the first.

    Args:
        model: unquantized, on any device; not changed.
        packed: paths of its linears that are, or are to be, packed.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    packed = sorted(packed)
    weights = {id(model.get_submodule(path).weight) for path in packed}
    reasons: dict[str, str] = {}
    first_path: dict[int, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module.weight) in weights:
            other = first_path.setdefault(id(module.weight), path)
            if other != path:
                reasons[path] = f"its weight is tied to that of {other}"
    local_names: dict[str, set[str]] = {}
    for path in packed:
        parent, _, local_name = path.rpartition(".")
        local_names.setdefault(parent, set()).add(local_name)
    seen: set[tuple[type, frozenset[str]]] = set()
    for parent, names in local_names.items():
        module = model.get_submodule(parent)
        if (kind := (type(module), frozenset(names))) not in seen and _is_initialized_from_above(model, module, names):
            reasons[f"{parent}.{min(names)}"] = f"`_init_weights` of {type(model).__name__} reads its weight"
        seen.add(kind)
    return reasons


def _is_initialized_from_above(model: PreTrainedModel, module: nn.Module, packed: set[str]) -> bool:
    """Whether `_init_weights` fails on a module whose packed children have no `weight`."""
    stand_in = _on_meta(module)
    for name, child in module.named_children():
        stand_in._modules[name] = _on_meta(child, without={"weight"} if name in packed else set())
    try:
        # Random numbers that it draws must not be missing elsewhere.
        with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
            model._init_weights(stand_in)
    except AttributeError as error:
        return error.name == "weight"
    except Exception:  # what else a stand-in lacks says nothing about the weight
        return False
    return False


def _on_meta(module: nn.Module, without: set[str] | frozenset[str] = frozenset()) -> nn.Module:
    """A module of the same class and settings whose own tensors, but for some, are there and hold no values."""
    stand_in = copy.copy(module)
    vars(stand_in)["_modules"] = dict(module._modules)
    for kind in ("_parameters", "_buffers"):
        vars(stand_in)[kind] = {
            name: None if tensor is None else torch.empty_like(tensor, device="meta")
            for name, tensor in vars(module)[kind].items()
            if name not in without
        }
    return stand_in
