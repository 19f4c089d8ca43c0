"""The packed stream: what is in it, in which order, and what it refuses."""

import copy

import pytest
import torch
from conftest import load_qat, take_step, tiny_llama, tiny_qwen3, tiny_qwen3_moe, tokens
from safetensors.torch import load_file
from torch import nn

from hf_nvfp4_qat import NVFP4QATConfig, fake_quantize_nvfp4, prepare_qat, save_nvfp4
from hf_nvfp4_qat.checkpoint.stream import packed_sources
from hf_nvfp4_qat.formats.names import from_checkpoint
from hf_nvfp4_qat.modules.swap import qat_modules
from hf_nvfp4_qat.rollout.stream import RolloutStream
from hf_nvfp4_qat.rollout.vllm.server import check_alignment
from hf_nvfp4_qat.selection.fused_groups import fused_group_key


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_llama])
def test_the_stream_is_the_checkpoint(make, tmp_path):
    model = prepare_qat(make())
    save_nvfp4(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    streamed = dict(RolloutStream(model))
    assert streamed.keys() == saved.keys()
    for name, tensor in streamed.items():
        assert tensor.dtype == saved[name].dtype
        assert torch.equal(tensor.view(torch.uint8), saved[name].view(torch.uint8)), name


def test_the_layout_announces_what_comes():
    stream = RolloutStream(prepare_qat(tiny_llama()))
    came = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in stream]
    assert came == [(item.name, item.dtype, item.shape) for item in stream.layout]
    assert stream.num_bytes == sum(item.nbytes for item in stream.layout)
    assert stream.num_packed == 14


def test_the_tensors_of_one_fused_module_come_together_scales_first():
    stream = RolloutStream(prepare_qat(tiny_llama()))
    groups = [fused_group_key(item.name.rpartition(".")[0]) for item in stream.layout]
    assert [group for i, group in enumerate(groups) if i == 0 or groups[i - 1] != group] == list(dict.fromkeys(groups))
    qkv = [
        item for item, group in zip(stream.layout, groups, strict=True) if group.endswith("layers.0.self_attn.qkv_proj")
    ]
    assert [item.dtype for item in qkv[:3]] == [torch.float32] * 3
    assert [item.dtype for item in qkv[3:6]] == [torch.bfloat16] * 3
    assert {item.dtype for item in qkv[6:]} == {torch.uint8, torch.float8_e4m3fn}
    assert all(item.shape == (1,) for item in qkv[:3])
    check_alignment(stream.layout)


