"""Every language model type of the installed Transformers, on the meta device, from its default config with few layers.

Most defaults make a model. `CHANGES` has what the others need, `NOT_BUILT` those that no few settings build.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

NUM_LAYERS = 4
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "encoder_layers", "decoder_layers")
_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
)
_TEXT = {"model_type": "llama", "pad_token_id": 0}
_EXPERTS = {"n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
_INDEXER = {
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 64},
    **{"indexer_compress_ratio": 4, "output_gate_type": "sigmoid"},
}
_TOWER = {"model_type": "siglip_vision_model", "num_hidden_layers": 2}
_ROPE = {"full_attention": None, "sliding_attention": None}
_MUSIC: dict[str, dict[str, Any]] = {
    "text_encoder": {"model_type": "t5"},
    "audio_encoder": {"model_type": "encodec"},
    "decoder": {"num_hidden_layers": 2},
}

CHANGES: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": _TOWER},
    "blt": {
        name: {"intermediate_size": 2048}
        for name in ("patcher_config", "encoder_config", "decoder_config", "global_config")
    },
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "cohere_compass": {"text_config": {"rope_parameters": _ROPE}},
    "cohere_compass_text": {"rope_parameters": _ROPE},
    "deepseek_ocr2": {
        "text_config": {
            "num_hidden_layers": 2,
            "mlp_layer_types": ["dense", "sparse"],
            "moe_intermediate_size": 1408,
        }
    },
    "deepseek_v2": {"moe_intermediate_size": 1408},
    "diffusion_gemma": {
        "text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64, "num_hidden_layers": 6},
        "vision_config": {"model_type": "gemma4_vision", "num_hidden_layers": 2},
    },
    "dots1": _EXPERTS,
    "emu3": {"vocabulary_map": {"<image>": 8711}},
    "encoder-decoder": {"encoder": {"model_type": "bert"}, "decoder": {"model_type": "bert", "is_decoder": True}},
    "fast_vlm": {"vision_config": _TOWER},
    "gemma3n": {"vision_config": _TOWER},
    "perception_lm": {"vision_config": _TOWER},
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text"}},
    "granite4_vision": {
        "text_config": {"model_type": "granite"},
        "deepstack_layer_map": [(0, 0)],
        "downsample_rate": "1/2",
    },
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64},
    "hunyuan_vl": {"text_config": {"head_dim": 64, "num_hidden_layers": 2}},
    "idefics3": {"pad_token_id": 0, "text_config": _TEXT},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "ministral": {"head_dim": 64},
    "musicgen": _MUSIC,
    "musicgen_melody": {**_MUSIC, "decoder": {"model_type": "musicgen_melody_decoder", **_MUSIC["decoder"]}},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 64},
    "qwen3_omni_moe_thinker": {"text_config": {"head_dim": 128}},
    "nemotron_h": {"moe_intermediate_size": 7680, "moe_shared_expert_intermediate_size": 7680},
    "qwen3_omni_moe": {
        "thinker_config": {"text_config": {"head_dim": 128}},
        "talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 64}},
    },
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True},
    "smolvlm": {"pad_token_id": 0, "text_config": _TEXT},
    "speech-encoder-decoder": {
        "encoder": {"model_type": "wav2vec2"},
        "decoder": {"model_type": "bert", "is_decoder": True},
    },
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "bert", "is_decoder": True}},
}

NOT_BUILT = {
    "dbrx": "its attention config lacks `rope_theta`, which its attention reads",
    "gemma3n": "its vision tower is timm's; its language model is that of gemma3n_text",
    "moonshine_streaming": "its config lacks `num_key_value_heads`, which its decoder reads",
    "perception_lm": "its vision tower is timm's",
}


def language_model_types() -> list[tuple[str, str]]:
    """(model type, class name) of every causal, image-text, speech-text and text-to-text model."""
    found = set()
    for mapping in _MAPPINGS:
        for model_type, names in getattr(modeling_auto, mapping).items():
            found |= {(model_type, name) for name in ((names,) if isinstance(names, str) else names)}
    return sorted((model_type, name) for model_type, name in found if model_type in CONFIG_MAPPING)


def on_meta(model_type: str, class_name: str) -> PreTrainedModel:
    """A model of this type with a few layers; with all layers, where it cannot have fewer."""
    model_class = getattr(transformers, class_name)
    for shorten in (_shorten, lambda config: None):
        config = CONFIG_MAPPING[model_type](**deepcopy(CHANGES.get(model_type, {})))  # configs take them apart
        text_config = config.get_text_config(decoder=True)
        if not isinstance(config, model_class.config_class) and isinstance(text_config, model_class.config_class):
            config = text_config
        try:
            shorten(config)
            config._attn_implementation = config._experts_implementation = "eager"
            with torch.device("meta"):
                return model_class(config)
        except Exception as error:
            failure = error
    raise failure


def _shorten(config: PreTrainedConfig) -> None:
    for part in _configs(config):
        for name in _DEPTHS:
            if isinstance(getattr(part, name, None), int) and getattr(part, name) > NUM_LAYERS:
                setattr(part, name, NUM_LAYERS)
        for name, value in list(vars(part).items()):
            if name.endswith(("layer_types", "indexer_types", "compress_ratios")) and isinstance(value, list):
                setattr(part, name, value[:NUM_LAYERS])


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)
