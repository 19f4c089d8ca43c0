"""What is measured at each push and each batch of rollouts."""

import logging
from typing import Any

import torch

from hf_nvfp4_qat.numerics.format import BLOCK_SIZE
from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor
from hf_nvfp4_qat.rollout.vllm.routing import compare_routing, recorded_outputs, recorded_routing
from hf_nvfp4_qat.trl_callbacks.trl_versions import (
    compared_tensors,
    compares_log_probabilities,
    metrics_of,
    private,
)

logger = logging.getLogger(__name__)

ELEMENTS_PER_WEIGHT = 2**16


class WeightSample:
    """Quantization error and code flips, on evenly spaced rows of every weight: all of a small one, 65,536 elements of
    a large one.

    A sample, because the codes of the last push must be kept to compare with: all of them would be a second packed copy
    of the model. What is taken of a weight is only sliced here, and computed with once for all weights.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._masters: list[torch.Tensor] = []
        self._codes: list[torch.Tensor] = []
        self._block_scales: list[torch.Tensor] = []
        self._global_scales: list[torch.Tensor] = []
        self._codes_before: torch.Tensor | None = None
        self._names_before: list[str] = []

    def start(self) -> None:
        """Forget what was taken of a push that did not end."""
        self._names, self._masters, self._codes, self._block_scales, self._global_scales = [], [], [], [], []

    def observe(self, name: str, weight: torch.Tensor, packed: NVFP4Tensor) -> None:
        """Take the sampled rows of one weight; no device synchronization.

        Args:
            name: checkpoint name.
            weight: master weight ``[N, K]``, or experts ``[E, N, K]``.
            packed: what is pushed of it.
        """
        rows = slice(None, None, max(1, -(-weight.numel() // ELEMENTS_PER_WEIGHT)))
        block_scale = packed.block_scale.flatten(0, -2)[rows]
        global_scale = packed.global_decode_scale.view(-1, 1).expand(-1, weight.shape[-2]).reshape(-1, 1)[rows]
        self._names.append(name)
        self._masters.append(weight.flatten(0, -2)[rows].to(torch.bfloat16).reshape(-1, BLOCK_SIZE))
        self._codes.append(packed.packed.flatten(0, -2)[rows].reshape(-1, BLOCK_SIZE // 2))
        self._block_scales.append(block_scale.reshape(-1, 1))
        self._global_scales.append(global_scale.expand(block_scale.shape).reshape(-1, 1))

    def metrics(self) -> dict[str, float]:
        """Metrics of the push that just ended; starts the next.

        Returns:
            ``weight_error``: ``||decoded - master|| / ||master||`` over all sampled weights; ``code_flips``: share of
            the sampled codes that changed since the push before, absent after the first. Empty if nothing was taken.
        """
        if not self._names:
            return {}
        device = self._codes[0].device
        master, codes, global_scale = (
            torch.cat([part.to(device) for part in parts])
            for parts in (self._masters, self._codes, self._global_scales)
        )
        block_scale = torch.cat([part.to(device).view(torch.uint8) for part in self._block_scales])
        one = torch.ones((), dtype=torch.float32, device=device)
        decoded = NVFP4Tensor(codes, block_scale.view(torch.float8_e4m3fn), one).dequantize()
        error = decoded.float() * global_scale - master.float()
        sums = torch.stack([error.square().sum(), master.float().square().sum()])
        before = self._codes_before
        if before is not None and self._names == self._names_before and before.shape == codes.shape:
            changed = before ^ codes
            sums = torch.cat([sums, ((changed & 0x0F) != 0).sum()[None] + ((changed & 0xF0) != 0).sum()[None]])
        squared_error, squared_norm, *num_flips = sums.double().tolist()
        metrics = {"weight_error": (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0}
        if num_flips:
            metrics["code_flips"] = num_flips[0] / (2 * codes.numel())
        self._codes_before, self._names_before = codes, self._names
        self.start()
        return metrics


def mismatch_kl(
    sampler_logps: torch.Tensor, trainer_logps: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over tokens of the k3 estimate of KL(sampler || trainer), and the number of tokens.

    With ``d = trainer - sampler`` the estimate is ``exp(d) - 1 - d``: unbiased, and never negative.
    (Source: J. Schulman, "Approximating KL Divergence", 2020.)

    Args:
        sampler_logps: log-probabilities of the sampled tokens under the engine, ``[B, T]``; NaN where it gave none.
        trainer_logps: the same under the training forward, ``[B, T]``.
        mask: ``[B, T]``, nonzero for completion tokens.
    """
    difference = (trainer_logps - sampler_logps).double()
    counted = mask.bool() & ~difference.isnan()
    difference = difference[counted]
    return (difference.exp() - 1 - difference).sum(), counted.sum()


