"""Which layers are quantized, what the report says, and what is refused."""

import copy

import pytest
import torch
from conftest import tiny_llama, tiny_qwen3, tiny_qwen3_moe
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_nvfp4_qat import NVFP4QATConfig, coverage, prepare_qat
from hf_nvfp4_qat.modules.linear import QATLinear
from hf_nvfp4_qat.modules.swap import qat_modules
from hf_nvfp4_qat.selection.fused_groups import fused_group_key
from hf_nvfp4_qat.selection.layer_names import FUSED_GROUPS


class Attention(nn.Module):
    def __init__(self, size: int = 32):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(size, size) for _ in range(3))


def test_full_covers_every_linear_but_the_output_embedding(capsys):
    model = prepare_qat(tiny_llama())
    report = coverage(model)
    assert len(report.quantized) == 14 and report.excluded["lm_head"] == "output embedding"
    assert type(model.lm_head) is nn.Linear
    printed = capsys.readouterr().out
    assert "model.layers.*.mlp.down_proj" in printed and "output embedding" in printed
    assert sum(layer.num_parameters for layer in report) == sum(p.numel() for p in model.parameters())
    assert f"{sum(m.weight.numel() + m.bias.numel() for m in qat_modules(model).values()):,} of" in printed


def test_ffn_only_leaves_attention_alone_and_says_why():
    report = coverage(prepare_qat(tiny_qwen3(), NVFP4QATConfig(preset="ffn_only")))
    assert len(report.quantized) == 6 and all(".mlp." in name for name in report.quantized)
    assert report.excluded["model.layers.0.self_attn.q_proj"] == "preset ffn_only"


def test_excluded_layers_stay_plain_and_name_their_pattern():
    report = coverage(prepare_qat(tiny_qwen3(), NVFP4QATConfig(exclude=["o_proj", r"re:model\.layers\.1\."])))
    assert len(report.quantized) == 6
    assert report.excluded["model.layers.0.self_attn.o_proj"] == "exclude: o_proj"
    assert report.excluded["model.layers.1.mlp.up_proj"] == r"exclude: re:model\.layers\.1\."


def test_outer_layers_stay_in_high_precision_and_the_report_says_so():
    model = tiny_qwen3(num_hidden_layers=4)
    report = coverage(prepare_qat(model, NVFP4QATConfig(bf16_first_layers=1, bf16_last_layers=2)))
    assert len(report.quantized) == 7 and all(name.startswith("model.layers.1.") for name in report.quantized)
    assert report.excluded["model.layers.0.mlp.up_proj"] == "bf16_first_layers=1"
    assert report.excluded["model.layers.3.self_attn.q_proj"] == "bf16_last_layers=2"
    report = coverage(prepare_qat(tiny_qwen3_moe(num_hidden_layers=3), NVFP4QATConfig(bf16_last_layers=1)))
    assert "model.layers.1.mlp.experts" in report.quantized
    assert report.excluded["model.layers.2.mlp.experts"] == "bf16_last_layers=1"


@pytest.mark.parametrize(
    "config, message",
    [
        (
            NVFP4QATConfig(bf16_first_layers=1, bf16_last_layers=1),
            r"must leave layers to quantize; 1 \+ 1 of 2 in Qwen3",
        ),
        (NVFP4QATConfig(exclude=["q_prj"]), r"\['q_prj'\] name none of Qwen3ForCausalLM"),
        (NVFP4QATConfig(exclude=["re:.*"]), "No layer is left to quantize: of 15 nn.Linear"),
        (NVFP4QATConfig(exclude=["up_proj"]), "gate_proj, .*up_proj into one matrix, so all or none"),
        (NVFP4QATConfig(exclude=["model.layers.1.self_attn.v_proj"]), "v_proj is excluded. Exclude the others too"),
    ],
)
def test_refusals_come_before_any_layer_is_changed(config, message):
    model = tiny_qwen3()
    with pytest.raises(ValueError, match=message):
        prepare_qat(model, config)
    assert not any(isinstance(module, QATLinear) for module in model.modules())


