"""A plain ``vllm serve`` as rollout server: how to start it, and whether the one that runs is the right one."""

import json
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from hf_nvfp4_qat.rollout.stream import TensorLayout

# Sizes by which two models of one family differ.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def start_command(model: str, config: dict[str, Any], base_url: str) -> str:
    """The shell line that starts a server for these rollouts.

    Args:
        model: folder or hub id of the unquantized model; its weights are not loaded, the first push brings them.
        config: quantization config of the rollouts.
        base_url: where the trainer looks for it.
    """
    url = urlsplit(base_url)
    arguments = [
        *("vllm", "serve", model),
        *("--port", str(url.port or 8000)),
        *("--hf-overrides", json.dumps({"quantization_config": config}, separators=(",", ":"))),
        *("--load-format", "dummy", "--dtype", "bfloat16"),
        *("--weight-transfer-config", '{"backend":"nccl"}'),
        *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"),
    ]
    return f"VLLM_SERVER_DEV_MODE=1 {shlex.join(arguments)}"


@contextmanager
def with_start_command(command: str) -> Iterator[None]:
    """Append the command that starts the right server to an error about the wrong one."""
    try:
        yield
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise type(error)(f"{error}\nStart the server with:\n  {command}") from error


def check_server(base_url: str, model_config: Any, *, timeout: float) -> None:
    """Make sure that the server runs this model in NVFP4.

    Args:
        base_url: of the server.
        model_config: Transformers config of the model in training.
        timeout: seconds to wait for it to come up.

    Raises:
        ConnectionError: nothing answers.
        ValueError: it answers, but is not in development mode, not NVFP4, or serves another model.
    """
    served = _server_info(base_url, timeout)["vllm_config"]["model_config"]
    if served.get("quantization") != "compressed-tensors":
        raise ValueError(
            f"The vLLM server at {base_url} must run NVFP4 weights; it runs {served.get('model')} with quantization "
            f"{served.get('quantization')!r}."
        )
    config = _as_dict(served.get("hf_config"))
    if config:
        text = config.get("text_config") or config
        ours = model_config.get_text_config()
        wrong = {
            name: (text[name], getattr(ours, name))
            for name in _SIZES
            if name in text and hasattr(ours, name) and text[name] != getattr(ours, name)
        }
        if wrong:
            listed = ", ".join(f"{name} {there} (trainer: {here})" for name, (there, here) in wrong.items())
            raise ValueError(f"The vLLM server at {base_url} serves another model, {served.get('model')}: {listed}.")
        method = (config.get("quantization_config") or {}).get("format")
        if method not in (None, "nvfp4-pack-quantized"):
            raise ValueError(f"The vLLM server at {base_url} runs {method!r} weights, not nvfp4-pack-quantized.")


def check_alignment(layout: Sequence[TensorLayout]) -> None:
    """Make sure that every tensor starts at a multiple of its element size in one byte buffer, as receivers cut it.

    Raises:
        ValueError: one does not.
    """
    offset = 0
    for item in layout:
        if offset % item.dtype.itemsize:
            raise ValueError(
                f"vLLM's transfer puts tensors end to end, so each must start at a multiple of its element size; "
                f"{item} would start at byte {offset}. A layer before it has out_features * in_features / 16 not "
                "divisible by 4: add it to `exclude`, or use colocate mode."
            )
        offset += item.nbytes


def _server_info(base_url: str, timeout: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout
    while True:
        try:
            with urlopen(f"{base_url}/server_info?config_format=json", timeout=30) as response:
                return json.load(response)
        except HTTPError as error:
            raise ValueError(
                f"The vLLM server at {base_url} must run in development mode, to take weights; "
                f"/server_info gave {error}."
            ) from error
        except (URLError, TimeoutError, ConnectionError) as error:
            if time.monotonic() >= deadline:
                raise ConnectionError(f"No vLLM server answers at {base_url} after {timeout:g} s: {error}.") from error
            time.sleep(1.0)


def _as_dict(config: Any) -> dict[str, Any]:
    """A Transformers config as vLLM dumps it: a dict, or its repr, a class name and JSON."""
    if isinstance(config, dict):
        return config
    try:
        return json.loads(config[config.index("{") :])
    except (TypeError, ValueError):
        return {}
