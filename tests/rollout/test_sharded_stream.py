"""Two processes with FSDP2: each pushes the whole model's packed weights, gathered from shards."""

import pytest
import torch
from conftest import tiny_llama, tokens
from processes import in_processes
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_nvfp4_qat import prepare_qat
from hf_nvfp4_qat.rollout.stream import RolloutStream


def _train(model) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        batch = (tokens() + step) % 128
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _push(rank: int) -> tuple:
    whole, sharded = prepare_qat(tiny_llama()), prepare_qat(tiny_llama())
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    _train(whole)
    _train(sharded)
    stream, expected = RolloutStream(sharded), RolloutStream(whole)
    equal = [
        name == other and torch.equal(tensor.view(torch.uint8), its.view(torch.uint8))
        for (name, tensor), (other, its) in zip(stream, expected, strict=True)
    ]
    is_sharded = all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    return (all(equal), len(equal), stream.layout == expected.layout, is_sharded)


@pytest.mark.slow
def test_an_fsdp2_model_pushes_what_the_whole_model_would():
    results = in_processes(_push)
    assert results[0] == results[1] == (True, 63, True, True)
