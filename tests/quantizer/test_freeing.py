"""`del model` frees a model that trains in NVFP4, as it frees any other: its memory does not wait for the collector."""

import copy
import gc
import pickle
from weakref import ref

import pytest
import torch
from conftest import load_qat, take_step, tiny_qwen3, tiny_qwen3_moe, tokens
from torch import nn

from hf_nvfp4_qat import NVFP4QATConfig, calibrate_activations, prepare_qat
from hf_nvfp4_qat.modules.swap import qat_weights
from hf_nvfp4_qat.rollout.stream import RolloutStream


def _plain(tmp_path, make):
    return make()


def _prepared(tmp_path, make):
    return prepare_qat(make())


def _loaded(tmp_path, make):
    make().save_pretrained(tmp_path / "plain")
    return load_qat(tmp_path / "plain")


USES = {
    "nothing": lambda model, path: None,
    "forward": lambda model, path: model(tokens()),
    "a step": lambda model, path: take_step(model.train(), torch.optim.AdamW(model.parameters())),
    "generate": lambda model, path: model.generate(tokens(4), max_new_tokens=2, pad_token_id=0),
    "save": lambda model, path: model.save_pretrained(path / "packed"),
    "a training checkpoint": lambda model, path: model.save_pretrained(path / "checkpoint-1"),
    "a copy": lambda model, path: (copy.deepcopy(model), pickle.loads(pickle.dumps(model))),
    "a push": lambda model, path: list(RolloutStream(model)) if qat_weights(model) else None,
}


@pytest.fixture
def without_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("make", [tiny_qwen3, tiny_qwen3_moe])
@pytest.mark.parametrize("get", [_plain, _prepared, _loaded])
def test_del_frees_a_model(get, make, use, tmp_path, without_collector):
    model = get(tmp_path, make)
    use(model, tmp_path)
    gone = [ref(model), *(ref(module) for module in model.modules()), *(ref(weight) for weight in model.parameters())]
    del model
    assert not [what() for what in gone if what() is not None]


def test_del_frees_a_calibrated_model_and_one_that_is_no_model_of_transformers(without_collector):
    model = prepare_qat(tiny_qwen3(), NVFP4QATConfig(activations="nvfp4"))
    calibrate_activations(model, [tokens()])
    plain = prepare_qat(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16)))
    plain(torch.ones(1, 32)).sum().backward()
    gone = [ref(model), ref(plain)]
    del model, plain
    assert [what() for what in gone] == [None, None]


def test_weights_that_outlive_their_model_stay_what_they_were():
    model = prepare_qat(tiny_qwen3_moe())
    expected = {name: weight.fake_quantized_weight() for name, weight in qat_weights(model).items()}
    weights = qat_weights(model)
    gone = ref(model)
    del model
    assert gone() is None
    other = prepare_qat(tiny_qwen3())
    take_step(other, torch.optim.SGD(other.parameters(), lr=0.1))  # looks at every weight there is
    assert all(torch.equal(weight.fake_quantized_weight(), expected[name]) for name, weight in weights.items())
