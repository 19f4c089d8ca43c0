"""Server mode without its network: TRL's real trainer and stream, vLLM's real byte buffers, and a real engine that
takes what came out of them. HTTP and NCCL are stood in for; on GPUs the whole of it runs (RESULTS.md)."""

import pytest
import torch
from conftest import SMALL_ENGINE, load_qat
from fake_server import answering
from trl_trainers import logged, make_trainer, rollouts

from hf_nvfp4_qat import NVFP4QATConfig, calibrate_activations
from hf_nvfp4_qat.rollout import stream as stream_module
from hf_nvfp4_qat.rollout.stream import RolloutStream
from hf_nvfp4_qat.rollout.sync import check, engine_arguments
from hf_nvfp4_qat.rollout.vllm.engine import worker_of
from hf_nvfp4_qat.rollout.vllm.versions import refresh_copies

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


class ServerStandIn:
    """TRL's client, with the server's engine behind it."""

    engine = None
    num_pushes = 0
    resets = [True]

    def __init__(self, **kwargs):
        pass

    def init_communicator(self, device):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, named_params):
        # As vLLM's packed transfer: one buffer of bytes, cut by what was announced.
        buffer = torch.cat([tensor.contiguous().view(torch.uint8).view(-1) for _, tensor in named_params])
        sizes = [getattr(torch, dtype).itemsize * torch.Size(shape).numel() for _, dtype, shape in metadata]
        received = [
            (name, part.view(getattr(torch, dtype)).view(shape))
            for (name, dtype, shape), part in zip(metadata, buffer.split(sizes), strict=True)
        ]
        worker = worker_of(self.engine)
        worker.reload_weights(weights_iterator=iter(received))
        refresh_copies(worker.model_runner.get_model())  # servers have GPUs, where nothing is packed as it is loaded
        type(self).num_pushes += 1

    def reset_prefix_cache(self):
        self.engine.reset_prefix_cache()

    def generate(self, prompts, n, max_tokens, temperature, **kwargs):
        from vllm import SamplingParams

        parameters = SamplingParams(n=n, max_tokens=max_tokens, temperature=temperature, logprobs=0)
        requests = self.engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False
        )
        outputs = [output for request in requests for output in request.outputs]
        return {
            "prompt_ids": prompts,
            "completion_ids": [list(output.token_ids) for output in outputs],
            "logprobs": [[[next(iter(p.values())).logprob] for p in output.logprobs] for output in outputs],
            "logprob_token_ids": [[[token] for token in output.token_ids] for output in outputs],
        }


@pytest.fixture
def server(folder, monkeypatch):
    from trl.generation import vllm_generation
    from vllm import LLM

    model = load_qat(folder)
    config = RolloutStream(model).quantization_config
    if ServerStandIn.engine is None:
        ServerStandIn.engine = LLM(
            str(folder), max_model_len=128, gpu_memory_utilization=0.2, logprobs_mode="processed_logprobs",
            distributed_executor_backend="uni", **SMALL_ENGINE, **engine_arguments(model),
        )  # fmt: skip
    monkeypatch.setattr(vllm_generation, "VLLMClient", ServerStandIn)
    monkeypatch.setattr(ServerStandIn, "num_pushes", 0)
    monkeypatch.setattr(ServerStandIn, "resets", [True])
    answer = dict(model=str(folder), quantization="compressed-tensors", hf_overrides={"quantization_config": config})
    with answering(200, resets=ServerStandIn.resets, **answer) as url:
        yield dict(vllm_mode="server", vllm_server_base_url=url, vllm_server_timeout=1.0)


def test_a_server_gets_the_packed_stream(folder, tmp_path, server):
    model = load_qat(folder)
    trainer = make_trainer(model, folder, tmp_path, [rollouts()], learning_rate=1e-2, **server)
    trainer.train()
    assert ServerStandIn.num_pushes == 3
    assert logged(trainer, "nvfp4/sync_mib")[0] == pytest.approx(RolloutStream(model).num_bytes / 2**20)
    assert max(logged(trainer, "nvfp4/mismatch_kl")) < 1e-3
    trainer.vllm_generation.sync_weights()
    assert check(ServerStandIn.engine, model).ok


