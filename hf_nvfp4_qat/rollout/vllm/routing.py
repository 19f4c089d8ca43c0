"""Which experts the engine sent each token to, beside the choice of the model in training.

A router takes the experts with the largest logits. Where two logits are close, rounding decides between them, and from
there on a token takes another way through the engine than it takes in training: a difference that no equality of
weights removes. Routers stay in bfloat16; here it is counted how often that happens.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_nvfp4_qat.modules.swap import fused_experts
from hf_nvfp4_qat.rollout.vllm.engine import VLLMEngine
from hf_nvfp4_qat.rollout.vllm.versions import moe_routers


@dataclass(frozen=True)
class EngineSequence:
    """The experts of one sequence in the engine.

    Attributes:
        num_prompt: how many of its tokens are the prompt.
        experts: int64 ``[T - 1, layers, k]`` for ``T`` tokens; the last token was sampled and never computed with.
    """

    num_prompt: int
    experts: torch.Tensor


@dataclass(frozen=True)
class ModelForward:
    """The experts of one forward of the model in training.

    Attributes:
        input_ids: ``[B, S]``.
        attention_mask: ``[B, S]``, nonzero for tokens that count.
        experts: number of a decoder layer to the experts of its tokens, ``[B * S, k]``.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    experts: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RoutingDifference:
    """How often a generated token got another set of experts in the engine than in training.

    Attributes:
        num_choices: generated tokens times layers with experts.
        num_different: of them, those with another set.
        num_tokens: generated tokens.
        num_tokens_different: of them, those with another set in at least one layer.
        num_unmatched: sequences of the trainer that the engine did not generate, which are left out.
    """

    num_choices: int = 0
    num_different: int = 0
    num_tokens: int = 0
    num_tokens_different: int = 0
    num_unmatched: int = 0


