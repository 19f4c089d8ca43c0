"""The clock rises when weights may have changed and stands still when not; scales follow it, on all processes alike."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import load_qat, take_step, tiny_qwen3, tokens
from processes import in_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_nvfp4_qat import NVFP4QATConfig, prepare_qat, refresh_global_scales
from hf_nvfp4_qat.modules import global_scale
from hf_nvfp4_qat.modules.calibration import share_input_amaxes
from hf_nvfp4_qat.modules.swap import qat_modules, qat_weights, weights_epoch
from hf_nvfp4_qat.numerics.quantize import global_amax, global_decode_scale_of_amax
from hf_nvfp4_qat.rollout.stream import RolloutStream


def linears(num: int = 3, *, times: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(num)])
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.mul_(times * 2**number)
    return prepare_qat(model)


def used_and_right_scales(model: nn.Module) -> tuple[list[float], list[float]]:
    """Those in the buffers, and those of the whole weights of the moment."""
    layers = qat_modules(model).values()
    whole = [getattr(layer.weight, "full_tensor", lambda layer=layer: layer.weight)() for layer in layers]
    return (
        [layer.global_decode_scale.item() for layer in layers],
        [global_decode_scale_of_amax(global_amax(weight)).item() for weight in whole],
    )


def step_flat_copies(weights: list[nn.Parameter], times: float) -> None:
    """As ZeRO does: the optimizer owns a flat tensor, and the weights are written where PyTorch does not count."""
    flat = nn.Parameter(torch.cat([weight.detach().flatten() for weight in weights]))
    optimizer = torch.optim.SGD([flat], lr=1.0)
    flat.grad = (1 - times) * flat.detach()
    optimizer.step()
    for weight, part in zip(weights, flat.detach().split([weight.numel() for weight in weights]), strict=True):
        weight.data.copy_(part.view_as(weight))


# What changes a weight, and what it does to a model.
def _assign(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def _set_data(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.data = layer.weight.detach() * 2


def _swap_averages(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    for weight, averaged in zip(model.parameters(), average.module.parameters(), strict=True):
        weight.data, averaged.data = averaged.data, weight.data


def _fused(model):
    take_step(model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True))


@torch.no_grad()
def _in_place(name, model):
    model.get_parameter(name).mul_(2)


CHANGES = {
    "sgd": lambda model: take_step(model, torch.optim.SGD(model.parameters(), lr=1e-3)),
    "fused adam": _fused,
    "flat copies": lambda model: step_flat_copies(list(model.parameters()), 2),
    "a linear in place": partial(_in_place, "model.layers.1.self_attn.o_proj.weight"),
    "a norm in place": partial(_in_place, "model.norm.weight"),
    "the embedding in place": partial(_in_place, "model.embed_tokens.weight"),
    "assignment": _assign,
    "data of another tensor": _set_data,
    "an average swapped in": _swap_averages,
    "load_state_dict": lambda model: model.load_state_dict(model.state_dict()),
    "load_state_dict, assigned": lambda model: model.load_state_dict(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True
    ),
    "refresh_global_scales": refresh_global_scales,
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_epoch_rises_when_a_tensor_may_have_changed(qat_model, change):
    before = weights_epoch(qat_model)
    assert weights_epoch(qat_model) == before
    CHANGES[change](qat_model)
    after = weights_epoch(qat_model)
    assert after > before
    assert weights_epoch(qat_model) == after


def test_a_persistent_buffer_counts_and_others_do_not(qat_model):
    qat_model.register_buffer("correction", torch.zeros(4))
    qat_model.register_buffer("scratch", torch.zeros(4), persistent=False)
    before = weights_epoch(qat_model)
    qat_model.scratch.add_(1)
    assert weights_epoch(qat_model) == before
    qat_model.correction.add_(1)
    assert weights_epoch(qat_model) > before


def test_reading_does_not_move_the_epoch(qat_model, qwen3_dir, tmp_path):
    other = load_qat(qwen3_dir)
    before = weights_epoch(qat_model)
    qat_model(input_ids=tokens(), labels=tokens()).loss.backward()
    list(RolloutStream(qat_model).tensors())
    qat_model.save_pretrained(tmp_path)
    copy.deepcopy(qat_model)
    take_step(other, torch.optim.SGD(other.parameters(), lr=0.1))
    assert weights_epoch(qat_model) == before


def test_a_weight_put_back_has_changed_too(qat_model):
    layer = qat_model.model.layers[0].mlp.up_proj
    first = layer.weight
    before = weights_epoch(qat_model)
    layer.weight = nn.Parameter(first.detach() * 2)
    between = weights_epoch(qat_model)
    layer.weight = first
    assert before < between < weights_epoch(qat_model)


def test_a_plain_step_does_not_hide_a_later_step_of_flat_copies():
    layer = linears(1)[0]
    layer(torch.randn(1, 64)).sum().backward()
    plain = torch.optim.SGD(layer.parameters(), lr=1e-3)
    plain.step()
    step_flat_copies([layer.weight], 100)
    layer(torch.randn(1, 64))
    used, right = used_and_right_scales(layer)
    assert used == right


def test_one_optimizer_for_some_matrices_and_a_flat_one_for_the_rest():
    model = linears(2)
    for times in (100, 0.01):
        model(torch.randn(1, 64)).sum().backward()
        optimizer = torch.optim.SGD([model[0].weight], lr=1.0)
        optimizer.step()
        step_flat_copies([model[1].weight], times)
        model(torch.randn(1, 64))
        used, right = used_and_right_scales(model)
        assert used == right


def test_optimizers_of_the_models_other_parameters_leave_scales_fresh(qat_model):
    """A copy of the model knows its own parameters too, before anybody has looked at all of them."""
    for model in (copy.deepcopy(qat_model), qat_model):
        matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        rest = [parameter for parameter in model.parameters() if parameter.ndim == 1]
        first, second = torch.optim.SGD(matrices, lr=0.1), torch.optim.AdamW(rest, lr=0.1)
        for _ in range(2):
            model(input_ids=tokens(), labels=tokens()).loss.backward()
            first.step()
            second.step()
            assert all(weight.global_scales.is_fresh(weight) for weight in qat_weights(model).values())
    before = weights_epoch(model)
    second.step()
    assert weights_epoch(model) > before


def test_a_head_outside_the_model_in_the_same_optimizer_leaves_scales_fresh(qat_model):
    head = nn.Linear(64, 1)
    optimizer = torch.optim.SGD([*qat_model.parameters(), *head.parameters()], lr=0.1)
    take_step(qat_model, optimizer)
    assert all(weight.global_scales.is_fresh(weight) for weight in qat_weights(qat_model).values())


def sharded(mesh, num: int = 3, *, times: float = 1.0) -> nn.Module:
    model = linears(num, times=times)
    fully_shard(model, mesh=mesh)
    return model


def _two_models(num_processes: int, rank: int) -> list:
    """Policy and value network under one optimizer; nothing in the process says in which order they are found."""
    mesh = init_device_mesh("cpu", (num_processes,))
    policy, value = sharded(mesh), sharded(mesh, 5, times=64)
    optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], lr=200.0)
    found = list(global_scale._live)
    global_scale._live = sorted(found, key=lambda scales: scales.clock.number, reverse=rank % 2 == 1)
    scales = []
    for _ in range(2):
        x = torch.randn(4, 64)
        # Of the last layers only the last row moves, far enough for a larger scale: one process sees that alone.
        (policy(x)[:, -1] + value(x)[:, -1]).sum().backward()
        optimizer.step()
        scales += [used_and_right_scales(policy), used_and_right_scales(value)]
    return scales


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_two_models_under_one_optimizer_refresh_in_the_same_order_on_all_processes(num_processes):
    results = in_processes(partial(_two_models, num_processes), num_processes)
    assert all(found == results[0] for found in results)
    assert all(used == right for used, right in results[0])


class _NoCollectives:
    """Within, a collective is an error."""

    def __enter__(self):
        self.all_reduce = dist.all_reduce

        def refuse(*args, **kwargs):
            raise AssertionError("a collective that the other processes do not take part in")

        dist.all_reduce = refuse

    def __exit__(self, *error):
        dist.all_reduce = self.all_reduce


def _steps_on_some_ranks(rank: int) -> tuple:
    """Two replicas on two processes each, of which one is trained; and steps that only one process makes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    model = sharded(mesh["shard"])
    w4a4 = prepare_qat(nn.Sequential(nn.Linear(64, 64)), NVFP4QATConfig(activations="nvfp4"))
    x = torch.randn(4, 64)
    model(x)
    if rank < 2:
        model(x).sum().backward()
        torch.optim.SGD(model.parameters(), lr=100.0).step()
    before = weights_epoch(model)
    if rank == 0:
        with _NoCollectives():
            w4a4(x).sum().backward()
            torch.optim.SGD(w4a4.parameters(), lr=0.1).step()
            probe = nn.Linear(4, 1)
            probe(torch.randn(2, 4)).sum().backward()
            torch.optim.SGD(probe.parameters(), lr=0.1).step()
            assert all(weight.global_scales.is_fresh(weight) for weight in qat_weights(model).values())
    assert weights_epoch(model) == before
    model(x)
    model.reshard()
    return used_and_right_scales(model)


