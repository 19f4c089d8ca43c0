"""doctor finds each planted fault and none in healthy checkpoints; --fix mends without changing a decoded value."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import SIZES, load_qat, tiny_llama, tiny_moe, tiny_qwen3, tiny_qwen3_moe, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_nvfp4_qat import NVFP4QATConfig, calibrate_activations, load_nvfp4, quantize_nvfp4, save_nvfp4, verify_nvfp4
from hf_nvfp4_qat.checkpoint.convert import convert_checkpoint, quantize_checkpoint
from hf_nvfp4_qat.checkpoint.skeleton import skeleton
from hf_nvfp4_qat.cli import app
from hf_nvfp4_qat.doctor.examine import examine
from hf_nvfp4_qat.doctor.findings import ENGINES, RULES, SEVERITIES, Diagnosis, fold, found
from hf_nvfp4_qat.doctor.repair import repair
from hf_nvfp4_qat.formats.files import printable
from hf_nvfp4_qat.formats.names import from_checkpoint, quantized_layers, to_checkpoint
from hf_nvfp4_qat.selection.fused_groups import always_fused_key, fused_group_key

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
Q = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.0.mlp.experts.3.up_proj"
ROUTER = "model.layers.0.mlp.gate"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}


def by_compressed_tensors(path: Path) -> None:
    """A W4A16 checkpoint as llm-compressor writes it: their packer, 2688 / amax, their fields in config.json."""
    pytest.importorskip("compressed_tensors")
    from their_packing import their_pack

    model = tiny_llama().bfloat16()
    model.save_pretrained(path)
    weights = load_file(path / SINGLE)
    linears = [name.removesuffix(".weight") for name in weights if name.endswith("_proj.weight")]
    amax: dict[str, torch.Tensor] = {}
    for layer in linears:
        key, largest = fused_group_key(layer), weights[f"{layer}.weight"].float().abs().max()
        amax[key] = torch.maximum(amax.get(key, largest), largest)
    for layer in linears:
        encode_scale = (2688 / amax[fused_group_key(layer)]).reshape(1)
        packed = their_pack(weights.pop(f"{layer}.weight"), encode_scale)
        weights |= {f"{layer}.{name}": tensor for name, tensor in packed.items()}
    save_file(weights, path / SINGLE, metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    group = {"targets": ["Linear"], "weights": {**NVFP4, "dynamic": False, "observer": "static_minmax"}}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "version": "0.20.0",
        "ignore": ["lm_head"],
        "quantization_status": "compressed", "kv_cache_scheme": None, "global_compression_ratio": None,
        "config_groups": {"group_0": {**group, "input_activations": None, "output_activations": None}},
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))


def unpack(tensors: dict[str, torch.Tensor], layer: str) -> None:
    tensors[f"{layer}.weight"] = from_checkpoint(layer, tensors.__getitem__).dequantize(torch.bfloat16)
    for part in ("weight_packed", "weight_scale", "weight_global_scale"):
        del tensors[f"{layer}.{part}"]


def in_fp8(tensors: dict[str, torch.Tensor], layer: str) -> None:
    unpack(tensors, layer)
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(torch.float8_e4m3fn)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints that are as they should be; tests copy them."""
    root = tmp_path_factory.mktemp("healthy")
    for name, model in {"qwen3": tiny_qwen3(), "llama": tiny_llama(), "moe": tiny_qwen3_moe()}.items():
        model.bfloat16().save_pretrained(root / "source" / name)
    llama = load_qat(root / "source" / "llama")
    load_qat(root / "source" / "qwen3").save_pretrained(root / "ours")
    save_nvfp4(llama, root / "shards", max_shard_size="24KB")
    save_nvfp4(llama, root / "modelopt", dialect="modelopt")
    load_qat(root / "source" / "moe").save_pretrained(root / "experts")
    with_inputs = load_qat(root / "source" / "llama", NVFP4QATConfig(activations="nvfp4"))
    calibrate_activations(with_inputs, [tokens()])
    with_inputs.save_pretrained(root / "W4A4")
    by_compressed_tensors(root / "llm-compressor")
    convert_checkpoint(root / "llm-compressor", root / "NVIDIA", "modelopt")
    shutil.rmtree(root / "source")
    return {path.name: path for path in root.iterdir()}


HEALTHY = ("ours", "shards", "modelopt", "experts", "W4A4", "llm-compressor", "NVIDIA")


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_found_in_a_healthy_checkpoint(name, healthy):
    diagnosis = examine(healthy[name])
    assert diagnosis.ok, str(diagnosis)
    assert diagnosis.num_layers == {"experts": 56}.get(name, 14)
    assert diagnosis.dialect == ("modelopt" if name in ("modelopt", "NVIDIA") else "compressed-tensors")
    assert not any(finding.rule == "not-compared" for finding in diagnosis.findings)
    assert examine(healthy[name], engine="vllm", tensor_parallel_size=2).ok
    assert repair(shutil.copytree(healthy[name], healthy[name].parent.parent / f"{name} copy")) == []


# Damage: each takes the directory of a copy.
Damage = Callable[[Path], Any]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """By their names in the files."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Change the tensors of a checkpoint of one file."""

    def damage(path: Path) -> None:
        with safe_open(path / SINGLE, framework="pt") as file:
            metadata = file.metadata()
        tensors = tensors_of(path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / SINGLE, metadata=metadata)

    return damage


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return changed(lambda tensors: tensors.update({name: change(tensors[name].clone())}))


def all_tensors(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return changed(lambda tensors: tensors.update({n: change(t) for n, t in tensors.items() if n.endswith(part)}))


def dropped(*names: str) -> Damage:
    return changed(lambda tensors: [tensors.pop(name) for name in names])


def with_byte(index: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """One byte of a tensor replaced: an E4M3 scale, or two codes."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.uint8).flatten()[index] = value
        return tensor

    return change


def edited(file: str, change: Callable[[dict], Any]) -> Damage:
    def damage(path: Path) -> None:
        content = json.loads((path / file).read_text())
        change(content)
        (path / file).write_text(json.dumps(content))

    return damage


def config(**changes: Any) -> Damage:
    return edited("config.json", lambda content: content.update(changes))


def quantization(**changes: Any) -> Damage:
    return edited("config.json", lambda content: content["quantization_config"].update(changes))


def group(**changes: Any) -> Damage:
    return edited("config.json", lambda c: c["quantization_config"]["config_groups"]["group_0"].update(changes))


def written(file: str, content: str | bytes) -> Damage:
    return lambda path: (path / file).write_bytes(content.encode() if isinstance(content, str) else content)


def removed(file: str) -> Damage:
    return lambda path: (path / file).unlink()


def all_of(*damages: Damage) -> Damage:
    return lambda path: [damage(path) for damage in damages]


def remapped(change: Callable[[dict[str, str]], Any]) -> Damage:
    return edited(INDEX, lambda index: change(index["weight_map"]))


def packed_instead(layer: str, dialect: str = "compressed-tensors", scale: float = 1.0) -> Damage:
    """A layer that is to stay in bfloat16, packed by accident."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        weight = quantize_nvfp4(tensors.pop(f"{layer}.weight"))
        packed = to_checkpoint(layer, weight)
        packed[f"{layer}.weight_global_scale"] *= scale
        if dialect == "modelopt":
            packed = {
                f"{layer}.weight": weight.packed,
                f"{layer}.weight_scale": weight.block_scale,
                f"{layer}.weight_scale_2": weight.global_decode_scale,
            }
        tensors.update(packed)

    def damage(path: Path) -> None:
        changed(change)(path)
        quantization(ignore=["lm_head"] if layer != "lm_head" else [])(path)

    return damage


def tied_head(path: Path) -> None:
    changed(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(path)
    packed_instead("lm_head")(path)


def another_head(path: Path) -> None:
    changed(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}))(path)


def overlapping(path: Path) -> None:
    """vLLM takes the first group of the file, Transformers the first by its letters."""

    def change(content: dict) -> None:
        first = content["quantization_config"]["config_groups"]["group_0"]
        second = {**first, "targets": ["re:.*mlp.*"], "input_activations": {**NVFP4, "dynamic": "local"}}
        first["targets"] = ["re:.*proj$"]
        content["quantization_config"]["config_groups"]["group_1"] = second

    edited("config.json", change)(path)


def in_two_files(path: Path) -> None:
    weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map["model.norm.weight"])
    tensors = load_file(path / other)
    save_file({**tensors, "model.norm.weight": torch.ones(64, dtype=torch.bfloat16)}, path / other)