def test_indivisible_layers_are_named():
    model = nn.ModuleDict({"first": nn.Linear(40, 16), "second": nn.Linear(32, 16)})
    with pytest.raises(ValueError, match="divisible by 16; first has 40. Add it to `exclude`"):
        prepare_qat(model)
    assert coverage(prepare_qat(model, NVFP4QATConfig(exclude=["first"]))).quantized == ("second",)


def test_only_exact_linears_are_taken():
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict({"special": Special(32, 16), "plain": nn.Linear(32, 16)})
    report = coverage(prepare_qat(model))
    assert report.quantized == ("plain",)
    assert report.excluded["special"] == "Special, a subclass of nn.Linear"


def test_a_linear_tied_to_an_embedding_is_an_output_embedding_whatever_its_name():
    model = nn.ModuleDict({"tokens": nn.Embedding(32, 16), "layer": nn.Linear(16, 16), "out": nn.Linear(16, 32)})
    model["out"].weight = model["tokens"].weight
    report = coverage(prepare_qat(model))
    assert report.quantized == ("layer",) and report.excluded["out"] == "output embedding"


def test_a_layer_whose_weight_the_parent_reads_itself_is_left_out():
    """Its forward never runs, so it would train in high precision and leave in NVFP4."""

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_proj, self.dt_proj, self.x_proj = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            assert x.dtype == self.x_proj.weight.dtype
            return self.x_proj(self.in_proj(x)) @ self.dt_proj.weight.t()

    report = coverage(prepare_qat(nn.ModuleDict({"mixer": Mixer()})))
    assert report.quantized == ("mixer.in_proj", "mixer.x_proj")
    assert report.excluded["mixer.dt_proj"] == "its weight is read by Mixer, past its forward"


class ReadsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_proj, self.dt_proj = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.in_proj(x) @ self.dt_proj.weight.t()


class Inherits(ReadsWeight):
    pass


class InheritsTwice(Inherits):
    def other(self):
        return self.in_proj.weight.dtype


@pytest.mark.parametrize("kind", [Inherits, InheritsTwice])
def test_a_weight_that_an_inherited_forward_reads_is_left_out(kind):
    report = coverage(prepare_qat(nn.ModuleDict({"mixer": kind()})))
    assert report.quantized == ("mixer.in_proj",)
    assert report.excluded["mixer.dt_proj"] == f"its weight is read by {kind.__name__}, past its forward"


class ReadsByAnotherName(ReadsWeight):
    """The source does not show whose weight it is."""

    reads = "dt_proj"

    def forward(self, x):
        layer = getattr(self, self.reads)
        return {"nested": [self.in_proj(x.to(layer.weight.dtype)) @ layer.weight.t()]}


class Clean(ReadsByAnotherName):
    def forward(self, x):
        layer = self.dt_proj
        return layer(self.in_proj(x.to(layer.weight.dtype)))


class Model(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.mixer, self.head = mixer, nn.Linear(16, 16)

    def forward(self, x):
        return self.mixer(self.head(x))


@pytest.fixture
def unreadable_source(monkeypatch):
    monkeypatch.setattr("hf_nvfp4_qat.modules.swap._source_of", lambda module_class: "")


def test_a_weight_read_under_another_name_is_refused_at_the_first_training_forward(unreadable_source):
    model = prepare_qat(Model(ReadsByAnotherName()))
    with torch.no_grad():
        model(torch.ones(2, 16))  # leaves no graph to look at
    for twin in (model, copy.deepcopy(model), model):
        with pytest.raises(ValueError, match=r"that of mixer\.dt_proj is read by another module.*Add it to `exclude`"):
            twin(torch.ones(2, 16))
    model = prepare_qat(Model(ReadsByAnotherName()), NVFP4QATConfig(exclude=["dt_proj"]))
    model(torch.ones(2, 16))
    assert not model._forward_hooks


@pytest.mark.parametrize("make", [lambda: Model(Clean()), tiny_qwen3, tiny_qwen3_moe])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_that_reads_no_weight_is_looked_at_once_and_trains(make, checkpointing):
    model = prepare_qat(make()).train()
    if checkpointing and hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(torch.ones(2, 16) if isinstance(model, Model) else torch.ones(2, 16, dtype=torch.int64))
    assert not model._forward_hooks


def test_a_weight_that_is_gathered_in_nvfp4_may_be_read_anywhere(unreadable_source):
    model = prepare_qat(Model(ReadsByAnotherName()))
    for layer in qat_modules(model).values():
        layer.nvfp4_weight.is_quantized = False
    model(torch.ones(2, 16))
    assert not model._forward_hooks


def test_a_layer_that_runs_and_whose_weight_is_also_read_is_left_alone(unreadable_source):
    class Regularized(Clean):
        def forward(self, x):
            layer = self.dt_proj
            return super().forward(x), layer.weight.square().sum()

    model = prepare_qat(Model(Regularized()))
    model(torch.ones(2, 16))
    assert not model._forward_hooks


def test_a_model_without_linears_is_refused():
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    with pytest.raises(ValueError, match="No layer is left to quantize: of 1 nn.Linear"):
        prepare_qat(gpt2)  # its linears are Conv1D


def moe_model() -> Qwen3MoeForCausalLM:
    sizes = dict(hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1, vocab_size=64)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads))