def test_after_a_failure_half_way_the_transfer_ends_and_the_server_is_not_asked(
    folder, tmp_path, server, monkeypatch
):  # fmt: skip
    trainer = make_trainer(load_qat(folder), folder, tmp_path, [rollouts()], **server)
    pack, calls = stream_module.quantize_unchecked, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise OSError("out of memory")
        return pack(*args, **kwargs)

    monkeypatch.setattr(stream_module, "quantize_unchecked", failing)
    with pytest.raises(RuntimeError, match="failed half-way: OSError: out of memory"):
        trainer.train()
    assert ServerStandIn.num_pushes == 1
    with pytest.raises(RuntimeError, match="must not generate"):
        trainer.vllm_generation.generate([[1, 2]], None, 1)
    trainer.vllm_generation.sync_weights()
    trainer.vllm_generation.generate([[1, 2]], None, 1)


def test_after_an_error_of_the_transfer_the_server_is_not_asked(folder, tmp_path, server, monkeypatch):
    trainer = make_trainer(load_qat(folder), folder, tmp_path, [rollouts()], **server)

    def broken(self, metadata, named_params):
        raise ConnectionResetError("peer is gone")

    with monkeypatch.context() as patch:
        patch.setattr(ServerStandIn, "update_named_params", broken)
        with pytest.raises(RuntimeError, match="failed half-way: ConnectionResetError: peer is gone"):
            trainer.train()
    with pytest.raises(RuntimeError, match="must not generate.*peer is gone"):
        trainer.vllm_generation.generate([[1, 2]], None, 1)
    trainer.vllm_generation.sync_weights()
    trainer.vllm_generation.generate([[1, 2]], None, 1)


def test_a_server_that_keeps_results_of_the_old_weights_is_not_asked(folder, tmp_path, server):
    """TRL asks it to empty its caches, and does not look at the answer."""
    trainer = make_trainer(load_qat(folder), folder, tmp_path, [rollouts()], **server)
    ServerStandIn.resets[:] = [False]
    with pytest.raises(RuntimeError, match="failed half-way: RuntimeError: .*could not empty its prefix cache"):
        trainer.train()
    with pytest.raises(RuntimeError, match="must not generate.*could not empty"):
        trainer.vllm_generation.generate([[1, 2]], None, 1)
    ServerStandIn.resets[:] = [True]
    trainer.vllm_generation.sync_weights()
    trainer.vllm_generation.generate([[1, 2]], None, 1)


def test_weights_that_diverge_are_refused_before_the_server_waits_for_them(folder, tmp_path, server):
    model = load_qat(folder)
    trainer = make_trainer(model, folder, tmp_path, [rollouts()], **server)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"down_proj\.weight.*diverged"):
        trainer.train()
    assert ServerStandIn.num_pushes == 0


def test_a_missing_server_is_an_error_with_the_start_command(folder, tmp_path):
    with pytest.raises(ConnectionError, match=r"(?s)No vLLM server answers.*VLLM_SERVER_DEV_MODE=1 vllm serve"):
        make_trainer(
            load_qat(folder), folder, tmp_path, [rollouts()], vllm_mode="server",
            vllm_server_base_url="http://127.0.0.1:9", vllm_server_timeout=0.1,
        )  # fmt: skip


def test_nvfp4_inputs_are_refused_since_a_server_may_leave_them_out(folder, tmp_path, server):
    model = load_qat(folder, NVFP4QATConfig(activations="nvfp4"))
    calibrate_activations(model, [torch.arange(1, 41).view(2, 20)])
    with pytest.raises(ValueError, match=r"NVFP4 inputs \(W4A4\).*Use colocate mode"):
        make_trainer(model, folder, tmp_path, [rollouts()], **server)


def test_a_server_of_another_model_is_an_error_with_the_start_command(folder, tmp_path, server):
    model = load_qat(folder)
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match=r"(?s)another model.*num_hidden_layers 2 \(trainer: 7\).*vllm serve"):
        make_trainer(model, folder, tmp_path, [rollouts()], **server)