def in_another_file(weight_map: dict[str, str]) -> None:
    weight_map["model.norm.weight"] = next(f for f in weight_map.values() if f != weight_map["model.norm.weight"])


def directory_instead(path: Path) -> None:
    (path / SINGLE).unlink()
    (path / SINGLE).mkdir()


def pipe_instead(path: Path) -> None:
    (path / SINGLE).unlink()
    os.mkfifo(path / SINGLE)


def zeros_at_the_end(path: Path) -> None:
    """What a copy leaves that had room reserved and did not end."""
    size = (path / SINGLE).stat().st_size
    os.truncate(path / SINGLE, size - 4_000)
    os.truncate(path / SINGLE, size)


def last_shard_lost(path: Path) -> None:
    sorted(path.glob("*.safetensors"))[-1].unlink()


double = tensor(f"{UP}.weight_global_scale", lambda t: t * 2)
subnormal = tensor(f"{DOWN}.weight_scale", with_byte(0, 3))

# Name: (healthy checkpoint, damage, rule, where, whether it can be mended).
FAULTS: dict[str, tuple[str, Damage, str, str, bool]] = {
    "a head that is another than the embedding": ("ours", another_head, "another-head", "lm_head.weight", False),
    "a tied head that is not ignored": ("ours", quantization(ignore=[]), "ignore-mismatch", "lm_head", True),
    "groups that overlap": ("ours", overlapping, "overlapping-targets", UP, False),
    "a truncated file": ("ours", lambda p: os.truncate(p / SINGLE, 20_000), "unreadable-file", SINGLE, False),
    "a pointer to a file": (
        "ours", written(SINGLE, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "unreadable-file", SINGLE, False,
    ),
    "no safetensors file": ("ours", written(SINGLE, b"\x80\x04pickle"), "unreadable-file", SINGLE, False),
    "a directory for a file": ("ours", directory_instead, "unreadable-file", SINGLE, False),
    "a pipe for a file": ("ours", pipe_instead, "unreadable-file", SINGLE, False),
    "a shard lost": ("shards", last_shard_lost, "missing-shard", "model-", False),
    "a shard and the index lost": ("shards", all_of(last_shard_lost, removed(INDEX)), "missing-shard", "model-", False),
    "a path to another place": (
        "shards", remapped(lambda m: m.update({"model.norm.weight": "../../secret.safetensors"})), "path-outside",
        INDEX, False,
    ),
    "an index that names another file": (
        "shards", remapped(in_another_file), "index-mismatch", "model.norm.weight", True,
    ),
    "an index without a tensor": (
        "shards", remapped(lambda m: m.pop("model.norm.weight")), "index-mismatch", "model.norm.weight", True,
    ),
    "an index with a tensor too many": (
        "shards", remapped(lambda m: m.update(ghost=m["model.norm.weight"])), "index-mismatch", "ghost", False,
    ),
    "an index lost": ("shards", removed(INDEX), "index-mismatch", INDEX, True),
    "an index that is not JSON": ("shards", written(INDEX, "{"), "bad-json", INDEX, True),
    "an index nested without end": ("shards", written(INDEX, "[" * 100_000), "bad-json", INDEX, True),
    "an index of numbers": ("shards", edited(INDEX, lambda i: i.update(weight_map={"a": 1})), "bad-json", INDEX, True),
    "a tensor twice": ("shards", in_two_files, "duplicate-tensor", "model.norm.weight", False),
    "two layouts": (
        "shards", lambda p: shutil.copy(sorted(p.glob("*.safetensors"))[0], p / SINGLE), "two-layouts", SINGLE, False,
    ),
    "strange weights": ("ours", written("adapter.safetensors", ""), "stray-weights", "adapter.safetensors", False),
    "no config": ("ours", removed("config.json"), "no-config", "config.json", False),
    "a config that is not JSON": ("ours", written("config.json", b"\xff"), "bad-json", "config.json", False),
    "a config that is a list": ("ours", written("config.json", "[]"), "bad-json", "config.json", False),
    "a config without quantization": (
        "ours", edited("config.json", lambda c: c.pop("quantization_config")), "no-quantization-config", "config.json",
        False,
    ),
    "nothing packed": (
        "ours", changed(lambda t: [t.pop(name) for name in list(t) if "weight_" in name]), "nothing-packed",
        "config.json", False,
    ),
    "another format": ("ours", quantization(format="pack-quantized"), "other-format", "config.json", False),
    "another algorithm": ("modelopt", quantization(quant_algo="FP8"), "other-format", "config.json", False),
    "blocks of another size, there": (
        "modelopt", group(weights={"num_bits": 4, "type": "float", "group_size": 32}), "other-format", "config.json",
        False,
    ),
    "a field of another type": ("ours", quantization(ignore=5), "bad-config", "config.json", False),
    "a pattern that is none": ("ours", quantization(ignore=["re:("]), "bad-config", "config.json", False),
    "no model type": ("ours", edited("config.json", lambda c: c.pop("model_type")), "bad-config", "config.json", False),
    "sizes that make no model": ("ours", config(num_attention_heads=0), "bad-config", "config.json", False),
    "groups of eight bits": ("ours", group(weights={**NVFP4, "num_bits": 8}), "bad-group", "config.json", False),
    "groups without layers": ("ours", group(targets=[]), "bad-group", "config.json", False),
    "groups of another format": ("ours", group(format="float-quantized"), "bad-group", "config.json", False),
    "no groups": ("ours", quantization(config_groups={}), "bad-group", "config.json", False),
    "groups of other layers": ("ours", group(targets=["re:.*self_attn.*"]), "bad-group", "mlp", False),
    "a config of the other dialect": (
        "ours", config(quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"}), "dialect-mismatch",
        "config.json", False,
    ),
    "tensors of the other dialect": (
        "modelopt", config(quantization_config={"quant_method": "compressed-tensors"}), "dialect-mismatch",
        "config.json", False,
    ),
    "frozen": ("ours", quantization(quantization_status="frozen"), "status-not-compressed", "config.json", True),
    "float32": ("ours", config(dtype="float32"), "dtype-float32", "config.json", True),
    "float32 that is stored so": (
        "ours", all_of(config(dtype="float32"), tensor("model.norm.weight", lambda t: t.float())), "dtype-float32",
        "config.json", False,
    ),
    "an unpacked layer ignored by the end of its name": (
        "ours", all_of(changed(lambda tensors: unpack(tensors, DOWN)), quantization(ignore=["down_proj"])),
        "ignore-mismatch", DOWN, True,
    ),
    "a packed layer ignored": ("ours", quantization(ignore=["lm_head", UP]), "ignore-mismatch", UP, True),
    "packed layers ignored by a pattern": (
        "llm-compressor", quantization(ignore=[r"re:.*(up_proj|lm_head)$"]), "ignore-mismatch", UP, True,
    ),
    "an unpacked layer not ignored": ("llm-compressor", quantization(ignore=[]), "ignore-mismatch", "lm_head", True),
    "a fused group packed in part": (
        "ours", all_of(changed(lambda tensors: unpack(tensors, Q)), quantization(ignore=[Q])), "split-group",
        Q.replace("q_proj", "k_proj"), False,
    ),
    "a layer in another format": (
        "ours", changed(lambda tensors: in_fp8(tensors, DOWN)), "ignore-mismatch", DOWN, False,
    ),
    "an unpacked layer not ignored, there": ("modelopt", quantization(ignore=[]), "ignore-mismatch", "lm_head", True),
    "two configs that disagree": (
        "modelopt", edited("hf_quant_config.json", lambda c: c["quantization"].update(exclude_modules=[UP])),
        "configs-disagree", "hf_quant_config.json", True,
    ),
    "a packed layer excluded by a wildcard": (
        "modelopt", quantization(ignore=["lm_head", "model.layers.0*"]), "ignore-mismatch", "model.layers.0", True,
    ),
    "packed layers excluded by a part of the name of their fused one": (
        "modelopt", quantization(ignore=["lm_head", "mlp.gate"]), "ignore-mismatch", UP, True,
    ),
    "two configs that disagree, and neither is right": (
        "modelopt",
        all_of(
            edited("hf_quant_config.json", lambda c: c["quantization"].update(quant_algo="NVFP4")),
            changed(lambda t: t.update({f"{UP}.input_scale": torch.ones(())})),
        ),
        "configs-disagree", "hf_quant_config.json", False,
    ),
    "an input scale missing": ("W4A4", dropped(f"{UP}.input_global_scale"), "missing-input-scale", UP, False),
    "an input scale too many": (
        "ours", changed(lambda t: t.update({f"{UP}.input_global_scale": torch.ones(1)})), "unused-input-scale", UP,
        False,
    ),
    "an input scale of zero": (
        "W4A4", tensor(f"{UP}.input_global_scale", lambda t: t * 0), "bad-input-scale", UP, False,
    ),
    "input scales not shared": (
        "W4A4", tensor(f"{UP}.input_global_scale", lambda t: t * 3), "unshared-input-scale", UP, False,
    ),
    "scales missing": ("ours", dropped(f"{UP}.weight_scale"), "missing-parts", UP, False),
    "both forms": ("ours", changed(lambda t: t.update({f"{UP}.weight": torch.ones(2)})), "both-forms", UP, False),
    "scales without codes": ("ours", dropped(f"{UP}.weight_packed"), "scale-without-codes", UP, False),
    "scales of another dtype": ("ours", tensor(f"{UP}.weight_scale", lambda t: t.float()), "wrong-layout", UP, False),
    "codes of another dtype": ("ours", tensor(f"{UP}.weight_packed", lambda t: t.int()), "wrong-layout", UP, False),
    "too few rows": ("ours", tensor(f"{UP}.weight_packed", lambda t: t[:-1]), "wrong-layout", UP, False),
    "blocks cut": ("ours", tensor(f"{UP}.weight_packed", lambda t: t[:, :-4]), "wrong-layout", UP, False),
    "several global scales": (
        "ours", tensor(f"{UP}.weight_global_scale", lambda t: t.repeat(2)), "wrong-layout", UP, False,
    ),
    "a global scale of zero": (
        "ours", tensor(f"{DOWN}.weight_global_scale", lambda t: t * torch.inf), "bad-global-scale", DOWN, False,
    ),
    "a global scale that is NaN": (
        "modelopt", tensor(f"{DOWN}.weight_scale_2", lambda t: t * torch.nan), "bad-global-scale", DOWN, False,
    ),
    "a block scale that is NaN": (
        "ours", tensor(f"{UP}.weight_scale", with_byte(0, 0x7F)), "bad-block-scale", UP, False,
    ),
    "a negative block scale": ("ours", tensor(f"{UP}.weight_scale", with_byte(0, 0xB8)), "bad-block-scale", UP, False),
    "a block scale of zero": ("ours", tensor(f"{UP}.weight_scale", with_byte(0, 0)), "zero-block-scale", UP, False),
    "a file that ends in zeros": ("ours", zeros_at_the_end, "lost-codes", "proj", False),
    "a subnormal block scale": (
        # Of weights whose scales are all small there is room above.
        "ours", all_of(tensor(f"{DOWN}.weight_scale", lambda t: (t.float() / 64).to(t.dtype)), subnormal),
        "subnormal-block-scale", DOWN, True,
    ),
    "a subnormal block scale beside a large one": ("ours", subnormal, "subnormal-block-scale", DOWN, False),
    "a scale not shared": ("ours", double, "unshared-scale", "up_proj", True),
    "a scale not shared, there": (
        "modelopt", tensor(f"{UP}.weight_scale_2", lambda t: t / 4), "unshared-scale", "up_proj", True,
    ),
    "another tool's scale not shared": (
        "llm-compressor", tensor(f"{Q}.weight_global_scale", lambda t: t * 2), "unshared-scale", "self_attn", True,
    ),
    "a scale that is not the one of its metadata": (
        "NVIDIA", all_tensors("weight_scale_2", lambda t: t / 2), "unreadable-tensor", "proj", False,
    ),
    "a scale not shared in an expert": (
        "experts", tensor(f"{EXPERT}.weight_global_scale", lambda t: t / 2), "unshared-scale", "experts.3", True,
    ),
    "a scale three times another": (
        "ours", tensor(f"{UP}.weight_global_scale", lambda t: t * 3), "unshared-scale", "up_proj", False,
    ),
    "a scale too far from another": (
        "ours", tensor(f"{UP}.weight_global_scale", lambda t: t * 2.0**20), "unshared-scale", "up_proj", False,
    ),
    "reciprocal scales": (
        "llm-compressor", all_tensors("weight_global_scale", lambda t: 1 / t), "implausible-scale", "proj", False,
    ),
    "a scale of the cache that is zero": (
        "ours", changed(lambda t: t.update({f"{Q.replace('q_proj', 'k_proj')}.k_scale": torch.zeros(1)})),
        "bad-cache-scale", "k_scale", False,
    ),
    "an embedding in integers": (
        "ours", tensor("model.embed_tokens.weight", lambda t: t.to(torch.int8)), "wrong-layout", "embed_tokens", False,
    ),
    "a tokenizer that is not JSON": (
        "ours", written("tokenizer.json", "{"), "bad-json", "tokenizer.json", False,
    ),
    "a norm that is NaN": (
        "ours", tensor("model.norm.weight", lambda t: t * torch.nan), "not-finite", "model.norm", False,
    ),
    "a router packed": ("experts", packed_instead(ROUTER), "quantized-router", ROUTER, True),
    "the output embedding packed": ("llm-compressor", packed_instead("lm_head"), "quantized-lm-head", "lm_head", True),
    "the output embedding packed, there": (
        # vLLM reads it there, so it may be meant.
        "modelopt", packed_instead("lm_head", "modelopt"), "quantized-lm-head", "lm_head", False,
    ),
    "the output embedding packed by another tool": (
        "llm-compressor", packed_instead("lm_head", scale=1.37), "quantized-lm-head", "lm_head", False,
    ),
    "a tied output embedding packed": ("ours", tied_head, "tied-lm-head", "lm_head", False),
    "the input embedding packed": (
        "llm-compressor", packed_instead("model.embed_tokens"), "quantized-embedding", "embed_tokens", True,
    ),
    "an expert missing": (
        "experts",
        changed(lambda t: [t.pop(name) for name in list(t) if ".0.mlp.experts.7." in name]),
        "missing-expert", "model.layers.0.mlp.experts", False,
    ),
    "a projection of an expert missing": (
        "experts", changed(lambda t: [t.pop(name) for name in list(t) if name.startswith(EXPERT)]),
        "missing-expert", "model.layers.0.mlp.experts.3", False,
    ),
    "an expert with a tensor more": (
        "experts", changed(lambda t: t.update({f"{EXPERT}.bias": torch.ones(1)})),
        "missing-expert", "model.layers.0.mlp.experts.3", False,
    ),
    "more experts than config.json has": ("experts", config(num_experts=4), "missing-expert", "experts", False),
    "a norm missing": ("ours", dropped("model.norm.weight"), "missing-tensor", "model.norm.weight", False),
    "a tensor too many": ("ours", changed(lambda t: t.update(extra=torch.ones(1))), "unknown-tensor", "extra", False),
    "a norm of another size": (
        "ours", tensor("model.norm.weight", lambda t: t[:32]), "wrong-shape", "model.norm", False,
    ),
    "a packed layer of another size": ("ours", config(intermediate_size=256), "wrong-shape", "mlp", False),
}  # fmt: skip


def copy_of(healthy: dict[str, Path], name: str, path: Path) -> Path:
    return Path(shutil.copytree(healthy[name], path))


def finding_of(diagnosis: Diagnosis, rule: str, where: str) -> Any:
    matching = [finding for finding in diagnosis.findings if finding.rule == rule and where in finding.where]
    assert matching, str(diagnosis)
    return matching[0]


def decoded(path: Path) -> dict[str, torch.Tensor]:
    """Every weight as the bits of its float32 values, as the files say it in either dialect, without doctor."""
    tensors = tensors_of(path)
    values = {}
    for name in [name for name in tensors if name.endswith(".weight_scale_2")]:
        layer = name.removesuffix(".weight_scale_2")
        tensors[f"{layer}.weight_global_scale"] = 1 / tensors.pop(name)
        tensors[f"{layer}.weight_packed"] = tensors.pop(f"{layer}.weight")
    layers = quantized_layers(list(tensors))
    for layer in layers:
        values[f"{layer}.weight"] = from_checkpoint(layer, tensors.__getitem__).dequantize(torch.float32)
    packed = {
        f"{layer}.{part}" for layer in layers for part in ("weight_packed", "weight_scale", "weight_global_scale")
    }
    values |= {name: tensor for name, tensor in tensors.items() if name not in packed}
    return {name: value.float().view(torch.int32) for name, value in values.items()}


def bytes_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.is_file()}


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: config(quantization_config="nvfp4")(path),
        lambda path: quantization(ignore=7)(path),
        lambda path: config(num_attention_heads=0)(path),
        lambda path: config(hidden_act="nobody's")(path),
    ],
    ids=["no object", "no list", "no heads", "no function"],
)
def test_a_config_that_nothing_can_use_is_one_line_for_verify_too(damage, healthy, tmp_path):
    path = copy_of(healthy, "ours", tmp_path / "copy")
    damage(path)
    result = CliRunner().invoke(app, ["verify", str(path)])
    assert result.exit_code in (0, 2) and not isinstance(result.exception, (TypeError, AttributeError, KeyError))
    examine(path)


