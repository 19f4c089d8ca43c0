"""Pushes into a real vLLM engine: on a CPU through the plugin's GEMM, on a GPU through Marlin and CUDA graphs."""

import dataclasses

import pytest
import torch
from conftest import load_qat, tiny_llama, tiny_qwen3
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, Phi3Config, Phi3ForCausalLM
from vllm_engines import (
    ON_GPU,
    PROMPTS,
    SIZES,
    empty_engine,
    generate,
    make_engine,
    release_engines,
    save,
    train_a_little,
)

from hf_nvfp4_qat import NVFP4QATConfig, prepare_qat, save_nvfp4
from hf_nvfp4_qat.rollout import sync as sync_module
from hf_nvfp4_qat.rollout.stream import RolloutStream
from hf_nvfp4_qat.rollout.sync import check, sync
from hf_nvfp4_qat.rollout.vllm.engine import VLLMEngine, worker_of
from hf_nvfp4_qat.rollout.vllm.loading import place_tensors
from hf_nvfp4_qat.rollout.vllm.reading import kernel_name
from hf_nvfp4_qat.rollout.vllm.versions import plain_tensors, unprocessed_loaders

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MLP = "model.layers.0.mlp"


@pytest.fixture(scope="module", autouse=True)
def release_engines_at_the_end():
    yield
    release_engines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tiny_qwen3(**SIZES, max_position_embeddings=512), tmp_path_factory.mktemp("rollout_qwen3"))


@pytest.fixture
def model(folder):
    return load_qat(folder)


@pytest.fixture(scope="module")
def engine(folder):
    return empty_engine(folder, load_qat(folder), max_model_len=512)


def test_a_synced_engine_generates_as_one_that_loads_the_exported_checkpoint(engine, model, tmp_path):
    train_a_little(model)
    report = sync(engine, model)
    save_nvfp4(model, tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)  # the export is a checkpoint like any other
    fresh = generate(make_engine(tmp_path))
    assert generate(engine) == fresh
    assert len({token for tokens, _ in fresh for token in tokens}) > 3
    assert report.num_bytes == sum(item.nbytes for item in RolloutStream(model).layout)
    assert report.num_packed == 14
    assert 1.5 < report.compression < 3.6


def test_the_engines_own_gemms_return_the_trained_weights_bit_for_bit(engine, model):
    sync(engine, model)
    before = generate(engine)
    train_a_little(model)
    stale = check(engine, model)
    assert len(stale.different) == sum(1 for _ in model.parameters())
    assert not stale.ok
    sync(engine, model)
    found = check(engine, model)
    assert found.ok
    assert found.num_weights == sum(parameter.numel() for parameter in model.parameters())
    assert generate(engine) != before


def test_check_finds_a_single_changed_code(engine, model):
    sync(engine, model)
    layer = model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        row = layer.weight[5, :16]
        row[row.abs().argmin()] = row.abs().max() / 2
    assert check(engine, model).different == {"model.layers.1.mlp.up_proj.weight": 1}


def test_no_tensor_of_the_engine_moves_over_five_pushes(engine, model):
    engine_model = worker_of(engine).model_runner.get_model()
    sync(engine, model)

    def addresses():
        tensors = (
            dict(engine_model.named_parameters()) | dict(engine_model.named_buffers()) | plain_tensors(engine_model)
        )
        return {name: tensor.data_ptr() for name, tensor in tensors.items()}

    before = addresses()
    for _ in range(5):
        train_a_little(model)
        sync(engine, model)
    assert addresses() == before
    assert check(engine, model).ok


def test_later_pushes_repeat_the_copies_of_the_first(engine, model, monkeypatch):
    """Not through vLLM's loaders, and with the same result."""
    sync(engine, model)
    sync(engine, model)
    runner = worker_of(engine).model_runner

    def no_loading(*args, **kwargs):
        raise AssertionError("vLLM's loaders were asked")

    monkeypatch.setattr(runner.get_model(), "load_weights", no_loading)
    train_a_little(model)
    sync(engine, model)
    assert check(engine, model).ok


