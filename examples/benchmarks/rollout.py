"""What NVFP4 rollouts cost and save on a GPU: one push into vLLM, engine memory, decode throughput, beside BF16.

    python examples/benchmarks/rollout.py                    Qwen3-8B's shape, random weights
    python examples/benchmarks/rollout.py --layers 8 --batches 1 8
    python examples/benchmarks/rollout.py --shape Qwen3-30B-A3B --memory-share 0.4

Each engine runs in a process of its own, in turn, beside the model in training (bfloat16). The BF16 push is what TRL
does in colocate mode: ``load_weights`` for one tensor after the other; fused experts vLLM does not take so. Prints
a table and appends it to RESULTS.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from report import record

GIB = 2**30


def make_model(shape: str, num_layers: int | None):
    """The model, or fewer of its layers, with random weights on the GPU."""
    from shapes import Shape
    from transformers import AutoModelForCausalLM

    changes = {} if num_layers is None else {"num_hidden_layers": num_layers}
    config = Shape(shape).config(max_position_embeddings=4096, **changes)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def make_engine(folder: str, memory_share: float, *, compiled: bool, **kwargs):
    from vllm import LLM

    if not compiled:
        kwargs["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    return LLM(
        model=folder, skip_tokenizer_init=True, max_model_len=512,
        gpu_memory_utilization=memory_share, distributed_executor_backend="uni", max_num_seqs=256, **kwargs,
    )  # fmt: skip


def timed(function, repeats: int) -> dict:
    """Seconds and extra memory of a call, the device's work included; the first call is kept apart."""
    seconds, extra = [], []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        extra.append((torch.cuda.max_memory_allocated() - before) / GIB)
    return {"first": seconds[0], "median": statistics.median(seconds[1:]), "extra_gib": max(extra[1:])}