def test_a_repair_that_fails_leaves_the_diagnosis_standing(healthy, tmp_path, monkeypatch):
    path = copy_of(healthy, "ours", tmp_path / "copy")
    config(dtype="float32")(path)

    def read_only(*args, **kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", read_only)
    result = CliRunner().invoke(app, ["doctor", str(path), "--fix"])
    assert result.exit_code == 2
    assert "dtype-float32" in result.output and "nothing was fixed: read-only" in result.output


@pytest.mark.parametrize("base, damage, rule, where, can_be_mended", FAULTS.values(), ids=FAULTS)
def test_each_fault_is_found_and_mended_or_left_alone(base, damage, rule, where, can_be_mended, healthy, tmp_path):
    path = copy_of(healthy, base, tmp_path / "copy")
    damage(path)
    diagnosis = examine(path)
    finding = finding_of(diagnosis, rule, where)
    assert not diagnosis.ok and finding.severity != "note"
    if not can_be_mended:
        assert not finding.fixable
        if not any(finding.fixable for finding in diagnosis.findings):
            before = bytes_of(path)
            assert repair(path) == [] and bytes_of(path) == before
        return
    assert any(finding.fixable for finding in diagnosis.findings)
    before = decoded(path)
    assert repair(path)
    after = examine(path)
    assert after.ok, str(after)
    now = decoded(path)
    assert now.keys() == before.keys()
    for name, bits in before.items():
        assert torch.equal(now[name], bits), name
    assert verify_nvfp4(path).ok, str(verify_nvfp4(path))
    assert repair(path) == []


def test_every_rule_that_is_no_note_has_a_planted_fault():
    elsewhere = {"unfinished-repair", "tensor-parallel", "plain-loading"}
    elsewhere |= {"unquantized-in-vllm", "vllm-name"}  # see test_families.py
    elsewhere |= {"another-model"}  # what verify_nvfp4 finds where a model is given
    planted = {rule for _, _, rule, _, _ in FAULTS.values()} | elsewhere
    assert {rule for rule, known in RULES.items() if known.severity != "note"} == planted
    assert all(known.severity in SEVERITIES and set(known.engines) <= set(ENGINES) for known in RULES.values())


def rules_of(path: Path, **options: Any) -> set[str]:
    return {finding.rule for finding in examine(path, **options).findings if finding.severity != "note"}


@pytest.mark.parametrize("damage", [lambda p: os.truncate(p / SINGLE, 20_000), written(SINGLE, b"\x80\x04pickle")])
@pytest.mark.parametrize("base", ["ours", "modelopt", "W4A4"])
def test_a_file_that_cannot_be_read_is_one_fault_and_its_tensors_are_not_missed(base, damage, healthy, tmp_path):
    path = copy_of(healthy, base, tmp_path / "copy")
    damage(path)
    assert rules_of(path) == {"unreadable-file"}


@pytest.mark.parametrize("number", range(3))
def test_a_damaged_or_lost_shard_is_one_fault_and_a_tensor_missing_elsewhere_another(number, healthy, tmp_path):
    path = copy_of(healthy, "shards", tmp_path / "copy")
    shard = sorted(path.glob("*.safetensors"))[number]
    os.truncate(shard, 1_000)
    assert rules_of(path) == {"unreadable-file"}
    shard.unlink()
    assert rules_of(path) == {"missing-shard"}
    file_of = json.loads((path / INDEX).read_text())["weight_map"]
    hidden = {name.rpartition(".")[0] for name, file in file_of.items() if file == shard.name}
    lost = next(name for name in file_of if name.endswith(".weight_scale") and name.rpartition(".")[0] not in hidden)
    other = path / file_of[lost]
    tensors = load_file(other)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, other, metadata={"format": "pt"})
    remapped(lambda weight_map: weight_map.pop(lost))(path)
    assert rules_of(path) == {"missing-shard", "missing-parts"}


