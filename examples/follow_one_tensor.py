"""Follow one weight from disk to the packed bytes and back, printing every stop. Runs in seconds, on a CPU.

Usage: python examples/follow_one_tensor.py
"""

import logging
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, set_seed
from transformers.utils import logging as transformers_logging

from hf_nvfp4_qat import NVFP4QATConfig, load_nvfp4, quantize_nvfp4, verify_nvfp4

NAME = "model.layers.0.mlp.up_proj"
logging.disable(logging.WARNING)
transformers_logging.disable_progress_bar()


def stop(title: str, where: str) -> None:
    print(f"\n== {title}   ({where})")


def show(label: str, tensor: torch.Tensor) -> None:
    """The first eight values of the first row."""
    row = tensor.detach().reshape(-1, tensor.shape[-1])[0, :8] if tensor.ndim else tensor.detach()
    values = f"{row.item():.6g}" if row.ndim == 0 else " ".join(f"{value:10.6f}" for value in row.float().tolist())
    print(f"   {label:28} {str(tensor.dtype).removeprefix('torch.'):14} {list(tensor.shape)!s:10} {values}")


def main() -> None:
    set_seed(0)
    directory = Path(tempfile.mkdtemp())
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, head_dim=16)
    tiny = Qwen3ForCausalLM(Qwen3Config(vocab_size=128, num_key_value_heads=2, tie_word_embeddings=True, **sizes))
    tiny.to(torch.bfloat16).save_pretrained(directory / "base")

    stop("load", "quantizer/hf_quantizer.py: linears become QATLinear before the weights arrive")
    model = AutoModelForCausalLM.from_pretrained(
        directory / "base", dtype=torch.float32, quantization_config=NVFP4QATConfig()
    )
    layer = model.get_submodule(NAME)
    print(f"   {NAME}: {layer}")
    show("master weight", layer.weight)

    stop("global scale", "modules/global_scale.py: one power of two, shared by gate_proj and up_proj")
    show("global_decode_scale", layer.global_decode_scale)
    print(f"   = 2^{int(layer.global_decode_scale.log2())}, group {layer.nvfp4_weight.scale_group!r}")

    stop("forward", "modules/linear.py -> numerics/quantize.py: quantize, decode, F.linear")
    show("what forward multiplies with", layer.fake_quantized_weight())
    seen = layer(torch.eye(layer.in_features)).t()
    equal = torch.equal(seen.bfloat16(), layer.fake_quantized_weight())
    print(f"   read out of forward with the identity, equal: {equal}")

    stop("backward", "modules/linear.py: the gradient passes straight through to the master")
    tokens = torch.arange(24)[None]
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    print(f"   loss {loss.item():.4f}")
    show("gradient of the master", layer.weight.grad)

    stop("optimizer step", "any torch optimizer; a hook refreshes every global scale")
    torch.optim.AdamW(model.parameters(), lr=2e-2).step()
    show("master weight", layer.weight)
    show("global_decode_scale", layer.global_decode_scale)
    show("what forward multiplies with", layer.fake_quantized_weight())

    stop("pack", "checkpoint/stream.py -> numerics/quantize.py: the same door")
    packed = quantize_nvfp4(layer.weight.detach(), global_decode_scale=layer.global_decode_scale)
    print(f"   codes of the first block     {packed.codes()[0, :16].tolist()}")
    print(f"   its bytes, low nibble first  {packed.packed[0, :8].numpy().tobytes().hex(' ')}")
    scale = packed.block_scale[0, 0]
    print(f"   its block scale              {scale.float().item():g} (byte {scale.view(torch.uint8).item():02x})")
    print(f"   {layer.weight.nbytes:,} bytes of master weight, {packed.nbytes:,} packed")

    stop("save", "checkpoint/save.py: compressed-tensors nvfp4-pack-quantized")
    model.save_pretrained(directory / "packed")
    tensors = load_file(directory / "packed" / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith(NAME):
            shown = f"{tensor.item():g} = 1 / global_decode_scale" if tensor.numel() == 1 else ""
            print(f"   {name:48} {str(tensor.dtype).removeprefix('torch.'):14} {list(tensor.shape)!s:10} {shown}")
    print("   " + str(verify_nvfp4(directory / "packed", model)).replace(str(directory), "..."))

    stop("back: plain Transformers", "no code of ours: compressed-tensors decodes")
    served = AutoModelForCausalLM.from_pretrained(directory / "packed")
    served(tokens)  # decodes in the first forward
    show("what is served", served.get_submodule(NAME).weight)
    equal = torch.equal(served.get_submodule(NAME).weight, layer.fake_quantized_weight())
    print(f"   equal to what forward multiplied with: {equal}")

    stop("back: training again", "quantizer/load.py: load_nvfp4 starts at the served values")
    again = load_nvfp4(directory / "packed")
    show("master weight", again.get_submodule(NAME).weight)
    print(f"   {again.nvfp4_requantization}")
    assert equal and not again.nvfp4_requantization.moved


if __name__ == "__main__":
    main()
