"""Where engine and trainer send a token to different experts: counted, and seen in a real engine."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL_ENGINE, load_qat, tiny_llama, tiny_qwen3_moe

from hf_nvfp4_qat.rollout.vllm.routing import (
    EngineSequence,
    ModelForward,
    RoutingDifference,
    compare_routing,
    engine_routing,
    recorded_outputs,
    recorded_routing,
)


def test_counts_sets_of_generated_tokens():
    forward = ModelForward(
        input_ids=torch.tensor([[0, 7, 8, 9, 6], [5, 5, 5, 5, 0]]),
        attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
        experts={
            0: torch.tensor([[9, 9], [0, 1], [2, 3], [0, 1], [0, 1], *[[0, 1]] * 5]),
            2: torch.tensor([[9, 9], [0, 1], [2, 3], [0, 1], [0, 1], *[[0, 1]] * 5]),
        },
    )
    # Layer 1 has no experts. Of 7 8 9 6 the first is the prompt, the last was never computed with.
    experts = torch.tensor([[[5, 4], [0, 0], [5, 4]], [[3, 2], [0, 0], [3, 2]], [[1, 0], [0, 0], [1, 2]]])
    found = compare_routing([forward], {(7, 8, 9, 6): EngineSequence(1, experts)})
    assert found == RoutingDifference(
        num_choices=4, num_different=1, num_tokens=2, num_tokens_different=1, num_unmatched=1
    )


def test_another_number_of_experts_is_an_error():
    forward = ModelForward(torch.tensor([[7, 8, 9]]), torch.ones(1, 3), {0: torch.zeros(3, 2, dtype=torch.int64)})
    sequence = EngineSequence(1, torch.zeros(2, 1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="chooses 3 experts a token, the model 2"):
        compare_routing([forward], {(7, 8, 9): sequence})


def test_engines_that_report_their_routing_are_believed_but_not_half_way():
    experts = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    completion = SimpleNamespace(token_ids=[6, 5], routed_experts=experts)
    output = SimpleNamespace(prompt_token_ids=[1, 2], outputs=[completion])
    found = engine_routing(None, [output])
    assert found[(1, 2, 6, 5)].num_prompt == 2 and found[(1, 2, 6, 5)].experts.tolist() == experts.tolist()
    completion.routed_experts = experts[:2]
    with pytest.raises(ValueError, match="it did of 2 of 3"):
        engine_routing(None, [output])


class ReportingEngine:
    """One that reports its routing, and can only repeat itself."""

    def generate(self):
        completion = SimpleNamespace(token_ids=[6, 5], routed_experts=np.zeros((3, 1, 2), dtype=np.uint8))
        return [SimpleNamespace(prompt_token_ids=[1, 2], outputs=[completion])]


def test_recording_leaves_an_engine_as_it_was():
    engine = ReportingEngine()
    with recorded_outputs(engine) as outer, recorded_outputs(engine) as inner:
        engine.generate()
    assert set(outer) == set(inner) == {(1, 2, 6, 5)}
    assert not vars(engine)


def test_recording_leaves_what_others_put_on_an_engine():
    engine, calls = ReportingEngine(), []

    def around(original):
        return lambda: (calls.append(1), original())[1]

    before = engine.generate = around(engine.generate)
    with recorded_outputs(engine) as found:
        engine.generate()
    assert engine.generate is before and found and len(calls) == 1
    with recorded_outputs(engine) as found:
        within = engine.generate = around(engine.generate)
        engine.generate()
    assert engine.generate is within and found and len(calls) == 3
    found.clear()
    engine.generate()
    assert not found and len(calls) == 5


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="no fused experts"), recorded_routing(tiny_llama()):
        pass


@pytest.mark.vllm
@pytest.mark.slow
def test_the_engine_routes_as_the_model_does_until_a_router_is_changed(tmp_path):
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from hf_nvfp4_qat.rollout.sync import engine_arguments, sync
    from hf_nvfp4_qat.rollout.vllm.engine import worker_of
    from hf_nvfp4_qat.rollout.vllm.versions import moe_routers

    cleanup_dist_env_and_memory()
    tiny_qwen3_moe(vocab_size=512, hidden_size=128, head_dim=32, initializer_range=0.06).to(
        torch.bfloat16
    ).save_pretrained(tmp_path)
    model = load_qat(tmp_path)
    engine = LLM(str(tmp_path), skip_tokenizer_init=True, max_model_len=128, **SMALL_ENGINE, **engine_arguments(model))
    sync(engine, model)
    prompts = [{"prompt_token_ids": list(range(5 + i, 25 + i))} for i in range(8)]
    sampled = SamplingParams(max_tokens=30, temperature=1.0, detokenize=False, ignore_eos=True, seed=0)
    routers = moe_routers(worker_of(engine).model_runner.get_model()).values()
    seen: list = []
    for router in routers:
        router.set_capture_fn(seen.append)
    capture = [router.capture_fn for router in routers]
    engine_side = engine_routing(engine, engine.generate(prompts, sampled, use_tqdm=False))
    assert seen and [router.capture_fn for router in routers] == capture  # somebody else may watch too
    tokens = torch.tensor(list(engine_side), device=model.device)

    def difference() -> list[float]:
        with recorded_routing(model) as forwards, torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16):
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        parts = []
        for layer in forwards[0].experts:
            one = ModelForward(forwards[0].input_ids, forwards[0].attention_mask, {layer: forwards[0].experts[layer]})
            found = compare_routing([one], engine_side)
            assert found.num_tokens == 8 * 29 and found.num_unmatched == 0
            parts.append(found.num_different / found.num_choices)
        return parts

    assert max(difference()) < 0.1
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.copy_(model.model.layers[1].mlp.gate.weight.flip(0))
    first, second = difference()
    assert first < 0.1 and second > 0.3
    del engine
    cleanup_dist_env_and_memory()
