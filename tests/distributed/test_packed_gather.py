"""FSDP2 with the NVFP4 gather: bit for bit what fake quantization in forward gives under the same sharding."""

import logging
import math
import tempfile
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from benchmarks.counted_gather import count_gathers
from conftest import tiny_llama, tiny_qwen3, tiny_qwen3_moe, tokens
from processes import Group, in_processes
from sharding import exact_sums, largest_difference, spread, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_nvfp4_qat import NVFP4QATConfig, fake_quantize_nvfp4, prepare_qat, save_nvfp4, verify_nvfp4
from hf_nvfp4_qat.distributed import fsdp_versions
from hf_nvfp4_qat.distributed.packed_gather import gathers_packed, stop_packed_gather, use_packed_gather
from hf_nvfp4_qat.modules import global_scale
from hf_nvfp4_qat.modules.swap import qat_modules, qat_weights

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
FP32 = MixedPrecisionPolicy()
DEFAULT = NVFP4QATConfig()


def shard(model, policy=FP32, **kwargs):
    """One unit a decoder layer."""
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy, **kwargs)
    if model.lm_head.weight is model.model.embed_tokens.weight:
        fully_shard([model.model.norm, model.model.embed_tokens, model.lm_head], mp_policy=policy, **kwargs)
    fully_shard(model, mp_policy=policy, **kwargs)
    exact_sums(model)
    return model


def train(model, rank: int, *, steps: int = 4, accumulate: int = 1, clip: float | None = None, **optimizer_options):
    """Losses, and the gradients of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **optimizer_options)
    losses, gradients = [], []
    for step in range(steps):
        for micro in range(accumulate):
            model.set_requires_gradient_sync(micro == accumulate - 1)
            batch = (tokens() + 7 * rank + 3 * step + micro) % 128
            loss = model(input_ids=batch, labels=batch).loss
            (loss / accumulate).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        gradients.append([whole(p.grad).clone() for p in model.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, gradients


def seen_in_forward(model) -> dict[str, torch.Tensor]:
    """Filled by the next forward: each QAT weight as the forward of its module finds it."""
    seen = {}
    for name, weight in qat_weights(model).items():
        model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(
            lambda module, args, name=name, weight=weight: seen.update({name: whole(weight.master).detach().clone()})
        )
    return seen


def compare(
    rank: int,
    make: Callable[[], nn.Module] = tiny_qwen3,
    policy: MixedPrecisionPolicy = BF16,
    before_sharding: Callable[[nn.Module], None] = lambda model: None,
    training: dict | None = None,
    recipe: NVFP4QATConfig = DEFAULT,
    **sharding,
) -> dict[str, float]:
    """Differences between the two ways to train, and the bytes that each gathers."""
    found = {}
    runs = {}
    for packed in (False, True):
        model = prepare_qat(spread(make()).train(), recipe)
        before_sharding(model)
        shard(model, policy, **sharding)
        counted = count_gathers(model)
        if packed:
            found["num_packed"] = use_packed_gather(model).num_packed
        runs[packed] = (*train(model, rank, **(training or {})), model, counted.num_bytes)
    (plain_losses, plain_grads, plain, found["plain_bytes"]), (losses, grads, model, found["bytes"]) = (
        runs[False],
        runs[True],
    )
    found["loss"] = max(abs(a - b) for a, b in zip(losses, plain_losses, strict=True))
    found["gradient"] = max(largest_difference(*pair) for pair in zip(grads, plain_grads, strict=True))
    found["master"] = largest_difference(model.parameters(), plain.parameters())
    seen = seen_in_forward(model)
    with torch.no_grad():
        model(input_ids=tokens())
    dtype = policy.param_dtype or torch.float32
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    expected = [
        fake_quantize_nvfp4(
            whole(weight.master).detach(), global_decode_scale=weight.global_decode_scale, scale_rule=recipe.scale_rule
        ).to(dtype)
        for weight in qat_weights(model).values()
    ]
    found["seen"] = largest_difference([seen[name] for name in qat_weights(model)], expected)
    found["scale"] = largest_difference(
        *([layer.global_decode_scale for layer in qat_weights(m).values()] for m in (model, plain))
    )
    return found


EXACT = {"loss": 0.0, "gradient": 0.0, "master": 0.0, "seen": 0.0, "scale": 0.0}


def assert_exact(results: list[dict], **bounds: float) -> None:
    for found in results:
        assert found["num_packed"] > 0 and math.isfinite(found["loss"])
        for key, bound in {**EXACT, **bounds}.items():
            assert found[key] <= bound, (key, found)


def _checkpointing(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _compiled(model):
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")


class OddMLP(nn.Module):
    """With weights of 33 rows and of one, which processes cannot share evenly."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.thirty_three, self.one = mlp, nn.Linear(64, 33, bias=False), nn.Linear(64, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.mlp(x)
        return y + self.thirty_three(y).mean(-1, keepdim=True) * self.one(y)


