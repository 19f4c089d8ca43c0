"""A weight is a value: what a part beside the master adds is trained, scaled and pushed without a change elsewhere."""

import torch
import torch.nn.functional as F
from conftest import take_step, tiny_qwen3
from torch import nn

from hf_nvfp4_qat import prepare_qat
from hf_nvfp4_qat.formats.names import from_checkpoint
from hf_nvfp4_qat.modules.swap import qat_modules, qat_weights, weights_epoch
from hf_nvfp4_qat.modules.weights import TrainedWeight
from hf_nvfp4_qat.rollout.stream import RolloutStream


class LowRankWeight(TrainedWeight):
    """A frozen master ``[N, K]`` and a low-rank part that trains: W + s B A."""

    def __init__(self, base: TrainedWeight, *, rank: int, scale: float):
        vars(self).update(vars(base))
        (module, _), (rows, columns) = base.places[0], base.master.shape
        module.part_A = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        module.part_B = nn.Parameter(torch.zeros(rows, rank))
        self.scale = scale
        module.nvfp4_weights[self.name] = self
        self.global_scales.add(self)

    @property
    def places(self):
        ((module, name),) = super().places
        return [(module, name), (module, "part_A"), (module, "part_B")]

    def parameters(self):
        return [getattr(module, name) for module, name in self.places]

    def operand(self):
        master, a, b = self.parameters()
        return torch.addmm(master, b, a, alpha=self.scale)


def test_a_part_beside_the_master_is_trained_scaled_and_pushed():
    torch.manual_seed(0)
    model = prepare_qat(tiny_qwen3())
    model.requires_grad_(False)
    masters = {name: layer.weight.clone() for name, layer in qat_modules(model).items()}
    weights = [LowRankWeight(weight, rank=4, scale=2.0) for weight in qat_weights(model).values()]
    optimizer = torch.optim.AdamW([part for weight in weights for part in weight.parameters()[1:]], lr=1e-2)
    epochs, losses = [weights_epoch(model)], []
    for _ in range(4):
        losses.append(take_step(model, optimizer).item())
        epochs.append(weights_epoch(model))
    assert losses[-1] < losses[0] and epochs == sorted(set(epochs))
    pushed = dict(RolloutStream(model))
    assert not any("part_" in name for name in pushed)
    for name, layer in qat_modules(model).items():
        weight = layer.nvfp4_weight
        assert weight.global_scales.is_fresh(weight)
        assert torch.equal(layer.weight, masters[name]) and not torch.equal(weight.trained(), masters[name])
        seen = layer.fake_quantized_weight()
        x = torch.randn(3, layer.in_features)
        assert torch.equal(layer(x), F.linear(x, seen.float()))
        assert torch.equal(from_checkpoint(name, pushed.__getitem__).dequantize(), seen)
