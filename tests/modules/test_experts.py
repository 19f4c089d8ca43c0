"""Fused experts: the module's own forward with NVFP4 weights, in every implementation, and what autograd keeps."""

import copy
import pickle

import pytest
import torch
from conftest import EXPERT_FAMILIES, tiny_moe, tiny_qwen3_moe, tokens
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from hf_nvfp4_qat import NVFP4QATConfig, coverage, fake_quantize_nvfp4, prepare_qat
from hf_nvfp4_qat.modules.experts import QATExperts
from hf_nvfp4_qat.modules.swap import coverage_of, qat_weights
from hf_nvfp4_qat.numerics.quantize import global_amax, global_decode_scale_of_amax

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


def decoded_twin(model):
    """The same model without QAT, its weights replaced by their decoded values."""
    twin = copy.deepcopy(model)
    qat = prepare_qat(model)
    with torch.no_grad():
        for name, weight in qat_weights(qat).items():
            twin.get_parameter(name).copy_(
                fake_quantize_nvfp4(weight.master.detach(), global_decode_scale=weight.global_decode_scale)
            )
    return qat, twin


def gradients(model) -> dict[str, torch.Tensor]:
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_forward_and_gradients_are_those_of_the_decoded_weights(implementation):
    qat, twin = decoded_twin(tiny_qwen3_moe())
    for model in (qat, twin):
        model.set_experts_implementation(implementation)
    assert torch.equal(qat(input_ids=tokens()).logits, twin(input_ids=tokens()).logits)
    mine, theirs = gradients(qat), gradients(twin)
    assert mine.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_on_a_gpu_forward_and_gradients_are_those_of_the_decoded_weights(implementation):
    ids = tokens().cuda()
    qat, twin = decoded_twin(tiny_qwen3_moe().cuda().bfloat16())
    found = []
    for model in (qat, twin):
        model.set_experts_implementation(implementation)
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        found.append((out.logits, {name: parameter.grad for name, parameter in model.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], gradient, rtol=2e-2, atol=1e-4)  # atomic adds


def test_one_expert_computes_what_a_linear_of_its_weights_does():
    """Against a reference that knows nothing of fused weights: each token through its experts, one by one."""
    model = prepare_qat(tiny_qwen3_moe())
    experts = model.model.layers[0].mlp.experts
    weights = experts.nvfp4_weights
    gate_up, down = (
        torch.stack([fake_quantize_nvfp4(matrix).float() for matrix in weights[name].master.detach()])
        for name in ("gate_up_proj", "down_proj")
    )
    x = torch.randn(7, 64)
    index, share = torch.tensor([[0, 5], [5, 2], [1, 0], [7, 7], [3, 2], [6, 1], [5, 0]]), torch.rand(7, 2)
    expected = torch.zeros(7, 64)
    for token in range(7):
        for slot in range(2):
            expert = index[token, slot]
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            expected[token] += share[token, slot] * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(experts(x, index, share), expected, rtol=1e-4, atol=1e-6)


def test_each_expert_has_a_scale_of_its_own_shared_by_gate_and_up():
    model = tiny_qwen3_moe()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[3] *= 37
    model = prepare_qat(model)
    weight = model.model.layers[0].mlp.experts.nvfp4_weights["gate_up_proj"]
    expected = global_decode_scale_of_amax(global_amax(weight.master))
    assert torch.equal(weight.global_decode_scale, expected) and weight.global_decode_scale[3] > 8 * expected[2]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_reach_the_experts_that_had_tokens_and_no_other(implementation):
    model = prepare_qat(tiny_qwen3_moe(num_experts=16))
    model.set_experts_implementation(implementation)
    chosen = set()
    for layer in model.model.layers[:1]:
        layer.mlp.gate.register_forward_hook(lambda gate, args, out: chosen.update(out[2].flatten().tolist()))
    model(input_ids=tokens(5) + 1).logits.square().sum().backward()
    experts = model.model.layers[0].mlp.experts
    for parameter in (experts.gate_up_proj, experts.down_proj):
        reached = {expert for expert, grad in enumerate(parameter.grad) if grad.abs().max() > 0}
        assert reached == chosen and len(chosen) < 16


def kept_bytes(model, **kwargs) -> int:
    """What autograd holds between forward and backward, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=tokens(), labels=tokens(), **kwargs)
    return sum(kept.values())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_autograd_keeps_no_fake_quantized_weight(implementation):
    qat, twin = decoded_twin(tiny_qwen3_moe())
    for model in (qat, twin):
        model.set_experts_implementation(implementation)
    assert kept_bytes(qat) <= kept_bytes(twin)


class CountQuantizations:
    """Counts elements of expert weights that are fake-quantized."""

    def __init__(self, monkeypatch) -> None:
        from hf_nvfp4_qat.modules import experts

        self.num_elements = 0
        original = experts.fake_quantize_unchecked

        def counted(weight, *args, **kwargs):
            self.num_elements += weight.numel()
            return original(weight, *args, **kwargs)

        monkeypatch.setattr(experts, "fake_quantize_unchecked", counted)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_backward_quantizes_what_it_needs_once_more(implementation, monkeypatch):
    model = prepare_qat(tiny_qwen3_moe())
    model.set_experts_implementation(implementation)
    counted = CountQuantizations(monkeypatch)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    in_forward = counted.num_elements
    assert in_forward == sum(weight.master.numel() for weight in qat_weights(model).values() if weight.master.ndim == 3)
    loss.backward()
    assert in_forward < counted.num_elements <= 2 * in_forward


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_its_savings(implementation, use_reentrant):
    plain, checkpointed = (prepare_qat(tiny_qwen3_moe()).train() for _ in range(2))
    for model in (plain, checkpointed):
        model.set_experts_implementation(implementation)
    before = kept_bytes(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    mine, theirs = gradients(checkpointed), gradients(plain)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert kept_bytes(checkpointed) < before / 2


def test_hooks_around_still_see_the_activations():
    """Such as those that offload them to the CPU."""
    experts = prepare_qat(tiny_qwen3_moe()).model.layers[0].mlp.experts
    x = torch.randn(7, 64, requires_grad=True)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
        out = experts(x, torch.zeros(7, 1, dtype=torch.long), torch.ones(7, 1))
    assert seen and not any(len(shape) == 3 for shape in seen)
    out.sum().backward()
    assert x.grad.abs().max() > 0


def test_a_weight_changed_between_forward_and_backward_is_an_error():
    experts = prepare_qat(tiny_qwen3_moe()).model.layers[0].mlp.experts
    out = experts(torch.randn(7, 64, requires_grad=True), torch.zeros(7, 1, dtype=torch.long), torch.ones(7, 1))
    with torch.no_grad():
        experts.down_proj.mul_(2)
    with pytest.raises(RuntimeError, match="changed after the forward"):
        out.sum().backward()


def test_backward_may_run_twice():
    experts = prepare_qat(tiny_qwen3_moe()).model.layers[0].mlp.experts
    x = torch.randn(7, 64, requires_grad=True)
    out = experts(x, torch.zeros(7, 1, dtype=torch.long), torch.ones(7, 1)).sum()
    (first,) = torch.autograd.grad(out, x, retain_graph=True)
    (second,) = torch.autograd.grad(out, x)
    assert torch.equal(first, second)
    y = checkpoint(experts, x, torch.zeros(7, 1, dtype=torch.long), torch.ones(7, 1), use_reentrant=False).sum()
    assert torch.equal(torch.autograd.grad(y, x)[0], first)


def test_scales_follow_the_optimizer_and_loading():
    model = prepare_qat(tiny_qwen3_moe())
    weight = model.model.layers[0].mlp.experts.nvfp4_weights["down_proj"]
    before = weight.global_decode_scale.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1000.0)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    after = weight.global_decode_scale.clone()
    assert not torch.equal(before, after)
    assert torch.equal(after, global_decode_scale_of_amax(global_amax(weight.master)))
    model.load_state_dict(tiny_qwen3_moe().state_dict())
    assert torch.equal(weight.global_decode_scale, before)


def test_copies_pickles_and_casts():
    model = prepare_qat(tiny_qwen3_moe())
    expected = model(input_ids=tokens()).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(input_ids=tokens()).logits, expected)
        experts = twin.model.layers[0].mlp.experts
        with torch.no_grad():
            experts.down_proj.mul_(64)
        twin(input_ids=tokens())
        mine, theirs = (m.model.layers[0].mlp.experts.down_proj_global_decode_scale for m in (model, twin))
        assert torch.equal(theirs, 64 * mine)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.model.layers[0].mlp.experts.down_proj_global_decode_scale.dtype == torch.float32
    assert half(input_ids=tokens()).logits.isfinite().all()


def test_autocast_computes_in_its_dtype():
    model = prepare_qat(tiny_qwen3_moe())
    experts = model.model.layers[0].mlp.experts
    with torch.autocast("cpu", torch.bfloat16):
        experts.config._experts_implementation = "eager"
        out = experts(torch.randn(7, 64), torch.zeros(7, 1, dtype=torch.long), torch.ones(7, 1))
        loss = model(input_ids=tokens(), labels=tokens()).loss
    assert out.isfinite().all()
    loss.backward()
    assert experts.down_proj.grad.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_compiled_experts_give_the_same_numbers_and_keep_no_more(implementation, checkpointing):
    # In bf16: Transformers cannot compile grouped products of anything else.
    plain, compiled, without = (tiny_qwen3_moe().bfloat16().train() for _ in range(3))
    kept = []
    for model in (prepare_qat(plain), prepare_qat(compiled), without):
        torch.compiler.reset()
        model.set_experts_implementation(implementation)
        if checkpointing:
            model.gradient_checkpointing_enable()
        if model is not plain:
            for layer in model.model.layers:
                layer.mlp.experts.compile(backend="aot_eager_decomp_partition", fullgraph=True)
            kept.append(kept_bytes(model))
    torch.compiler.reset()
    mine, theirs = gradients(compiled), gradients(plain)
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=2e-2, atol=1e-5)
    assert kept[0] <= kept[1] + 512  # the global scales


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_families(family):
    qat, twin = decoded_twin(tiny_moe(family).eval())
    assert any(isinstance(module, QATExperts) for module in qat.modules())
    assert torch.equal(qat(input_ids=tokens()).logits, twin(input_ids=tokens()).logits)
    assert not any(
        "expert" in name and "shared" not in name and "gate" not in name for name in coverage_of(qat).excluded
    )
    # Hunyuan's router is a linear of another name inside of `gate`.
    assert not any(part in ("gate", "router") for name in coverage_of(qat).quantized for part in name.split("."))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt_oss", "transposed"),
        ("llama4_text", "does not go through"),
        ("granitemoe", "in one piece"),
    ],
)
def test_what_is_not_covered_is_refused_with_the_way_out(family, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        prepare_qat(tiny_moe(family))
    assert "re:.*experts$" in str(caught.value)
    model = prepare_qat(tiny_moe(family), NVFP4QATConfig(exclude=[r"re:.*experts$"]))
    assert not any(isinstance(module, QATExperts) for module in model.modules())


def test_experts_can_be_left_out_and_the_report_says_so(capsys):
    model = prepare_qat(tiny_qwen3_moe(), NVFP4QATConfig(exclude=["experts"]))
    assert coverage(model).excluded["model.layers.0.mlp.experts"] == "exclude: experts"
    assert "exclude: experts" in capsys.readouterr().out
    ffn = prepare_qat(tiny_qwen3_moe(), NVFP4QATConfig(preset="ffn_only"))
    assert set(coverage_of(ffn).quantized) == {f"model.layers.{layer}.mlp.experts" for layer in range(2)}


def test_columns_that_blocks_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="down_proj has 24 columns"):
        prepare_qat(tiny_qwen3_moe(moe_intermediate_size=24))


def test_experts_with_a_computed_weight_are_refused():
    model = prepare_qat(tiny_qwen3_moe())
    experts = model.model.layers[1].mlp.experts
    parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.down_proj computes its weight from other"):
        model(tokens())
    parametrize.remove_parametrizations(experts, "down_proj")
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert experts.down_proj.grad.any()