def odd_rows() -> nn.Module:
    model = tiny_qwen3()
    for layer in model.model.layers:
        layer.mlp = OddMLP(layer.mlp)
    return model


def experts(implementation: str = "grouped_mm", **changes) -> nn.Module:
    model = tiny_qwen3_moe(**changes)
    model.set_experts_implementation(implementation)
    return model


TWO_STEPS = {"steps": 2}
# What is passed to `compare`, on two processes.
MODES: dict[str, dict] = {
    "bf16": {},
    "fp32": {"policy": FP32},
    "untied": {"make": partial(tiny_qwen3, tie_word_embeddings=False)},
    "llama": {"make": tiny_llama, "training": TWO_STEPS},
    "kept whole after forward": {"reshard_after_forward": False, "training": TWO_STEPS},
    "uneven rows": {"make": odd_rows, "training": TWO_STEPS},
    "checkpointing": {"before_sharding": _checkpointing},
    "accumulation": {"training": {"accumulate": 2}},
    "clipping": {"training": {"clip": 0.05}},
    "fused optimizer": {"training": {"fused": True}},
    "compiled": {"before_sharding": _compiled, "training": TWO_STEPS},
    "four over six": {"recipe": NVFP4QATConfig(scale_rule="four_over_six"), "training": TWO_STEPS},
    "nvfp4 inputs": {"recipe": NVFP4QATConfig(activations="nvfp4"), "training": TWO_STEPS},
    "experts": {"make": experts},
    "experts, uneven": {
        "make": partial(experts, num_experts=5),
        "recipe": NVFP4QATConfig(scale_rule="mse"),
        "training": TWO_STEPS,
    },
    "experts, eager, checkpointing": {
        "make": partial(experts, "eager"),
        "before_sharding": _checkpointing,
        "training": TWO_STEPS,
    },
}


@pytest.fixture(scope="module")
def two_processes():
    with Group(2) as group:
        yield group


@pytest.fixture(scope="module")
def four_processes():
    with Group(4) as group:
        yield group


def _mode(name: str, rank: int) -> dict[str, float]:
    return compare(rank, **MODES[name])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_training_equals_fake_quantization_in_forward(two_processes, mode):
    assert_exact(two_processes.run(partial(_mode, mode)))


@pytest.mark.slow
def test_a_third_of_the_bytes_moves(two_processes):
    num_weights = sum(layer.weight.numel() for layer in qat_modules(prepare_qat(tiny_qwen3())).values())
    for found in two_processes.run(partial(_mode, "bf16")):
        # Gathered for forward and backward in 4 steps, half of the rows sent by each of two: 4.5 bits for 16.
        assert found["plain_bytes"] - found["bytes"] == 8 * num_weights // 2 * (16 - 4.5) / 8


# On four processes; hybrid: sharded over two of them, and replicated.
MESHES: dict[str, dict] = {
    "uneven rows": {"make": odd_rows},
    "experts, more processes than experts": {"make": partial(experts, num_experts=3)},
    "experts, hybrid": {"make": partial(experts, num_experts=3)},
    "hybrid": {},
}


