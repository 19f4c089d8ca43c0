"""What fails on one process fails on all of them, and none waits for it."""

import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_llama
from processes import failing_at, in_processes, raised
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from hf_nvfp4_qat import prepare_qat, save_nvfp4, verify_nvfp4
from hf_nvfp4_qat.distributed import gather
from hf_nvfp4_qat.distributed.failures import failing_together, failures_of_all, sharding_groups
from hf_nvfp4_qat.sharding import packed as packed_module


def test_alone_an_error_is_an_error():
    assert failures_of_all(None, []) == []
    assert failures_of_all(OSError("full"), []) == ["OSError: full"]
    with failing_together([]):
        pass
    with pytest.raises(OSError, match="full"), failing_together([]):
        raise OSError("full")


def _told(rank: int) -> list:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    groups = mesh.get_all_groups()
    assert sharding_groups(torch.nn.Linear(2, 2)) == []
    layer = torch.nn.Linear(4, 4)
    fully_shard(layer, mesh=mesh)
    assert sharding_groups(layer) == groups

    def fail(failing):
        with failing_together(groups):
            if rank in failing:
                raise OSError(f"full {rank}")

    return [raised(partial(fail, failing)) for failing in ((), (2,), (1, 3))]


@pytest.mark.slow
def test_every_process_learns_which_one_failed_over_all_axes_of_a_mesh():
    stop = "RuntimeError: This process stops because another one failed. It is process"
    for rank, (none, one, two) in enumerate(in_processes(_told, 4)):
        assert none == "nothing"
        assert one == ("OSError: full 2" if rank == 2 else f"{stop} 2: OSError: full 2")
        assert two == (f"OSError: full {rank}" if rank in (1, 3) else f"{stop} 1: OSError: full 1")


def _gathered(rank: int) -> list:
    """A process that fails before, or after, takes part in what the others gather."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = [torch.randn(6, 32), torch.randn(32, 32), torch.randn(5, 32)]
    shards = [distribute_tensor(w, mesh, [Shard(dim)]) for w, dim in zip(whole, (0, 1, 0), strict=True)]
    scales = [torch.tensor(2.0**-10)] * 3
    found = []
    for name in ("encode_rows", "quantize_unchecked", "packed_rows"):
        with failing_at(packed_module, name, 1) if rank == 1 else nullcontext():
            found.append(raised(lambda: packed_module.gather_packed(shards, scales, "amax")))
        # The next gather is about the next weights on both.
        expected = packed_module.gather_packed(whole, scales, "amax")
        packed = packed_module.gather_packed(shards, scales, "amax")
        found.append(all(torch.equal(a.dequantize(), b.dequantize()) for a, b in zip(packed, expected, strict=True)))
    return found


@pytest.mark.slow
def test_a_process_that_fails_to_quantize_still_takes_part():
    healthy, failed = in_processes(_gathered)
    assert healthy == ["nothing", True] * 3
    names = ("encode_rows", "quantize_unchecked", "packed_rows")
    assert failed == [item for name in names for item in (f"Broken: in {name}", True)]


def _saved(folder: Path, failing_rank: int, rank: int) -> list:
    model = prepare_qat(tiny_llama())
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    save = partial(save_nvfp4, model, folder / "model")
    errors = []
    for name in ("encode_rows", "packed_rows"):
        with failing_at(packed_module, name, 5) if rank == failing_rank else nullcontext():
            errors.append(raised(save))
        errors.append((folder / "model" / "config.json").exists())
    save()
    dist.barrier()
    return [*errors, verify_nvfp4(folder / "model", model).ok]


@pytest.mark.slow
@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_process_that_fails_to_pack_for_a_checkpoint_does_not_hold_up_the_others(failing_rank):
    with tempfile.TemporaryDirectory() as folder:
        results = in_processes(partial(_saved, Path(folder), failing_rank))
    told = f"RuntimeError: Nothing was saved, because a process failed. It is process {failing_rank}: Broken: in"
    for rank, (first, first_config, second, second_config, ok) in enumerate(results):
        for error in (first, second):
            assert error.startswith("Broken: in" if rank == failing_rank else told)
        assert not first_config and not second_config and ok, results


def _written(rank: int) -> list[str]:
    def write(items):
        list(items)
        raise OSError("the disk is full")

    return [raised(lambda: gather.on_main_process(write, map(abs, [1, 2])))]


@pytest.mark.slow
def test_an_error_of_the_writer_after_all_is_made_is_told():
    told = "RuntimeError: Nothing was saved, because a process failed. It is process 0: OSError: the disk is full"
    assert in_processes(_written) == [["OSError: the disk is full"], [told]]
