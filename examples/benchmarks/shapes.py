"""The shapes of published models, for random weights."""

from enum import StrEnum

from transformers import PretrainedConfig, Qwen3Config, Qwen3MoeConfig


class Shape(StrEnum):
    """Model names as options of the benchmarks."""

    dense = "Qwen3-8B"
    experts = "Qwen3-30B-A3B"

    def config(self, **changes) -> PretrainedConfig:
        """The model's configuration; `changes` (num_hidden_layers, vocab_size, ...) win."""
        shared = dict(vocab_size=151936, num_attention_heads=32, head_dim=128, tie_word_embeddings=False)
        if self is Shape.dense:
            sizes = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_key_value_heads=8)
            return Qwen3Config(**{**shared, **sizes, **changes})
        sizes = dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_key_value_heads=4)
        experts = dict(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True)
        return Qwen3MoeConfig(**{**shared, **sizes, **experts, **changes})