@pytest.fixture
def without_plan(engine):
    """What an engine was planned for stays with it; here neither from other tests nor for them."""

    def forget():
        vars(worker_of(engine)).pop("nvfp4_rollout_plan", None)

    forget()
    yield
    forget()


@pytest.mark.usefixtures("without_plan")
def test_a_model_whose_loading_is_more_than_copies_goes_through_vllms_loaders_every_time(engine, model, monkeypatch):
    monkeypatch.setattr("hf_nvfp4_qat.rollout.vllm.replay.can_replay", lambda worker, model: False)
    asked = []
    engine_model = worker_of(engine).model_runner.get_model()
    load = engine_model.load_weights
    monkeypatch.setattr(engine_model, "load_weights", lambda weights: (asked.append(1), load(weights))[1])
    for _ in range(3):
        train_a_little(model)
        sync(engine, model)
    assert len(asked) == 4  # the first time to see where tensors go
    assert check(engine, model).ok


def test_biases_arrive(tmp_path):
    model = load_qat(save(tiny_llama(**SIZES), tmp_path))
    engine = empty_engine(tmp_path, model)
    for _ in range(2):
        train_a_little(model)
        sync(engine, model)
        found = check(engine, model)
        assert found.ok, found.different
        assert found.num_weights == sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.bias.add_(1)
    assert check(engine, model).different == {"model.layers.0.self_attn.v_proj.bias": 64}


def test_matrices_that_are_fused_on_disk_arrive_and_are_compared_whole(tmp_path):
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = load_qat(save(Phi3ForCausalLM(config), tmp_path))
    engine = empty_engine(tmp_path, model)
    for _ in range(3):
        train_a_little(model)
        sync(engine, model)
        found = check(engine, model)
        assert found.ok and not found.not_compared, found
        assert found.num_weights == sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        for part in (model.model.layers[0].self_attn.qkv_proj, model.model.layers[1].mlp.gate_up_proj):
            part.weight[-1] = part.weight[0]  # the last rows are of v and of up
    assert check(engine, model).different.keys() == {
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.1.mlp.gate_up_proj.weight",
    }


def test_what_vllm_rearranges_arrives_and_is_reported_as_not_compared(tmp_path):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=512, hidden_size=128, n_layer=2, n_head=4)
    path = save(BloomForCausalLM(config), tmp_path)
    model = load_qat(path, NVFP4QATConfig(exclude=["query_key_value"]))
    engine = empty_engine(path, model)
    for _ in range(2):
        train_a_little(model)
        sync(engine, model)
    found = check(engine, model)
    assert found.ok
    assert set(found.not_compared) == {
        f"transformer.h.{i}.self_attention.query_key_value.{name}" for i in range(2) for name in ("weight", "bias")
    }
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([PROMPTS[0]], device=model.device)).logits[0, -1].log_softmax(-1)
    token, logprob = (output[0] for output in generate(engine)[0])
    assert logprob == pytest.approx(expected[token].item(), abs=0.05)
    with pytest.raises(ValueError, match="query_key_value.*add the layer to `exclude`"):
        sync(engine, load_qat(path))


def test_an_engine_in_another_dtype_is_refused(folder, model):
    engine = empty_engine(folder, model, dtype="float16")
    with pytest.raises(ValueError, match="computes in torch.float16"):
        sync(engine, model)


def test_layers_left_in_bfloat16_arrive(folder):
    model = load_qat(folder, NVFP4QATConfig(preset="ffn_only", bf16_first_layers=1, scale_rule="four_over_six"))
    engine = empty_engine(folder, model)
    train_a_little(model)
    sync(engine, model)
    assert check(engine, model).ok


def test_the_kernel_is_named(engine):
    assert kernel_name(worker_of(engine)) == ("MarlinNvFp4LinearKernel" if ON_GPU else "ReferenceNvFp4LinearKernel")


# Faults: all loud, none generates


class Faulty(RolloutStream):
    """A stream that is not what the engine needs, or not what it announces."""

    def drop(self, suffix):
        self._groups = [[source for source in group if not source.name.endswith(suffix)] for group in self._groups]
        self.layout = tuple(item for item in self.layout if suffix.removesuffix(".weight") not in item.name)
        return self

    def announce(self, suffix, **changes):
        self.layout = tuple(
            dataclasses.replace(item, **changes) if item.name.endswith(suffix) else item for item in self.layout
        )
        return self


