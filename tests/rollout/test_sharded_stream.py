"""Two processes with FSDP2: each pushes the whole model's packed weights, gathered from shards."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_llama, tiny_qwen3_moe, tokens
from processes import failing_at, in_processes, raised
from store_engine import Store, StoreEngine
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_nvfp4_qat import NVFP4QATConfig, fake_quantize_nvfp4, prepare_qat
from hf_nvfp4_qat.modules.swap import qat_weights
from hf_nvfp4_qat.rollout import stream as stream_module
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
    list(RolloutStream(sharded))  # what was planned for whole weights is no plan for shards
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    all_gather = dist.all_gather_into_tensor

    def counted(output, part, group=None, **kwargs):
        sent.append(part.nbytes)
        return all_gather(output, part, group=group, **kwargs)

    equal, sent, observed = [], [], []
    for _ in range(2):
        _train(whole)
        _train(sharded)
        stream, expected = RolloutStream(sharded), RolloutStream(whole)
        sent.clear()
        observed.clear()
        dist.all_gather_into_tensor = counted
        tensors = list(stream.tensors(lambda name, weight, packed: observed.append((name, weight, packed))))
        dist.all_gather_into_tensor = all_gather
        equal += [
            name == other and torch.equal(tensor.view(torch.uint8), its.view(torch.uint8))
            for (name, tensor), (other, its) in zip(tensors, expected, strict=True)
        ]
    is_sharded = all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    own_rows_observed = all(
        torch.equal(fake_quantize_nvfp4(weight, global_decode_scale=packed.global_decode_scale), packed.dequantize())
        for _, weight, packed in observed
    )
    num_weights = sum(weight.master.numel() for weight in qat_weights(whole).values())
    # One gather a decoder layer, of half of the rows in 4.5 bits a weight.
    gathers = (len(sent), sum(sent) == num_weights // 2 * 4.5 / 8)
    return (
        all(equal),
        len(tensors),
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


def _push_after_one_that_broke_off(rank: int) -> bool:
    config = NVFP4QATConfig(exclude=["re:.*experts$"])
    whole, sharded = (prepare_qat(tiny_qwen3_moe(num_experts=4), config) for _ in range(2))
    fully_shard(sharded)
    for name, _ in RolloutStream(sharded):
        if ".experts.1." in name:
            break
    _train(whole)
    _train(sharded)
    return all(
        name == other and torch.equal(tensor, its)
        for (name, tensor), (other, its) in zip(RolloutStream(sharded), RolloutStream(whole), strict=True)
    )


@pytest.mark.slow
def test_experts_that_a_broken_push_has_gathered_are_not_pushed_later():
    assert in_processes(_push_after_one_that_broke_off) == [True, True]


# A process that fails does not hold up the others, and all of them learn of it


def sharded_model():
    model = prepare_qat(tiny_llama())
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


class Receiver(StoreEngine):
    """Keeps names only, and may fail at one of them."""

    def __init__(self):
        super().__init__(Store())
        self.received = []

    def place(self, stream):
        self.received.clear()
        return {}

    def push(self, tensors, layout):
        super().push(tensors, layout)
        self.wait()

    def take(self, name, tensor):
        self.received.append(name)

    def wait(self):
        pass

    def generate(self):
        if self.store.refusal:
            raise RuntimeError(self.store.refusal)
        return "generated"


def _pushes(failing_rank: int, rank: int) -> list:
    from hf_nvfp4_qat.rollout import sync as sync_module
    from hf_nvfp4_qat.sharding import packed

    model, engine = sharded_model(), Receiver()
    sync_module.engine_of = lambda llm: llm
    sync_module._compare = lambda engine, stream: [engine.take(*item) for item in stream.weights()]
    number = len(RolloutStream(model).layout)
    results = []
    for push, owner, name, failing_call in (
        (sync_module.sync, engine, "reset_caches", 1),  # before anything is sent
        (sync_module.sync, packed, "encode_rows", 3),  # before a gather
        (sync_module.sync, packed, "packed_rows", 9),  # after one
        (sync_module.sync, stream_module, "own_rows", 2),
        (sync_module.sync, engine, "take", 20),  # in the receiver
        (sync_module.sync, engine, "wait", 1),
        (sync_module.check, engine, "take", 7),
    ):
        with failing_at(owner, name, failing_call) if rank == failing_rank else nullcontext():
            results.append((name, raised(lambda push=push: push(engine, model)), raised(engine.generate)))
        sync_module.sync(engine, model)
        assert len(engine.received) == number and engine.generate() == "generated"
        assert len(sync_module.check(engine, model)) == sum(1 for _ in model.parameters())
    return results


@pytest.mark.slow
@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_push_that_fails_on_one_process_fails_on_all(failing_rank):
    half_way = f"RuntimeError: The push of weights into a store failed half-way: process {failing_rank}: Broken: in"
    for rank, results in enumerate(in_processes(partial(_pushes, failing_rank))):
        assert len(results) == 7
        for number, (name, error, generation) in enumerate(results):
            if number in (0, 6):
                # Nothing was sent: the engine goes on with the weights it has.
                own = f"Broken: in {name}"
                told = (
                    f"RuntimeError: This process stops because another one failed. It is process {failing_rank}: {own}"
                )
                assert error == (own if rank == failing_rank else told)
                assert generation == "nothing"
            else:
                assert error.startswith(f"{half_way} {name}")
                assert f"process {failing_rank}: Broken: in {name}" in generation


class Server:
    """TRL's client, in front of nothing."""

    def __init__(self):
        self.received = []

    def update_named_params(self, metadata, named_params):
        self.received = [(name, self.send(tensor)) for name, tensor in named_params]

    def send(self, tensor):
        return list(tensor.shape)

    def reset_prefix_cache(self):
        pass


