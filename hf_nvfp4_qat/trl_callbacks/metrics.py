"""What is measured at each push and each batch of rollouts."""

from typing import Any

import torch

from hf_nvfp4_qat.numerics.tensor import NVFP4Tensor

ROWS_PER_WEIGHT = 64


class WeightSample:
    """Quantization error and code flips, on up to 64 evenly spaced rows of every weight (all rows of a small one).

    A sample, because the codes of the last push must be kept to compare with: all of them would be a second packed copy
    of the model, and the rows kept here are under one percent of an 8B model.
    """

    def __init__(self) -> None:
        self._codes: dict[str, torch.Tensor] = {}
        self._sums: list[torch.Tensor] = []
        self._flips: list[torch.Tensor] = []
        self._num_compared = 0

    def observe(self, name: str, weight: torch.Tensor, packed: NVFP4Tensor) -> None:
        """Take the sampled rows of one weight; no device synchronization.

        Args:
            name: checkpoint name.
            weight: master weight ``[N, K]``.
            packed: what is pushed of it.
        """
        step = max(1, -(-weight.shape[0] // ROWS_PER_WEIGHT))
        master = weight[::step].to(torch.bfloat16).float()
        codes = packed.packed[::step].contiguous()
        sampled = NVFP4Tensor(codes, packed.block_scale[::step].contiguous(), packed.global_decode_scale)
        error = sampled.dequantize().float() - master
        self._sums.append(torch.stack([error.square().sum(), master.square().sum()]))
        before = self._codes.get(name)
        if before is not None:
            changed = before ^ codes
            self._flips.append(((changed & 0x0F) != 0).sum() + ((changed & 0xF0) != 0).sum())
            self._num_compared += 2 * codes.numel()
        self._codes[name] = codes.clone()

    def metrics(self) -> dict[str, float]:
        """Metrics of the push that just ended; starts the next.

        Returns:
            ``weight_error``: ``||decoded - master|| / ||master||`` over all sampled weights; ``code_flips``: share of
            the sampled codes that changed since the push before, absent after the first.
        """
        error, norm = torch.stack([sums.cpu() for sums in self._sums]).sum(0).tolist()
        metrics = {"weight_error": (error / norm) ** 0.5 if norm else 0.0}
        if self._num_compared:
            metrics["code_flips"] = sum(int(flips) for flips in self._flips) / self._num_compared
        self._sums, self._flips, self._num_compared = [], [], 0
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
        trainer: a TRL trainer; one without metrics of its own is left alone.
        metrics: name without prefix, and value.
    """
    recorded = getattr(trainer, "_metrics", None)
    if recorded is not None:
        mode = "train" if trainer.model.training else "eval"
        for name, value in metrics.items():
            recorded[mode][f"nvfp4/{name}"].append(value)


def record_mismatch(trainer: Any) -> None:
    """Record ``mismatch_kl`` and ``masked_fraction`` wherever a TRL trainer computes both log-probabilities.

    Works without NVFP4 too, to have a baseline in the same units. Trainers that do not compare sampler and
    trainer (RLOO, or GRPO with ``vllm_importance_sampling_correction=False``) record nothing.
    """
    original = getattr(trainer, "_generate_and_score_completions", None)
    if original is None:
        return

    def generate_and_score(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        sampler, own = output.get("sampling_per_token_logps"), output.get("old_per_token_logps")
        ratio = output.get("importance_sampling_ratio")
        if sampler is not None and own is not None and ratio is not None:
            mask = output["completion_mask"] * output.get("tool_mask", 1)
            _record_comparison(trainer, sampler, own, mask, ratio)
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