def _on_four(name: str, rank: int) -> dict[str, float]:
    options = dict(MESHES[name])
    if "hybrid" in name:
        options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return compare(rank, training=TWO_STEPS, **options)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_four_processes_and_hybrid_sharding(four_processes, mesh):
    assert_exact(four_processes.run(partial(_on_four, mesh)))


def _tensor_parallel(rank: int) -> dict[str, float]:
    """q/k/v, gate/up split by rows and o/down by columns, then sharded: forward sees the whole's fake quantization."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = prepare_qat(spread(tiny_llama()).train())
    plan = {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ColwiseParallel()),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), ColwiseParallel()),
        **dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), RowwiseParallel()),
    }
    for layer in model.model.layers:
        parallelize_module(layer, mesh["tp"], plan)
    shard(model, FP32, mesh=mesh["dp"])
    found = {
        "num_packed": use_packed_gather(model).num_packed,
        "seen": 0.0,
        **dict.fromkeys(("loss", "gradient", "master", "scale"), 0.0),
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        masters = {name: whole(layer.weight).detach().clone() for name, layer in qat_modules(model).items()}
        seen = seen_in_forward(model)
        batch = (tokens() + mesh["dp"].get_local_rank()) % 128
        model(input_ids=batch, labels=batch).loss.backward()
        for name, layer in qat_modules(model).items():
            expected = fake_quantize_nvfp4(masters[name], global_decode_scale=layer.global_decode_scale).float()
            found["seen"] = max(found["seen"], largest_difference([seen[f"{name}.weight"]], [expected]))
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.slow
def test_tensor_parallelism(four_processes):
    assert_exact(four_processes.run(_tensor_parallel))


def _without_reduction(rank: int) -> dict:
    """The comparison can fail: each process with the scale of its own rows."""
    global_scale.maximum_over_mesh = lambda shared_amax, mesh: None
    return compare(rank, training={"steps": 1})


@pytest.mark.slow
def test_a_scale_of_ones_own_rows_is_found_out():
    results = in_processes(_without_reduction)
    assert any(found["seen"] > 0 or found["scale"] > 0 for found in results)


def _lives(rank: int) -> dict:
    """Switching, replaced tensors, generation, and what autograd holds."""
    found = {}
    model = shard(prepare_qat(spread(tiny_qwen3()).train()), BF16)
    reference = shard(prepare_qat(spread(tiny_qwen3()).train()), BF16)

    def losses_differ() -> float:
        return abs(train(model, rank, steps=1)[0][0] - train(reference, rank, steps=1)[0][0])

    found["again"] = use_packed_gather(model) == use_packed_gather(model)
    stop_packed_gather(model)
    stop_packed_gather(model)
    found["switching"] = []
    for packed in (True, False, True):
        use_packed_gather(model) if packed else stop_packed_gather(model)
        assert gathers_packed(model) == packed
        found["switching"].append(losses_differ())
    late = shard(prepare_qat(spread(tiny_qwen3()).train()), BF16)
    another = shard(prepare_qat(spread(tiny_qwen3()).train()), BF16)
    found["late"] = train(late, rank, steps=1)[0] == train(another, rank, steps=1)[0]
    use_packed_gather(late)
    found["late"] &= train(late, rank, steps=1)[0] == train(another, rank, steps=1)[0]
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    hooked = [hasattr(layer.weight._local_tensor, "fsdp_pre_all_gather") for layer in qat_modules(model).values()]
    with torch.no_grad():
        mine, theirs = (m(input_ids=tokens()).logits for m in (model, reference))
    again = [hasattr(layer.weight._local_tensor, "fsdp_pre_all_gather") for layer in qat_modules(model).values()]
    found["assign"] = (any(hooked), all(again), largest_difference([mine], [theirs]))
    for m in (model, reference):
        for module in m.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        with torch.no_grad():
            for layer in qat_modules(m).values():
                layer.weight.mul_(1.5)  # no optimizer, no load_state_dict
    found["edited"] = losses_differ()
    register_fsdp_forward_method(model, "generate")
    model.eval()
    generated = model.generate(input_ids=tokens(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    found["generated"] = generated.shape[1] - tokens().shape[1]
    return found


@pytest.mark.slow
def test_switching_replaced_tensors_edits_and_generation():
    for found in in_processes(_lives):
        assert found["again"] and found["late"] and found["switching"] == [0.0, 0.0, 0.0] and found["edited"] == 0.0
        assert found["assign"] == (False, True, 0.0) and found["generated"] == 4


def _held(rank: int) -> dict:
    """Bytes that autograd holds between forward and backward, after resharding."""
    held = {}
    for kind in ("none", "forward", "packed"):
        for compiled in (False, True):
            torch.compiler.reset()
            model = tiny_qwen3().train()
            model = model if kind == "none" else prepare_qat(model)
            if compiled:
                _compiled(model)
            shard(model, BF16)
            if kind == "packed":
                use_packed_gather(model)
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
                loss = model(input_ids=tokens(), labels=tokens()).loss
            storages = {
                t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept if not isinstance(t, DTensor)
            }
            held[kind, compiled] = sum(storages.values())
            loss.backward()
    return held


@pytest.mark.slow
def test_autograd_holds_no_more_than_without_qat():
    for held in in_processes(_held):
        for compiled in (False, True):
            assert held["packed", compiled] == held["none", compiled]
            # The two modes of QAT differ in nothing that grows with the weights.
            assert held["forward", compiled] - held["none", compiled] < 14 * 64


def _refusals(rank: int) -> dict[str, str]:
    from torch.distributed._composable.replicate_with_fsdp import replicate  # not in PyTorch 2.11

    found = {}

    def message(name: str, function: Callable[[], object]) -> None:
        try:
            function()
        except ValueError as error:
            found[name] = str(error)

    message("not sharded", lambda: use_packed_gather(prepare_qat(tiny_qwen3())))
    message("no qat", lambda: use_packed_gather(shard(tiny_qwen3())))
    offloaded = shard(prepare_qat(tiny_qwen3()), offload_policy=CPUOffloadPolicy(pin_memory=False))
    message("offloaded", lambda: use_packed_gather(offloaded))
    in_use = shard(prepare_qat(tiny_qwen3()), reshard_after_forward=False)
    in_use(input_ids=tokens())
    message("in use", lambda: use_packed_gather(in_use))
    columns = prepare_qat(tiny_qwen3())
    for layer in columns.model.layers:
        fully_shard(layer, shard_placement_fn=lambda parameter: Shard(1) if parameter.ndim == 2 else Shard(0))
    fully_shard(columns)
    message("by columns", lambda: use_packed_gather(columns))
    message("replicated", lambda: use_packed_gather(replicate(prepare_qat(tiny_qwen3()))))
    return found


@pytest.mark.slow
def test_what_is_not_supported_is_refused_with_the_way_out():
    for found in in_processes(_refusals):
        assert "fully_shard" in found["not sharded"] and "none of 0" in found["no qat"]
        assert "NVFP4_QAT_GATHER=bf16" in found["offloaded"]
        assert "gathered" in found["in use"] and "columns" in found["by columns"]
        assert "replicated" in found["replicated"]


def _alone(rank: int) -> dict:
    return compare(rank, training={"steps": 2})


@pytest.mark.slow
def test_one_process():
    assert_exact(in_processes(_alone, num_processes=1))


ON_GPUS = {
    "bf16": {},
    "fp32": {"policy": FP32, "training": TWO_STEPS},
    "kept whole after forward": {"reshard_after_forward": False, "training": TWO_STEPS},
    "uneven rows": {"make": odd_rows, "training": TWO_STEPS},
    "checkpointing": {"before_sharding": _checkpointing},
    "clipping, fused optimizer": {"training": {"clip": 0.05, "fused": True}},
}


def _on_gpus(rank: int) -> dict[str, dict]:
    return {name: compare(rank, **options) for name, options in ON_GPUS.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("num_gpus", [1, pytest.param(2, marks=pytest.mark.multi_gpu)])
def test_on_gpus(num_gpus):
    """The kernels and NCCL, on FSDP2's streams."""
    results = in_processes(_on_gpus, num_gpus, on_gpus=True)
    for name in results[0]:
        assert_exact([result[name] for result in results])


