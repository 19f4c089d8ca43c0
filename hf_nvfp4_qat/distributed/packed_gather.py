"""The NVFP4 all-gather: FSDP2 moves codes and block scales, and the gathered weight is the fake-quantized one.

GATHER.md draws it. In short: FSDP2 asks the local tensor of a sharded parameter for two hooks before it gathers. The
first encodes this process's rows, with a global scale that is ready; the second decodes everybody's rows into the whole
weight. That weight is an autograd leaf, so its gradient is the straight-through one, and forward is a plain F.linear.

The hooks are attributes of plain tensors (nothing subclasses torch.Tensor), and such attributes are lost when a tensor
is replaced: by ``load_state_dict(assign=True)`` and ``.to``. So they are looked for, and put back, before each forward.
"""

from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_nvfp4_qat.distributed.fsdp_versions import (
    forget_gathers,
    fsdp_parameters,
    gathered_shape,
    why_no_extension,
)
from hf_nvfp4_qat.modules.global_scale import scales_of
from hf_nvfp4_qat.modules.swap import qat_weights
from hf_nvfp4_qat.modules.weights import TrainedWeight
from hf_nvfp4_qat.numerics.format import BLOCK_SIZE
from hf_nvfp4_qat.sharding.parts import mesh_of, own_experts, own_part, own_storage
from hf_nvfp4_qat.sharding.wire import decode_rows, encode_rows, part_num_rows

_ATTRIBUTE = "nvfp4_packed_gather"


@dataclass
class GatherReport:
    """What ``use_packed_gather`` did.

    Attributes:
        num_packed: weights that are gathered in 4 bits from now on.
        left_out: parameter name to the reason why its weight is gathered whole and fake-quantized in forward.
    """

    num_packed: int
    left_out: dict[str, str]

    def __str__(self) -> str:
        text = f"{self.num_packed} weights are gathered in NVFP4"
        for name, reason in list(self.left_out.items())[:3]:
            text += f"; {name} is not: {reason}"
        return text + (f"; and {len(self.left_out) - 3} more" if len(self.left_out) > 3 else "")


def use_packed_gather(model: nn.Module) -> GatherReport:
    """Make FSDP2 gather the QAT weights of a model in 4 bits, from the next forward on.

    The numbers stay those of fake quantization in forward, to the bit; what changes is what travels (4.5 bits a
    weight), what stays in memory (no second copy) and who quantizes (each process its own rows).

    Args:
        model: a QAT model after ``fully_shard``, or after ``Accelerator.prepare`` with FSDP2; between steps.

    Raises:
        ValueError: the model is not sharded by FSDP2, has no QAT weights that are, is offloaded, or is in use.
    """
    if not isinstance(model, FSDPModule):
        raise ValueError(
            f"The NVFP4 gather needs a model sharded by FSDP2; {type(model).__name__} is not. Call "
            "`torch.distributed.fsdp.fully_shard` first, or prepare it with Accelerate and `fsdp_version: 2`. DDP, "
            "FSDP1 and ZeRO work without it: weights are fake-quantized in forward there."
        )
    if not gathers_packed(model):
        setattr(model, _ATTRIBUTE, _PackedGather(model))
    gather = getattr(model, _ATTRIBUTE)
    return GatherReport(len(gather.weights), gather.left_out)


def stop_packed_gather(model: nn.Module) -> None:
    """Back to whole weights, fake-quantized in forward; nothing happens if that is how it is.

    Raises:
        ValueError: a weight is gathered at the moment.
    """
    if gathers_packed(model):
        getattr(model, _ATTRIBUTE).stop()
        delattr(model, _ATTRIBUTE)


def gathers_packed(model: nn.Module) -> bool:
    """Whether ``use_packed_gather`` is in force."""
    return _ATTRIBUTE in vars(model)


