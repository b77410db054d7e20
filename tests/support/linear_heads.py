"""Rows of hidden states, a language-model head of every kind, and targets, one of them ignored."""

import torch

KINDS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.3},
    "all": {"bias": True, "softcap": 1.5, "scale": 0.3},
}


def operands(N=7, H=5, V=23, dtype=torch.float64, kind="plain"):
    """Hidden states ``[N, H]`` and a weight ``[V, H]`` with gradients, targets ``[N]``, and what else the head has."""
    hidden = torch.randn(N, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, V, (N,))
    if N > 2:
        targets[2] = -100
    head = dict(KINDS[kind])
    if "bias" in head:
        head["bias"] = torch.randn(V, dtype=dtype, requires_grad=True)
    return hidden, weight, targets, head
