"""Other versions of vLLM than the tested ones: said once, and never in the way of those who do not need us."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_nvfp4_qat.rollout.vllm import cpu_plugin, versions
from hf_nvfp4_qat.rollout.vllm.versions import NEWEST_TESTED, OLDEST, vllm_version

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def vllm():
    return pytest.importorskip("vllm")


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def log(caplog, monkeypatch):
    """Warnings; vLLM's loggers do not hand theirs on."""
    monkeypatch.setattr(cpu_plugin, "logger", logging.getLogger("hf_nvfp4_qat.rollout.vllm.cpu_plugin"))
    with caplog.at_level(logging.WARNING, logger="hf_nvfp4_qat"):
        yield caplog


def test_a_newer_vllm_than_tested_gets_one_warning_and_an_older_one_an_error(vllm, monkeypatch, log):
    monkeypatch.setattr(versions, "_warned", set())
    vllm_version()
    assert not lines(log)
    monkeypatch.setattr(vllm, "__version__", "99.1.0+cpu")
    for _ in range(3):
        assert str(vllm_version()) == "99.1.0"
    assert lines(log) == [
        f"NVFP4 rollouts are tested up to vLLM {NEWEST_TESTED}; 99.1.0 is installed. If something fails, install "
        f"vllm=={NEWEST_TESTED}."
    ]
    monkeypatch.setattr(vllm, "__version__", "0.25.9")
    with pytest.raises(ValueError, match=f"need vLLM {OLDEST} or newer.*0.25.9"):
        vllm_version()


@pytest.fixture
def unpatched(vllm, monkeypatch):
    """vLLM's modules as they are before the plugin is loaded: the linear kernels, and the experts."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as experts,
    )
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("needs vLLM for CPUs")
    for module, name in ((linear, "MarlinNvFp4LinearKernel"), (experts, "CompressedTensorsW4A4Nvfp4MoEMethod")):
        classes = [kind for kind in getattr(module, name).__mro__ if kind.__module__ != cpu_plugin.__name__]
        monkeypatch.setattr(module, name, classes[0])
    kernels = dict(linear._POSSIBLE_NVFP4_KERNELS)
    kernels.pop(current_platform._enum, None)
    monkeypatch.setattr(linear, "_POSSIBLE_NVFP4_KERNELS", kernels)
    return linear, experts


def contents(modules) -> list[dict]:
    return [dict(vars(module)) for module in modules]


def test_the_plugin_replaces_three_names_once(unpatched, log):
    before = contents(unpatched)
    cpu_plugin.register()
    after = contents(unpatched)
    changed = {name for old, new in zip(before, after, strict=True) for name in new if new[name] is not old[name]}
    assert changed == {
        "_POSSIBLE_NVFP4_KERNELS", "MarlinNvFp4LinearKernel", "CompressedTensorsW4A4Nvfp4MoEMethod"
    }  # fmt: skip
    cpu_plugin.register()
    assert contents(unpatched) == after
    assert not lines(log)


@pytest.mark.parametrize(
    "name",
    [
        "_POSSIBLE_NVFP4_KERNELS",
        "MarlinNvFp4LinearKernel",
        "EmulationNvFp4LinearKernel",
        "CompressedTensorsW4A4Nvfp4MoEMethod",
    ],
)
@pytest.mark.parametrize("change", ["gone", "something else"])
def test_where_vllm_has_other_names_it_starts_without_us(unpatched, monkeypatch, log, name, change):
    from vllm import plugins

    for module in unpatched:
        if hasattr(module, name):
            if change == "gone":
                monkeypatch.delattr(module, name)
            elif name != "EmulationNvFp4LinearKernel":  # it is only handed on
                monkeypatch.setattr(module, name, None)
            else:
                return
    before = contents(unpatched)
    monkeypatch.setattr(plugins, "plugins_loaded", False)
    plugins.load_general_plugins()
    assert contents(unpatched) == before
    (line,) = lines(log)
    assert "do not run on this CPU" in line and f"{OLDEST} to {NEWEST_TESTED}" in line
    assert name in line or change != "gone"


def test_a_version_outside_the_tested_range_gets_one_line_and_the_plugin(vllm, unpatched, monkeypatch, log):
    monkeypatch.setattr(vllm, "__version__", "99.1.0")
    for _ in range(2):
        cpu_plugin.register()
    assert lines(log) == [
        f"hf_nvfp4_qat: NVFP4 on a CPU is tested with vLLM {OLDEST} to {NEWEST_TESTED}; 99.1.0 is installed."
    ]
    assert unpatched[0].MarlinNvFp4LinearKernel.__module__ == cpu_plugin.__name__


class Kernel:
    """An object that computes for a layer, with tensors of its own."""

    def __init__(self):
        self.locks = torch.zeros(4)


def test_tensors_of_kernels_keep_their_addresses_where_a_reload_makes_kernels_anew():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    dense, experts = model
    dense.scheme = SimpleNamespace(kernel=Kernel())
    experts.quant_method = SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=Kernel()))
    captured = [dense.scheme.kernel.locks, experts.quant_method.moe_kernel.fused_experts.locks]
    with versions.stable_addresses(model):
        dense.scheme.kernel.locks = torch.full((4,), 2.0)
        experts.quant_method.moe_kernel = SimpleNamespace(fused_experts=Kernel())
        experts.quant_method.moe_kernel.fused_experts.locks += 3
    held = [dense.scheme.kernel.locks, experts.quant_method.moe_kernel.fused_experts.locks]
    assert all(new is old for new, old in zip(held, captured, strict=True))
    assert [tensor.tolist() for tensor in held] == [[2.0] * 4, [3.0] * 4]


@pytest.mark.parametrize(
    "version, cuda, inputs, experts, expected",
    [
        ("0.27.1", True, False, False, {"linear_backend": "marlin"}),
        ("0.33.0", True, False, True, {"linear_backend": "marlin", "moe_backend": "marlin"}),
        ("0.33.0", True, True, True, {}),
        ("0.31.0", False, False, True, {"mm_device_do_normalize": False}),
        ("0.33.0", False, False, True, {}),
    ],
)
def test_the_kernel_is_chosen_here_where_vllm_would_choose(vllm, monkeypatch, version, cuda, inputs, experts, expected):
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert versions.engine_arguments(quantizes_input=inputs, has_experts=experts) == expected


def test_models_that_vllm_runs_through_transformers_are_refused_before_there_is_an_engine(vllm):
    versions.refuse_transformers_backend("Qwen3ForCausalLM")
    for architecture in ("OlmoForCausalLM", "NeverHeardOfForCausalLM"):
        with pytest.raises(ValueError, match=f"no implementation of its own of {architecture}"):
            versions.refuse_transformers_backend(architecture)


@pytest.mark.parametrize("version, workspace", [("0.29.0", "own"), ("0.30.0", "own"), ("0.33.0", "shared")])
def test_the_kernel_of_experts_gets_what_its_version_takes(vllm, monkeypatch, version, workspace):
    marlin_utils = pytest.importorskip("vllm.model_executor.layers.quantization.utils.marlin_utils")
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(marlin_utils, "get_marlin_workspace", lambda device: "shared", raising=False)
    module = SimpleNamespace(workspace="own", w13_weight=torch.zeros(1))
    permutations, found, options = versions.marlin_experts_arguments(module)
    assert found == workspace
    assert (permutations, options) == (((None, None), {"is_k_full": True}) if version < "0.30" else ((), {}))