def push(monkeypatch, engine, model, make_faulty):
    monkeypatch.setattr(sync_module, "RolloutStream", lambda model: make_faulty(Faulty(model)))
    try:
        sync(engine, model)
    finally:
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("make_faulty", "message"),
    [
        (lambda stream: stream.drop("layers.0.self_attn.k_proj.weight"), r"qkv_proj\.weight.* gets .* of .* elements"),
        (lambda stream: stream.drop("layers.1.mlp.gate_proj.weight"), r"gate_up_proj\.weight.* gets .* of .* elements"),
        (lambda stream: stream.drop("layers.1.input_layernorm.weight"), r"input_layernorm\.weight .*no tensor"),
        (lambda stream: stream.drop("embed_tokens.weight"), r"embed_tokens\.weight .*no tensor"),
        (lambda stream: stream.announce("q_proj.weight_packed", shape=(128, 62)), "cannot take .*q_proj.weight_packed"),
        (lambda stream: stream.announce("q_proj.weight_packed", shape=(256, 64)), "must take tensors whole"),
        # What is not packed is not helped by `exclude`.
        (
            lambda stream: stream.announce("0.input_layernorm.weight", shape=(64,)),
            "cannot take .*0.input_layernorm(?!.*exclude)",
        ),
        (lambda stream: stream.announce("down_proj.weight_scale", dtype=torch.uint8), "expected torch.float8_e4m3fn"),
        (lambda stream: stream.announce("layers.0.mlp.up_proj.weight_scale", name="lost.weight_scale"), "lost"),
        (lambda stream: stream.announce("1.mlp.up_proj.weight_packed", name=f"{MLP}.up_proj.weight_packed"), ""),
    ],
    ids=["sibling", "half", "norm", "embedding", "shape", "too tall", "norm shape", "dtype", "name", "twice"],
)  # fmt: skip
def test_a_push_that_does_not_fit_is_refused_before_the_first_byte(engine, model, monkeypatch, make_faulty, message):
    sync(engine, model)
    before = generate(engine)
    with pytest.raises(ValueError, match=f"(?s){message}.*Nothing was sent"):
        push(monkeypatch, engine, model, make_faulty)
    assert generate(engine) == before
    assert check(engine, model).ok


