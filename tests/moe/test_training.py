"""Two hundred steps of a small language model: the layer against a mixture of experts written in plain autograd."""

import copy

import torch
from torch import nn
from torch.nn.functional import linear, silu

from cggr_moe import PersistentTRMLP
from tests.support.small_language_model import WIDTH, SmallLanguageModel, loss_curve


class WrittenOut(nn.Module):
    """Every expert on every token, weighted with zeros where the router did not choose it."""

    def __init__(self, layer: PersistentTRMLP) -> None:
        super().__init__()
        self.top_k = layer.top_k
        self.gate, self.gate_up_proj, self.down_proj = layer.gate, layer.gate_up_proj, layer.down_proj

    def forward(self, x):
        probability = linear(x, self.gate.weight).softmax(-1)
        best = probability.topk(self.top_k, dim=-1)
        chosen = torch.zeros_like(probability).scatter(-1, best.indices, 1.0)
        weight = probability * chosen / best.values.sum(-1, keepdim=True)
        gate, up = torch.einsum("bsh,eih->bsei", x, self.gate_up_proj).chunk(2, dim=-1)
        every = torch.einsum("bsei,ehi->bseh", silu(gate) * up, self.down_proj)
        share = chosen.mean((0, 1)) / self.top_k
        return (every * weight[..., None]).sum(2), chosen.shape[-1] * (share * probability.mean((0, 1))).sum()


def test_the_loss_curve_is_that_of_the_written_out_model():
    torch.manual_seed(0)
    layers = [PersistentTRMLP(WIDTH, 32, num_experts=4, top_k=2, dtype=torch.float64) for _ in range(2)]
    model = SmallLanguageModel(layers).double()
    reference = copy.deepcopy(model)
    reference.layers = nn.ModuleList(WrittenOut(layer) for layer in reference.layers)
    curve, expected = loss_curve(model, 200), loss_curve(reference, 200)
    assert expected[-20:].mean() < 0.6 * expected[:5].mean()
    torch.testing.assert_close(curve, expected, rtol=1e-6, atol=0)