def test_experts_can_be_excluded_and_routers_always_are():
    report = coverage(prepare_qat(moe_model(), NVFP4QATConfig(exclude=[r"re:.*experts$"])))
    assert len(report.quantized) == 4
    assert report.excluded["model.layers.0.mlp.gate"] == "router"


def test_heads_routers_and_towers_are_excluded_by_rule():
    classifier = AutoModelForSequenceClassification.from_config(
        LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    )
    assert coverage(prepare_qat(classifier)).excluded["score"] == "classification or value head"
    names = {"mlp.gate": "router", "vision_tower.fc": "vision tower", "multi_modal_projector.a": "modality projector"}
    model = nn.Module()
    for name in ("mlp", "vision_tower", "multi_modal_projector"):
        model.add_module(name, nn.Module())
    for name in (*names, "mlp.up"):
        parent, child = name.split(".")
        getattr(model, parent).add_module(child, nn.Linear(16, 16))
    report = coverage(prepare_qat(model))
    assert {name: report.excluded[name] for name in names} == names and report.quantized == ("mlp.up",)


@pytest.mark.parametrize("group", FUSED_GROUPS, ids=lambda group: "+".join(group.members))
def test_every_fused_group_shares_one_scale(group):
    parent = nn.Module()
    for size, name in enumerate(group.members + group.optional):
        linear = nn.Linear(32, 16)
        nn.init.constant_(linear.weight, 10.0**size)
        parent.add_module(name, linear)
    model = nn.ModuleDict({"block": parent, "other": nn.Linear(32, 16)})
    prepare_qat(model)
    members = [getattr(model["block"], name) for name in group.members + group.optional]
    assert len({member.global_decode_scale.item() for member in members}) == 1
    assert members[-1].global_decode_scale != model["other"].global_decode_scale


def test_same_names_under_different_parents_do_not_share():
    assert fused_group_key("a.q_proj") == fused_group_key("a.k_proj") != fused_group_key("b.q_proj")
    assert fused_group_key("a.o_proj") == "a.o_proj" and fused_group_key("q_proj") == "qkv_proj"


def test_a_shared_scale_leaves_most_values_alone():
    """Inside the normal range the values do not depend on the scale, so sharing costs (almost) nothing."""
    model = prepare_qat(nn.ModuleDict({"attention": Attention()}))
    alone = prepare_qat(nn.ModuleDict({"q": nn.Linear(32, 32)}))
    with torch.no_grad():
        alone["q"].weight.copy_(model["attention"].q_proj.weight)
        model["attention"].k_proj.weight.mul_(16)
    assert model["attention"].q_proj.global_decode_scale.item() == alone["q"].global_decode_scale.item()  # not yet
    shared, own = model["attention"].q_proj.fake_quantized_weight(), alone["q"].fake_quantized_weight()
    assert model["attention"].q_proj.global_decode_scale > alone["q"].global_decode_scale
    assert torch.equal(shared, own)
