"""An engine that is no vLLM: it keeps what it is sent."""

from hf_nvfp4_qat.formats.names import PACKED, from_checkpoint
from hf_nvfp4_qat.rollout.engine import Engine
from hf_nvfp4_qat.rollout.placement import Placement


class Store:
    """Something that generates: it has weights, cached results, requests, and may be told to do nothing."""

    def __init__(self):
        self.tensors, self.cache, self.num_requests, self.refusal = {}, ["old"], 0, ""


class StoreEngine(Engine):
    """Keeps every tensor as it comes, under its own name."""

    name, is_whole = "a store", True

    def __init__(self, llm):
        self.store = llm

    @staticmethod
    def is_mine(llm):
        return isinstance(llm, Store)

    @staticmethod
    def arguments(stream):
        return {"ignore": stream.ignored_layers}

    def place(self, stream):
        regions = {item.name: tuple((0, size) for size in item.shape) for item in stream.layout}
        return {
            name: [Placement(name, *name.rsplit(".", 1), target=region, source=region)]
            for name, region in regions.items()
        }

    def push(self, tensors, layout):
        for (name, tensor), item in zip(tensors, layout, strict=True):
            assert (name, tensor.dtype, tuple(tensor.shape)) == (item.name, item.dtype, item.shape)
            self.take(name, tensor)

    def take(self, name, tensor):
        self.store.tensors[name] = tensor.clone()

    def reader(self):
        def read(placement):
            if placement.parameter == PACKED:
                return from_checkpoint(placement.module, self.store.tensors.__getitem__).dequantize()
            return self.store.tensors[placement.tensor]

        return read

    def reset_caches(self, *, restart_requests=False):
        if self.store.num_requests and not restart_requests:
            raise ValueError("unfinished requests")
        self.store.cache.clear()

    def refuse(self, reason):
        self.store.refusal = reason

    def allow(self):
        self.store.refusal = ""