def _large_on_gpus(rank: int) -> dict:
    """Work long enough for a missing wait between streams to show."""
    sizes = {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 6, "head_dim": 512}
    return compare(rank, lambda: tiny_qwen3(**sizes), training={"steps": 3})


@pytest.mark.gpu
@pytest.mark.parametrize("num_gpus", [1, pytest.param(2, marks=pytest.mark.multi_gpu)])
def test_large_weights_on_gpus(num_gpus):
    assert_exact(in_processes(_large_on_gpus, num_gpus, on_gpus=True))


def _saved_on_gpus(rank: int) -> tuple[int, bool]:
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    model = shard(prepare_qat(spread(tiny_qwen3()).train()), BF16)
    use_packed_gather(model)
    train(model, rank, steps=1)
    save_nvfp4(model, folder[0])
    report = verify_nvfp4(folder[0], model)
    return report.num_compared, report.ok


@pytest.mark.gpu
@pytest.mark.parametrize("num_gpus", [1, pytest.param(2, marks=pytest.mark.multi_gpu)])
def test_saving_on_gpus(num_gpus):
    assert in_processes(_saved_on_gpus, num_gpus, on_gpus=True) == [(52, True)] * num_gpus


def test_a_newer_pytorch_than_tested_gets_one_warning(monkeypatch, caplog):
    fsdp_versions._warn_if_untested.cache_clear()
    with caplog.at_level(logging.WARNING, logger="hf_nvfp4_qat"):
        list(fsdp_versions.fsdp_parameters(nn.Linear(16, 16)))
        assert not caplog.records
        monkeypatch.setattr(torch, "__version__", "9.9.0+cpu")
        for _ in range(3):
            list(fsdp_versions.fsdp_parameters(nn.Linear(16, 16)))
    assert [record.getMessage() for record in caplog.records] == [
        "The NVFP4 gather is tested with PyTorch 2.11 to 2.13; 9.9.0+cpu is installed. If something fails, set "
        "NVFP4_QAT_GATHER=bf16."
    ]


