"""A push, family by family: whatever saved checkpoint vLLM loads can be pushed, to the same bits and the same tokens.

Each family here has something that others have not: a convolution that vLLM builds as a linear layer, parameters
without dims, a weight that the engine keeps twice, a router with a bias or in float32.
"""

import math
import re

import pytest
import torch
from conftest import SIZES, load_qat
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, set_seed
from vllm_engines import empty_engine, generate, make_engine, release_engines

from hf_nvfp4_qat import NVFP4QATConfig, save_nvfp4
from hf_nvfp4_qat.rollout.sync import check, sync
from hf_nvfp4_qat.rollout.vllm.engine import worker_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ON_GPU = torch.cuda.is_available()
# Marlin wants 128 columns or more.
BIG = dict(
    vocab_size=512, hidden_size=128, intermediate_size=256, head_dim=32, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, tie_word_embeddings=False,
)  # fmt: skip
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=128)
GROUPS = dict(n_group=1, topk_group=1)
DELTA = dict(
    layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4, linear_num_key_heads=2,
    linear_key_head_dim=128, linear_value_head_dim=128, shared_expert_intermediate_size=128,
)  # fmt: skip
GEMMA = dict(
    num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, vocab_size_per_layer_input=512,
    hidden_size_per_layer_input=128,
)  # fmt: skip
MAMBA = dict(n_groups=1, chunk_size=16)
# State of recurrent layers takes a block of the small cache for each sequence.
FEW = dict(max_num_seqs=8)

FAMILIES: dict[str, tuple[str, dict]] = {
    # conv1d [C, 1, width]; beside it in Mamba 2 a view of its weight, and A_log, which the loader computes with
    "qwen3_next": ("qwen3_next", {**EXPERTS, **DELTA, "num_experts": 4}),
    "mamba2": ("mamba2", {**MAMBA, "num_heads": 8, "head_dim": 32, "state_size": 16, "expand": 2}),
    "nemotron_h": (
        "nemotron_h",
        {
            **MAMBA, "layers_block_type": ["mamba", "mlp", "attention", "mlp"], "num_hidden_layers": 4,
            "mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16,
        },
    ),
    # e_score_correction_bias, which router and experts share
    "glm4_moe": ("glm4_moe", {**EXPERTS, **GROUPS, "n_routed_experts": 4, "first_k_dense_replace": 1}),
    "ernie4_5_moe": ("ernie4_5_moe", {**EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}),
    # the same, and attention that derives tensors from loaded weights
    "deepseek_v3": (
        "deepseek_v3",
        {
            **EXPERTS, **GROUPS, "n_routed_experts": 4, "topk_method": "noaux_tc", "first_k_dense_replace": 1,
            "kv_lora_rank": 512, "q_lora_rank": 128, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
            "num_key_value_heads": 4,
        },
    ),
    # a router in float32 on a CPU
    "afmoe": ("afmoe", {**EXPERTS, **GROUPS, "num_experts": 4, "num_dense_layers": 1}),
    # the same with a loader that converts it, and norms with a loader that has no name
    "minimax_m2": (
        "minimax_m2",
        {
            **EXPERTS, "num_local_experts": 4, "intermediate_size": 128, "rotary_dim": 32, "scoring_func": "sigmoid",
            "use_routing_bias": True,
        },
    ),
    # the convolution of Mamba 1
    "jamba": (
        "jamba",
        {
            "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_offset": 1, "attn_layer_period": 2,
            "expert_layer_offset": 1, "expert_layer_period": 2, "mamba_d_state": 16, "use_mamba_kernels": False,
        },
    ),
    # parameters and buffers without dims
    "apertus": ("apertus", {}),
    # keys that are values too, in half of the layers; layers with the keys and values of others
    "gemma4_k_eq_v": (
        "gemma4_text",
        {
            **GEMMA, "global_head_dim": 32, "attention_k_eq_v": True, "num_global_key_value_heads": 2,
            "num_kv_shared_layers": 0,
        },
    ),
    "gemma4_kv_shared": ("gemma4_text", {**GEMMA, "global_head_dim": 32, "num_kv_shared_layers": 2}),
    "gemma3n": (
        "gemma3n_text",
        {
            **GEMMA, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 128,
            "sliding_window": 32, "tie_word_embeddings": True, "hidden_size_per_layer_input": 96,
        },
    ),
}  # fmt: skip

