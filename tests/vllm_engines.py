"""Real vLLM engines in this process: on a CPU through the plugin's GEMM, on a GPU through Marlin and CUDA graphs."""

import gc

import torch
from conftest import SMALL_ENGINE, take_step

from hf_nvfp4_qat.rollout.sync import engine_arguments

ON_GPU = torch.cuda.is_available()
# Marlin wants in_features of 128 or more; heads of 32 keep q, k and v of different heights.
SIZES = dict(vocab_size=512, hidden_size=128, intermediate_size=256, head_dim=32)
PROMPTS = [[1, 2, 3, 4], [100, 7, 55], [9]]


# An engine that is collected takes the process groups of the others with it, so all of them go together.
_engines: list = []


def release_engines() -> None:
    _engines.clear()
    gc.collect()


def make_engine(path, **kwargs):
    from vllm import LLM

    engine = LLM(
        model=str(path),
        skip_tokenizer_init=True,
        # Graphs without compilation: what the tests are about, and a third of the start-up time.
        **{**SMALL_ENGINE, "enforce_eager": not ON_GPU},
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]},
        gpu_memory_utilization=0.03 if ON_GPU else 0.2,
        distributed_executor_backend="uni",
        **{"max_model_len": 64, **kwargs},
    )
    _engines.append(engine)
    return engine


def empty_engine(path, model, **kwargs):
    """An engine as TRL's callback builds it: NVFP4 configuration, random weights."""
    return make_engine(path, **{**engine_arguments(model), **kwargs})


def generate(engine, num_tokens: int = 12):
    """Greedy tokens and their log-probabilities."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=num_tokens, temperature=0, logprobs=0, detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = [request.outputs[0] for request in engine.generate(prompts, parameters, use_tqdm=False)]
    return [
        (list(output.token_ids), [next(iter(logprob.values())).logprob for logprob in output.logprobs])
        for output in outputs
    ]


def save(model, path):
    # Larger weights than the default initialization, for outputs that depend on them.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
            if name.endswith("bias"):
                parameter.normal_()
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def train_a_little(model, lr: float = 3e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(2):
        take_step(model.cpu(), optimizer)
    return model.cuda() if ON_GPU else model
