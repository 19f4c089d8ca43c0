"""load_state_dict takes master weights, and refuses what would be left out, or taken for weights, in silence."""

import pytest
import torch
from conftest import load_qat, take_step, tiny_qwen3, tiny_qwen3_moe, tokens
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from hf_nvfp4_qat import NVFP4QATConfig, prepare_qat, save_nvfp4

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_qwen3_moe])
@pytest.mark.parametrize("dialect", ["compressed-tensors", "modelopt"])
def test_a_packed_state_dict_is_refused_by_the_name_of_the_first_weight(make, dialect, tmp_path):
    model = prepare_qat(make())
    save_nvfp4(model, tmp_path, dialect=dialect)
    packed = load_file(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no model\.layers\.0\.self_attn\.q_proj\.weight in 16 or 32 bits, but"):
        model.load_state_dict(packed, strict=False)


def test_single_experts_are_refused_and_one_file_of_several_is_not():
    model = prepare_qat(tiny_qwen3_moe())
    experts = "model.layers.0.mlp.experts"
    weights = model.state_dict()
    single = {f"{experts}.0.gate_proj.weight": torch.ones(32, 64)}
    with pytest.raises(ValueError, match=rf"has no {experts}.gate_up_proj in 16 or 32 bits, but {experts}.0.gate_proj"):
        model.load_state_dict(single, strict=False)
    half = {name: tensor * 2 for name, tensor in weights.items() if name.endswith((".down_proj", "q_proj.weight"))}
    expected = {name: tensor.clone() for name, tensor in {**weights, **half}.items()}
    model.load_state_dict(half, strict=False)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_codes_under_the_name_of_a_weight_are_refused(dtype):
    model = prepare_qat(tiny_qwen3())
    weights = model.state_dict()
    before = weights[UP].clone()
    weights[UP] = weights[UP].to(dtype)
    with pytest.raises(ValueError, match=rf"has no {UP} in 16 or 32 bits, but {UP} {str(dtype)[6:]}"):
        model.load_state_dict(weights)
    assert torch.equal(model.state_dict()[UP], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_in_any_floating_dtype_are_taken(dtype):
    model = prepare_qat(tiny_qwen3())
    weights = {name: tensor.to(dtype) for name, tensor in tiny_qwen3().state_dict().items()}
    model.load_state_dict(weights)
    assert torch.equal(model.state_dict()[UP], weights[UP].float())


def trainer(path, output, save_format, **options):
    arguments = TrainingArguments(
        output, max_steps=4, per_device_train_batch_size=1, save_steps=2, use_cpu=True, report_to=[],
        disable_tqdm=True, learning_rate=5e-3, save_strategy="steps", **options,
    )  # fmt: skip
    rows = [{"input_ids": tokens()[0], "labels": tokens()[0]}] * 4
    model = load_qat(path, NVFP4QATConfig(save_format=save_format))
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:1])


@pytest.mark.parametrize("options", [{}, {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}])
def test_a_trainer_goes_on_from_master_weights_and_refuses_packed_ones(options, qwen3_dir, tmp_path):
    good = trainer(qwen3_dir, tmp_path / "master", "auto", **options)
    good.train()
    resumed = trainer(qwen3_dir, tmp_path / "master", "auto", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "master" / "checkpoint-2"))
    for name, tensor in good.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor)
    packed = trainer(qwen3_dir, tmp_path / "packed", "nvfp4", **options)
    if not options:
        packed.train()
        packed = trainer(qwen3_dir, tmp_path / "packed", "nvfp4")
    with pytest.raises(ValueError, match="Training goes on from master weights; the state dict has no"):
        packed.train(resume_from_checkpoint=None if options else str(tmp_path / "packed" / "checkpoint-2"))


def test_a_loaded_state_dict_trains_on(qwen3_dir):
    loaded, expected = load_qat(qwen3_dir), prepare_qat(tiny_qwen3())
    loaded.load_state_dict(tiny_qwen3().state_dict())
    losses = []
    for model in (loaded, expected):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([take_step(model, optimizer) for _ in range(2)])
    assert losses[0] == losses[1]
