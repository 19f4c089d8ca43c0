"""Whatever is in the files, doctor ends with a diagnosis or a ValueError, and soon.

Some mutations are the same every time; at night there are twenty times as many, from a new seed.
"""

import copy
import json
import random
import struct
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file

from hf_nvfp4_qat import quantize_nvfp4
from hf_nvfp4_qat.doctor.examine import examine
from hf_nvfp4_qat.doctor.findings import RULES
from hf_nvfp4_qat.doctor.repair import repair
from hf_nvfp4_qat.formats.modelopt import modelopt_config_files, to_modelopt
from hf_nvfp4_qat.formats.names import from_checkpoint, quantization_config, quantized_layers, to_checkpoint

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
SECONDS = 10.0
"""For one examination, which takes milliseconds; patterns that match for ever are given ten seconds."""

# What a stranger may write where a name, a number or anything else should be.
STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 2**31, 2**63 - 1, 2**64, 10**40, -(2**63), 0.5, 1e308, float("nan"), float("inf"), "", "x",
    "../../etc/passwd", "/etc/passwd", "..", ".", "a\0b", "[bold]\x1b[2J", "\ud800", "\u202e", "x" * 300, "re:(",
    "re:.*", "U8", "F8_E4M3", "F32", "BF16", "F4", "I64", "BOOL", "C64", [], {}, [[]], [None], [0], [2**62, 4],
    [-1, 16], ["a"], {"a": 1}, {"": {}}, {"weights": 4}, [1] * 70,
)  # fmt: skip


def tensors() -> tuple[dict[str, torch.Tensor], ...]:
    """Two shards: a fused pair, an expert, a router, an output embedding, a norm."""
    torch.manual_seed(0)
    shards: tuple[dict[str, torch.Tensor], ...] = ({}, {})
    for number, layer in enumerate(("self_attn.q_proj", "self_attn.k_proj", "mlp.experts.0.w1", "mlp.experts.1.w1")):
        weight = quantize_nvfp4(torch.randn(4, 32), global_decode_scale=torch.tensor(2.0**-8))
        shards[number % 2].update(to_checkpoint(f"model.layers.0.{layer}", weight))
    shards[0]["model.layers.0.mlp.gate.weight"] = torch.randn(2, 32).bfloat16()
    shards[1]["model.norm.weight"] = torch.ones(32).bfloat16()
    return shards


CONFIG = {
    "model_type": "unheard-of",
    "dtype": "bfloat16",
    "num_experts": 2,
    "tie_word_embeddings": True,
    "quantization_config": quantization_config(["model.layers.0.mlp.gate"], quantizes_input=False),
}
MODEL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_hidden_layers": 1, "hidden_size": 32,
    "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2,
    "vocab_size": 16,
}  # fmt: skip


class Checkpoint:
    """A small good checkpoint in memory, and one on disk that is written from it, file by file."""

    def __init__(self, directory: Path, *, dialect: str, model: dict[str, Any]) -> None:
        self.directory = directory
        shards = tensors()
        config: dict[str, Any] = {**CONFIG, **model}
        files = {"config.json": config}
        if dialect == "modelopt":
            shards = tuple(to_modelopt(shard, {})[0] for shard in shards)
            files = modelopt_config_files(config, unpacked=["model.layers.0.mlp.gate"])
        weight_map = {name: file for file, shard in zip(SHARDS, shards, strict=True) for name in shard}
        files[INDEX] = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        self.files = {name: json.dumps(content).encode() for name, content in files.items()}
        self.files |= {file: save(shard, {"format": "pt"}) for file, shard in zip(SHARDS, shards, strict=True)}
        self.restore(*self.files)

    def restore(self, *names: str) -> None:
        for name in names:
            (self.directory / name).write_bytes(self.files[name])


