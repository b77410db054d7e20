"""Checks that a model's logits are its head's matrix, a scale and a softcap, and nothing else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from cggr_core.routing.architectures import Architecture
from cggr_core.routing.heads import Head
from cggr_core.routing.inputs import TokenInputs
from cggr_core.routing.patches import replaced_forwards, without_checkpointing

# Standard deviation of the logits that replace a head's: large enough for a softcap to show, and for a loss to depend
# on its labels, which it hardly does with untrained weights.
_LOGIT_SCALE = 8.0
# Tolerated relative error of what follows the head; products in half precision round by up to 2 ** -8.
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 2e-2
# Most random numbers to draw; larger logits repeat them, at different places in every row.
_MOST_DRAWN = 1048573  # a prime


@contextmanager
def large_random_logits(
    head: nn.Module, *, traced: bool = False, change: Callable[[Tensor], Tensor] | None = None
) -> Iterator[list[Tensor]]:
    """Let a head return large random logits, the same in every block; the rest of the model runs as usual.

    Scope: this module, whoever calls it.

    Args:
        head: The head.
        traced: Enable gradients from the head's call to the end of the block, so that everything computed from its
            logits has a graph that ends at them.
        change: Maps standard normal numbers to the logits; they are large by default.

    Yields:
        The logits of every call of the head; the model gets copies of them.
    """
    own, given = head.forward, list[Tensor]()

    def with_noise(*args: Any, **kwargs: Any) -> Any:
        logits = own(*args, **kwargs)
        if type(logits) is not Tensor:  # sharded over ranks
            return logits
        given.append(
            (change or _large)(_noise(logits.shape, logits.device, len(given))).to(logits).requires_grad_(traced)
        )
        torch.set_grad_enabled(traced or torch.is_grad_enabled())
        return given[-1].clone()

    with torch.set_grad_enabled(torch.is_grad_enabled()), replaced_forwards({head: with_noise}):
        yield given


@contextmanager
def random_logits(
    head: nn.Module, classes: int, change: Callable[[Tensor], Tensor], *, traced: bool = False
) -> Iterator[None]:
    """Let a head return random logits over a given number of classes, without computing its product.

    Scope: this module, whoever calls it.

    Args:
        head: The head.
        classes: Number of logits per token.
        change: Maps standard normal numbers ``[..., classes]`` in float32, which differ in every call, to the logits.
        traced: As for :func:`large_random_logits`.

    Raises:
        TypeError: When the head is called, if it is sharded over ranks.
    """
    own, calls = head.forward, count()

    def stand_in(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        like = own(hidden[:1, :1] if hidden.dim() == 3 else hidden[:1], *args, **kwargs)
        if type(like) is not Tensor:
            raise TypeError(f"the head gives a {type(like).__name__}")
        noise = _noise(torch.Size((*hidden.shape[:-1], classes)), like.device, next(calls))
        logits = change(noise).to(like).requires_grad_(traced)
        torch.set_grad_enabled(traced or torch.is_grad_enabled())
        return logits.clone() if traced else logits

    with torch.set_grad_enabled(torch.is_grad_enabled()), replaced_forwards({head: stand_in}):
        yield


def _large(noise: Tensor) -> Tensor:
    return noise * _LOGIT_SCALE


def _noise(shape: torch.Size, device: torch.device, seed: int) -> Tensor:
    """Standard normal numbers in float32, the same on every device."""
    size = shape.numel()
    drawn = torch.randn(min(size, _MOST_DRAWN), generator=torch.Generator().manual_seed(seed), device="cpu").to(device)
    return drawn.repeat(-(-size // max(drawn.numel(), 1)))[:size].view(shape)


@torch.no_grad()
def gives_the_logits(model: nn.Module, architecture: Architecture, inputs: TokenInputs) -> bool:
    """Whether all that a model does to its head's output is to apply the scale and softcap in its description.

    Checked in the model's current mode. A parameter that takes part counts as a change, even if its value has no effect
    yet.

    Args:
        model: The model.
        architecture: Its description.
        inputs: A few tokens.
    """
    head = architecture.head
    if getattr(model, "final_logits_bias", None) is not None:  # a buffer, 0 until a checkpoint sets it
        return False
    with (
        without_checkpointing(architecture),
        large_random_logits(head.module, traced=True) as given,
    ):
        logits = model(**inputs.arguments(), use_cache=False).logits
    if not given:
        return True  # sharded over ranks: the probe compares values only
    if len(given) != 1 or logits.shape != given[0].shape or not _is_close(_scaled_and_capped(head, given[0]), logits):
        return False
    return leaves(logits) <= {given[0]}


def _scaled_and_capped(head: Head, product: Tensor) -> Tensor:
    product = product.float() * (head.scale or 1.0)
    return product if head.softcap is None else head.softcap * torch.tanh(product / head.softcap)


def leaves(value: Tensor) -> set[Tensor]:
    """The tensors that a graph ends at."""
    found, seen, waiting = set[Tensor](), set[Any](), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            found.add(leaf)
        waiting.extend(following for following, _ in node.next_functions)
    return found


def _is_close(value: Tensor, expected: Tensor) -> bool:
    tolerance = _TOLERANCE if expected.dtype in (torch.float32, torch.float64) else _HALF_TOLERANCE
    return torch.allclose(value, expected.float(), rtol=tolerance, atol=tolerance * _LOGIT_SCALE)