def test_rows_of_zeros_are_a_note_of_their_layer(healthy, tmp_path):
    path = copy_of(healthy, "ours", tmp_path / "copy")
    zeros = {f"{UP}.weight_packed": 0, f"{UP}.weight_scale": 0}
    changed(lambda t: [t[name].view(torch.uint8)[5:8].fill_(value) for name, value in zeros.items()])(path)
    finding = next(finding for finding in examine(path).findings if finding.rule == "zero-rows")
    assert (finding.where, finding.message, finding.severity) == (UP, "3 rows decode to nothing but zeros", "note")
    assert not any(finding.rule == "zero-rows" for finding in examine(healthy["ours"]).findings)


def test_groups_that_overlap_are_said_where_formats_are_mixed(healthy, tmp_path):
    path = copy_of(healthy, "ours", tmp_path / "copy")
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
    changed(lambda t: in_fp8(t, DOWN))(path)

    def mix(targets: list[str], order: int) -> None:
        group = json.loads((healthy["ours"] / "config.json").read_text())["quantization_config"]["config_groups"]
        nvfp4 = {**group["group_0"], "targets": targets}
        other = {"targets": [f"re:.*{DOWN[6:]}$"], "weights": fp8, "input_activations": None}
        groups = {"nvfp4": nvfp4, "fp8": other} if order else {"fp8": other, "nvfp4": nvfp4}
        quantization(format="mixed-precision", config_groups=groups)(path)

    mix(["re:.*_proj$"], 0)  # sorts before "re:.*layers"
    assert rules_of(path) == {"overlapping-targets"}
    assert finding_of(examine(path), "overlapping-targets", DOWN).message.startswith("vLLM takes it for one of `fp8`")
    mix(["re:.*proj$"], 0)
    assert not rules_of(path)
    mix(["re:.*proj$"], 1)
    assert rules_of(path) == {"overlapping-targets"}
    mix(["re:.*_proj$"], 1)
    assert rules_of(path) == {"overlapping-targets"}
    assert "engines take it for one of `nvfp4`" in finding_of(examine(path), "overlapping-targets", DOWN).message
    mix(["re:.*(?<!down)_proj$", "re:.*1[.]mlp[.]down_proj$"], 1)
    assert not rules_of(path)


