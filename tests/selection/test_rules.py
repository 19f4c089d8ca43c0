"""What stays in high precision by structure: outside the language model, choosing, or unquantized in vLLM.

coverage_by_model_type.txt has every model type; these are the kinds of structure, one by one, and what has no type.
"""

import logging

import pytest
from conftest import tiny_llama, tiny_qwen3
from model_types import on_meta
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from hf_nvfp4_qat import NVFP4QATConfig, coverage, prepare_qat
from hf_nvfp4_qat.modules.recipe import Recipe
from hf_nvfp4_qat.modules.swap import Coverage, fused_experts, swap_linears
from hf_nvfp4_qat.selection.rules import OUTSIDE, language_models, reason_by_name, reasons_by_rule


def covered(model: nn.Module) -> Coverage:
    return swap_linears(model, Recipe(), output_embedding=model.get_output_embeddings())


def divided(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """The linears and experts that may be quantized, and the others with the reason."""
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    experts = fused_experts(model)
    reasons = reasons_by_rule(model, linears, experts)
    return [name for name in (*linears, *experts) if name not in reasons], reasons


@pytest.mark.parametrize(
    "model_type, class_name, inside, outside",
    [
        # A projector of a name that no table has, beside the decoder.
        ("paddleocr_vl", "PaddleOCRVLForConditionalGeneration", "model.language_model", ["model.projector.linear_1"]),
        # Towers within the decoder, and the projections that go with them.
        (
            "phi4_multimodal", "Phi4MultimodalForCausalLM", "model.layers",
            ["model.embed_tokens_extend.image_embed.img_projection_up"],
        ),
        (
            "evolla", "EvollaForProteinText2Text", "model.layers",
            ["model.protein_encoder.sequence_compressor_resampler"],
        ),
        # `get_decoder` returns the model itself.
        (
            "qwen2_5_omni", "Qwen2_5OmniForConditionalGeneration", "thinker.model",
            ["talker.model.layers.0.mlp.up_proj", "token2wav.code2wav_dit_model.input_embed.proj"],
        ),
        ("csm", "CsmForConditionalGeneration", "backbone_model", ["depth_decoder.model.layers.0", "codec_model"]),
        # Halves: of speech to text the one that writes, of text to text both.
        ("whisper", "WhisperForConditionalGeneration", "model.decoder", ["model.encoder.layers.0.fc1"]),
        (
            "t5gemma2", "T5Gemma2ForConditionalGeneration", "model.",
            ["model.encoder.vision_tower"],
        ),
        # Heads are outside of a model that has but one part.
        ("bert", "BertLMHeadModel", "bert.encoder", ["cls.predictions.transform.dense"]),
    ],
)  # fmt: skip
def test_what_lies_outside_the_language_model_is_left_out(model_type, class_name, inside, outside):
    kept, reasons = divided(on_meta(model_type, class_name))
    assert kept and all(name.startswith(inside) for name in kept)
    for path in outside:
        assert {reason for name, reason in reasons.items() if name.startswith(path)} == {OUTSIDE}, path


def test_of_text_to_text_models_both_halves_are_quantized():
    for model_type, class_name in (("t5", "T5ForConditionalGeneration"), ("bart", "BartForConditionalGeneration")):
        kept, _ = divided(on_meta(model_type, class_name))
        assert {name.removeprefix("model.").partition(".")[0] for name in kept} == {"encoder", "decoder"}
    kept, _ = divided(on_meta("t5gemma2", "T5Gemma2ForConditionalGeneration"))
    assert any(name.startswith("model.encoder.text_model.") for name in kept)


def test_a_model_made_of_models_is_a_language_model_where_they_read_tokens():
    model = on_meta("blt", "BltForCausalLM")
    names = {name: module for name, module in model.named_modules()}
    parts = {name for name, module in names.items() if any(module is part for part in language_models(model))}
    assert parts == {f"model.{name}" for name in ("local_encoder", "global_transformer", "local_decoder", "patcher")}


def test_layers_that_share_the_weights_of_the_language_model_belong_to_it():
    model = on_meta("diffusion_gemma", "DiffusionGemmaForBlockDiffusion")
    report = covered(model)
    assert "model.encoder.language_model.layers.0.mlp.up_proj" in report.quantized
    assert report.excluded["model.encoder.vision_tower.encoder.layers.0.mlp.up_proj.linear"] == OUTSIDE
    assert report.excluded["model.decoder.self_conditioning.up_proj"] == "vLLM builds it unquantized"


def test_experts_of_another_modality_are_left_out_of_the_layers():
    report = covered(on_meta("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration"))
    assert "model.language_model.layers.1.mlp.text_moe.experts" in report.quantized
    assert report.excluded["model.language_model.layers.1.mlp.vision_moe.experts"] == "vision tower"


def test_a_wrapped_model_is_found_in_its_wrapper():
    class WithValueHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.pretrained_model = on_meta("paddleocr_vl", "PaddleOCRVLForConditionalGeneration")
            self.v_head = nn.ModuleDict({"summary": nn.Linear(16, 1)})

    kept, reasons = divided(WithValueHead())
    assert kept and all(name.startswith("pretrained_model.model.language_model.") for name in kept)
    assert reasons["v_head.summary"] == "classification or value head"


def test_a_tower_by_itself_is_taken_as_a_whole():
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    vision = CLIPVisionConfig(**sizes, patch_size=14)
    assert len(coverage(prepare_qat(CLIPVisionModel(vision))).quantized) == 6
    assert len(coverage(prepare_qat(nn.ModuleDict({"vision_tower": CLIPVisionModel(vision)}))).quantized) == 6
    text = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    assert all(".language_model." in name for name in coverage(prepare_qat(llava)).quantized)


@pytest.mark.parametrize(
    "model_type, class_name, reason, path",
    [
        ("zaya", "ZayaForCausalLM", "router", "mlp.gate.router_mlp.fc1"),
        ("glm_moe_dsa", "GlmMoeDsaForCausalLM", "token selector", "self_attn.indexer.wk"),
        ("deepseek_v4", "DeepseekV4ForCausalLM", "token selector", "compressor.indexer.scorer.weights_proj"),
        ("roberta", "RobertaForCausalLM", "output embedding", "lm_head.dense"),
        ("dia", "DiaForConditionalGeneration", "output embedding", "logits_dense"),
        ("fsmt", "FSMTForConditionalGeneration", "output embedding", "decoder.output_projection"),
        ("axk2", "AXK2ForCausalLM", "part of a norm", "input_layernorm.mlp.fc1"),
        ("jamba", "JambaForCausalLM", "vLLM builds it unquantized", "mamba.in_proj"),
    ],
)
def test_layers_that_choose_answer_or_are_unquantized_in_vllm_are_left_out(model_type, class_name, reason, path):
    kept, reasons = divided(on_meta(model_type, class_name))
    assert {why for name, why in reasons.items() if name.endswith(path)} == {reason}
    assert kept and not any(name.endswith(path) for name in kept)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 16) for _ in range(3))
        self.chooser, self.mixer = nn.Linear(32, 3), nn.Linear(32, 16)


