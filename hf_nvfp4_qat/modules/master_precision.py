"""Says once, in the first steps of training, when master weights in 16 bits are too coarse for the learning rate.

A bfloat16 number changes by 0.4 percent of itself or not at all, so most updates of a small learning rate leave the
weight as it was, and nothing looks wrong but the loss. How many do is not guessed: one step is looked at, in a sample
of the weights that the optimizer owns. It is the first step at which the learning rate has stopped rising, since a
warmup begins with steps that are meant to be too small. After that nothing is done, or read from the device, any more.
"""

import logging
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hf_nvfp4_qat.modules.global_scale import own_part
from hf_nvfp4_qat.modules.swap import qat_weights

logger = logging.getLogger(__name__)

_NUM_WEIGHTS = 8
_NUM_VALUES = 4096
"""Of each of the sampled weights."""
_NUM_TRIES = 20
"""Steps of optimizers that own none of a model's weights (ZeRO and FSDP1 step copies) before it is left alone."""
_MOST = 0.5

_waiting: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()
"""Models that were not looked at yet, with the tries that are left."""
_learning_rates: "WeakKeyDictionary[torch.optim.Optimizer, float]" = WeakKeyDictionary()
_sample: tuple[Any, list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]]] | None = None
"""Of the step that is being made: the model, and weights with their values before and their gradients."""
_hooks: list[Any] = []


def watch_master_precision(model: nn.Module) -> None:
    """Look at one of the first optimizer steps of a model whose weights train in 16 bits."""
    if all(weight.master.dtype in (torch.float32, torch.float64) for weight in qat_weights(model).values()):
        return
    _waiting[model] = _NUM_TRIES
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def _before_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    global _sample
    _sample = None
    if not _waiting:
        return
    rate = max(float(group.get("lr", 0)) for group in optimizer.param_groups)
    is_rising = rate > _learning_rates.get(optimizer, 0.0)
    _learning_rates[optimizer] = rate
    if is_rising or not rate:
        return
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for model in list(_waiting):
        _waiting[model] -= 1
        weights = [weight.master for weight in qat_weights(model).values() if id(weight.master) in owned]
        trained = [weight for weight in weights if weight.grad is not None and weight.dtype.itemsize == 2]
        if trained:
            picked = trained[:: -(-len(trained) // _NUM_WEIGHTS)]
            _sample = ref(model), [(weight, _values(weight), _values(weight.grad)) for weight in picked]
        if trained or not _waiting[model]:
            del _waiting[model]


def _values(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of some values from all over a tensor, of a sharded one from this process's part."""
    values = own_part(tensor).detach().reshape(-1)
    return values[:: max(1, values.numel() // _NUM_VALUES)].clone()


def _after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    global _sample
    if _sample is None:
        return
    (model, sampled), _sample = _sample, None
    counts = [
        torch.stack([(gradient != 0).sum(), ((gradient != 0) & (_values(weight) == before)).sum()])
        for weight, before, gradient in sampled
    ]
    num_updates, num_lost = torch.stack([count.to(counts[0].device) for count in counts]).sum(0).tolist()
    if num_updates and num_lost / num_updates > _MOST:
        logger.warning(
            "Master weights in %s are too coarse for the learning rate %s: in one step, %s of the updates left them as "
            "they were. Load %s with `dtype=torch.float32`; `bf16=True` of a Trainer still computes in bfloat16.",
            str(sampled[0][0].dtype).removeprefix("torch."),
            f"{_learning_rates[optimizer]:g}",
            f"{num_lost / num_updates:.1%}",
            type(model()).__name__,
        )
    if not _waiting:
        while _hooks:
            _hooks.pop().remove()
