"""Keep masks, plain log-probabilities and reference gradients for the tests of routed log-probabilities."""

import torch

from cggr_core import CGGRModel, Selection
from tests.support.model_steps import ROUTED
from tests.support.reference_routing import gradients, reference_loss

WAYS = [("exact", None), *ROUTED]
LENGTH = 14


def some(rows=3, length=LENGTH, seed=0, share=0.4):
    keep = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < share
    keep[:, -1] = False
    return keep


def slots(keep, capacity=8):
    """A selection with fewer slots than tokens, so that a pass over the other tokens is made too."""
    return Selection.from_mask(keep, weight=torch.ones(keep.shape), capacity=capacity)


def next_tokens(input_ids):
    return torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], -100)], dim=1)


def plain(model, input_ids, temperature=1.0, **inputs):
    """Log-probabilities and entropies of the next tokens by an ordinary forward."""
    logits = model(input_ids=input_ids, use_cache=False, **inputs).logits / temperature
    logprobs = logits.log_softmax(-1)
    targets = next_tokens(input_ids)
    logprob = logprobs.gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0]
    return logprob, -(logprobs.exp() * logprobs).sum(-1)


def reference(model, input_ids, keep, weight, gradient, **inputs):
    """Gradients of ``-sum(weight * logprob)`` by an autograd graph over all tokens."""
    layers = CGGRModel(model)._passes.architecture.layers
    targets = next_tokens(input_ids)
    coefficients = weight.masked_fill(~keep, 0.0)
    loss, _ = reference_loss(
        model, layers, keep, coefficients, targets, gradient=gradient, input_ids=input_ids, **inputs
    )
    loss.backward()
    return gradients(model)