def mutated_json(content: Any, rng: random.Random) -> Any:
    """A deep copy with one to three things in it replaced, renamed, removed or added."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.randint(1, 3)):
        places = [content]
        for place in places:
            values = place.values() if isinstance(place, dict) else place
            places += [value for value in values if isinstance(value, (dict, list)) and value]
        place = rng.choice(places)
        if not place:
            continue
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        change = rng.randrange(5)
        if change == 0:
            del place[key]
        elif change == 1 and isinstance(place, dict):
            place[str(rng.choice(STRANGE))] = place.pop(key)
        elif change == 2 and isinstance(place[key], int):
            place[key] += rng.choice((-1, 1, 16, 2**40))
        else:
            place[key] = copy.deepcopy(rng.choice(STRANGE))
    return content


def nested(depth: int, rng: random.Random) -> bytes:
    opening = rng.choice((b"[", b'{"a":'))
    return opening * depth + (b"1" if rng.random() < 0.5 else b"")


def mutated_text(text: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, doubled, or JSON that is not what it was."""
    change = rng.randrange(6)
    if change == 0:
        return text[: rng.randrange(len(text))]
    if change == 1:
        return nested(rng.choice((10, 900, 5000, 100_000)), rng)
    if change == 2:
        at = rng.randrange(len(text))
        return text[:at] + text[at : at + 50] * 2 + text[at + 50 :]
    if change == 3:
        return rng.choice(
            (b"", b"\xff\xfe", b"null", b"[]", b'"x"', b"1" * 6000, b"\xef\xbb\xbf{}", b'{"weight_map": []}')
        )
    flipped = bytearray(text)
    for _ in range(rng.randint(1, 4)):
        flipped[rng.randrange(len(flipped))] = rng.randrange(256)
    return bytes(flipped)


