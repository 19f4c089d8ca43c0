"""Pushes after the first: the copies that vLLM's loaders made, repeated without asking the loaders again."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from hf_nvfp4_qat.rollout.placement import Placement, slices
from hf_nvfp4_qat.rollout.stream import NamedTensor, TensorLayout
from hf_nvfp4_qat.rollout.vllm.loading import as_announced
from hf_nvfp4_qat.rollout.vllm.versions import (
    abandon_reload,
    begin_module,
    can_replay,
    current_config,
    finish_module,
    is_kept_as_loaded,
    refresh_copies,
    stable_addresses,
)


class Replay:
    """Later pushes into an engine that has taken one: the copies that vLLM's loaders made, without asking them again.

    Routing 900 tensors by name through those loaders is Python, and takes longer than everything the GPU does. Their
    copies are known, so they are made directly: per module, raw tensors are filled, vLLM processes them for its kernel,
    and the results go where the kernel reads them. Tensors that kernels use as loaded (norms, embeddings) are
    written in place.
    """

    def __init__(self, worker: Any, by_tensor: Mapping[str, Sequence[Placement]]) -> None:
        """Plan it; ``is_possible`` says whether it would be the same as vLLM's own loading."""
        self._worker = worker
        self._model = worker.model_runner.get_model()
        self._by_tensor = by_tensor
        placements = [placement for group in by_tensor.values() for placement in group]
        self._num_expected = Counter(placement.module for placement in placements)
        self._modules = {path: self._model.get_submodule(path) for path in self._num_expected}
        self._in_place = {path for path, module in self._modules.items() if is_kept_as_loaded(module)}
        self.is_possible = can_replay(worker, self._model) and all(placement.is_plain for placement in placements)

    def load(self, tensors: Iterable[NamedTensor], layout: Sequence[TensorLayout]) -> None:
        """As ``load_tensors``."""
        raw: dict[str, dict[str, torch.Tensor]] = {}
        num_missing = self._num_expected.copy()
        with current_config(self._worker), stable_addresses(self._model), torch.no_grad():
            try:
                for name, tensor in as_announced(tensors, layout):
                    for placement in self._by_tensor[name]:
                        path = placement.module
                        module = self._modules[path]
                        if path in self._in_place:
                            target = getattr(module, placement.parameter).data
                        else:
                            if path not in raw:
                                raw[path] = begin_module(module)
                            target = raw[path][placement.parameter].data
                        if placement.source is not None:
                            part = tensor[slices(placement.source)]
                            target[slices(placement.target)].view(part.shape).copy_(part)
                        else:
                            target[slices(placement.target)].fill_(placement.constant)
                        num_missing[path] -= 1
                        if not num_missing[path] and path in raw:
                            finish_module(module)
                            del raw[path]
                refresh_copies(self._model)
            except BaseException:
                abandon_reload(self._model, self._worker.model_config)
                raise