class PageIndexer(nn.Module):
    def __init__(self):
        super().__init__()
        self.scores = nn.Linear(32, 16)


def test_a_router_is_what_has_an_output_for_each_expert_and_a_selector_what_its_class_says():
    report = coverage(prepare_qat(nn.ModuleDict({"block": Block(), "pages": PageIndexer()})))
    assert report.excluded == {"block.chooser": "router", "pages.scores": "token selector"}
    assert report.quantized == ("block.experts.0", "block.experts.1", "block.experts.2", "block.mixer")


@pytest.mark.parametrize(
    "name, reason",
    [
        ("lm_head", "output embedding"),
        ("audio_lm_head", "output embedding"),
        ("model.layers.0.mlp.gate", "router"),
        ("model.layers.0.mlp.gate.router_mlp.fc1", "router"),
        ("model.layers.0.block_sparse_moe.router.layer", "router"),
        ("model.layers.0.mlp.shared_expert_gate", "router"),
        ("model.layers.0.self_attn.indexer.weights_proj", "token selector"),
        ("classifier.dense", "classification or value head"),
        ("model.high_res_vision_model.neck", "vision tower"),
        ("model.multi_modal_projector.linear_1", "modality projector"),
        ("model.layers.0.mlp.gate_proj", None),
        ("model.layers.0.self_attn.forget_gate.f_a_proj", None),
        ("model.layers.0.mlp.gate_up_proj", None),
        ("model.layers.0.self_attn.q_norm_proj", None),
    ],
)
def test_names_are_matched_by_whole_components(name, reason):
    assert reason_by_name(name) == reason


def test_a_model_of_mamba_mixers_alone_is_trained_and_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "hf_nvfp4_qat"):
        assert covered(on_meta("mamba", "MambaForCausalLM")).quantized
    assert "vLLM 0.31 builds Mamba mixers unquantized" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_nvfp4_qat"):
        covered(on_meta("jamba", "JambaForCausalLM"))
        prepare_qat(tiny_qwen3(), NVFP4QATConfig()), prepare_qat(tiny_llama())
    assert not [record for record in caplog.records if record.name.startswith("hf_nvfp4_qat")]
