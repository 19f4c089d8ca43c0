"""Two processes under DistributedDataParallel: scales stay equal on all ranks and equal to the reference."""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import tiny_qwen3, tokens

from hf_nvfp4_qat import prepare_qat, quantize_nvfp4
from hf_nvfp4_qat.modules.swap import qat_modules


def _train(rank: int, store: str, results) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
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
    results[rank] = (exact, float(sum(weight.double().abs().sum() for weight in served)))
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_agree_under_ddp():
    with tempfile.NamedTemporaryFile() as store, mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_train, args=(store.name + ".store", results), nprocs=2)
        assert results[0] == results[1] and results[0][0]