def routing_arguments() -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for an engine that reports its routing; on CPUs it needs none, and has none."""
    return {"enable_return_routed_experts": True} if torch.cuda.is_available() else {}


@contextmanager
def recorded_routing(model: nn.Module) -> Iterator[list[ModelForward]]:
    """Record the experts of every forward of `model` in this context.

    Args:
        model: a Transformers model, called with ``input_ids`` by keyword.

    Raises:
        ValueError: a model without fused experts.
    """
    forwards: list[ModelForward] = []

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        input_ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        forwards.append(ModelForward(input_ids, torch.ones_like(input_ids) if mask is None else mask))

    def chosen(layer: int) -> Any:
        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            forwards[-1].experts[layer] = next(tensor for tensor in tensors if not tensor.is_floating_point())

        return record

    names = fused_experts(model)
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no fused experts, so there is no routing to compare. Leave "
            "`routing_every` out."
        )
    hooks = [model.register_forward_pre_hook(begin, with_kwargs=True)]
    for name in names:
        hook = chosen(_layer_number(name))
        hooks.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield forwards
    finally:
        for handle in hooks:
            handle.remove()


def engine_routing(llm: Any, outputs: Iterable[Any]) -> dict[tuple[int, ...], EngineSequence]:
    """The experts that an engine in this process chose for what it generated, by the tokens of each sequence.

    An engine made with ``routing_arguments()`` reports them with its outputs. Any other computes each sequence once
    more while its routers are watched, which takes one that runs Python in each step (as on CPUs).

    Args:
        llm: ``vllm.LLM`` that generated `outputs` with the weights it still has.
        outputs: vLLM's ``RequestOutput``.

    Raises:
        ValueError: the engine neither reports its routing nor can be watched.
    """
    found = {}
    for output in outputs:
        prompt = tuple(output.prompt_token_ids)
        for completion in output.outputs:
            tokens = (*prompt, *completion.token_ids)
            if getattr(completion, "routed_experts", None) is None:
                experts = _watched_prefill(llm, tokens[:-1])
            else:
                experts = torch.from_numpy(completion.routed_experts.astype("int64"))[: len(tokens) - 1]
            if len(experts) < len(tokens) - 1:
                raise ValueError(
                    f"The engine must report the experts of every token; it did of {len(experts)} of "
                    f"{len(tokens) - 1}. Leave `routing_every` out."
                )
            found[tokens] = EngineSequence(len(prompt), experts)
    return found


@contextmanager
def recorded_outputs(llm: Any) -> Iterator[dict[tuple[int, ...], EngineSequence]]:
    """Record ``engine_routing`` of all that `llm` generates in this context, while it still has the weights."""
    found: dict[tuple[int, ...], EngineSequence] = {}
    was_replaced, original = "generate" in vars(llm), llm.generate
    is_recording = True

    def generate(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_recording
        outputs = original(*args, **kwargs)
        if is_recording:
            is_recording = False  # what follows generates too
            try:
                found.update(engine_routing(llm, outputs))
            finally:
                is_recording = True
        return outputs

    llm.generate = generate
    try:
        yield found
    finally:
        is_recording = False
        # Else somebody has put a function of his own around this one, which then only passes calls on.
        if llm.generate is generate:
            if was_replaced:
                llm.generate = original
            else:
                del llm.generate


def compare_routing(
    forwards: Sequence[ModelForward], engine: Mapping[tuple[int, ...], EngineSequence]
) -> RoutingDifference:
    """Compare the sets of experts, token by token and layer by layer; the prompts' tokens do not count.

    Raises:
        ValueError: engine and model choose different numbers of experts.
    """
    counts = torch.zeros(4, dtype=torch.int64)
    num_unmatched = 0
    for forward in forwards:
        layers = sorted(forward.experts)
        shape = (*forward.input_ids.shape, -1)
        own = torch.stack([forward.experts[layer].view(shape) for layer in layers], dim=2).cpu()
        for tokens, mask, chosen in zip(forward.input_ids.cpu(), forward.attention_mask.cpu(), own, strict=True):
            mask = mask.bool()
            sequence = engine.get(tuple(tokens[mask].tolist()))
            if sequence is None:
                num_unmatched += 1
                continue
            generated = slice(sequence.num_prompt, len(sequence.experts))
            mine, theirs = chosen[mask][generated], sequence.experts[generated][:, layers]
            if mine.shape != theirs.shape:
                raise ValueError(
                    f"The engine chooses {theirs.shape[-1]} experts a token, the model {mine.shape[-1]}. They run "
                    "different configs: give both the same `num_experts_per_tok`."
                )
            different = (mine.sort().values != theirs.sort().values).any(dim=-1)
            counts += torch.tensor(
                [different.numel(), different.sum(), len(different), different.any(dim=-1).sum()], dtype=torch.int64
            )
    num_choices, num_different, num_tokens, num_tokens_different = counts.tolist()
    return RoutingDifference(num_choices, num_different, num_tokens, num_tokens_different, num_unmatched)


def _watched_prefill(llm: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    """Experts ``[T, layers, k]`` of tokens that the engine computes as a prompt; zeros in layers without experts."""
    from vllm import SamplingParams

    seen: dict[int, list[torch.Tensor]] = {}
    engine = VLLMEngine(llm)
    routers = moe_routers(engine.worker.model_runner.get_model())
    engine.reset_caches()  # what is cached is not computed
    before = {layer: router.capture_fn for layer, router in routers.items()}
    for layer, router in routers.items():
        router.set_capture_fn(lambda ids, layer=layer: seen.setdefault(layer, []).append(ids.long().cpu()))
    try:
        llm.generate([{"prompt_token_ids": list(tokens)}], SamplingParams(max_tokens=1), use_tqdm=False)
    finally:
        for layer, router in routers.items():
            router.set_capture_fn(before[layer])
    chosen = {layer: torch.cat(parts) for layer, parts in seen.items()}
    if chosen.keys() != routers.keys() or any(len(experts) != len(tokens) for experts in chosen.values()):
        raise ValueError(
            "The engine's routers cannot be watched while it runs captured graphs. Make the engine with "
            "`enable_return_routed_experts=True`, or with `enforce_eager=True`."
        )
    experts = next(iter(chosen.values())).new_zeros(len(tokens), max(chosen) + 1, next(iter(chosen.values())).shape[-1])
    for layer, ids in chosen.items():
        experts[:, layer] = ids
    return experts


def _layer_number(name: str) -> int:
    """Of a module path: "model.layers.3.mlp.experts" is in layer 3."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    if len(numbers) != 1:
        raise ValueError(f"The path of an experts module names its decoder layer by one number; got {name}.")
    return int(numbers[0])
