"""The parts of FSDP2 that PyTorch keeps to itself, in one place.

Tested with PyTorch 2.11 to 2.13. A newer one gets one warning; one that lacks a name used here, an error with the name.
"""

import logging
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from torch.distributed.fsdp import FSDPModule

logger = logging.getLogger(__name__)

OLDEST_TESTED = Version("2.11")
NEWEST_TESTED = Version("2.13")

# Of what FSDP2 calls an FSDPParam.
_PARAMETER_NAMES = (
    "sharded_param",
    "sharded_state",
    "mesh_info",
    "post_forward_mesh_info",
    "fsdp_placement",
    "offload_to_cpu",
    "all_gather_outputs",
    "_orig_size",
    "_param_fqn",
    "_unsharded_inner_tensors",
    "_unsharded_param",
    "_init_extensions",
)


def torch_version() -> Version:
    """Major and minor version of PyTorch."""
    version = Version(torch.__version__)
    return Version(f"{version.major}.{version.minor}")


@cache
def _warn_if_untested(version: Version) -> None:
    if not OLDEST_TESTED <= version <= NEWEST_TESTED:
        logger.warning(
            "The NVFP4 gather is tested with PyTorch %s to %s; %s is installed. If something fails, set "
            "NVFP4_QAT_GATHER=bf16.",
            OLDEST_TESTED,
            NEWEST_TESTED,
            torch.__version__,
        )


def _private(owner: Any, *names: str) -> Any:
    """The last attribute of `names` of something of FSDP2's, after making sure that there are all of them.

    Raises:
        ValueError: there is not.
    """
    for name in names:
        # One is there after the first gather only, and announced in the class until then.
        is_announced = name == "_unsharded_param" and name in getattr(type(owner), "__annotations__", {})
        if not hasattr(owner, name) and not is_announced:
            kind = getattr(owner, "__name__", type(owner).__name__)
            raise ValueError(
                f"The NVFP4 gather needs `{name}` of FSDP2's {kind}; PyTorch {torch.__version__} has none. Install "
                f"PyTorch {OLDEST_TESTED} to {NEWEST_TESTED}, or set NVFP4_QAT_GATHER=bf16."
            )
    return getattr(owner, names[-1])


def _mesh_info() -> type:
    """FSDP2's class for a mesh over which a parameter is sharded, not replicated.

    Raises:
        ValueError: this version of PyTorch has none.
    """
    fully_shard = import_module("torch.distributed.fsdp._fully_shard")
    return _private(_private(fully_shard, "_fsdp_common"), "FSDPMeshInfo")


def fsdp_parameters(model: nn.Module) -> Iterator[Any]:
    """FSDP2's record (``FSDPParam``) of every parameter that it shards.

    Raises:
        ValueError: this version of PyTorch keeps them in another way.
    """
    version = torch_version()
    _warn_if_untested(version)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = _private(module, "_get_fsdp_state")()
            if version < Version("2.12"):  # one group a module, or none
                groups = [_private(state, "_fsdp_param_group")]
            else:
                groups = _private(state, "_fsdp_param_groups")
            for group in groups:
                for parameter in () if group is None else _private(group, "fsdp_params"):
                    _private(parameter, *_PARAMETER_NAMES)
                    yield parameter


def why_no_extension(parameter: Any) -> str | None:
    """Why FSDP2 cannot gather this parameter in a form of ours; None if it can."""
    if not isinstance(parameter.mesh_info, _mesh_info()):
        return "it is replicated, not sharded"
    if parameter.fsdp_placement.dim != 0:
        return "it is sharded along its columns, which would cut blocks of 16"
    if parameter.post_forward_mesh_info not in (None, parameter.mesh_info):
        return "`reshard_after_forward` is a number, and FSDP2 then cuts the gathered bytes as if they were the weight"
    return None


def gathered_shape(parameter: Any) -> torch.Size:
    """Shape of the weight when FSDP2 has gathered it; with tensor parallelism, a part of the whole."""
    return parameter._orig_size


def forget_gathers(parameter: Any) -> None:
    """Let the next gather allocate anew, after hooks were put on or taken off.

    FSDP2 sizes a parameter's buffers at its first gather and never again.

    Raises:
        ValueError: the parameter is gathered at the moment.
    """
    if parameter.sharded_state.name != "SHARDED":
        raise ValueError(
            f"How a weight is gathered changes between steps; {parameter._param_fqn} is gathered at the moment. "
            "Finish the backward pass, or call `model.reshard()`, first."
        )
    parameter.all_gather_outputs = []
    parameter._unsharded_inner_tensors = []
    if hasattr(parameter, "_unsharded_param"):
        del parameter._unsharded_param
    parameter._init_extensions()
