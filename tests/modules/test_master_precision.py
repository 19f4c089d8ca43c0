"""One step is looked at, once a model: whether 16-bit master weights took the updates."""

import copy
import logging

import pytest
import torch
from conftest import load_qat, take_step, tiny_qwen3, tiny_qwen3_moe

from hf_nvfp4_qat import prepare_qat
from hf_nvfp4_qat.modules import master_precision
from hf_nvfp4_qat.modules.swap import qat_weights


@pytest.fixture
def said(caplog):
    """The warnings, as they come."""
    caplog.set_level(logging.WARNING, logger="hf_nvfp4_qat.modules.master_precision")
    return lambda: [record.getMessage() for record in caplog.records if "too coarse" in record.getMessage()]


@pytest.fixture(autouse=True)
def nobody_else():
    """Models of other tests are not waiting."""
    master_precision._waiting.clear()


def lost_share(model, before) -> float:
    after = {name: weight.master.detach() for name, weight in qat_weights(model).items()}
    total = sum(tensor.numel() for tensor in after.values())
    return sum(int((after[name] == before[name]).sum()) for name in after) / total


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_qwen3_moe])
def test_lost_updates_are_told_once_with_their_share(make, said):
    model = prepare_qat(make().to(torch.bfloat16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    take_step(model, optimizer)
    assert not said()  # the learning rate may be rising
    before = {name: weight.master.detach().clone() for name, weight in qat_weights(model).items()}
    take_step(model, optimizer)
    assert len(said()) == 1
    assert "Master weights in bfloat16 are too coarse for the learning rate 1e-06" in said()[0]
    share = float(said()[0].partition("in one step, ")[2].partition("%")[0]) / 100
    assert share > 0.9 and (make is tiny_qwen3_moe or abs(share - lost_share(model, before)) < 0.02)
    for _ in range(3):
        take_step(model, optimizer)
    assert len(said()) == 1 and not master_precision._hooks and not master_precision._waiting


@pytest.mark.parametrize("dtype, rate", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.bfloat16, 0.0)])
def test_nothing_is_said_where_updates_arrive_or_none_are_made(dtype, rate, qwen3_dir, said):
    model = load_qat(qwen3_dir, dtype=dtype)
    assert (model in master_precision._waiting) == (dtype == torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(4):
        take_step(model, optimizer)
    assert not said() and (model in master_precision._waiting) == (rate == 0.0)


def test_a_warmup_is_waited_for(said):
    model = prepare_qat(tiny_qwen3().to(torch.bfloat16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7)
    for step in range(1, 5):
        optimizer.param_groups[0]["lr"] = step * 1e-7
        take_step(model, optimizer)
    assert not said()
    take_step(model, optimizer)
    assert "learning rate 4e-07" in said()[0]


def test_values_without_a_gradient_do_not_count(said):
    model = prepare_qat(tiny_qwen3().to(torch.bfloat16))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        for weight in qat_weights(model).values():
            weight.master.grad = torch.zeros_like(weight.master)
            weight.master.grad[0] = 1.0
        optimizer.step()
    assert not said() and model not in master_precision._waiting


def test_an_optimizer_of_other_weights_is_given_up(said):
    model = prepare_qat(tiny_qwen3().to(torch.bfloat16))
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    optimizer = torch.optim.SGD(norms, lr=1e-3)
    for _ in range(30):
        optimizer.step()
    assert model not in master_precision._waiting and not said()


def test_the_training_is_the_same_with_the_look_and_without():
    model = prepare_qat(tiny_qwen3().to(torch.bfloat16))
    twin = copy.deepcopy(model)
    for trained in (model, twin):
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
        for _ in range(3):
            take_step(trained, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