class _PackedGather:
    """The hooks of one model."""

    def __init__(self, model: nn.Module) -> None:
        parameters = {id(parameter.sharded_param): parameter for parameter in fsdp_parameters(model)}
        weights = qat_weights(model)
        self.left_out = {name: reason for name, w in weights.items() if (reason := _obstacle(w, parameters))}
        self.weights = {name: weight for name, weight in weights.items() if name not in self.left_out}
        if not self.weights:
            first = next((f" {name}: {reason}." for name, reason in self.left_out.items()), "")
            raise ValueError(
                "The NVFP4 gather needs QAT weights that FSDP2 shards, between steps; "
                f"none of {len(weights)} is one.{first}"
            )
        # What stays when a weight's tensor is replaced: the mesh it is sharded over, and its shape when gathered.
        self._shards: dict[str, tuple[Any, torch.Size]] = {}
        for name, weight in self.weights.items():
            parameter = parameters[id(weight.master)]
            if parameter.offload_to_cpu:
                raise ValueError(
                    f"The NVFP4 gather does not work with CPU offloading; {name} is offloaded. Turn "
                    "`fsdp_offload_params` off, or set NVFP4_QAT_GATHER=bf16."
                )
            self._shards[name] = mesh_of(weight.master), gathered_shape(parameter)
        for name, weight in self.weights.items():
            # Tensor parallelism makes DTensors of buffers too; the scale is whole on every process.
            weight.global_decode_scale = own_part(weight.global_decode_scale)
            _put_hooks(weight, self._shards[name][1])
            forget_gathers(parameters[id(weight.master)])
            weight.is_gathered = True
        self._model = ref(model)
        # Before FSDP2's own hook: scales and ours must be ready when the first weight is gathered.
        self._handle = model.register_forward_pre_hook(self._before_forward, prepend=True)
        # Now too: put on by a hook of the first forward, this one would run from the second on.
        self._before_forward(model, ())

    def stop(self) -> None:
        """Take the hooks off; the next gather is FSDP2's own."""
        model = self._model()
        parameters = {id(parameter.sharded_param): parameter for parameter in fsdp_parameters(model)} if model else {}
        shards = [parameters.get(id(weight.master)) for weight in self.weights.values()]
        if None in shards:
            raise ValueError(
                "How weights are gathered changes between steps; they are gathered at the moment. Finish the backward "
                "pass, or call `model.reshard()`, first."
            )
        for weight, shard in zip(self.weights.values(), shards, strict=True):
            local = own_storage(weight.master)
            for hook in ("fsdp_pre_all_gather", "fsdp_post_all_gather"):
                if hasattr(local, hook):
                    delattr(local, hook)
            forget_gathers(shard)
            weight.is_gathered = False
        self._handle.remove()

    @torch.compiler.disable  # as FSDP2's own hooks are
    def _before_forward(self, model: nn.Module, args: Any) -> None:
        for name, weight in self.weights.items():
            mesh, shape = self._shards[name]
            # A weight that is whole at the moment was gathered through hooks that are in place.
            if mesh_of(weight.master) == mesh and not hasattr(own_storage(weight.master), "fsdp_pre_all_gather"):
                _put_hooks(weight, shape)
        for scales in scales_of(self.weights.values()):
            scales.refresh_stale()


def _obstacle(weight: TrainedWeight, parameters: dict[int, Any]) -> str | None:
    """Why this weight cannot be gathered in 4 bits."""
    parameter = parameters.get(id(weight.master))
    if parameter is None:
        return "FSDP2 does not shard it, or it is gathered now"
    if reason := why_no_extension(parameter):
        return reason
    num_columns = gathered_shape(parameter)[-1]
    if num_columns % BLOCK_SIZE:
        return f"tensor parallelism leaves this process {num_columns} columns, which {BLOCK_SIZE} does not divide"
    return None


def _put_hooks(weight: TrainedWeight, shape: torch.Size) -> None:
    """The two hooks that FSDP2 looks for, on the local tensor.

    Args:
        weight: one that is sharded.
        shape: ``[N, K]`` of the gathered weight (the rows that tensor parallelism leaves this process), or experts
            ``[E, N, K]``.
    """
    local = own_storage(weight.master)
    index = own_experts(weight.master)
    # The tensor holds the hooks, so they hold neither it nor its module.
    local_ref, weight_ref = ref(local), ref(weight)

    def fsdp_pre_all_gather(mesh: Any) -> tuple[tuple[torch.Tensor], tuple[torch.Tensor, int]]:
        # One argument: with the five-argument form FSDP2 compares sizes on those processes alone that have padding.
        local, weight = local_ref(), weight_ref()
        assert local is not None and weight is not None
        num_parts = mesh.size()
        scale = weight.global_decode_scale
        num_rows = part_num_rows(shape[0], num_parts)
        part = encode_rows(local.detach(), scale[index], num_rows=num_rows, scale_rule=weight.scale_rule)
        return (part,), (scale, num_parts)

    def fsdp_post_all_gather(
        outputs: tuple[torch.Tensor], metadata: tuple[torch.Tensor, int], dtype: torch.dtype, *, out: Any = None
    ) -> Any:
        scale, num_parts = metadata
        whole = torch.empty(shape, dtype=dtype, device=outputs[0].device) if out is None else out
        whole = own_storage(whole)
        # To autograd this is the same weight as before: what is gathered again has the same values.
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(whole):
            decode_rows(outputs[0].view(num_parts, -1), scale, whole)
        return (whole, (whole,)) if out is None else None

    local.fsdp_pre_all_gather = fsdp_pre_all_gather
    local.fsdp_post_all_gather = fsdp_post_all_gather
