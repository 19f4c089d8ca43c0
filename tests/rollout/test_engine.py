"""What a push needs of an engine is its interface and nothing else: here is an engine that is no vLLM."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import take_step, tiny_qwen3, tiny_qwen3_moe
from store_engine import Store, StoreEngine

from hf_nvfp4_qat import prepare_qat
from hf_nvfp4_qat.formats.names import PACKED
from hf_nvfp4_qat.rollout import engine as engine_module
from hf_nvfp4_qat.rollout.engine import engine_of
from hf_nvfp4_qat.rollout.sync import check, engine_arguments, sync


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setitem(engine_module._KINDS, "store", "store_engine:StoreEngine")
    return Store()


def test_an_object_gets_the_kind_of_engine_that_knows_it(store):
    engine = engine_of(store)
    assert isinstance(engine, StoreEngine) and engine.store is store
    model = prepare_qat(tiny_qwen3())
    assert engine_arguments(model, "store") == {"ignore": ["lm_head"]}


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_qwen3_moe])
def test_any_engine_is_filled_and_compared(make, store):
    model = prepare_qat(make())
    assert len(check_of_empty(store, model).different) == sum(1 for _ in model.parameters())
    for _ in range(2):
        store.cache.append("old")
        take_step(model.train(), torch.optim.SGD(model.parameters(), lr=1e-2))
        report = sync(store, model)
        assert report.num_tensors == len(store.tensors) and not store.cache
        assert report.num_bytes == sum(tensor.nbytes for tensor in store.tensors.values())
        found = check(store, model)
        assert found.ok and found.num_weights == sum(parameter.numel() for parameter in model.parameters())
    name = next(name for name in store.tensors if name.endswith(f"0.self_attn.v_proj.{PACKED}"))
    store.tensors[name][5, 5] ^= 1
    assert check(store, model).different == {name.replace(PACKED, "weight"): 1}


def check_of_empty(store, model):
    """Of an engine whose weights are all zero."""
    sync(store, model)
    for tensor in store.tensors.values():
        tensor.view(-1).view(torch.uint8).zero_()
    for name, tensor in store.tensors.items():
        if name.endswith("global_scale"):
            tensor.fill_(1)
    return check(store, model)


def test_any_engine_refuses_before_it_takes_anything_and_after_it_took_half(store, monkeypatch):
    model = prepare_qat(tiny_qwen3())
    store.num_requests = 1
    with pytest.raises(ValueError, match="unfinished requests"):
        sync(store, model)
    assert not store.tensors
    sync(store, model, restart_requests=True)

    def failing(self, name, tensor):
        raise OSError("the shelf broke")

    with monkeypatch.context() as patch:
        patch.setattr(StoreEngine, "take", failing)
        with pytest.raises(RuntimeError, match="into a store failed half-way: OSError: the shelf broke"):
            sync(store, model, restart_requests=True)
    assert "the shelf broke" in store.refusal
    sync(store, model, restart_requests=True)
    assert not store.refusal and check(store, model).ok


NEUTRAL = sorted(Path(engine_module.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", NEUTRAL, ids=lambda path: path.stem)
def test_what_serves_every_engine_names_none(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                imported = [alias.name for alias in names]
            case ast.ImportFrom(module=module, names=names):
                imported = [f"{module}.{alias.name}" for alias in names]
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name) | ast.FunctionDef(name=name):
                imported = [name]
            case _:
                continue
        assert not [name for name in imported if "vllm" in name.lower()]


def test_what_serves_every_engine_loads_none():
    code = (
        "import sys, hf_nvfp4_qat.rollout.sync\n"
        "assert not [name for name in sys.modules if name.startswith('hf_nvfp4_qat.rollout.vllm')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