def test_an_engine_of_another_model_is_refused(engine, tmp_path):
    deeper = prepare_qat(tiny_qwen3(**SIZES, num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"(?s)layers\.2.*Nothing was sent"):
        sync(engine, deeper)
    wider = prepare_qat(tiny_qwen3(**{**SIZES, "intermediate_size": 512}))
    with pytest.raises(
        ValueError, match=r"(?s)took 16384 of 32768 elements of .*gate_proj.*config\.json.*Nothing was sent"
    ):
        sync(engine, wider)


def test_a_group_with_one_member_left_in_bfloat16_is_refused(engine, model):
    layer = model.model.layers[0].self_attn.k_proj
    layer.__class__ = torch.nn.Linear
    with pytest.raises(ValueError, match=r"(?s)k_proj\.weight|qkv_proj.*Nothing was sent"):
        sync(engine, model)


def test_a_failure_half_way_makes_the_engine_refuse_until_a_push_succeeds(engine, model, monkeypatch):
    sync(engine, model)
    before = generate(engine)

    def failing(stream):
        stream.tensors = lambda observe, fresh: failing_iterator(RolloutStream(model))
        return stream

    def failing_iterator(stream):
        for num_sent, item in enumerate(stream):
            if num_sent == 20:
                raise OSError("the disk is on fire")
            yield item

    train_a_little(model)
    with pytest.raises(RuntimeError, match="half-way.*the disk is on fire"):
        push(monkeypatch, engine, model, failing)
    with pytest.raises(RuntimeError, match="must not generate.*the disk is on fire"):
        generate(engine)
    sync(engine, model)
    assert check(engine, model).ok
    assert generate(engine) != before


@pytest.mark.parametrize("fault", ["missing", "changed", "reordered"])
def test_a_stream_that_breaks_its_announcement_is_a_failure_half_way(engine, model, monkeypatch, fault):
    sync(engine, model)

    def broken(stream):
        tensors = list(RolloutStream(model))
        if fault == "missing":
            tensors.pop()
        elif fault == "changed":
            tensors[10] = (tensors[10][0], torch.zeros(3))
        else:
            tensors[10], tensors[11] = tensors[11], tensors[10]
        stream.tensors = lambda observe, fresh: iter(tensors)
        return stream

    with pytest.raises(RuntimeError, match="half-way.*must bring what it announced"):
        push(monkeypatch, engine, model, broken)
    with pytest.raises(RuntimeError, match="must not generate"):
        generate(engine)
    sync(engine, model)
    assert check(engine, model).ok


def test_an_engine_that_was_never_filled_can_be_told_to_refuse(engine, model):
    VLLMEngine(engine).refuse("no weights were pushed yet")
    with pytest.raises(RuntimeError, match="no weights were pushed yet"):
        generate(engine)
    sync(engine, model)
    generate(engine)


# Caches: what the engine computed with other weights is forgotten

LONG = [1 + i % 500 for i in range(300)]  # more than the 128 tokens of a block on a CPU


def first_token(engine):
    """Log-probability of the first token after a long prompt, and how many tokens of the prompt were cached."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=1, temperature=0, logprobs=0, detokenize=False)
    (request,) = engine.generate([{"prompt_token_ids": LONG}], parameters, use_tqdm=False)
    (logprob,) = request.outputs[0].logprobs[0].values()
    return logprob.logprob, request.num_cached_tokens


def add_request(engine):
    """A request that is begun and not finished, as of an agent."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=20, temperature=0, logprobs=0, detokenize=False, ignore_eos=True)
    engine.llm_engine.add_request("unfinished", {"prompt_token_ids": LONG}, parameters)
    engine.llm_engine.step()


def finish(engine):
    """The output of the request that is unfinished."""
    outputs = []
    while engine.llm_engine.has_unfinished_requests():
        outputs = engine.llm_engine.step() or outputs
    return outputs[0].outputs[0]


def change(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(1 + 0.5 * torch.randn_like(parameter))


def test_nothing_that_was_cached_with_the_old_weights_is_used_after_a_push(engine, model, monkeypatch):
    sync(engine, model)
    old, _ = first_token(engine)
    assert first_token(engine)[1] >= 128  # there is a cache
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    images, connectors = [], []
    monkeypatch.setattr(scheduler.encoder_cache_manager, "reset", lambda: images.append(1))
    monkeypatch.setattr(scheduler, "reset_connector_cache", lambda: connectors.append(1) or True)
    change(model)
    sync(engine, model)
    new, num_cached = first_token(engine)
    assert num_cached == 0 and new != old
    assert images == connectors == [1]
    assert engine.llm_engine.reset_prefix_cache()
    assert first_token(engine) == (new, 0)


def test_a_push_with_unfinished_requests_is_refused_and_changes_nothing(engine, model):
    sync(engine, model)
    before = first_token(engine)[0]
    add_request(engine)
    change(model)
    with pytest.raises(ValueError, match=r"(?s)engine has 1\. Nothing was sent.*abort_request.*restart_requests=True"):
        sync(engine, model)
    assert len(finish(engine).token_ids) == 20
    assert not check(engine, model).ok
    assert first_token(engine)[0] == pytest.approx(before, abs=1e-3)
    sync(engine, model)
    assert check(engine, model).ok
    assert first_token(engine)[1] == 0


def test_on_request_unfinished_requests_go_on_with_the_new_weights_alone(engine, model):
    from vllm import SamplingParams

    sync(engine, model)
    add_request(engine)
    change(model)
    sync(engine, model, restart_requests=True)
    assert check(engine, model).ok
    output = finish(engine)
    assert len(output.token_ids) == 20
    # The last token follows from all before it, by the new weights alone.
    assert engine.llm_engine.reset_prefix_cache()
    prompt = {"prompt_token_ids": [*LONG, *output.token_ids[:-1]]}
    parameters = SamplingParams(max_tokens=1, temperature=0, logprobs=0, detokenize=False)
    (fresh,) = engine.generate([prompt], parameters, use_tqdm=False)
    (expected,) = fresh.outputs[0].logprobs[0].values()
    assert output.logprobs[-1][output.token_ids[-1]].logprob == pytest.approx(expected.logprob, abs=0.02)


def test_a_cache_that_stays_in_use_is_a_push_that_did_not_begin(engine, model, monkeypatch):
    sync(engine, model)
    before = generate(engine)
    change(model)
    monkeypatch.setattr(engine.llm_engine, "reset_prefix_cache", lambda **options: False)
    with pytest.raises(ValueError, match=r"could not empty its prefix cache.*Nothing was sent"):
        sync(engine, model)
    assert generate(engine) == before


def test_requests_do_not_go_on_after_a_push_that_failed_half_way(engine, model, monkeypatch):
    sync(engine, model)
    add_request(engine)

    def failing(device):
        raise OSError("the device is lost")

    monkeypatch.setattr("hf_nvfp4_qat.rollout.vllm.engine._wait_for_device", failing)
    with pytest.raises(RuntimeError, match="half-way: OSError: the device is lost"):
        sync(engine, model, restart_requests=True)
    with pytest.raises(RuntimeError, match="must not generate.*the device is lost"):
        engine.llm_engine.step()
    monkeypatch.undo()
    sync(engine, model, restart_requests=True)
    assert len(finish(engine).token_ids) == 20


# What others put on the engine stays there


def wrap(owner, name):
    """Somebody's own function around a method of one object; calls are counted."""
    calls, original = [], getattr(owner, name)

    def wrapper(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)
    return wrapper, calls


def test_a_function_that_was_put_on_the_engine_before_comes_back(engine, model):
    sync(engine, model)
    owner = engine.llm_engine
    theirs, calls = wrap(owner, "add_request")
    sync(engine, model)
    assert owner.add_request is theirs
    for reason in ("one", "another"):
        VLLMEngine(engine).refuse(reason)
    with pytest.raises(RuntimeError, match="another"):
        generate(engine)
    assert not calls
    sync(engine, model)
    assert owner.add_request is theirs
    generate(engine)
    assert len(calls) == len(PROMPTS)
    del owner.add_request


def test_a_function_that_was_put_around_a_refusal_stays_and_is_refused_again(engine, model):
    owner = engine.llm_engine
    VLLMEngine(engine).refuse("not yet")
    refusal = owner.add_request
    theirs, calls = wrap(owner, "add_request")
    with pytest.raises(RuntimeError, match="not yet"):
        generate(engine)
    sync(engine, model)
    assert owner.add_request is theirs
    generate(engine)
    assert len(calls) == 1 + len(PROMPTS)
    VLLMEngine(engine).refuse("again")
    with pytest.raises(RuntimeError, match="again"):
        generate(engine)
    owner.add_request = refusal  # theirs is undone
    with pytest.raises(RuntimeError, match="again"):
        generate(engine)
    sync(engine, model)
    assert not {"add_request", "step"} & vars(owner).keys()
    generate(engine)


def test_placing_tensors_changes_nothing(engine, model):
    sync(engine, model)
    before = generate(engine)
    worker = worker_of(engine)
    first = place_tensors(worker, RolloutStream(model).layout)
    assert place_tensors(worker, RolloutStream(model).layout) == first
    assert generate(engine) == before


def test_an_engine_whose_loaders_cannot_be_watched_stays_as_it_is(engine, model, monkeypatch):
    sync(engine, model)
    before = generate(engine)

    def broken(engine_model):
        unprocessed_loaders(engine_model)
        raise AttributeError("a loader without a name")

    monkeypatch.setattr("hf_nvfp4_qat.rollout.vllm.loading.unprocessed_loaders", broken)
    with pytest.raises(AttributeError, match="without a name"):
        place_tensors(worker_of(engine), RolloutStream(model).layout)
    assert generate(engine) == before
    assert check(engine, model).ok


def test_an_engine_outside_this_process_is_refused(model):
    with pytest.raises(ValueError, match="runs in this process.*VLLM_ENABLE_V1_MULTIPROCESSING=0"):
        sync(object(), model)
