"""A small mixture-of-experts language model and its data, for comparing loss curves."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, rms_norm

VOCABULARY, WIDTH, LENGTH = 32, 32, 24


class SmallLanguageModel(nn.Module):
    """Embedding, blocks of a causal running mean and a token-routed MLP, head; returns loss and auxiliary loss."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mixers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in layers)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        steps = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        aux_total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        for mixer, layer in zip(self.mixers, self.layers, strict=True):
            x = x + mixer(rms_norm(x, (WIDTH,)).cumsum(1) / steps)
            out, aux_loss = layer(rms_norm(x, (WIDTH,)))
            x, aux_total = x + out, aux_total + aux_loss
        logits = self.head(rms_norm(x, (WIDTH,))[:, :-1]).to(aux_total.dtype)
        return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), aux_total


def batches(steps: int, size: int = 8) -> Tensor:
    """Sequences in which each token is mostly a fixed function of the two before it: [steps, size, LENGTH]."""
    generator = torch.Generator().manual_seed(0)
    rule = torch.randint(0, VOCABULARY, (VOCABULARY, 4), generator=generator)
    tokens = torch.randint(0, VOCABULARY, (steps, size, LENGTH), generator=generator)
    noise = torch.rand(tokens.shape, generator=generator) < 0.1
    for t in range(2, LENGTH):
        expected = rule[tokens[..., t - 1], tokens[..., t - 2] % 4]
        tokens[..., t] = torch.where(noise[..., t], tokens[..., t], expected)
    return tokens


def loss_curve(model: nn.Module, steps: int, device: str = "cpu") -> Tensor:
    """Losses of ``steps`` steps of AdamW, without the auxiliary loss that is trained with: float64 [steps]."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for tokens in batches(steps).to(device):
        loss, aux_loss = model(tokens)
        optimizer.zero_grad()
        (loss + 0.01 * aux_loss).backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).double().cpu()
