"""PEFT on a QAT model: refused on and around layers that train in NVFP4, allowed elsewhere."""

import pytest
import torch
from conftest import load_qat, take_step, tiny_qwen3, tiny_qwen3_moe, tokens
from packaging.version import Version
from torch import nn

from hf_nvfp4_qat import NVFP4QATConfig, prepare_qat
from hf_nvfp4_qat.modules.swap import qat_modules

peft = pytest.importorskip("peft")

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def picture(model: nn.Module) -> tuple:
    """What an adapter would change: the modules, and which parameters train."""
    modules = [(name, module) for name, module in model.named_modules()]
    return modules, [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]


def refused(model: nn.Module, config: "peft.PeftConfig", layer: str) -> None:
    """The refusal names the layer; afterwards the model is as it was, and trains as one that nobody touched."""
    expected = take_step(model, torch.optim.SGD(model.parameters(), lr=0.0))
    before = picture(model)
    with pytest.raises(ValueError, match=rf"adapters on NVFP4 QAT layers are not supported yet.*; {layer} got an"):
        peft.get_peft_model(model, config)
    assert picture(model) == before
    assert not getattr(model, "peft_config", None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert torch.equal(take_step(model, optimizer), expected)
    assert take_step(model, optimizer) < expected


CONFIGS = {
    "lora": lambda: peft.LoraConfig(target_modules=["q_proj"]),
    "dora": lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
    "all-linear": lambda: peft.LoraConfig(target_modules="all-linear"),
    "a weight by name": lambda: peft.LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj"]),
    "lokr": lambda: peft.LoKrConfig(target_modules=["q_proj"]),
    "oft": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=16),
    "boft": lambda: peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4),
    "fourierft": lambda: peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=8),
    "hra": lambda: peft.HRAConfig(target_modules=["q_proj"]),
    "copies": lambda: peft.LoraConfig(target_modules=["embed_tokens"], modules_to_save=["q_proj"]),
    "copies of a parent": lambda: peft.LoraConfig(target_modules=["embed_tokens"], modules_to_save=["self_attn"]),
}  # fmt: skip


@pytest.mark.parametrize("make_config", CONFIGS.values(), ids=CONFIGS)
def test_every_kind_of_adapter_is_refused_on_a_linear_layer(make_config):
    refused(prepare_qat(tiny_qwen3()), make_config(), r"model\.layers\.0\.self_attn\.q_proj")


def test_adapters_on_experts_are_refused_after_those_on_other_layers_were_put_on():
    model = prepare_qat(tiny_qwen3_moe(), NVFP4QATConfig(exclude=ATTENTION))
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=EXPERTS)
    refused(model, config, r"model\.layers\.0\.mlp\.experts")


def test_copies_of_experts_are_refused():
    config = peft.LoraConfig(target_modules=["embed_tokens"], modules_to_save=["mlp.experts"])
    refused(prepare_qat(tiny_qwen3_moe()), config, r"model\.layers\.0\.mlp\.experts")


def test_a_layer_that_is_wrapped_by_hand_is_named_by_its_group():
    layer = prepare_qat(tiny_qwen3()).model.layers[1].self_attn.q_proj
    with pytest.raises(ValueError, match=r"a layer of group model\.layers\.1\.self_attn\.qkv_proj got an adapter"):
        peft.tuners.lora.Linear(layer, "default", peft.LoraConfig(), r=4)


def test_the_method_of_transformers_is_refused_too_and_saving_still_works(tmp_path):
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"Transformers takes PEFT {MIN_PEFT_VERSION} or newer")
    model = prepare_qat(tiny_qwen3())
    before = picture(model)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj got an adapter"):
        model.add_adapter(peft.LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    assert picture(model) == before
    model.save_pretrained(tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


def test_adapters_elsewhere_are_allowed_and_survive_the_refusal_of_a_second_one(qwen3_dir):
    model = load_qat(qwen3_dir, NVFP4QATConfig(preset="ffn_only"))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    with pytest.raises(ValueError, match=r"mlp\.up_proj got an adapter"):
        adapted.add_adapter("second", peft.LoraConfig(target_modules=["q_proj", "up_proj"]))
    assert [name for name, parameter in adapted.named_parameters() if parameter.requires_grad] == names
    assert not any("second" in name for name, _ in adapted.named_parameters())
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.5)
    losses = [take_step(adapted, optimizer).item() for _ in range(4)]
    assert losses[3] < losses[0] and len(qat_modules(model)) == 6


def test_a_model_with_adapters_is_not_prepared():
    adapted = peft.get_peft_model(tiny_qwen3(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="PEFT adapters"):
        prepare_qat(adapted)


def test_prompts_and_single_tokens_train_beside_qat_layers():
    for config in (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 5, 10]),
    ):
        adapted = peft.get_peft_model(prepare_qat(tiny_qwen3()), config)
        loss = adapted(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
