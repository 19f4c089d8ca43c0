"""QAT in forward under DDP, FSDP1 and ZeRO: the scales follow the weights, and training is that of one process."""

from functools import partial

import pytest
import torch
from conftest import tiny_qwen3, tokens
from processes import in_processes
from sharding import largest_difference, spread
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from hf_nvfp4_qat import prepare_qat, refresh_global_scales
from hf_nvfp4_qat.modules.swap import qat_modules

STEPS = 3


def batch(rank: int, step: int) -> torch.Tensor:
    return (tokens() + 7 * rank + 3 * step) % 128


def one_process() -> tuple[list[float], list[torch.Tensor]]:
    """Both processes' batches in one: losses of the first, and the masters."""
    model = prepare_qat(spread(tiny_qwen3()).train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        for rank in range(2):
            loss = model(input_ids=batch(rank, step), labels=batch(rank, step)).loss
            (loss / 2).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses[::2], [parameter.detach() for parameter in model.parameters()]


def _train(kind: str, rank: int) -> tuple[float, float]:
    model = prepare_qat(spread(tiny_qwen3()).train())
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={Qwen3DecoderLayer})
        wrapped = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=kind == "fsdp1", device_id=torch.device("cpu")
        )
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        loss = wrapped(input_ids=batch(rank, step), labels=batch(rank, step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    expected_losses, expected = one_process()
    if kind == "ddp":
        difference = largest_difference(model.parameters(), expected)
    else:
        with FullyShardedDataParallel.summon_full_params(wrapped):
            difference = largest_difference(model.parameters(), expected)
    mine = max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True)) if rank == 0 else 0.0
    return mine, difference


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp1 flat"])
def test_two_processes_train_what_one_does(kind):
    for losses, masters in in_processes(partial(_train, kind)):
        assert (losses, masters) == (0.0, 0.0)


def _zero(stage: int, rank: int) -> tuple[list[float], list[float], list[float]]:
    import deepspeed

    model = prepare_qat(spread(tiny_qwen3()).train())
    before = scales(model)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(STEPS):
        engine.backward(engine(input_ids=batch(rank, step), labels=batch(rank, step)).loss)
        engine.step()
    engine(input_ids=batch(rank, 0))
    used = scales(model)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        refresh_global_scales(model)
    return before, used, scales(model)


def scales(model: torch.nn.Module) -> list[float]:
    return [layer.global_decode_scale.item() for layer in qat_modules(model).values()]


@pytest.mark.peers
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_uses_the_scales_of_the_weights_it_has(stage, monkeypatch):
    """Which it steps as flat copies, and writes where PyTorch does not count."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    for before, used, fresh in in_processes(partial(_zero, stage)):
        assert used == fresh != before
