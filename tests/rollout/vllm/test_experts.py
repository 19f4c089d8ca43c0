"""Experts pushed into a real vLLM engine: stacked, one by one, and as a checkpoint is loaded, all to the same bits."""

import pytest
import torch
from conftest import load_qat, tiny_moe
from vllm_engines import empty_engine, generate, make_engine, release_engines

from hf_nvfp4_qat import save_nvfp4
from hf_nvfp4_qat.rollout.stream import RolloutStream
from hf_nvfp4_qat.rollout.sync import check, sync
from hf_nvfp4_qat.rollout.vllm import replay as replay_module
from hf_nvfp4_qat.rollout.vllm.engine import worker_of
from hf_nvfp4_qat.rollout.vllm.reading import kernel_name

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ON_GPU = torch.cuda.is_available()
SIZES = dict(
    vocab_size=512, hidden_size=128, intermediate_size=128, moe_intermediate_size=128, head_dim=32,
    initializer_range=0.1,
)  # fmt: skip
FAMILIES = ["qwen3_moe", "mixtral"]


@pytest.fixture(autouse=True)
def release():
    """vLLM makes its groups once a process; those of an engine without experts lack one that experts need."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    yield
    release_engines()


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(f"rollout_{request.param}")
    tiny_moe(request.param, **SIZES).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def model(folder):
    model = load_qat(folder)
    shake(model)
    return model.cuda() if ON_GPU else model


def shake(model) -> None:
    """Move every weight, and with it most codes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))


def engine_tensors(engine) -> dict[str, torch.Tensor]:
    """What the kernels compute with: global scales of experts are no parameters on a GPU."""
    model = worker_of(engine).model_runner.get_model()
    plain = {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor) and name.endswith("weight_scale_2")
    }
    tensors = {**model.state_dict(), **plain}
    return {name: tensor.clone() for name, tensor in tensors.items() if ".attn." not in name and "input" not in name}


def test_all_ways_into_an_engine_give_the_same_bits(folder, model, tmp_path, monkeypatch):
    save_nvfp4(model, tmp_path)
    loaded = make_engine(tmp_path)
    expected, tokens = engine_tensors(loaded), generate(loaded)
    stacked = empty_engine(folder, model)
    first, second = sync(stacked, model), sync(stacked, model)
    assert first.num_tensors < 60 and second.num_bytes == first.num_bytes
    assert check(stacked, model).ok and generate(stacked) == tokens
    monkeypatch.setattr(replay_module, "can_replay", lambda worker, model: False)
    one_by_one = empty_engine(folder, model)
    for _ in range(2):
        assert sync(one_by_one, model).num_tensors == len(RolloutStream(model).layout) > 200
    assert check(one_by_one, model).ok and generate(one_by_one) == tokens
    for engine in (stacked, one_by_one):
        found = engine_tensors(engine)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            mine, theirs = (t.reshape(-1).view(torch.uint8) for t in (found[name], tensor))
            assert torch.equal(mine, theirs), name


def test_a_wrong_value_in_one_expert_is_found_out(folder, model):
    engine = empty_engine(folder, model)
    sync(engine, model)
    report = check(engine, model)
    quantized = sum(parameter.numel() for name, parameter in model.named_parameters() if "experts" in name)
    assert report.ok and report.num_weights > quantized
    name, weight = next((name, p) for name, p in model.named_parameters() if name.endswith("1.mlp.experts.down_proj"))
    with torch.no_grad():
        weight[5, 7, 16:32] = weight[5, 7, 16:32].abs() * -1 - 1
    assert check(engine, model).different == {name: 16}
    before = generate(engine)
    shake(model)
    sync(engine, model)
    assert check(engine, model).ok and generate(engine) != before
    assert kernel_name(worker_of(engine))


def test_a_push_that_breaks_off_between_experts_leaves_an_engine_that_can_be_filled(folder, model, monkeypatch):
    engine = empty_engine(folder, model)
    sync(engine, model)
    expected = generate(engine)
    original = RolloutStream.tensors

    def broken(self, *args, **kwargs):
        for name, tensor in original(self, *args, **kwargs):
            if "1.mlp.experts.down_proj.weight_packed" in name:
                raise OSError("cable pulled")
            yield name, tensor

    shake_back = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    shake(model)
    with monkeypatch.context() as patch:
        patch.setattr(RolloutStream, "tensors", broken)
        with pytest.raises(RuntimeError, match="cable pulled"):
            sync(engine, model)
    with pytest.raises(RuntimeError, match="half-way"):
        generate(engine)
    model.load_state_dict(shake_back, strict=False)
    sync(engine, model)
    assert check(engine, model).ok and generate(engine) == expected


def test_an_engine_with_another_number_of_experts_is_refused(folder, model, tmp_path):
    tiny_moe(model.config.model_type, **SIZES, num_experts=4).to(torch.bfloat16).save_pretrained(tmp_path)
    other = empty_engine(tmp_path, load_qat(tmp_path))
    with pytest.raises(ValueError, match="Nothing was sent"):
        sync(other, model)
