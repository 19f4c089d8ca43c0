"""Several pushes into one vLLM engine on a GPU: seconds, values, addresses, memory and tokens of each.

    python examples/benchmarks/pushes.py --layers 8                         Qwen3-8B's shape, random weights
    python examples/benchmarks/pushes.py --shape Qwen3-30B-A3B --layers 4
    python examples/benchmarks/pushes.py --layers 8 --kernel humming        not what rollouts choose by themselves
    python examples/benchmarks/pushes.py --layers 8 --sleep                 level 2 before each push, as TRL does it

Weights move between the pushes. After each, the engine is read back through its own GEMMs, and at the end it generates
the same greedy tokens as a second engine that loads the exported checkpoint, with CUDA graphs in both. Appends a row
to RESULTS.md for each push.
"""

import argparse
import tempfile
import time

import torch
from report import record
from rollout import GIB, make_engine, make_model


def addresses(engine) -> dict:
    """Where everything lies that a CUDA graph may have captured."""
    from hf_nvfp4_qat.rollout.vllm.engine import worker_of
    from hf_nvfp4_qat.rollout.vllm.versions import plain_tensors

    model = worker_of(engine).model_runner.get_model()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **plain_tensors(model)}
    return {name: tensor.data_ptr() for name, tensor in tensors.items() if "kv_cache" not in str(name)}


def greedy(engine, num_tokens: int = 64) -> list[tuple[int, ...]]:
    """Tokens after prompts of 1, 8 and 32 tokens, together and alone."""
    from vllm import SamplingParams

    torch.manual_seed(0)
    prompts = [{"prompt_token_ids": torch.randint(1000, 100000, (length,)).tolist()} for length in (1, 8, 32)]
    parameters = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True, detokenize=False)
    outputs = [engine.generate(batch, parameters, use_tqdm=False) for batch in (prompts, prompts[:1])]
    return [tuple(output.outputs[0].token_ids) for batch in outputs for output in batch]


def main() -> None:
    """Push, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Qwen3-8B", choices=["Qwen3-8B", "Qwen3-30B-A3B"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--pushes", type=int, default=5)
    parser.add_argument("--memory-share", type=float, default=0.25, help="of the GPU, for each of two engines")
    parser.add_argument("--kernel", choices=["marlin", "humming"], default="marlin")
    parser.add_argument("--sleep", action="store_true", help="put the engine to sleep, level 2, before each push")
    options = parser.parse_args()

    import vllm

    from hf_nvfp4_qat import prepare_qat, save_nvfp4
    from hf_nvfp4_qat.rollout.sync import check, engine_arguments, sync
    from hf_nvfp4_qat.rollout.vllm.engine import worker_of
    from hf_nvfp4_qat.rollout.vllm.reading import kernel_name

    model = prepare_qat(make_model(options.shape, options.layers))
    kernels = {"linear_backend": options.kernel}
    if options.shape == "Qwen3-30B-A3B":
        kernels["moe_backend"] = options.kernel
    rows, before = [], None
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as exported:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        own = {**kernels, "kv_cache_memory_bytes": GIB}
        arguments = {**engine_arguments(model), **own, "enable_sleep_mode": options.sleep}
        engine = make_engine(folder, options.memory_share, compiled=False, **arguments)
        for number in range(options.pushes):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.01).add_(0.01 * torch.randn_like(parameter))
            if options.sleep:
                engine.sleep(level=2)
                engine.wake_up(tags=["weights"])
            torch.cuda.synchronize()
            start = time.perf_counter()
            sync(engine, model)
            seconds = time.perf_counter() - start
            if options.sleep:
                engine.wake_up(tags=["kv_cache"])
            torch.cuda.empty_cache()
            allocated = torch.cuda.memory_allocated() / GIB
            found, now = check(engine, model), addresses(engine)
            num_moved = 0 if before is None else sum(now[name] != before[name] for name in now if name in before)
            before = now
            num_different = sum(found.different.values())
            rows.append([str(number + 1), f"{seconds:.3f}", f"{num_different} of {found.num_weights:,}", str(num_moved),
                         f"{allocated:.2f}"])  # fmt: skip
            print(rows[-1], flush=True)
        tokens = greedy(engine)
        save_nvfp4(model, exported)
        fresh = make_engine(exported, options.memory_share, compiled=False, **own)
        same = tokens == greedy(fresh)
    record(
        f"Pushes: {options.shape}, {options.layers} layers, {options.kernel}" + ", sleep level 2" * options.sleep,
        ["push", "s", "values that differ", "tensors that moved", "GiB allocated after it"],
        rows,
        notes=f"vllm {vllm.__version__}, kernel {kernel_name(worker_of(engine))}, CUDA graphs without compilation. "
        f"Greedy tokens equal to those of an engine that loads the exported checkpoint: {'yes' if same else 'NO'} "
        f"({len(set(tokens[0]))} different ones in the first 64).",
    )


if __name__ == "__main__":
    main()
