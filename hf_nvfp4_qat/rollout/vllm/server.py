"""A plain ``vllm serve`` as rollout server: how to start it, and whether the one that runs is the right one."""

import json
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from hf_nvfp4_qat.checkpoint.stream import is_tied, wrong_tied_settings
from hf_nvfp4_qat.formats.names import activations_of
from hf_nvfp4_qat.rollout.plan import TensorLayout

# Sizes by which two models of one family differ.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def start_command(
    model: str,
    config: dict[str, Any],
    base_url: str,
    tied_settings: dict[str, Any] | None = None,
    arguments: dict[str, Any] | None = None,
) -> str:
    """The shell line that starts a server for these rollouts.

    Args:
        model: folder or hub id of the unquantized model; its weights are not loaded, the first push brings them.
        config: quantization config of the rollouts.
        base_url: where the trainer looks for it.
        tied_settings: of the ``RolloutStream``.
        arguments: of ``versions.engine_arguments``, for a server of this version on GPUs like those here.
    """
    url = urlsplit(base_url)
    overrides = {"quantization_config": config, **(tied_settings or {})}
    line = [
        *("vllm", "serve", model),
        *("--port", str(url.port or 8000)),
        *("--hf-overrides", json.dumps(overrides, separators=(",", ":"))),
        *("--load-format", "dummy", "--dtype", "bfloat16"),
        *("--weight-transfer-config", '{"backend":"nccl"}'),
        *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"),
    ]
    for name, value in (arguments or {}).items():
        option = name.replace("_", "-")
        line += [f"--no-{option}"] if value is False else [f"--{option}", value]
    return f"VLLM_SERVER_DEV_MODE=1 {shlex.join(line)}"


@contextmanager
def with_start_command(command: str) -> Iterator[None]:
    """Append the command that starts the right server to an error about the wrong one."""
    try:
        yield
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise type(error)(f"{error}\nStart the server with:\n  {command}") from error


def check_server(base_url: str, model: Any, config: dict[str, Any], *, timeout: float) -> None:
    """Make sure that the server runs this model in this NVFP4 configuration.

    Args:
        base_url: of the server.
        model: the model in training.
        config: quantization config of its rollouts.
        timeout: seconds to wait for the server to come up.

    Raises:
        ConnectionError: nothing answers.
        ValueError: it answers, but is not in development mode, not NVFP4, quantizes other layers, or serves another
            model.
    """
    info = _server_info(base_url, timeout)["vllm_config"]["model_config"]
    served = info["model"]
    served_config = _served_config(info, str(model.name_or_path), base_url)
    quantization = served_config.get("quantization_config") or {}
    if info.get("quantization") != config["quant_method"] or quantization.get("format") != config["format"]:
        raise ValueError(
            f"The vLLM server at {base_url} must run {config['format']} weights; it serves {served} with quantization "
            f"{info.get('quantization')!r}, format {quantization.get('format')!r}."
        )
    if activations_of(quantization) != "bf16":
        raise ValueError(
            f"The vLLM server at {base_url} must compute with 16-bit inputs (W4A16); {served} has NVFP4 ones (W4A4)."
        )
    if different := sorted(set(quantization.get("ignore") or ()) ^ set(config["ignore"])):
        raise ValueError(
            f"The vLLM server at {base_url} must leave the same layers unquantized as the trainer; {len(different)} "
            f"differ, the first is {different[0]}."
        )
    ours = model.config.get_text_config()
    theirs = served_config.get("text_config") or served_config
    wrong = [
        f"{name} {theirs[name]} (trainer: {getattr(ours, name)})"
        for name in _SIZES
        if name in theirs and hasattr(ours, name) and theirs[name] != getattr(ours, name)
    ]
    for name, setting in wrong_tied_settings(model.config, is_tied(model)).items():
        part = served_config.get(name) if isinstance(setting, dict) else served_config
        if isinstance(part, dict) and part.get("tie_word_embeddings") != is_tied(model):
            wrong.append(f"tie_word_embeddings {part.get('tie_word_embeddings')} (trainer: {is_tied(model)})")
    if wrong:
        raise ValueError(f"The vLLM server at {base_url} serves another model, {served}: {', '.join(wrong)}.")


def _served_config(info: dict[str, Any], ours: str, base_url: str) -> dict[str, Any]:
    """The served model's config.json with the server's overrides.

    vLLM does not tell it, so it is read by the model's name, here; where that is no place on this machine, only a
    server of the very name in training is accepted.
    """
    from transformers import AutoConfig

    overrides = info.get("hf_overrides") if isinstance(info.get("hf_overrides"), dict) else {}
    try:
        served = AutoConfig.from_pretrained(info["model"]).to_dict()
        for name, setting in (overrides or {}).items():
            is_part = name.endswith("_config") and name != "quantization_config" and isinstance(served.get(name), dict)
            served[name] = {**served[name], **setting} if is_part else setting
        return served
    except (OSError, ValueError) as error:
        if info["model"] != ours:
            raise ValueError(
                f"The vLLM server at {base_url} serves {info['model']}, whose config cannot be read here; the trainer "
                f"trains {ours}. Serve that, or make the config readable under the same name."
            ) from error
        return dict(overrides or {})


def reset_server_caches(base_url: str, *, timeout: float) -> None:
    """Empty every cache of what the server computed with its weights, and make sure that it did.

    Args:
        base_url: of the server.
        timeout: seconds to wait for requests of others, which keep caches in use.

    Raises:
        RuntimeError: its prefix cache is still in use.
    """
    deadline = time.monotonic() + timeout
    while not _post(f"{base_url}/reset_prefix_cache?reset_external=true").get("success"):
        if time.monotonic() >= deadline:
            raise RuntimeError(
                f"The vLLM server at {base_url} could not empty its prefix cache, which holds results of the old "
                f"weights, for {timeout:g} s: it has unfinished requests. Let nobody else use it, or restart it."
            )
        time.sleep(0.2)
    _post(f"{base_url}/reset_encoder_cache")


def _post(url: str) -> dict[str, Any]:
    with urlopen(Request(url, method="POST"), timeout=30) as response:
        return json.loads(response.read() or "{}")


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
