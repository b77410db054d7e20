"""The head of a learned router: a score from a hidden state and a target embedding."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

# Numbers that say how hidden state and target agree.
_AGREEMENTS = 8


class RegressionHead(nn.Module):
    """``c · gelu(M [a, b, a * b, d])`` of a hidden state and a target embedding; ``LearnedRouter`` says what these are.

    Args:
        hidden_size: Length of a hidden state.
        embedding_size: Length of an embedding.
        width: Length of both projections and of the layer between.
        seed: Of the weights; ``c`` and the biases start at 0, ``D`` around 1.
    """

    def __init__(self, hidden_size: int, embedding_size: int, width: int, *, seed: int) -> None:
        super().__init__()
        # Initialised separately: nn.Linear would draw from the global generator and change the model's draws.
        linear: Callable[..., nn.Linear] = partial(
            cast(Any, nn.utils.skip_init), nn.Linear, device="cpu", dtype=torch.float32
        )
        self.hidden = linear(hidden_size, width)
        self.target = linear(embedding_size, width)
        self.product = linear(hidden_size, _AGREEMENTS, bias=False) if hidden_size == embedding_size else None
        self.between = linear(3 * width + (0 if self.product is None else _AGREEMENTS), width)
        self.out = linear(width, 1, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.requires_grad_(False).zero_()
            for layer in (self.hidden, self.target, self.between):
                bound = layer.in_features**-0.5
                layer.weight.uniform_(-bound, bound, generator=generator)
            if self.product is not None:
                self.product.weight.normal_(1.0, 0.5, generator=generator)

    def forward(self, hidden: Tensor, target: Tensor, unit: Tensor) -> Tensor:
        """float32 ``[...]`` from ``[..., H]`` and ``[..., E]``; the projections run in the inputs' dtype."""
        a, b = _projected(hidden, self.hidden), _projected(target, self.target)
        parts = [a, b, a * b]
        if self.product is not None:
            parts.append(self.agreement(hidden, target) / unit)
        return self.out(nn.functional.gelu(self.between(torch.cat(parts, dim=-1))))[..., 0]

    def agreement(self, hidden: Tensor, target: Tensor) -> Tensor:
        """``D (norm(h) * e)``, float32 ``[..., 8]``; one 0 where the lengths differ."""
        if self.product is None:
            return hidden.new_zeros(*hidden.shape[:-1], 1, dtype=torch.float32)
        product = nn.functional.layer_norm(hidden, hidden.shape[-1:]) * target
        return nn.functional.linear(product, self.product.weight.to(product.dtype)).float()


def _projected(value: Tensor, layer: nn.Linear) -> Tensor:
    normed = nn.functional.layer_norm(value, value.shape[-1:])
    return nn.functional.linear(normed, layer.weight.to(normed.dtype)).float() + layer.bias
