"""Everything that depends on vLLM's version or reaches into its reload machinery, in one file.

version    what differs                                                              what is done here
-------    ----------------------------------------------------------------------    ------------------------------
< 0.26     separate W4A16 scheme, other reload internals                             refused
< 0.27     `reload_weights` runs without a current vLLM config                       `current_config`
< 0.27.1   Marlin's lock workspace, a plain attribute that CUDA graphs have          `stable_addresses`
           captured, is allocated anew by every reload
< 0.28     so are the global scales of fused experts                                 `stable_addresses`
< 0.30     Marlin's kernel of experts takes permutations of columns                  `marlin_experts_arguments`
>= 0.31    its locks are no attribute of the layer, but the worker's                  `marlin_experts_arguments`
0.28-0.32  constants that normalize images are buffers, which a loader that draws    `engine_arguments`
           weights at random overwrites
>= 0.32    Humming is preferred to Marlin on Hopper, if it is installed              `engine_arguments`
all        Humming keeps its locks on the kernel object, which a reload makes anew   `stable_addresses`
all        models that vLLM runs through Transformers change its classes in this     `refuse_transformers_backend`
           process, and so the model in training
all        a reload that fails half-way leaves modules on the meta device, and       `abandon_reload`
           counts what was loaded before towards the next attempt
all        a reload asks each loader for its name, which a partial function lacks   `unprocessed_loaders`
all        on some CPUs an output embedding that is tied to the input embedding     `refresh_copies`
           computes with a copy of it, made when the engine started; and Mamba 2
           with a copy of its convolution's weight
all        on a CPU that multiplies bfloat16, a convolution's weight is rearranged     `convolution_weight`
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from hf_nvfp4_qat.formats.names import BLOCK_SCALE, GLOBAL_ENCODE_SCALE, PACKED
from hf_nvfp4_qat.numerics.format import E4M3_MIN_NORMAL

logger = logging.getLogger(__name__)

EMPTY_FORMAT = "nvfp4_empty"
_empty_loader: Any = None

OLDEST = Version("0.26.0")
NEWEST_TESTED = Version("0.33.0")


_warned: set[Version] = set()


def vllm_version() -> Version:
    """Version of the installed vLLM, of the GPU or the CPU distribution; a newer one than tested gets one warning.

    Raises:
        ValueError: older than what is supported.
    """
    version = installed_vllm()
    if version < OLDEST:
        raise ValueError(
            f"NVFP4 rollouts need vLLM {OLDEST} or newer (tested up to {NEWEST_TESTED}); {version} is installed."
        )
    if not is_tested(version) and version not in _warned:
        _warned.add(version)
        logger.warning(
            "NVFP4 rollouts are tested up to vLLM %s; %s is installed. If something fails, install vllm==%s.",
            NEWEST_TESTED,
            version,
            NEWEST_TESTED,
        )
    return version


def installed_vllm() -> Version:
    """Version of the installed vLLM, whatever it is."""
    import vllm

    return Version(Version(vllm.__version__).base_version)


def is_tested(version: Version) -> bool:
    """Whether `version` of vLLM is in the tested range."""
    return OLDEST <= version <= NEWEST_TESTED


@contextmanager
def current_config(worker: Any) -> Iterator[None]:
    """vLLM's notion of the config in force, which layers ask for when they process weights."""
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(worker.vllm_config):
        yield


@contextmanager
def stable_addresses(model: nn.Module) -> Iterator[None]:
    """Keep every tensor that is a plain attribute of a module or its kernel where it is, with the values it then has.

    CUDA graphs have captured the addresses. vLLM preserves those of parameters and buffers itself. An error is no
    exception: graphs that lock in freed memory hang at the next generation.
    """
    before = plain_tensors(model)
    try:
        yield
    finally:
        for path, module in model.named_modules():
            # A reload may have made the owner anew, with tensors of its own.
            for kernel, owner in _owners_of_tensors(module):
                for name, new in list(vars(owner).items()):
                    old = before.get((path, kernel, name))
                    if (
                        isinstance(new, torch.Tensor)
                        and old is not None
                        and new is not old
                        and (new.shape, new.dtype) == (old.shape, old.dtype)
                    ):
                        old.copy_(new)
                        setattr(owner, name, old)


def plain_tensors(model: nn.Module) -> dict[tuple[str, str, str], torch.Tensor]:
    """Tensors that modules and their kernels hold as plain attributes, by (module path, path to the kernel, name)."""
    return {
        (path, kernel, name): value
        for path, module in model.named_modules()
        for kernel, owner in _owners_of_tensors(module)
        for name, value in vars(owner).items()
        if isinstance(value, torch.Tensor)
    }


# Where a layer of vLLM keeps the object that computes.
_KERNELS = ("scheme.kernel", "quant_method", "quant_method.kernel", "quant_method.moe_kernel.fused_experts")