EXCLUDE = {
    # vLLM's loader takes no packed weights there.
    "jamba": ["re:.*mamba.*"],
}

# vLLM 0.31 makes these engines on a CPU, but they do not generate.
SILENT_ON_A_CPU = {
    "minimax_m2": "vLLM's router for CPUs takes no sigmoid",
    "jamba": "vLLM gives Mamba 1 a convolution that it has rearranged, on CPUs that multiply bfloat16",
}

# What vLLM 0.31 does not run on a CPU, be it from a file.
NOT_ON_A_CPU = {
    "mamba": "vLLM's loader takes no packed in_proj, and of Mamba 1 no other linear layer is quantized",
    "nemotron_h with experts": "vLLM has no experts without a gate on a CPU",
    "falcon_h1": "vLLM's own names of its Mamba layers match no entry of `ignore`",
    "lfm2": "vLLM packs convolutions of width 4 only on CPUs that multiply bfloat16; these are of width 3",
    "qwen3_5": "vLLM builds its image processor, which needs torchvision, also for text",
    "olmo_hybrid": "vLLM needs a Triton that runs on the machine",
}

# vLLM's loaders compute with these: where values go is not known.
NOT_COMPARED = ("A_log", "block_sparse_moe.e_score_correction_bias")


@pytest.fixture(autouse=True)
def release():
    """vLLM makes its groups once a process; those of an engine without experts lack one that experts need."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    yield
    release_engines()


def shake(model: nn.Module) -> None:
    """Move every value of every tensor, zeros and ones too; buffers without dims are settings, not weights."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and (tensor.ndim or name in dict(model.named_parameters())):
                tensor.add_(0.1 * torch.randn_like(tensor))


def engine_tensors(engine) -> dict[str, torch.Tensor]:
    """All that an engine's modules hold, but for caches, and the input scales of W4A16, which nothing reads."""
    model = worker_of(engine).model_runner.get_model()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for path, module in model.named_modules():
        tensors |= {f"{path}.{name}": value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
    return {name: tensor for name, tensor in tensors.items() if not re.search("input_global_scale|kv_cache", name)}


@pytest.mark.parametrize(
    "family",
    [*FAMILIES, *(pytest.param(name, marks=pytest.mark.skip(reason=why)) for name, why in NOT_ON_A_CPU.items())],
)
def test_a_push_makes_the_engine_that_loads_the_saved_checkpoint(family, tmp_path):
    model_type, options = FAMILIES[family]
    set_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SIZES, **BIG, **options})
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    shake(plain)
    plain.to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    model = load_qat(tmp_path / "plain", NVFP4QATConfig(exclude=EXCLUDE.get(family, [])))
    if ON_GPU:
        model.cuda()
    engine = empty_engine(tmp_path / "plain", model, **FEW)
    if ON_GPU or family == "gemma3n":
        # vLLM's warm-up samples before the first push, and a NaN is a token beyond the vocabulary on a GPU.
        assert all(math.isfinite(p) for _, logprobs in generate(engine) for p in logprobs)
    sync(engine, model)
    assert check(engine, model).ok

    shake(model)
    stale = check(engine, model)
    compared = [name for name, tensor in model.named_parameters() if not name.endswith(NOT_COMPARED)]
    assert len(stale.different) >= len(compared)
    sync(engine, model)
    found = check(engine, model)
    assert found.ok, found.different
    assert all(name.endswith(NOT_COMPARED) for name in found.not_compared)

    save_nvfp4(model, tmp_path / "packed")
    loaded = make_engine(tmp_path / "packed", **FEW)
    mine, theirs = engine_tensors(engine), engine_tensors(loaded)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        one, other = (t.detach().reshape(-1).view(torch.uint8) for t in (mine[name], tensor))
        assert torch.equal(one, other), name
    if family in SILENT_ON_A_CPU and not ON_GPU:
        return
    tokens = generate(engine)
    assert tokens == generate(loaded)
    assert len({token for output, _ in tokens for token in output}) > 3
