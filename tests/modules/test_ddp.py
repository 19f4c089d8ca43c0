"""Two processes under DistributedDataParallel: scales stay equal on all ranks and equal to the reference."""

import pytest
import torch
from conftest import tiny_qwen3, tokens
from processes import in_processes

from hf_nvfp4_qat import prepare_qat, quantize_nvfp4
from hf_nvfp4_qat.modules.swap import qat_modules


def _train(rank: int) -> tuple:
    model = prepare_qat(tiny_qwen3())
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.1)
    for step in range(3):
        batch = (tokens() + 7 * rank + step) % 128  # different data on each rank
        parallel(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    served = [layer.fake_quantized_weight() for layer in qat_modules(model).values()]
    exact = all(
        torch.equal(
            weight, quantize_nvfp4(layer.weight.detach(), global_decode_scale=layer.global_decode_scale).dequantize()
        )
        for weight, layer in zip(served, qat_modules(model).values(), strict=True)
    )
    return (exact, float(sum(weight.double().abs().sum() for weight in served)))


@pytest.mark.slow
def test_ranks_agree_under_ddp():
    results = in_processes(_train)
    assert results[0] == results[1] and results[0][0]