def _owners_of_tensors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield "", module
    for path in _KERNELS:
        owner: Any = module
        for name in path.split("."):
            owner = getattr(owner, name, None)
        if hasattr(owner, "__dict__"):
            yield path, owner


def engine_arguments(*, quantizes_input: bool, has_experts: bool) -> dict[str, Any]:
    """What an engine is made with so that vLLM does not choose by itself what rollouts cannot do with.

    Args:
        quantizes_input: whether inputs are NVFP4 too; then vLLM knows the only kernels there are.
        has_experts: whether fused experts are quantized.
    """
    arguments: dict[str, Any] = {}
    if torch.cuda.is_available() and not quantizes_input:
        arguments["linear_backend"] = "marlin"
        if has_experts:
            arguments["moe_backend"] = "marlin"
    if Version("0.28") <= vllm_version() < Version("0.33"):
        arguments["mm_device_do_normalize"] = False
    return arguments


def refuse_transformers_backend(architecture: str) -> None:
    """Refuse, before an engine is made, a model that vLLM has no implementation of.

    Raises:
        ValueError: it would run the model through Transformers.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    known = ModelRegistry.models.get(architecture)
    if known is None or getattr(known, "class_name", "").startswith("Transformers"):
        raise ValueError(
            f"vLLM has no implementation of its own of {architecture} and runs it through Transformers, which changes "
            "the class of the model in training too, in the same process. Use server mode."
        )


def marlin_experts_arguments(module: Any) -> tuple[tuple[None, ...], torch.Tensor, dict[str, Any]]:
    """What Marlin's kernel of experts takes in this version of vLLM: permutations, locks, and options.

    Args:
        module: vLLM's ``RoutedExperts``.
    """
    version = vllm_version()
    permutations, options = ((None, None), {"is_k_full": True}) if version < Version("0.30") else ((), {})
    if version < Version("0.31"):
        return permutations, module.workspace, options
    from vllm.model_executor.layers.quantization.utils.marlin_utils import get_marlin_workspace

    return permutations, get_marlin_workspace(module.w13_weight.device), options


def unprocessed_loaders(model: nn.Module) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor, Any]]:
    """Put `model` back into the layout that checkpoints have, on the meta device, with its own weight loaders.

    Undo with ``abandon_reload``.

    Returns:
        (module path, tensor name) to the tensor that vLLM hands to the loader, the same without data, and the loader.
        The two differ for biases, which vLLM never puts on the meta device.
    """
    from vllm.model_executor.model_loader.reload import layerwise, meta

    for module in model.modules():
        for tensors in (layerwise.get_layer_tensors(module), *layerwise.get_layerwise_info(module).restore_metadata):
            for tensor in tensors.values():
                loader = getattr(tensor, "weight_loader", None)
                if isinstance(loader, partial):
                    loader.__name__ = loader.func.__name__  # type: ignore[attr-defined]
    layerwise.initialize_layerwise_reload(model)
    loaders: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor, Any]] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, tensor in layerwise.get_layer_tensors(module).items():
            # A loader knows a tensor that two modules share by its first name.
            if is_filled_by_loading(module, name) and id(tensor) not in seen:
                seen.add(id(tensor))
                stand_in = tensor if tensor.is_meta else meta.to_meta_tensor(tensor)
                loaders[path, name] = (tensor, stand_in, layerwise._get_original_loader(tensor))
    return loaders


def abandon_reload(model: nn.Module, model_config: Any) -> None:
    """Leave a reload that will not be finished: every module gets back the tensors it had, and nothing is pending.

    Modules that were complete have their new weights, the others their old ones: fit for another full push only.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    for module in model.modules():
        info = layerwise.get_layerwise_info(module)
        if info.can_load():
            info.loaded_weights = []
            info.load_numel = 0
            if info.kernel_tensors is not None and info.load_numel_total:
                # Without this vLLM warns about each module that it "failed to load".
                info.load_numel_total = 0
    layerwise.finalize_layerwise_reload(model, model_config)


@contextmanager
def reloading(worker: Any, model: nn.Module) -> Iterator[None]:
    """Around all that writes new weights: CUDA graphs go on with them, and after an error another push is possible."""
    with current_config(worker), stable_addresses(model), torch.no_grad():
        try:
            yield
            refresh_copies(model)
        except BaseException:
            abandon_reload(model, worker.model_config)
            raise


