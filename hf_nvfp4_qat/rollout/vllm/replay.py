"""How a push gets into the engine: the first through vLLM's loaders, later ones by repeating the copies they made.

Routing 900 tensors by name through those loaders is Python, and takes longer than everything the GPU does. Their copies
are known, so they are made directly: per module, raw tensors are filled, vLLM processes them for its kernel, and the
results go where the kernel reads them. Tensors that kernels use as loaded (norms, embeddings) are written in place.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from hf_nvfp4_qat.rollout.placement import Placement, slices
from hf_nvfp4_qat.rollout.plan import TensorLayout
from hf_nvfp4_qat.rollout.stream import NamedTensor, RolloutStream
from hf_nvfp4_qat.rollout.vllm.loading import as_announced, load_tensors, place_tensors
from hf_nvfp4_qat.rollout.vllm.versions import (
    begin_module,
    can_replay,
    finish_module,
    is_kept_as_loaded,
    reloading,
)


class EnginePlan:
    """What was worked out for one engine and one layout.

    Attributes:
        layout: what comes, in order.
        by_tensor: where each tensor goes, by name.
        is_stacked: whether experts come stacked, which vLLM's own loaders do not take: these must go by copies.
    """

    def __init__(self, worker: Any, stream: RolloutStream) -> None:
        """Let vLLM's loaders place the tensors of `stream`.

        Raises:
            ValueError: as ``place_tensors``.
        """
        self._worker = worker
        self._model = worker.model_runner.get_model()
        self.layout = stream.layout
        placements = place_tensors(worker, stream.layout, stream.experts)
        self.by_tensor: dict[str, list[Placement]] = {}
        for placement in placements:
            self.by_tensor.setdefault(placement.tensor, []).append(placement)
        self._num_expected = Counter(placement.module for placement in placements)
        self._modules = {path: self._model.get_submodule(path) for path in self._num_expected}
        self._in_place = {path for path, module in self._modules.items() if is_kept_as_loaded(module)}
        self._can_replay = can_replay(worker, self._model) and all(placement.is_plain for placement in placements)
        self._is_loaded = False
        self.is_stacked = stream.is_stacked and self._can_replay

    def load(self, tensors: Iterable[NamedTensor], layout: Sequence[TensorLayout]) -> None:
        """Push `tensors`, which must be exactly those of `layout`.

        The first push, and any after a failure, go through vLLM's loaders; the others repeat their copies.

        Raises:
            Exception: as ``load_tensors``.
        """
        is_loaded, self._is_loaded = self._is_loaded, False
        if self.is_stacked or (is_loaded and self._can_replay):
            self._replay(as_announced(tensors, layout))
        else:
            load_tensors(self._worker, tensors, layout)
        self._is_loaded = True

    def _replay(self, tensors: Iterable[NamedTensor]) -> None:
        raw: dict[str, dict[str, torch.Tensor]] = {}
        num_missing = self._num_expected.copy()
        with reloading(self._worker, self._model):
            for name, tensor in tensors:
                for placement in self.by_tensor[name]:
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