def mutated_shard(shard: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, header length, or body."""
    (length,) = struct.unpack("<Q", shard[:8])
    header, body = shard[8 : 8 + length], shard[8 + length :]
    change = rng.randrange(6)
    if change == 0:
        return struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, 2**27, 2**63, 2**64 - 1))) + shard[8:]
    if change == 1:
        header = mutated_text(header, rng)
    elif change == 2:  # a key twice
        text = header.decode().strip()
        entries = json.loads(text)
        name = rng.choice([name for name in entries if name != "__metadata__"])
        header = (text[:-1] + f",{json.dumps(name)}:{json.dumps(rng.choice(list(entries.values())))}}}").encode()
    elif change == 3:  # scales and codes of any value
        body = bytes(rng.randrange(256) for _ in body)
    else:
        entries = mutated_json(json.loads(header), rng)
        header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + body


def write_shard(checkpoint: Checkpoint, rng: random.Random) -> str:
    name = rng.choice(SHARDS)
    (checkpoint.directory / name).write_bytes(mutated_shard(checkpoint.files[name], rng))
    return name


def rescaled_shard(checkpoint: Checkpoint, rng: random.Random) -> str:
    """Global scales times powers of two, one in ten times something else."""
    name = rng.choice(SHARDS)
    stored = load(checkpoint.files[name])
    for key in stored:
        if key.endswith("global_scale"):
            stored[key] = stored[key] * 2.0 ** rng.randint(-3, 3) * rng.choice((1, 1, 1, 1, 1, 1, 1, 1, 1, 3))
    (checkpoint.directory / name).write_bytes(save(stored, {"format": "pt"}))
    return name


def write_json(name: str) -> Callable[[Checkpoint, random.Random], str]:
    def write(checkpoint: Checkpoint, rng: random.Random) -> str:
        content = checkpoint.files[name]
        if rng.random() < 0.3:
            content = mutated_text(content, rng)
        else:
            content = json.dumps(mutated_json(json.loads(content), rng)).encode()
        (checkpoint.directory / name).write_bytes(content)
        return name

    return write


# What is mutated, in which dialect, with an architecture or without, and how often.
CAMPAIGNS = {
    "headers": (write_shard, "compressed-tensors", {}, 200),
    "headers, ModelOpt": (write_shard, "modelopt", {}, 100),
    "headers, with a model": (write_shard, "compressed-tensors", MODEL, 20),
    "indexes": (write_json(INDEX), "compressed-tensors", {}, 150),
    "configs": (write_json("config.json"), "compressed-tensors", {}, 100),
    "configs, ModelOpt": (write_json("config.json"), "modelopt", {}, 100),
    "second configs, ModelOpt": (write_json("hf_quant_config.json"), "modelopt", {}, 50),
    "configs, with a model": (write_json("config.json"), "compressed-tensors", MODEL, 50),
}
NIGHTLY = 20
"""Times as many at night."""


def examine_mutations(directory: Path, campaign: str, num_times: int, seed: str) -> Counter[str]:
    """How often each rule was found, and "refused"."""
    write, dialect, model, num_mutations = CAMPAIGNS[campaign]
    checkpoint = Checkpoint(directory, dialect=dialect, model=model)
    rules = {finding.rule for finding in examine(directory).findings}
    assert not rules & {"bad-json", "unreadable-file", "bad-config"} and ("not-compared" in rules) == (not model)
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    for number in range(num_times * num_mutations):
        name = write(checkpoint, rng)
        start = time.monotonic()
        try:
            diagnosis = examine(directory, tensor_parallel_size=2)
            json.dumps(diagnosis.as_json()).encode()
            str(diagnosis).encode()
            seen.update({finding.rule for finding in diagnosis.findings})
        except ValueError:
            seen["refused"] += 1
        except BaseException as error:
            kept = (directory / name).read_bytes()[:2000]
            raise AssertionError(
                f"mutation {number} of {name}, seed {seed!r}: {type(error).__name__}: {error}\n{kept!r}"
            ) from error
        seconds = time.monotonic() - start
        assert num_times < NIGHTLY or seconds < SECONDS, f"mutation {number} of {name}, seed {seed!r}: {seconds} s"
        checkpoint.restore(name)
    return seen


@pytest.mark.parametrize("campaign", CAMPAIGNS)
def test_every_mutation_ends_in_a_diagnosis(campaign, tmp_path):
    seen = examine_mutations(tmp_path, campaign, 1, "the same every time")
    assert seen.keys() <= {*RULES, "refused"} and len(seen) >= 5, seen


@pytest.mark.nightly
@pytest.mark.parametrize("campaign", CAMPAIGNS)
def test_every_mutation_of_this_night_ends_in_a_diagnosis(campaign, tmp_path, seed):
    seen = examine_mutations(tmp_path, campaign, NIGHTLY, str(seed))
    assert seen.keys() <= {*RULES, "refused"} and len(seen) >= 5, seen


def values_of(directory: Path) -> dict[str, torch.Tensor]:
    """The bits of every packed layer that can be decoded, from all files there are."""
    stored: dict[str, torch.Tensor] = {}
    for file in SHARDS:
        with suppress(Exception):  # damaged beyond reading
            stored.update(load_file(directory / file))
    values = {}
    for layer in quantized_layers(list(stored)):
        with suppress(Exception):
            values[layer] = from_checkpoint(layer, stored.__getitem__).dequantize(torch.float32).view(torch.int32)
    plain = {name.removesuffix(".weight"): tensor for name, tensor in stored.items() if name.endswith(".weight")}
    return {name: tensor.float().view(torch.int32) for name, tensor in plain.items()} | values


def repair_anything(directory: Path, num_checkpoints: int, seed: str) -> int:
    """How many of them were repaired: each keeps all its values, and a second repair finds nothing to do."""
    checkpoint = Checkpoint(directory, dialect="compressed-tensors", model={})
    rng = random.Random(seed)
    num_repaired = 0
    for number in range(num_checkpoints):
        names = {write(checkpoint, rng) for write in rng.choices((write_shard, rescaled_shard, write_json(INDEX)), k=2)}
        before = values_of(directory)
        with suppress(ValueError):
            changes = repair(directory)
            num_repaired += bool(changes)
            after = values_of(directory)
            moved = [name for name, bits in before.items() if not torch.equal(after[name], bits)]
            assert not moved, (number, seed, changes)
            assert repair(directory) == [], (number, seed)
        checkpoint.restore(*names, "config.json", INDEX, *SHARDS)
    return num_repaired


def test_a_repair_of_anything_keeps_all_values_and_leaves_nothing_to_a_second(tmp_path):
    assert repair_anything(tmp_path, 100, "the same every time") > 10


@pytest.mark.nightly
def test_a_repair_of_anything_of_this_night_keeps_all_values_and_leaves_nothing_to_a_second(tmp_path, seed):
    assert repair_anything(tmp_path, 2500, str(seed)) > 250


def test_claimed_sizes_are_not_allocated(tmp_path):
    """A header that claims more than its file has is damaged; one that claims huge empty tensors is only odd."""
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    for shape in ([2**40], [2**62, 0], [0, 2**62]):
        entries = {
            f"x.{part}": {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}
            for part, dtype in (("weight_packed", "U8"), ("weight_scale", "F8_E4M3"), ("weight_global_scale", "F32"))
        }
        header = json.dumps(entries).encode()
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        rules = {finding.rule for finding in examine(tmp_path).findings}
        assert rules & {"unreadable-file", "wrong-layout"}