@pytest.mark.slow
def test_processes_that_do_not_step_are_not_waited_for():
    results = in_processes(_steps_on_some_ranks, 4)
    assert all(used == right for used, right in results)
    assert results[0] == results[1] != results[2] == results[3]


def _evaluate(rank: int) -> tuple[list[int], bool, list]:
    model = prepare_qat(tiny_qwen3())
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    epochs = [weights_epoch(model)]
    for _ in range(2):
        with torch.no_grad():
            model(input_ids=tokens())  # leaves the root's parameters gathered
        epochs.append(weights_epoch(model))
    list(RolloutStream(model).tensors())
    epochs.append(weights_epoch(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    take_step(model, optimizer)
    stepped = weights_epoch(model)
    with torch.no_grad(), _NoCollectives():
        # PyTorch does not count this for the DTensor, and one process alone cannot refresh.
        if rank == 0:
            model.model.norm.weight.to_local().add_(1)
        written = weights_epoch(model)
    return epochs, stepped > epochs[0], [written > stepped, used_and_right_scales_by_name(model)]


def used_and_right_scales_by_name(model) -> bool:
    """Whether the scales are those of the fused groups."""
    for layer in model.model.layers:
        for members in (["q_proj", "k_proj", "v_proj"], ["o_proj"]):
            modules = [getattr(layer.self_attn, name) for name in members]
            amax = torch.stack([global_amax(module.weight.full_tensor()) for module in modules]).amax()
            if any(module.global_decode_scale != global_decode_scale_of_amax(amax) for module in modules):
                return False
    return True


@pytest.mark.slow
def test_under_fsdp2_evaluation_and_pushes_leave_the_epoch_and_steps_raise_it():
    results = in_processes(_evaluate)
    for rank, (epochs, stepped, (written, fresh)) in enumerate(results):
        assert len(set(epochs)) == 1
        assert stepped and fresh
        assert written == (rank == 0)


def _w4a4(rank: int) -> dict[str, tuple[list[float], list[float]]]:
    return {wrap: _largest_inputs(wrap, rank) for wrap in ("ddp", "fsdp2", "loop")}


def _largest_inputs(wrap: str, rank: int) -> tuple[list[float], list[float]]:
    """Those that this process saw in one step, and those it has after it."""
    torch.manual_seed(0)
    model = prepare_qat(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), NVFP4QATConfig(activations="nvfp4"))
    called = model
    if wrap == "ddp":
        called = nn.parallel.DistributedDataParallel(model)
    elif wrap == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    called((1 + rank) * torch.ones(4, 64)).sum().backward()
    own = [layer.input_amax.item() for layer in qat_modules(model).values()]
    optimizer.step()
    if wrap == "loop":
        share_input_amaxes(model, dist.group.WORLD)
    return own, [layer.input_amax.item() for layer in qat_modules(model).values()]


@pytest.mark.slow
def test_processes_that_train_together_share_the_largest_inputs():
    first, second = in_processes(_w4a4)
    for wrap in first:
        (own, shared), (others, also_shared) = first[wrap], second[wrap]
        assert own != others, wrap
        assert shared == also_shared == [max(pair) for pair in zip(own, others, strict=True)], wrap


def test_a_model_that_no_optimizer_trains_follows_writes_through_data(qat_model):
    """As TRL moves a reference toward the policy, and others an average: nothing counts these writes."""
    reference = copy.deepcopy(qat_model).eval()
    for model in (reference, copy.deepcopy(reference)):
        for times in (1000, 0.001):
            for weight in model.parameters():
                weight.data.mul_(times)
            moved = model(input_ids=tokens()).logits
            refresh_global_scales(model)
            assert torch.equal(model(input_ids=tokens()).logits, moved)


def test_a_model_in_training_is_not_refreshed_at_every_forward_of_an_evaluation(qat_model, monkeypatch):
    optimizer = torch.optim.SGD(qat_model.parameters(), lr=0.1)
    take_step(qat_model.train(), optimizer)
    scales = next(iter(qat_weights(qat_model).values())).global_scales
    refreshed = []
    monkeypatch.setattr(scales, "_refresh", refreshed.append)
    qat_model.eval()(input_ids=tokens())
    assert not refreshed
    del optimizer
    qat_model(input_ids=tokens())
    assert len(refreshed) == 1
