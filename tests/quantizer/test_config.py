"""NVFP4QATConfig: frozen, JSON, and usable as a dict."""

import copy
import json
import pickle
from dataclasses import FrozenInstanceError

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AutoQuantizationConfig

from hf_nvfp4_qat import NVFP4QATConfig
from hf_nvfp4_qat.modules.swap import qat_modules

FULL = NVFP4QATConfig(preset="ffn_only", exclude=["a", "re:b.*"], save_format="master")


@pytest.mark.parametrize("config", [NVFP4QATConfig(), FULL])
def test_it_round_trips_through_json_copies_and_pickles(config):
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored["quant_method"] == config.quant_method == "nvfp4_qat"
    assert AutoQuantizationConfig.from_dict(stored) == config
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config and hash(config)
    assert json.loads(config.to_json_string()) == dict(config) == stored


def test_it_round_trips_through_config_json(qwen3_dir, tmp_path):
    config = AutoConfig.from_pretrained(qwen3_dir)
    config.quantization_config = FULL
    config.save_pretrained(tmp_path)
    stored = AutoConfig.from_pretrained(tmp_path).quantization_config
    assert NVFP4QATConfig.from_dict(stored) == FULL


def test_it_is_frozen():
    with pytest.raises(FrozenInstanceError):
        NVFP4QATConfig().preset = "ffn_only"
    with pytest.raises(FrozenInstanceError):
        NVFP4QATConfig().new_attribute = 1
    assert NVFP4QATConfig().update(preset="ffn_only", other=1) == {"preset": "ffn_only", "other": 1}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"preset": "all"}, "`preset` is one of full, ffn_only; got 'all'"),
        ({"save_format": "gguf"}, "`save_format` is one of auto, master, nvfp4; got 'gguf'"),
        ({"exclude": "lm_head"}, "`exclude` is a list of strings; got 'lm_head'"),
        ({"exclude": ["re:(unclosed"]}, "holds 're:\\(unclosed', which is no regular expression"),
        ({"exclude": [1]}, "`exclude` is a list of strings"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NVFP4QATConfig(**arguments)


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match="got unknown group_size"):
        NVFP4QATConfig.from_dict({"quant_method": "nvfp4_qat", "group_size": 32})


def test_a_dict_works_as_quantization_config(qwen3_dir):
    model = AutoModelForCausalLM.from_pretrained(
        qwen3_dir, quantization_config={"quant_method": "nvfp4_qat", "preset": "ffn_only"}
    )
    assert len(qat_modules(model)) == 6 and model.config.quantization_config == NVFP4QATConfig(preset="ffn_only")