def test_a_tensor_that_would_not_be_aligned_is_refused():
    model = prepare_qat(nn.Sequential(nn.Linear(16, 2, bias=False), nn.Linear(16, 2, bias=False)))
    with pytest.raises(ValueError, match=r"1\.weight_global_scale.*start at byte 22"):
        check_alignment(RolloutStream(model).layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_aliases_a_weight(qwen3_dir, dtype):
    model = load_qat(qwen3_dir, dtype=dtype)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    pushed = list(RolloutStream(model))
    assert not own & {tensor.untyped_storage().data_ptr() for _, tensor in pushed}
    assert {tensor.dtype for name, tensor in pushed if "norm" in name or "embed" in name} == {torch.bfloat16}


def test_what_is_pushed_decodes_to_what_the_forward_uses(qat_model):
    optimizer = torch.optim.AdamW(qat_model.parameters(), lr=1e-2)
    take_step(qat_model, optimizer)
    pushed = dict(RolloutStream(qat_model))
    for name, layer in qat_modules(qat_model).items():
        assert torch.equal(from_checkpoint(name, pushed.__getitem__).dequantize(), layer.fake_quantized_weight())


def test_edits_through_data_are_in_the_next_push(qat_model):
    layer = qat_model.model.layers[0].mlp.down_proj
    qat_model(input_ids=tokens())
    layer.weight.data.mul_(64)
    pushed = dict(RolloutStream(qat_model))
    decoded = from_checkpoint("model.layers.0.mlp.down_proj", pushed.__getitem__).dequantize()
    assert torch.equal(decoded, fake_quantize_nvfp4(layer.weight.detach()))


def test_one_module_is_alive_at_a_time():
    stream = RolloutStream(prepare_qat(tiny_qwen3()))
    alive: list = []
    loads: list[int] = []
    for group in stream._groups:
        for i, source in enumerate(group):
            read = source.read
            group[i] = copy.copy(source)
            object.__setattr__(group[i], "read", lambda read=read: (loads.append(len(alive)), read())[1])
    for name, _ in stream:
        alive.append(name)
    # Each weight was loaded when exactly the tensors of the groups before its own had been taken.
    starts = [0]
    for group in stream._groups:
        starts.append(starts[-1] + sum(len(source.layout()) for source in group))
    assert loads == [start for start, group in zip(starts, stream._groups, strict=False) for _ in group]


def test_a_model_without_qat_layers_is_refused():
    with pytest.raises(ValueError, match="no QAT layers"):
        RolloutStream(tiny_qwen3())


def test_a_weight_with_nan_is_refused_by_name_before_anything_is_sent(qat_model):
    with torch.no_grad():
        qat_model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight.*Nothing was sent"):
        RolloutStream(qat_model)


def test_siblings_with_different_scales_are_refused(qat_model):
    layer = qat_model.model.layers[0].self_attn.k_proj
    layer.nvfp4_weight.global_scales._groups["model.layers.0.self_attn.qkv_proj"].pop(layer.nvfp4_weight)
    layer.nvfp4_weight.scale_group = "alone"
    layer.nvfp4_weight.global_scales.add(layer.nvfp4_weight)
    with torch.no_grad():
        layer.weight.mul_(64)
    with pytest.raises(ValueError, match=r"self_attn\.(q|k)_proj\.weight has .* and .*(q|k|v)_proj\.weight has"):
        RolloutStream(qat_model)


def test_frozen_and_excluded_layers_are_pushed_too(qwen3_dir):
    model = load_qat(qwen3_dir, NVFP4QATConfig(preset="ffn_only"))
    model.requires_grad_(False)
    stream = RolloutStream(model)
    assert stream.num_packed == 6
    assert {item.name for item in stream.layout if "q_proj" in item.name} == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)
    }
    assert "model.layers.0.self_attn.q_proj" in stream.ignored_layers


def test_experts_come_one_by_one_with_constant_input_scales_or_stacked():
    model = prepare_qat(tiny_qwen3_moe())
    stream = RolloutStream(model)
    check_alignment(stream.layout)
    pushed = dict(stream)
    experts = "model.layers.1.mlp.experts"
    saved = {name: tensor for source in packed_sources(model) for name, tensor in source.tensors().items()}
    constants = {name for name in pushed if name.endswith("input_global_scale")}
    assert pushed.keys() - constants == saved.keys() and len(constants) == 2 * 3 * 8
    assert all(pushed[name].tolist() == [1.0] for name in constants)
    assert all(torch.equal(pushed[name].view(torch.uint8), saved[name].view(torch.uint8)) for name in saved)
    stacked_stream = RolloutStream(model)
    stacked_stream.stack_experts()
    stacked = dict(stacked_stream)
    assert [(item.name, item.dtype, item.shape) for item in stacked_stream.layout] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in stacked.items()
    ]
    assert not any(f"{experts}.3." in name for name in stacked)
    assert torch.equal(
        stacked[f"{experts}.gate_up_proj.weight_packed"][3, 32:], pushed[f"{experts}.3.up_proj.weight_packed"]
    )
    assert torch.equal(
        stacked[f"{experts}.down_proj.weight_global_scale"][5:6], pushed[f"{experts}.5.down_proj.weight_global_scale"]
    )
    assert stream.num_bytes - stacked_stream.num_bytes == 4 * (len(constants) + 2 * 8)


def test_a_nan_in_one_expert_is_named_before_anything_is_sent():
    model = prepare_qat(tiny_qwen3_moe())
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[6, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="experts.down_proj"):
        RolloutStream(model)