@pytest.mark.parametrize(
    "family, changes",
    [
        ("nanochat", {}),
        ("zamba2", dict(
            mamba_d_state=16, mamba_headdim=16, mamba_ngroups=1, num_hidden_layers=4, n_mamba_heads=8, mamba_expand=2,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], use_mamba_kernels=False,
            attention_hidden_size=128, hybrid_layer_ids=[1, 3], num_mem_blocks=1,
        )),
    ],
)  # fmt: skip
def test_models_that_plain_transformers_cannot_build_packed_are_named(family, changes, tmp_path):
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CONFIG_MAPPING[family](**{**SIZES, **ids, **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "packed")
    (finding, *_) = (found for found in examine(tmp_path / "packed").findings if found.rule == "plain-loading")
    assert finding.severity == "warning" and finding.engines == ("transformers",)
    assert not examine(tmp_path / "packed", engine="transformers").ok
    assert examine(tmp_path / "packed", engine="vllm").ok
    with pytest.raises(AttributeError, match="weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert not load_nvfp4(tmp_path / "packed").nvfp4_requantization.moved


def test_a_mended_checkpoint_gives_the_logits_it_gave_where_each_layer_has_its_own_scale(healthy, tmp_path):
    path = copy_of(healthy, "ours", tmp_path / "copy")
    double(path)
    before = AutoModelForCausalLM.from_pretrained(path)(tokens()).logits  # Transformers fuses nothing
    repair(path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(path)(tokens()).logits, before)
    scales = [tensors_of(path)[f"model.layers.0.mlp.{name}.weight_global_scale"] for name in ("up_proj", "gate_proj")]
    assert torch.equal(*scales)


def test_faults_of_shards_are_mended_file_by_file(healthy, tmp_path):
    path = copy_of(healthy, "shards", tmp_path / "copy")
    file = json.loads((path / INDEX).read_text())["weight_map"][f"{UP}.weight_global_scale"]
    scale_moved(path)
    before, values = bytes_of(path), decoded(path)
    repair(path)
    after = bytes_of(path)
    assert file in {name for name in after if after[name] != before[name]} and after.keys() == before.keys()
    assert after[INDEX] == before[INDEX] and len({n for n in after if after[n] != before[n]}) < len(after) / 2
    assert examine(path).ok and all(torch.equal(decoded(path)[name], bits) for name, bits in values.items())
    with safe_open(path / file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "made": "by hand"}


def test_a_layer_of_a_sharded_checkpoint_goes_back_to_bfloat16_in_the_index_too(healthy, tmp_path):
    path = copy_of(healthy, "shards", tmp_path / "copy")
    file = json.loads((path / INDEX).read_text())["weight_map"]["lm_head.weight"]
    tensors = load_file(path / file)
    original = tensors.pop("lm_head.weight")
    packed = to_checkpoint("lm_head", quantize_nvfp4(original))
    save_file({**tensors, **packed}, path / file, metadata={"format": "pt"})
    remapped(lambda m: [m.pop("lm_head.weight"), m.update(dict.fromkeys(packed, file))])(path)
    quantization(ignore=[])(path)
    finding_of(examine(path), "quantized-lm-head", "lm_head")
    repair(path)
    assert examine(path).ok and verify_nvfp4(path).ok
    assert torch.equal(tensors_of(path)["lm_head.weight"], quantize_nvfp4(original).dequantize())
    assert AutoModelForCausalLM.from_pretrained(path).lm_head.weight.dtype == torch.bfloat16


def test_a_repair_in_modelopts_dialect_keeps_the_bits_that_reciprocals_lose(healthy, tmp_path):
    damaged = copy_of(healthy, "llm-compressor", tmp_path / "damaged")
    for layer in (Q, Q.replace("layers.0", "layers.1"), UP, UP.replace("layers.0", "layers.1")):
        tensor(f"{layer}.weight_global_scale", lambda t: t * 4)(damaged)
    convert_checkpoint(damaged, tmp_path / "there", "modelopt")
    with safe_open(tmp_path / "there" / SINGLE, framework="pt") as file:
        assert "nvfp4_exact_scales" in file.metadata()
    assert repair(tmp_path / "there") and repair(damaged)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", "compressed-tensors")
    assert bytes_of(tmp_path / "back")[SINGLE] == bytes_of(damaged)[SINGLE]
    assert examine(tmp_path / "there").ok


def scale_moved(path: Path) -> None:
    """Of one layer, whose file only is written again."""
    file = json.loads((path / INDEX).read_text())["weight_map"][f"{UP}.weight_global_scale"]
    tensors = load_file(path / file)
    tensors[f"{UP}.weight_global_scale"] *= 8
    save_file(tensors, path / file, metadata={"format": "pt", "made": "by hand"})


@pytest.mark.parametrize("num_renamed", [0, 1, 2])
@pytest.mark.parametrize("base, damage", [("experts", packed_instead(ROUTER)), ("shards", scale_moved)])
def test_a_repair_killed_while_it_renames_is_finished_by_the_next(
    base, damage, num_renamed, healthy, tmp_path, monkeypatch
):
    path = copy_of(healthy, base, tmp_path / "copy")
    damage(path)
    values = decoded(path)
    replace, renamed = os.replace, []

    def killed(source, target):
        if not str(source).endswith(".new"):
            if len(renamed) == num_renamed:
                raise KeyboardInterrupt
            renamed.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    if num_renamed < 2:
        with pytest.raises(KeyboardInterrupt):
            repair(path)
        assert not (path / "config.json").exists()  # nothing loads half a repair
        monkeypatch.undo()
        finding_of(examine(path), "unfinished-repair", "weights")
        assert "finished a repair" in repair(path)[0]
    else:
        repair(path)
    assert examine(path).ok and not list(path.glob("*partial*"))
    assert all(torch.equal(decoded(path)[name], bits) for name, bits in values.items())


def test_a_repair_that_cannot_write_leaves_every_byte(healthy, tmp_path, monkeypatch):
    from hf_nvfp4_qat.doctor import repair as module

    path = copy_of(healthy, "ours", tmp_path / "copy")
    double(path)
    before = bytes_of(path)

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        repair(path)
    assert bytes_of(path) == before


def two_of_one(path: Path) -> None:
    scale_moved(path)
    in_two_files(path)


def lost_and_unnamed(path: Path) -> None:
    remapped(lambda m: [m.update(ghost=m["model.norm.weight"]), m.pop("model.norm.weight")])(path)


@pytest.mark.parametrize("damage", [two_of_one, lost_and_unnamed])
def test_what_could_be_mended_is_left_where_it_is_not_clear_which_tensor_counts(damage, healthy, tmp_path):
    path = copy_of(healthy, "shards", tmp_path / "copy")
    damage(path)
    before = bytes_of(path)
    assert not any(finding.fixable for finding in examine(path).findings)
    assert repair(path) == [] and bytes_of(path) == before


def test_of_a_pattern_that_goes_what_it_rightly_stood_for_stays(healthy, tmp_path):
    """Also where the architecture, and so the list of linears, is not known."""
    path = copy_of(healthy, "llm-compressor", tmp_path / "copy")
    config(architectures=["NobodyForCausalLM"])(path)
    quantization(ignore=[r"re:.*(up_proj|lm_head)$", "elsewhere"])(path)
    finding_of(examine(path), "ignore-mismatch", UP)
    repair(path)
    assert examine(path).ok
    assert json.loads((path / "config.json").read_text())["quantization_config"]["ignore"] == ["elsewhere", "lm_head"]


def test_what_only_another_engine_does_is_left_out(healthy, tmp_path):
    path = copy_of(healthy, "ours", tmp_path / "copy")
    quantization(quantization_status="frozen")(path)
    assert not examine(path).ok and not examine(path, engine="transformers").ok
    assert examine(path, engine="vllm").ok
    for name, rule in (("experts", "expert-scales"), ("modelopt", "modelopt-dialect")):
        assert not examine(healthy[name], engine="transformers").ok
        finding_of(examine(healthy[name], engine="transformers"), rule, "")
    for name, version in (("ours", "0.5.22"), ("modelopt", "0.5.19")):
        diagnosis = examine(healthy[name], engine="sglang")
        assert diagnosis.ok and version in finding_of(diagnosis, "sglang-version", "config.json").message
    finding_of(examine(healthy["W4A4"]), "w4a4-on-hopper", "config.json")
    with pytest.raises(ValueError, match="`engine` is one of vllm, sglang, transformers; got 'llama.cpp'"):
        examine(path, engine="llama.cpp")


def test_shapes_that_gpus_cannot_share_are_named(healthy):
    finding = finding_of(examine(healthy["ours"], tensor_parallel_size=8), "tensor-parallel", "o_proj")
    assert (
        finding.severity == "error" and "64 columns do not divide into 8 parts of whole blocks of 16" in finding.message
    )
    with pytest.raises(ValueError, match="at least 1; got 0"):
        examine(healthy["ours"], tensor_parallel_size=0)


def test_tensors_that_the_architecture_says_it_skips_are_no_fault(tmp_path):
    tiny_moe("deepseek_v3").bfloat16().save_pretrained(tmp_path / "source")
    load_qat(tmp_path / "source").save_pretrained(tmp_path / "packed")
    prediction = "model.layers.61.shared_head.norm.weight"
    changed(lambda t: t.update({prediction: torch.ones(2)}))(tmp_path / "packed")
    diagnosis = examine(tmp_path / "packed")
    assert diagnosis.ok and finding_of(diagnosis, "skipped-tensor", prediction).severity == "note"


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is neither"):
        examine(tmp_path / "nothing")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match="holds neither"):
        examine(tmp_path)
    with pytest.raises(ValueError, match="changes a local directory"):
        repair("someone/model-NVFP4")


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["Trainer"]},
        {"architectures": ["AutoConfig"]},
        {"architectures": {"0": "Qwen3ForCausalLM"}},
        {"num_hidden_layers": 10**9, "layer_types": None},
        {"id2label": None, "num_labels": 10**9},
        {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
        {"use_pretrained_backbone": True, "backbone": "resnet50"},
        {"dtype": "object"},
        {"vocab_size": "many"},
    ],
)
def test_a_hostile_architecture_is_not_built(change, healthy, tmp_path):
    path = copy_of(healthy, "ours", tmp_path / "copy")
    (path / "evil.py").write_text("raise SystemExit('run')")
    config(**change)(path)
    assert {finding.rule for finding in examine(path).findings} & {"not-compared", "bad-config"}


