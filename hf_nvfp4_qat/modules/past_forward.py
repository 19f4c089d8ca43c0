"""Finds layers whose weight another module computes with: they would train in high precision and be saved in NVFP4.

``swap_linears`` looks for such layers in the source of their parents. What it cannot see (``layer = self.dt_proj;
F.linear(x, layer.weight)``) shows in the autograd graph of the first training forward: a QAT layer's own forward takes
its weight through a node of its own. The graph is walked once; later forwards cost nothing. Reading `dtype` or `shape`
of a weight leaves no node.

Not seen: weights that do not train, forwards that do not go through the model itself, are compiled as a whole or use
reentrant checkpointing, and weights that FSDP shards. A layer that also runs its own forward is left alone.
"""

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from hf_nvfp4_qat.modules.linear import QATLinear

# Nodes that take a weight as they should: ``QATLinear.forward``'s, and those of compiled parts, which cannot be read.
_OWN = ("_KeptBackward", "CompiledFunctionBackward")


def watch_first_forward(model: nn.Module) -> None:
    """Refuse, at the first training forward of `model`, QAT layers whose weight is only read past their forward."""
    model.register_forward_hook(_check_readers)


def _check_readers(model: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    nodes = [leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.grad_fn]
    if not nodes:
        return
    layers = {
        id(layer.weight): path
        for path, layer in model.named_modules()
        if isinstance(layer, QATLinear) and not layer.nvfp4_weight.reads_as_it_is  # by any way of reading it
    }
    readers: dict[str, list[str]] = {}
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        for reached, _ in node.next_functions:
            if reached is None:
                continue
            if (path := layers.get(id(getattr(reached, "variable", None)))) is not None:
                readers.setdefault(path, []).append(node.name())
            if reached not in seen:
                seen.add(reached)
                nodes.append(reached)
    if past := [path for path, names in readers.items() if not any(name in _OWN for name in names)]:
        raise ValueError(
            f"NVFP4 QAT quantizes a weight in the forward of its own layer; that of {', '.join(past[:5])} is read by "
            "another module instead, so it would train in high precision and be saved in NVFP4. Add "
            f"{'it' if len(past) == 1 else f'these {len(past)} layers'} to `exclude`."
        )
    for number, hook in list(model._forward_hooks.items()):
        if hook is _check_readers:
            model._forward_hooks.pop(number)