def _server_pushes(failing_rank: int, rank: int) -> list:
    from trl.generation.vllm_generation import VLLMGeneration

    from hf_nvfp4_qat.sharding import packed
    from hf_nvfp4_qat.trl_callbacks import generation as generation_module

    model, client = sharded_model(), Server()
    trl = object.__new__(VLLMGeneration)

    def reduce(tensor):
        dist.all_reduce(tensor)
        return tensor

    accelerator = SimpleNamespace(num_processes=2, is_main_process=rank == 0, device=torch.device("cpu"), reduce=reduce)
    vars(trl).update(
        model=model, mode="server", accelerator=accelerator, vllm_client=client, server_base_url="http://nowhere",
        server_timeout=1, _weight_metadata=None, _dist=SimpleNamespace(fsdp_version=2, zero_stage=0),
    )  # fmt: skip
    model.name_or_path = "tiny"
    generation_module.check_server = generation_module.reset_server_caches = lambda *args, **kwargs: None
    generation = generation_module.NVFP4Generation(trl, check_every=0)
    generation.build(lambda: None)
    expected = [[item.name, list(item.shape)] for item in RolloutStream(model).layout]
    cases = [
        (generation_module, "_metadata", 1),
        (packed, "encode_rows", 3),
        (packed, "packed_rows", 9),
        (generation.sample, "observe", 2),
    ]
    if failing_rank == 0:
        cases += [(client, "send", 5), (generation_module, "reset_server_caches", 1)]
    results = []
    for owner, name, failing_call in cases:
        client.received = []
        with failing_at(owner, name, failing_call) if rank == failing_rank else nullcontext():
            error = raised(trl.sync_weights)
        announced = [list(item) for item in client.received] in ([], expected)
        results.append((name, error, raised(lambda: trl.generate([[1]], None, 1)), announced))
        trl.sync_weights()
        assert [list(item) for item in client.received] == (expected if rank == 0 else [])
    return results


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_push_to_a_server_that_fails_on_one_process_fails_on_all(failing_rank):
    cause = f"process {failing_rank}: Broken: in"
    for rank, results in enumerate(in_processes(partial(_server_pushes, failing_rank))):
        assert len(results) == (6 if failing_rank == 0 else 4)
        for name, error, generation, announced in results:
            if name == "_metadata":
                assert f"{cause} {name}" in error or rank == failing_rank and error == f"Broken: in {name}"
            else:
                start = "RuntimeError: The push of weights to the server failed half-way"
                assert error.startswith(f"{start}: {cause} {name}")
                assert "must not generate" in generation and f"{cause} {name}" in generation
            assert generation.startswith("RuntimeError: vLLM must not generate")
            assert announced  # all that was announced came, or nothing