def record(trainer: Any, **metrics: float) -> None:
    """Add ``nvfp4/`` metrics to a TRL trainer's own: they reach the log history and every tracker, averaged like those.

    Args:
        trainer: a TRL trainer; one of another library without metrics of its own is left alone.
        metrics: name without prefix, and value.
    """
    recorded = metrics_of(trainer)
    if recorded is not None:
        mode = "train" if trainer.model.training else "eval"
        for name, value in metrics.items():
            recorded[mode][f"nvfp4/{name}"].append(value)


def record_mismatch(trainer: Any) -> None:
    """Record ``mismatch_kl`` and ``masked_fraction`` wherever a TRL trainer computes both log-probabilities.

    Works without NVFP4 too, to have a baseline in the same units. Trainers that do not compare sampler and
    trainer (RLOO, or GRPO with ``vllm_importance_sampling_correction=False``) record nothing.

    Raises:
        ValueError: a TRL version that does not let itself be watched.
    """
    metrics_of(trainer)  # raises now what would raise later
    if not compares_log_probabilities(trainer):
        return
    original = trainer._generate_and_score_completions

    def generate_and_score(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        sampler, own, ratio, mask = compared_tensors(output)
        _record_comparison(trainer, sampler, own, mask, ratio)
        return output

    trainer._generate_and_score_completions = generate_and_score


def record_routing(trainer: Any, llm: Any, every: int) -> None:
    """Record how often generated tokens got other experts in the engine than in training.

    Compared with the forward by which the trainer computes log-probabilities of its own; where it computes none (GRPO
    with ``vllm_importance_sampling_correction=False``) nothing is recorded. Works without NVFP4 too.

    Args:
        trainer: a TRL trainer that generates with an engine in its process.
        llm: the engine.
        every: batches of rollouts between two comparisons; the first is compared.

    Raises:
        ValueError: a model without fused experts, or a trainer without rollouts that can be watched.
    """
    original = private(trainer, "_generate_and_score_completions")
    model = trainer.accelerator.unwrap_model(trainer.model)
    with recorded_routing(model):
        pass  # raises now what would raise later
    num_batches = 0

    def generate_and_score(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_batches
        num_batches += 1
        if (num_batches - 1) % every:
            return original(*args, **kwargs)
        with recorded_outputs(llm) as engine, recorded_routing(model) as forwards:
            output = original(*args, **kwargs)
        found = compare_routing(forwards, engine)
        if found.num_unmatched:
            logger.warning(
                "%d of the trainer's sequences are none that the engine generated; their routing is not compared.",
                found.num_unmatched,
            )
        counts = torch.tensor(
            [found.num_choices, found.num_different, found.num_tokens, found.num_tokens_different],
            dtype=torch.float64,
            device=trainer.accelerator.device,
        )
        sums = trainer.accelerator.gather(counts).view(-1, 4).sum(0).tolist()
        num_choices, num_different, num_tokens, num_tokens_different = sums
        if num_choices:
            record(
                trainer,
                routing_difference=num_different / num_choices,
                rerouted_tokens=num_tokens_different / num_tokens,
            )
        return output

    trainer._generate_and_score_completions = generate_and_score


def _record_comparison(
    trainer: Any, sampler: torch.Tensor, own: torch.Tensor, mask: torch.Tensor, ratio: torch.Tensor
) -> None:
    total, count = mismatch_kl(sampler, own, mask)
    # One ratio per token [B, T] or per sequence [B, 1]; TRL masks by setting it to zero.
    considered = mask.bool() if ratio.shape == mask.shape else torch.ones_like(ratio, dtype=torch.bool)
    masked = (ratio == 0) & considered
    sums = torch.stack([total, count.double(), masked.sum().double(), considered.sum().double()])
    total_kl, num_tokens, num_masked, num_considered = trainer.accelerator.gather(sums).view(-1, 4).sum(0).tolist()
    record(
        trainer,
        mismatch_kl=total_kl / num_tokens if num_tokens else 0.0,
        masked_fraction=num_masked / num_considered if num_considered else 0.0,
    )
