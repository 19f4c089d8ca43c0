"""What a user of the published checkpoint sees: load it with plain Transformers and compressed-tensors, and measure.

Usage: python examples/served_loss.py CHECKPOINT TOKENS.safetensors RESULT.safetensors

Does not import hf_nvfp4_qat, and checks that nothing else did.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(checkpoint: str, tokens_file: str, result_file: str) -> None:
    tokens = load_file(tokens_file)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    model(tokens["probe"][:, :1])  # compressed-tensors decodes in the first forward, to bfloat16
    model.to(torch.float32)  # the same numbers, computed with less rounding and, on most CPUs, faster
    result = {"probe_logits": model(tokens["probe"]).logits}
    for part in ("held_out", "out_of_domain"):
        losses = [model(row[None], labels=row[None]).loss for row in tqdm(tokens[part], desc=part, leave=False)]
        result[part] = torch.stack(losses).mean()
    assert "hf_nvfp4_qat" not in sys.modules, "the served side must not need this package"
    save_file(result, result_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
