"""W4A4 rollouts: vLLM's own emulation computes what training computes, and an engine that would not is refused."""

from types import SimpleNamespace

import pytest
import torch
from conftest import load_qat, tiny_qwen3
from vllm_engines import SIZES, empty_engine, generate, make_engine, release_engines, save, train_a_little

from hf_nvfp4_qat import NVFP4QATConfig, calibrate_activations, save_nvfp4
from hf_nvfp4_qat.rollout.sync import check, sync
from hf_nvfp4_qat.rollout.vllm.engine import worker_of
from hf_nvfp4_qat.rollout.vllm.reading import check_kernel, kernel_name

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ON_GPU = torch.cuda.is_available()
W4A4 = NVFP4QATConfig(activations="nvfp4")
IDS = torch.arange(1, 41).view(2, 20)


@pytest.fixture(scope="module", autouse=True)
def release_engines_at_the_end():
    yield
    release_engines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tiny_qwen3(**SIZES), tmp_path_factory.mktemp("rollout_w4a4"))


@pytest.fixture(scope="module")
def trained(folder):
    model = load_qat(folder, W4A4).train()
    train_a_little(model)
    return model


@pytest.fixture(scope="module")
def engine(folder, trained):
    return empty_engine(folder, trained, linear_backend="emulation")


def test_a_synced_engine_generates_as_one_that_loads_the_exported_checkpoint(engine, trained, tmp_path):
    assert kernel_name(worker_of(engine)) == "EmulationNvFp4LinearKernel"
    sync(engine, trained)
    assert check(engine, trained).ok
    save_nvfp4(trained, tmp_path)
    fresh = generate(make_engine(tmp_path, linear_backend="emulation"))
    assert generate(engine) == fresh
    assert len({token for tokens, _ in fresh for token in tokens}) > 3


@torch.no_grad()
def test_the_engine_computes_what_training_computes(engine, trained):
    sync(engine, trained)
    served = worker_of(engine).model_runner.get_model()
    trained.eval()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        layer = trained.get_submodule(f"model.layers.1.{name}")
        module = served.get_submodule(f"model.layers.1.{name}")
        # Of very different sizes, and a row past what the global scale has room for.
        x = torch.randn(24, layer.in_features) * torch.exp2(torch.arange(-14.0, 10.0))[:, None]
        x = (x * layer.input_amax.cpu() / 64).to(torch.bfloat16).to(trained.device)
        with torch.autocast(trained.device.type, torch.bfloat16):
            computed = layer(x)
        assert torch.equal(module.quant_method.apply(module, x, None), computed)
        amax, layer.input_amax = layer.input_amax, None
        with torch.autocast(trained.device.type, torch.bfloat16):
            assert not torch.equal(layer(x), computed)
        layer.input_amax = amax


def test_a_later_push_brings_new_input_scales(engine, trained):
    sync(engine, trained)
    sync(engine, trained)
    before = {name: layer.input_amax.clone() for name, layer in trained.named_modules() if hasattr(layer, "input_amax")}
    for layer in trained.modules():
        if hasattr(layer, "input_amax"):
            layer.input_amax.mul_(64)
    found = check(engine, trained)
    assert len(found.different) == 14
    sync(engine, trained)
    assert check(engine, trained).ok
    calibrate_activations(trained, [IDS])
    sync(engine, trained)
    assert check(engine, trained).ok
    for name, amax in before.items():
        trained.get_submodule(name).input_amax.copy_(amax)


@pytest.mark.parametrize("kernel", ["MarlinNvFp4LinearKernel", "ReferenceNvFp4LinearKernel"])
def test_a_weight_only_kernel_is_refused(kernel):
    layer = torch.nn.Module()
    layer.scheme = SimpleNamespace(kernel=type(kernel, (), {})())
    worker = SimpleNamespace(model_runner=SimpleNamespace(get_model=lambda: layer))
    with pytest.raises(ValueError, match=f"{kernel}.*emulation"):
        check_kernel(worker)


@pytest.mark.gpu
def test_hopper_is_refused_before_anything_is_pushed(folder, trained):
    if torch.cuda.get_device_capability()[0] >= 10:
        pytest.skip("needs a GPU before Blackwell")
    with pytest.raises(ValueError, match="MarlinNvFp4LinearKernel"):
        sync(empty_engine(folder, trained), trained)