def test_of_what_config_json_names_only_models_are_called(healthy, tmp_path, monkeypatch):
    class Caught:
        calls = 0

        def __init__(self, *arguments):
            Caught.calls += 1

    monkeypatch.setattr(transformers, "Trainer", Caught)
    path = copy_of(healthy, "ours", tmp_path / "copy")
    config(architectures=["Trainer"])(path)
    finding_of(examine(path), "not-compared", "architecture")
    assert Caught.calls == 0


@pytest.fixture(scope="module")
def vision_language(tmp_path_factory) -> Path:
    """A packed Qwen2.5-VL under the names that published ones have: model.layers, visual.blocks."""
    root = tmp_path_factory.mktemp("vision_language")
    text = {**SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    vision = {"hidden_size": 64, "intermediate_size": 128, "depth": 1, "num_heads": 4, "out_hidden_size": 64}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    transformers.Qwen2_5_VLForConditionalGeneration(config).bfloat16().save_pretrained(root / "source")
    quantize_checkpoint(root / "source", root / "packed")
    return root / "packed"


def under_module_names(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        new = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else f"model.{name}"
        tensors[new if not name.startswith("lm_head") else name] = tensors.pop(name)


def test_weights_may_have_the_names_of_modules(vision_language, tmp_path):
    path = Path(shutil.copytree(vision_language, tmp_path / "copy"))
    assert examine(path).ok, str(examine(path))
    changed(under_module_names)(path)
    quantization(ignore=["lm_head", "re:model.visual.*"])(path)
    assert examine(path).ok, str(examine(path))
    assert verify_nvfp4(path).ok
    assert load_nvfp4(path).nvfp4_requantization.num_elements > 0
    dropped("model.language_model.norm.weight")(path)
    finding_of(examine(path), "missing-tensor", "model.norm.weight")


def test_plain_module_names_in_ignore_are_translated_by_engines_and_patterns_are_not(vision_language, tmp_path):
    path = Path(shutil.copytree(vision_language, tmp_path / "copy"))
    ignore = json.loads((path / "config.json").read_text())["quantization_config"]["ignore"]
    quantization(ignore=[entry for entry in ignore if not entry.startswith("visual")])(path)
    assert examine(path).ok, str(examine(path))
    quantization(ignore=["lm_head", "re:model.visual.*"])(path)
    finding_of(examine(path), "ignore-mismatch", "visual.blocks.0")


def test_float32_in_the_part_for_the_language_model_is_found_and_mended(vision_language, tmp_path):
    path = Path(shutil.copytree(vision_language, tmp_path / "copy"))
    edited("config.json", lambda c: c.pop("dtype") and c["text_config"].update(dtype="float32"))(path)
    assert finding_of(examine(path), "dtype-float32", "config.json").fixable
    assert repair(path) == ["dtype set to bfloat16"] and examine(path).ok


def test_there_and_back_gives_the_same_config_of_a_vision_language_model(vision_language, tmp_path):
    convert_checkpoint(vision_language, tmp_path / "there", "modelopt")
    convert_checkpoint(tmp_path / "there", tmp_path / "back", "compressed-tensors")
    assert bytes_of(tmp_path / "back") == bytes_of(vision_language)


def test_experts_packed_in_one_tensor_are_said_not_to_be_examined_and_not_converted(tmp_path):
    text = {**SIZES, "num_local_experts": 2, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 1}
    model_config = transformers.Llama4TextConfig(**text)
    transformers.Llama4ForCausalLM(model_config).bfloat16().save_pretrained(tmp_path / "llama4")
    path = tmp_path / "llama4"

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                experts, columns, rows = tensors[name].shape
                tensors[name] = torch.zeros(experts, columns // 2, rows, dtype=torch.uint8)
                tensors[f"{name}_weight_scale"] = torch.ones(experts, columns // 16, rows).to(torch.float8_e4m3fn)
                tensors[f"{name}_weight_scale_2"] = torch.ones(())
            elif "shared_expert." in name:
                layer, weight = name.removesuffix(".weight"), quantize_nvfp4(tensors[name])
                tensors[name], tensors[f"{layer}.weight_scale"] = weight.packed, weight.block_scale
                tensors[f"{layer}.weight_scale_2"] = torch.tensor(2.0**-10)

    changed(pack)(path)
    config(quantization_config={
        "quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "ignore": ["*router*", "*self_attn*", "lm_head"],
    })(path)  # fmt: skip
    diagnosis = examine(path)
    assert diagnosis.ok, str(diagnosis)
    assert finding_of(diagnosis, "fused-experts", "experts.down_proj").count == 4
    with pytest.raises(ValueError, match="4 tensors in other formats|8 tensors in other formats"):
        convert_checkpoint(path, tmp_path / "there", "compressed-tensors")


def test_code_for_attention_that_a_config_names_is_not_asked_for(healthy, tmp_path):
    for name in ("flash_attention_2", "somebody/kernels"):
        path = copy_of(healthy, "ours", tmp_path / name.replace("/", " "))
        config(_attn_implementation=name, _experts_implementation=name)(path)
        assert examine(path).ok, str(examine(path))
        assert skeleton(path).config._attn_implementation == "eager"


def test_a_router_packed_keeps_what_lies_beside_its_weight(tmp_path):
    path = tmp_path / "packed"
    tiny_moe("deepseek_v3").bfloat16().save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", path)
    packed_instead("model.layers.1.mlp.gate")(path)
    assert [finding.rule for finding in examine(path).findings if finding.severity == "error"] == ["quantized-router"]


def test_a_layer_of_zeros_is_a_note(healthy, tmp_path):
    path = copy_of(healthy, "ours", tmp_path / "copy")
    all_of(tensor(f"{DOWN}.weight_packed", torch.zeros_like), tensor(f"{DOWN}.weight_scale", torch.zeros_like))(path)
    assert examine(path).ok and finding_of(examine(path), "all-zero", DOWN)


def test_layers_that_only_some_architectures_fuse_may_have_scales_of_their_own():
    assert fused_group_key("a.g_proj") == fused_group_key("a.q_proj")
    assert always_fused_key("a.g_proj") == "a.g_proj" and always_fused_key("a.q_proj") == fused_group_key("a.q_proj")


def test_layers_that_no_group_names_need_not_be_ignored(healthy, tmp_path):
    path = copy_of(healthy, "ours", tmp_path / "copy")
    layers = [name for name in quantized_layers(list(tensors_of(path))) if "self_attn" in name]
    changed(lambda tensors: [unpack(tensors, layer) for layer in layers])(path)
    all_of(group(targets=["re:.*mlp.*"]), quantization(ignore=[]))(path)
    assert examine(path).ok, str(examine(path))
    group(targets=["Linear"])(path)
    finding_of(examine(path), "ignore-mismatch", "self_attn")


def test_of_mixed_formats_only_nvfp4_is_examined_and_said_to_be(healthy, tmp_path):
    for base, says in (("ours", {"format": "mixed-precision"}), ("modelopt", {"quant_algo": "MIXED_PRECISION"})):
        path = copy_of(healthy, base, tmp_path / base)
        fp8 = {f"{DOWN}.weight_scale": torch.ones(1, dtype=torch.bfloat16), f"{DOWN}.input_scale": torch.ones(1)}
        int4 = {f"{Q}.weight_packed": torch.ones(64, 8, dtype=torch.int32), f"{Q}.weight_scale": torch.ones(64, 1)}
        changed(lambda t: [t.pop(name) for name in list(t) if name.startswith((DOWN, Q))])(path)  # noqa: B023
        changed(lambda t, fp8=fp8: t.update({f"{DOWN}.weight": torch.ones(64, 128).to(torch.float8_e4m3fn), **fp8}))(
            path
        )
        if base == "ours":
            changed(lambda t, int4=int4: t.update(int4))(path)
        quantization(**says)(path)
        diagnosis = examine(path)
        assert diagnosis.ok, str(diagnosis)
        assert "only the 12 layers in NVFP4" in finding_of(diagnosis, "mixed-precision", "config.json").message
        tensor(f"{UP}.weight_scale", with_byte(0, 0x7F))(path)
        finding_of(examine(path), "bad-block-scale", UP)
        with pytest.raises(ValueError, match="mixed-precision|MIXED_PRECISION"):
            load_nvfp4(path)


def test_a_config_that_hides_other_formats_is_refused_by_all_that_decode(healthy, tmp_path):
    path = copy_of(healthy, "ours", tmp_path / "copy")
    changed(lambda tensors: in_fp8(tensors, DOWN))(path)
    for command in ("dequantize", "convert"):
        result = CliRunner().invoke(app, [command, str(path), str(tmp_path / "new")])
        assert result.exit_code == 2 and f"the first {DOWN}.weight in F8_E4M3" in " ".join(result.output.split())
        assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="What is not NVFP4 must be unquantized"):
        load_nvfp4(path)


def test_a_layer_in_both_forms_is_not_converted_to_one_of_them(healthy, tmp_path):
    path = copy_of(healthy, "ours", tmp_path / "copy")
    changed(lambda tensors: tensors.update({f"{UP}.weight": torch.ones(128, 64)}))(path)
    with pytest.raises(ValueError, match=f"has 1 in both forms, the first {UP}"):
        convert_checkpoint(path, tmp_path / "there", "modelopt")


def test_layers_with_nvfp4_inputs_may_stand_beside_others(healthy, tmp_path):
    path = copy_of(healthy, "W4A4", tmp_path / "copy")
    changed(lambda t: [t.pop(name) for name in list(t) if "mlp" in name and name.endswith("input_global_scale")])(path)
    weights_only = {"targets": ["re:.*mlp.*"], "weights": {**NVFP4, "dynamic": False}, "input_activations": None}
    edited("config.json", lambda c: c["quantization_config"]["config_groups"].update(group_1=weights_only))(path)
    assert examine(path).ok, str(examine(path))
    with pytest.raises(ValueError, match="groups of both. Say which"):
        load_nvfp4(path)
    load_nvfp4(path, NVFP4QATConfig())
    dropped(f"{Q}.input_global_scale")(path)
    (finding,) = [finding for finding in examine(path).findings if finding.rule == "missing-input-scale"]
    assert finding.where == Q


def test_a_snapshot_of_links_is_not_repaired(healthy, tmp_path):
    path = copy_of(healthy, "ours", tmp_path / "blobs")
    double(path)
    (tmp_path / "snapshot").mkdir()
    for file in path.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    before = bytes_of(path)
    with pytest.raises(ValueError, match="is a link, as in a snapshot of the Hub's cache. Copy it first"):
        repair(tmp_path / "snapshot")
    assert bytes_of(path) == before
    finding_of(examine(tmp_path / "snapshot"), "unshared-scale", "up_proj")


def test_a_shard_of_an_earlier_save_is_a_note_and_not_read(healthy, tmp_path):
    path = copy_of(healthy, "shards", tmp_path / "copy")
    shard = sorted(path.glob("*.safetensors"))[0]
    shutil.copy(shard, path / "model-00002-of-00099.safetensors")
    diagnosis = examine(path)
    assert diagnosis.ok and finding_of(diagnosis, "unindexed-shard", "of-00099").severity == "note"
    assert not any(finding.rule == "duplicate-tensor" for finding in diagnosis.findings)


def test_heads_divide_among_gpus(healthy, tmp_path):
    path = copy_of(healthy, "ours", tmp_path / "copy")
    heads = json.loads((path / "config.json").read_text())["num_attention_heads"]
    finding = finding_of(examine(path, tensor_parallel_size=heads + 1), "tensor-parallel", "config.json")
    assert f"{heads} attention heads" in finding.message


def test_two_dialects_in_one_checkpoint_are_refused_by_all_that_read_it(healthy, tmp_path):
    path = copy_of(healthy, "ours", tmp_path / "copy")
    config(quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"})(path)
    for command in (["verify", str(path)], ["convert", str(path), str(tmp_path / "new")]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2 and "must be of one dialect" in result.output
    with pytest.raises(ValueError, match="must be of one dialect"):
        load_nvfp4(path)


def test_ten_thousand_like_faults_are_one_line():
    many = [found("zero-block-scale", f"experts.{n}", f"{n + 1} block scales are zero") for n in range(10_000)]
    (folded,) = fold(many)
    assert folded.count == 10_000 and folded.where == "experts.0, experts.1, experts.2 and 9997 more"
    assert len(fold([*many, found("missing-parts", "x", "missing y")])) == 2


def test_names_cannot_write_to_the_terminal(healthy, tmp_path):
    path = copy_of(healthy, "ours", tmp_path / "copy")
    name = "\x1b[2J[bold red]\u202e" + "x" * 5000
    changed(lambda t: t.update({name: torch.ones(1)}))(path)
    result = CliRunner().invoke(app, ["doctor", str(path)])
    assert result.exit_code == 1 and "\x1b" not in result.stdout and "\\x1b[2J[bold red]\\u202exx" in result.stdout
    assert max(map(len, result.stdout.splitlines())) < 2000
    assert printable("a\ud800\n") == "a\\ud800\\n"


def test_the_command_says_what_it_found_in_lines_json_and_exit_codes(healthy, tmp_path):
    path = copy_of(healthy, "ours", tmp_path / "copy")
    run = CliRunner().invoke
    assert run(app, ["doctor", str(path)]).exit_code == 0
    assert run(app, ["doctor", str(tmp_path / "nothing")]).exit_code == 2
    assert run(app, ["doctor", str(path), "--engine", "llama.cpp"]).exit_code == 2
    double(path)
    result = run(app, ["doctor", str(path), "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and not report["ok"] and "fixed" not in report
    assert set(report) == {"path", "dialect", "engine", "num_layers", "num_tensors", "ok", "findings"}
    (error,) = [finding for finding in report["findings"] if finding["severity"] == "error"]
    assert error["rule"] == "unshared-scale" and error["fixable"] and error["engines"] == ["vllm"]
    lines = run(app, ["doctor", str(path)]).stdout
    assert "error: unshared-scale [vllm]: model.layers.0.mlp.up_proj: vLLM fuses it with" in lines
    assert "`--fix` does this: Bring the group to one global scale." in lines
    result = run(app, ["doctor", str(path), "--fix", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["ok"] and "powers of two" in report["fixed"][0]
    double(path)
    result = run(app, ["doctor", str(path), "--fix"])
    assert result.exit_code == 0 and "fixed: moved powers of two" in result.stdout and "good" in result.stdout
