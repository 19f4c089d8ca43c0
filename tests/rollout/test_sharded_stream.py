"""Two processes with FSDP2: each pushes the whole model's packed weights, gathered from shards."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_llama, tiny_qwen3_moe, tokens
from processes import in_processes
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_nvfp4_qat import fake_quantize_nvfp4, prepare_qat
from hf_nvfp4_qat.modules.swap import qat_weights
from hf_nvfp4_qat.rollout.stream import RolloutStream


def _train(model) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        batch = (tokens() + step) % 128
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _push(make, rank: int) -> tuple:
    whole, sharded = prepare_qat(make()), prepare_qat(make())
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    _train(whole)
    _train(sharded)
    stream, expected = RolloutStream(sharded), RolloutStream(whole)
    sent, observed = [], []
    all_gather = dist.all_gather_into_tensor

    def counted(output, part, group=None, **kwargs):
        sent.append(part.nbytes)
        return all_gather(output, part, group=group, **kwargs)

    dist.all_gather_into_tensor = counted
    tensors = list(stream.tensors(lambda name, weight, packed: observed.append((name, weight, packed))))
    dist.all_gather_into_tensor = all_gather
    equal = [
        name == other and torch.equal(tensor.view(torch.uint8), its.view(torch.uint8))
        for (name, tensor), (other, its) in zip(tensors, expected, strict=True)
    ]
    is_sharded = all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    own_rows_observed = all(
        torch.equal(fake_quantize_nvfp4(weight, global_decode_scale=packed.global_decode_scale), packed.dequantize())
        for _, weight, packed in observed
    )
    num_weights = sum(weight.weight.numel() for weight in qat_weights(whole).values())
    # One gather a decoder layer, of half of the rows in 4.5 bits a weight.
    gathers = (len(sent), sum(sent) == num_weights // 2 * 4.5 / 8)
    return (
        all(equal),
        len(equal),
        stream.layout == expected.layout,
        is_sharded,
        len(observed),
        own_rows_observed,
        gathers,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "num_tensors", "num_packed"), [(tiny_llama, 63, 14), (partial(tiny_qwen3_moe, num_experts=4), 132, 12)]
)
def test_an_fsdp2_model_pushes_what_the_whole_model_would(make, num_tensors, num_packed):
    results = in_processes(partial(_push, make))
    assert results[0] == results[1] == (True, num_tensors, True, True, num_packed, True, (2, True))