def decode_throughput(engine, batches: list[int], num_in: int = 128, num_out: int = 256) -> dict[int, float]:
    """Generated tokens a second by batch size; prompts of 128 random tokens, 256 generated."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=num_out, temperature=1.0, ignore_eos=True, detokenize=False)
    throughput = {}
    for batch in batches:
        rates = []
        for _ in range(2):
            prompts = [{"prompt_token_ids": torch.randint(1000, 100000, (num_in,)).tolist()} for _ in range(batch)]
            start = time.perf_counter()
            engine.generate(prompts, parameters, use_tqdm=False)
            rates.append(batch * num_out / (time.perf_counter() - start))
        throughput[batch] = max(rates)
    return throughput


def measure(engine_kind: str, options: argparse.Namespace) -> dict:
    """All numbers of one engine, beside a model in training on the same GPU."""
    from hf_nvfp4_qat import prepare_qat
    from hf_nvfp4_qat.rollout.stream import RolloutStream
    from hf_nvfp4_qat.rollout.sync import check, engine_arguments, sync
    from hf_nvfp4_qat.rollout.vllm.engine import worker_of
    from hf_nvfp4_qat.rollout.vllm.reading import kernel_name

    model = make_model(options.shape, options.layers)
    if engine_kind == "nvfp4":
        prepare_qat(model)
    with tempfile.TemporaryDirectory() as folder:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        arguments = engine_arguments(model) if engine_kind == "nvfp4" else {"load_format": "dummy", "dtype": "bfloat16"}
        engine = make_engine(folder, options.memory_share, compiled=options.compile, **arguments)
    worker = worker_of(engine)
    result: dict = {"weights_gib": worker.model_runner.model_memory_usage / GIB}
    if engine_kind == "nvfp4":
        result["kernel"] = kernel_name(worker)
        result["push"] = timed(lambda: sync(engine, model), options.repeats)
        result["plan"] = timed(lambda: RolloutStream(model).stack_experts(), options.repeats)
        result["pack"] = timed(lambda: pack(RolloutStream(model)), options.repeats)
        report = sync(engine, model)
        result |= {
            "bytes_gib": report.num_bytes / GIB,
            "compression": report.compression,
            "tensors": report.num_tensors,
        }
        start = time.perf_counter()
        found = check(engine, model)
        seconds = time.perf_counter() - start
        result["check"] = {"seconds": seconds, "values": found.num_weights, "different": sum(found.different.values())}
        if options.profile:
            write_profile(lambda: sync(engine, model), options.profile)
    else:
        load = worker.model_runner.get_model().load_weights

        def push_as_trl_does() -> None:
            for name, parameter in model.named_parameters():
                load([(name, parameter.data)])

        if options.shape == "Qwen3-8B":
            result["push"] = timed(push_as_trl_does, options.repeats)
        result["bytes_gib"] = sum(parameter.nbytes for parameter in model.parameters()) / GIB
    result["decode"] = decode_throughput(engine, options.batches)
    result["largest_tensor_gib"] = max(parameter.nbytes for parameter in model.parameters()) / GIB
    return result


def pack(stream) -> None:
    """All tensors of a push, each forgotten at once."""
    stream.stack_experts()
    for _ in stream.tensors(fresh=False):
        pass


def write_profile(function, path: str) -> None:
    """Where the time of a call goes, by function, into a text file."""
    import cProfile
    import pstats

    with cProfile.Profile() as profile:
        function()
    with open(path, "w", encoding="utf-8") as file:
        pstats.Stats(profile, stream=file).sort_stats("cumulative").print_stats(70)
        pstats.Stats(profile, stream=file).sort_stats("tottime").print_stats(40)


def report(bf16: dict, nvfp4: dict, shape: str) -> None:
    """Both engines' numbers, side by side."""
    import transformers
    import vllm

    def pushed(what: str, digits: int) -> str:
        return f"{bf16['push'][what]:.{digits}f}" if "push" in bf16 else "-"

    rows = [
        ["engine weights, GiB", f"{bf16['weights_gib']:.2f}", f"{nvfp4['weights_gib']:.2f}"],
        ["pushed, GiB", f"{bf16['bytes_gib']:.2f}", f"{nvfp4['bytes_gib']:.2f}"],
        ["push, s (median, the first apart)", pushed("median", 3), f"{nvfp4['push']['median']:.3f}"],
        ["first push, s (checks the engine's layout)", pushed("first", 3), f"{nvfp4['push']['first']:.3f}"],
        ["of it: refresh of scales and plan, s", "", f"{nvfp4['plan']['median']:.3f}"],
        ["of it: plan and packing on the GPU, s", "", f"{nvfp4['pack']['median']:.3f}"],
        ["extra memory at its peak, GiB", pushed("extra_gib", 2), f"{nvfp4['push']['extra_gib']:.2f}"],
        *(
            [f"decode, tokens/s, batch {batch}", f"{bf16['decode'][batch]:.0f}", f"{nvfp4['decode'][batch]:.0f}"]
            for batch in bf16["decode"]
        ),
    ]  # fmt: skip
    check = nvfp4["check"]
    record(
        f"Rollouts: {shape}",
        ["", "BF16", "NVFP4 W4A16"],
        rows,
        notes=f"vllm {vllm.__version__}, transformers {transformers.__version__}, kernel {nvfp4['kernel']}. "
        f"Largest tensor: {nvfp4['largest_tensor_gib']:.2f} GiB. Check of the engine through its GEMMs: "
        f"{check['different']} of {check['values']:,} values differ, {check['seconds']:.1f} s. "
        "Decode: 128 tokens in, 256 out.",
    )


def main() -> None:
    """Measure both engines in processes of their own, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Qwen3-8B", choices=["Qwen3-8B", "Qwen3-30B-A3B"])
    parser.add_argument("--layers", type=int, help="all by default")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-share", type=float, default=0.5, help="of the GPU, for the engine")
    parser.add_argument("--profile", default="", help="write where the time of a push goes to this file")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="of the engine, by vLLM")
    parser.add_argument("--engine", choices=["bf16", "nvfp4"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        print("RESULT " + json.dumps(measure(options.engine, options)), flush=True)
        return
    found = {}
    for engine in ("bf16", "nvfp4"):
        command = [sys.executable, __file__, *sys.argv[1:], "--engine", engine]
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        if line is None:
            raise SystemExit(f"The {engine} engine gave no result (exit {done.returncode}):\n{done.stdout[-4000:]}")
        found[engine] = json.loads(line.removeprefix("RESULT "))
        print(json.dumps({engine: found[engine]}), flush=True)
    report(found["bf16"], found["nvfp4"], f"{options.shape}, {options.layers or 'all'} layers")


if __name__ == "__main__":
    main()
