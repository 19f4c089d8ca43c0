"""Everything that depends on TRL's version or reaches into what TRL keeps to itself, in one file.

what                                           where it is                          what it is for
--------------------------------------------   ----------------------------------   ------------------------------------
`_init_vllm`                                   VLLMGeneration                       the engine is built, or connected to
`_dist.fsdp_version`, `_dist.zero_stage`       VLLMGeneration                       how the model is sharded
`_iter_named_params`, `_weight_metadata`       VLLMGeneration, for a server         the stream of weights
`_llm_weights_sleeping`                        VLLMGeneration, for an own engine    whether sleep mode discarded weights
`_metrics`                                     every trainer with VLLMGeneration    metrics are added to the trainer's
`_generate_and_score_completions`, its keys    trainers with importance sampling    sampler and trainer are compared

Every name is asked for when the trainer is made, and the keys at the first batch of rollouts.
"""

import logging
from typing import Any

import torch
from packaging.version import Version

logger = logging.getLogger(__name__)

OLDEST = Version("1.16.0")
NEWEST_TESTED = Version("1.16.0")

_COMPARED = ("sampling_per_token_logps", "old_per_token_logps", "importance_sampling_ratio", "completion_mask")
_warned: set[Version] = set()


def trl_version() -> Version:
    """Version of the installed TRL; one that is newer than the tested ones gets one warning.

    Raises:
        ValueError: older than what is supported.
    """
    import trl

    version = Version(trl.__version__)
    if version < OLDEST:
        raise ValueError(f"NVFP4 rollouts need TRL {OLDEST} or newer; {version} is installed.")
    if version > NEWEST_TESTED and version not in _warned:
        _warned.add(version)
        logger.warning(
            "NVFP4 rollouts are tested up to TRL %s; %s is installed. If something fails, install trl==%s.",
            NEWEST_TESTED,
            version,
            NEWEST_TESTED,
        )
    return version


def private(owner: Any, name: str) -> Any:
    """The attribute `name` of something of TRL's.

    Raises:
        ValueError: there is none.
    """
    if not hasattr(owner, name):
        kind = owner if isinstance(owner, type) else type(owner)
        raise ValueError(
            f"NVFP4 rollouts need `{name}` of TRL's {kind.__name__}; TRL {trl_version()} has none. Install "
            f"trl=={NEWEST_TESTED}."
        )
    return getattr(owner, name)


def check_trl() -> None:
    """Make sure, before an engine is built, that TRL has the place where packed weights go in.

    Raises:
        ValueError: it has not.
    """
    from trl.generation.vllm_generation import VLLMGeneration

    trl_version()
    for name in ("_init_vllm", "_iter_named_params", "sync_weights", "generate"):
        private(VLLMGeneration, name)


def sharding_of(generation: Any) -> tuple[int | None, int]:
    """The version of FSDP (None without it) and the stage of ZeRO (0 without it) of a ``VLLMGeneration``.

    Raises:
        ValueError: TRL does not say.
    """
    backend = private(generation, "_dist")
    return private(backend, "fsdp_version"), private(backend, "zero_stage")


def weights_sleep(generation: Any) -> bool:
    """Whether sleep mode has discarded the weights of a ``VLLMGeneration`` with an engine of its own.

    Raises:
        ValueError: TRL does not say.
    """
    return private(generation, "_llm_weights_sleeping")


def compares_log_probabilities(trainer: Any) -> bool:
    """Whether a trainer computes log-probabilities of what the engine sampled, to correct for the difference.

    GRPO does if it is told so; the configurations of other trainers (RLOO, distillation) have no such option.

    Raises:
        ValueError: it does, and TRL has not the method that is wrapped to see them.
    """
    args = vars(trainer).get("args")
    option = "vllm_importance_sampling_correction"
    if args is None or not hasattr(args, option) or not (args.use_vllm and getattr(args, option)):
        return False
    private(trainer, "_generate_and_score_completions")
    return True


def compared_tensors(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of what a trainer that compares makes of a batch: log-probabilities under the engine and under the trainer,
    importance ratios, and which tokens count.

    Raises:
        ValueError: TRL has other names for them.
    """
    if missing := [name for name in _COMPARED if name not in batch]:
        raise ValueError(
            f"NVFP4 metrics need {', '.join(missing)} in a batch of rollouts; TRL {trl_version()} has none. Install "
            f"trl=={NEWEST_TESTED}."
        )
    sampler, own, ratio, mask = (batch[name] for name in _COMPARED)
    return sampler, own, ratio, mask * batch.get("tool_mask", 1)


def metrics_of(trainer: Any) -> dict[str, dict[str, list[float]]] | None:
    """A trainer's own metrics, by mode and name. None for one that is not TRL's and has no such thing.

    Raises:
        ValueError: it is TRL's, and has none.
    """
    if any(kind.__module__.partition(".")[0] == "trl" for kind in type(trainer).__mro__):
        return private(trainer, "_metrics")
    return vars(trainer).get("_metrics")
