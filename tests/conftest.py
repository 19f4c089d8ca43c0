"""Small real architectures, built once; no test touches the network."""

import os
import secrets

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# An engine in the process of the tests, which leaves the scheduling of threads to the system.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# The bar would be drawn for every tiny model.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
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


# The same examples every time; new ones, and more of them, at night.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.register_profile("nightly", max_examples=2000, database=None, deadline=None, print_blob=True)
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="what the nightly tests draw from; a new one by default")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = secrets.randbelow(2**32)  # processes of pytest-xdist get it with the other options


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.markexpr and "nightly" in config.option.markexpr.replace("not nightly", ""):
        terminalreporter.write_line(f"The seed was {config.option.seed}; --seed={config.option.seed} repeats this run.")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """What a nightly test draws from: another one every night, or what `--seed` says."""
    return request.config.option.seed


def tiers_left_out(config: pytest.Config) -> tuple[str, ...]:
    """Markers of tests that nobody asked for: of all but the fast tier, unless `-m`, `-k`, a file or a test says so."""
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return ()
    if config.option.keyword or any(argument.endswith(".py") for argument in config.args):
        return ("nightly",)
    return ("slow", "vllm", "peers", "nightly")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what was not asked for; skip what this machine has not got, and say so.

    vLLM's tests run last, since an engine changes its process.
    """
    left_out = tiers_left_out(config)
    is_wanted = [not any(map(item.get_closest_marker, left_out)) for item in items]
    config.hook.pytest_deselected(items=[item for item, wanted in zip(items, is_wanted, strict=True) if not wanted])
    items[:] = [item for item, wanted in zip(items, is_wanted, strict=True) if wanted]
    for item in items:
        if item.get_closest_marker("vllm") and find_spec("vllm") is None:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    items.sort(key=lambda item: item.get_closest_marker("vllm") is not None)


@pytest.fixture(autouse=True)
def leave_nothing_behind():
    """What a test compiled, and what libraries wrote into the environment for it, is not there for the next test."""
    before = dict(os.environ)
    yield
    torch.compiler.reset()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def tiny_qwen3(**changes) -> PreTrainedModel:
    """Qwen3, tied embeddings, 14 linears to quantize, in fp32."""
    set_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "tie_word_embeddings": True, **changes}))


def tiny_llama(**changes) -> PreTrainedModel:
    """Llama, untied, with biases."""
    set_seed(0)
    biases = {"attention_bias": True, "mlp_bias": True}
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **biases, "tie_word_embeddings": False, **changes}))


def tiny_qwen3_moe(**changes) -> PreTrainedModel:
    """Qwen3-MoE: 8 experts a layer, 2 a token, tied embeddings, in fp32."""
    return tiny_moe("qwen3_moe", **{"tie_word_embeddings": True, **changes})


# What the configurations of some families need besides SIZES; all of them have experts that NVFP4 covers.
_LATENT = dict(
    n_group=1, topk_group=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
    num_key_value_heads=4, first_k_dense_replace=1,
)  # fmt: skip
_NEXT = dict(
    layer_types=["full_attention"] * 2, shared_expert_intermediate_size=32, linear_num_value_heads=4,
    linear_num_key_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
)  # fmt: skip
EXPERT_FAMILIES: dict[str, dict] = {
    **dict.fromkeys(("qwen3_moe", "mixtral", "olmoe", "phimoe", "minimax_m2", "flex_olmo"), {}),
    "qwen2_moe": {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe_text"), _NEXT),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _LATENT),
    "glm4_moe": {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_k": 2},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "lfm2_moe": {"layer_types": ["full_attention"] * 2, "num_dense_layers": 0},
}


def tiny_moe(family: str, **changes) -> PreTrainedModel:
    """A model type of Transformers with experts, in fp32."""
    config_class = CONFIG_MAPPING[family]
    # Often several names of one thing.
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    num_experts = next((changes.pop(name) for name in experts if name in changes), 8)
    options = {
        **SIZES, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "tie_word_embeddings": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        **{name: num_experts for name in experts if hasattr(config_class(), name)},
        **EXPERT_FAMILIES.get(family, {}), **changes,
    }  # fmt: skip
    if family in ("deepseek_v2", "deepseek_v3"):
        del options["head_dim"]
    set_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**options), dtype=torch.float32)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, like the vocabulary of byte-level models."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left")
    fast.add_special_tokens({"eos_token": "<eos>", "pad_token": "<pad>"})
    return fast


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
