"""Small real architectures, built once; no test touches the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A small engine in the process of the tests, which leaves the scheduling of threads to the system.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# The bar would be drawn for every tiny model.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from importlib.util import find_spec

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from hf_nvfp4_qat import NVFP4QATConfig

transformers_logging.disable_progress_bar()

SIZES = dict(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
)  # fmt: skip


# What tests add to every vLLM engine. Many live in one process, for one that is collected takes the others'
# process groups with it, so each has a small cache.
SMALL_ENGINE = {"enforce_eager": True, "kv_cache_memory_bytes": 2**26}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine has not got, and say so; run vLLM's tests last, since an engine changes its process."""
    for item in items:
        if item.get_closest_marker("vllm") and find_spec("vllm") is None:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    items.sort(key=lambda item: item.get_closest_marker("vllm") is not None)


def tiny_qwen3(**changes) -> PreTrainedModel:
    """Qwen3, tied embeddings, 14 linears to quantize, in fp32."""
    set_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "tie_word_embeddings": True, **changes}))


def tiny_llama(**changes) -> PreTrainedModel:
    """Llama, untied, with biases."""
    set_seed(0)
    biases = {"attention_bias": True, "mlp_bias": True}
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **biases, "tie_word_embeddings": False, **changes}))


@pytest.fixture(scope="session")
def qwen3_dir(tmp_path_factory):
    """A bfloat16 checkpoint of tiny_qwen3."""
    path = tmp_path_factory.mktemp("qwen3")
    tiny_qwen3().to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory):
    """A bfloat16 checkpoint of tiny_llama."""
    path = tmp_path_factory.mktemp("llama")
    tiny_llama().to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def qat_model(qwen3_dir):
    """tiny_qwen3 loaded for QAT with fp32 master weights."""
    return load_qat(qwen3_dir)


def load_qat(path, config: NVFP4QATConfig | None = None, **kwargs) -> PreTrainedModel:
    """from_pretrained with our config, fp32 masters unless told otherwise."""
    kwargs.setdefault("dtype", torch.float32)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config or NVFP4QATConfig(), **kwargs)


def tokens(num_tokens: int = 24) -> torch.Tensor:
    """int64 [1, num_tokens] within the tiny vocabulary."""
    return torch.arange(num_tokens)[None] * 5 % 128


def take_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """One training step on ``tokens()``; returns the loss."""
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()