def begin_module(module: nn.Module) -> dict[str, torch.Tensor]:
    """Give one module the tensors that checkpoints have, uninitialized, beside the ones its kernel computes with.

    What vLLM's reload does for a module, without its counting of elements. Ends with ``finish_module``, or with
    ``abandon_reload``.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    info = layerwise.get_layerwise_info(module)
    info.kernel_tensors = layerwise.get_layer_params_buffers(module)
    info.kernel_non_persistent_buffers = set(module._non_persistent_buffers_set)
    layerwise.restore_layer_on_meta(module, info)
    info.load_numel_total = 0  # not None: under way
    layerwise.materialize_layer(module, info)
    return layerwise.get_layer_tensors(module)


def finish_module(module: nn.Module) -> None:
    """Process the tensors that ``begin_module`` gave for the kernel, into the addresses the kernel has."""
    from vllm.model_executor.model_loader.reload import layerwise

    layerwise._layerwise_process(module, layerwise.get_layerwise_info(module))


def can_replay(worker: Any, model: nn.Module) -> bool:
    """Whether loading this model is nothing but copies into modules that are processed one by one.

    Not so where attention derives tensors from loaded weights (MLA), and where encoder outputs are cached.
    """
    from vllm.model_executor.layers.attention import MLAAttention

    return not worker.model_config.is_multimodal_model and not any(
        isinstance(module, MLAAttention) for module in model.modules()
    )


def is_kept_as_loaded(module: nn.Module) -> bool:
    """Whether the kernel of `module` computes with its tensors just as checkpoints bring them."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.platforms import current_platform

    if isinstance(module, VocabParallelEmbedding):
        return not current_platform.is_cpu()
    return getattr(module, "quant_method", None) is None


def refresh_copies(model: nn.Module) -> None:
    """On a CPU, let what computes with a copy of a weight, made when the engine started, compute with what it is now.

    Such are embeddings that share a weight, of which one was processed, and Mamba 2, whose view of the convolution's
    weight is left behind when the weight is rearranged.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and not module.weight.is_meta:
            module.quant_method.process_weights_after_loading(module)
        copy = module._buffers.get("conv_weights")
        weight = None if copy is None else convolution_weight(module.conv1d)
        if copy is not None and weight is not None:
            copy.copy_(weight.view(copy.shape))


def convolution_weight(module: Any) -> torch.Tensor | None:
    """``[C, 1, width]`` of a causal convolution, which vLLM makes of a linear layer; None for other layers."""
    # A CPU may have it in another order, and this beside it.
    in_order = vars(module).get("_cpu_unpacked_conv_weight")
    if in_order is not None:
        return in_order[:, None]
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.ndim == 3 else None


def register_empty_loader() -> str:
    """Register a load format for an engine that waits for its first push, and name it.

    vLLM's own "dummy" leaves packed codes uninitialized and draws global scales around zero: the weights decode to
    infinities and NaN, which vLLM's warm-up samples from. Here quantized weights are small, and in turn positive and
    negative; not zero, for Gemma 3n divides by the magnitude of a product. It also draws what no checkpoint brings,
    such as the scales of attention; here that keeps its default.
    """
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
    from vllm.model_executor.model_loader.reload import layerwise

    global _empty_loader
    if _empty_loader is None:

        class EmptyModelLoader(DummyModelLoader):
            def load_weights(self, model: nn.Module, model_config: Any) -> None:
                defaults = [
                    (tensor, tensor.clone())
                    for module in model.modules()
                    for name, tensor in layerwise.get_layer_tensors(module).items()
                    if not is_filled_by_loading(module, name)
                ]
                super().load_weights(model, model_config)
                for tensor, default in defaults:
                    tensor.data.copy_(default)
                for name, parameter in model.named_parameters():
                    if name.endswith(PACKED):
                        parameter.data.fill_(0x91)  # 0.5, -0.5
                    elif name.endswith((BLOCK_SCALE, GLOBAL_ENCODE_SCALE)):
                        value = E4M3_MIN_NORMAL if name.endswith(BLOCK_SCALE) else 1.0
                        parameter.data.copy_(torch.full(parameter.shape, value, device=parameter.device))

        _empty_loader = register_model_loader(EMPTY_FORMAT)(EmptyModelLoader)
    return EMPTY_FORMAT


def moe_routers(model: nn.Module) -> dict[int, Any]:
    """The routers of an engine's model, by decoder layer; their ``set_capture_fn`` lets one see the chosen experts."""
    from vllm.model_executor.layers.fused_moe.layer import MoERunner
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    runners = (module for module in model.modules() if isinstance(module, MoERunner))
    return {runner.layer_id: runner.router for runner in runners if isinstance(runner.router, BaseRouter)}


def is_filled_by_loading(module: nn.Module, name: str) -> bool:
    """Whether a checkpoint is expected to bring the tensor `name` of `module`."""
    from vllm.model_executor.layers.attention import Attention, MLAAttention
    from vllm.model_executor.model_loader.reload import meta

    # 0.26 has one list of names that are never loaded, newer versions a shorter one without the biases. One name on it
    # is loaded all the same, past the reload: experts and router share the tensor, so it stays where it is.
    never_loaded = getattr(meta, "SKIP_LOAD_TENSORS", meta.SKIP_TENSORS - {"bias"}) - {"e_score_correction_bias"}
    # The scales of attention have defaults, and checkpoints in this format do not bring them.
    return (
        name not in module._non_persistent_buffers_set
        and name not in never_loaded
        and not isinstance(module, (Attention, MLAAttention))
    )