def _renamed(rank: int) -> dict[str, str]:
    """What is said where FSDP2 has another name for something."""
    from torch.distributed.fsdp._fully_shard import _fsdp_common

    found = {}
    model = fully_shard(prepare_qat(nn.Sequential(nn.Linear(32, 32, bias=False))))
    (parameter,) = fsdp_versions.fsdp_parameters(model)
    state = model._get_fsdp_state()
    owners = [(_fsdp_common, "FSDPMeshInfo"), (type(model), "_get_fsdp_state"), *STATE_NAMES]
    owners = [(state if owner is None else owner, name) for owner, name in owners]
    for owner, name in [*owners, *((parameter, name) for name in ("sharded_state", "_orig_size", "fsdp_placement"))]:
        classes = owner.__mro__ if isinstance(owner, type) else type(owner).__mro__
        namespace = next(place for place in (owner, *classes) if name in vars(place))
        kept = vars(namespace)[name]
        delattr(namespace, name)
        try:
            use_packed_gather(model)
        except ValueError as error:
            found[name] = str(error)
        finally:
            setattr(namespace, name, kept)
    use_packed_gather(model)
    return found


STATE_NAMES = [(None, "_fsdp_param_groups" if fsdp_versions.torch_version().minor >= 12 else "_fsdp_param_group")]


def test_a_name_of_fsdp2_that_is_gone_is_named():
    (found,) = in_processes(_renamed, 1)
    assert len(found) == 6
    for name, error in found.items():
        assert f"needs `{name}` of FSDP2's" in error and "NVFP4_QAT_GATHER=bf16" in error
