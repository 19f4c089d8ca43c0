"""Counts what FSDP2's all-gathers send."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather


class CountedGather(DefaultAllGather):
    """FSDP2's own all-gather; adds up the bytes that this process sends."""

    num_bytes = 0

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *args, **kwargs):
        self.num_bytes += input_tensor.nbytes
        return super().__call__(output_tensor, input_tensor, *args, **kwargs)


def count_gathers(model: nn.Module) -> CountedGather:
    """Count the gathers of all FSDP2 units of a model."""
    counted = CountedGather()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(counted)
    return counted
