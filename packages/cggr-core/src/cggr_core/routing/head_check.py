"""Checks that a model's logits are its head's matrix, a scale and a softcap, and nothing else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from cggr_core.routing.architectures import Architecture, Head
from cggr_core.routing.inputs import TokenInputs
from cggr_core.routing.patches import replaced_forwards, without_checkpointing

# Standard deviation of the logits that stand in for a head's: a softcap bends them, and a loss tells its labels apart,
# which those of starting weights do not.
_LOGIT_SCALE = 8.0
# Relative error of what comes after the head; products in half precision round by up to 2 ** -8.
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 2e-2
# Random numbers that are drawn at most; many logits are these again and again, in other places of every row.
_MOST_DRAWN = 1048573  # a prime


@contextmanager
def large_random_logits(head: nn.Module, *, traced: bool = False) -> Iterator[list[Tensor]]:
    """Let a head give large random logits, the same in every block; whatever stands around it is as it was.

    Scope: this module, whoever calls it.

    Args:
        head: The head.
        traced: Switch gradients on from the head's call to the end of the block, so that what is made of its logits
            has a graph that ends at them.

    Yields:
        The logits that the head gave, for every call; the model has copies of them.
    """
    own, given = head.forward, list[Tensor]()

    def with_noise(*args: Any, **kwargs: Any) -> Any:
        logits = own(*args, **kwargs)
        if type(logits) is not Tensor:  # sharded over ranks
            return logits
        given.append((_noise(logits.shape, logits.device, len(given)) * _LOGIT_SCALE).to(logits).requires_grad_(traced))
        torch.set_grad_enabled(traced or torch.is_grad_enabled())
        return given[-1].clone()

    with torch.set_grad_enabled(torch.is_grad_enabled()), replaced_forwards({head: with_noise}):
        yield given


@contextmanager
def random_logits(head: nn.Module, classes: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a head give random logits over some number of classes, without its product.

    Reach: this module, whoever calls it.

    Args:
        head: The head.
        classes: How many logits it is to give for each token.
        change: From standard normal numbers ``[..., classes]`` in float32, others in every call, to the logits.

    Raises:
        TypeError: In a call, if the head is sharded over ranks.
    """
    own, calls = head.forward, count()

    def stand_in(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        like = own(hidden[:1, :1] if hidden.dim() == 3 else hidden[:1], *args, **kwargs)
        if type(like) is not Tensor:
            raise TypeError(f"the head gives a {type(like).__name__}")
        return change(_noise(torch.Size((*hidden.shape[:-1], classes)), like.device, next(calls))).to(like)

    with replaced_forwards({head: stand_in}):
        yield


def _noise(shape: torch.Size, device: torch.device, seed: int) -> Tensor:
    """Standard normal numbers in float32, the same on every device."""
    size = shape.numel()
    drawn = torch.randn(min(size, _MOST_DRAWN), generator=torch.Generator().manual_seed(seed), device="cpu").to(device)
    return drawn.repeat(-(-size // max(drawn.numel(), 1)))[:size].view(shape)


@torch.no_grad()
def gives_the_logits(model: nn.Module, architecture: Architecture, inputs: TokenInputs) -> bool:
    """Whether what a model makes of its head's output is the scale and the softcap that its description says.

    In the mode that the model is in. A parameter that takes part counts, also where its value changes nothing yet.

    Args:
        model: The model.
        architecture: Its description.
        inputs: A few tokens.
    """
    head = architecture.head
    if getattr(model, "final_logits_bias", None) is not None:  # a buffer that is 0 until a checkpoint brings another
        return False
    with (
        without_checkpointing(architecture),
        large_random_logits(head.module, traced=True) as given,
    ):
        logits = model(**inputs.arguments(), use_cache=False).logits
    if not given:
        return True  # sharded over ranks: the probe compares the values alone
    if len(given) != 1 or logits.shape != given[0].shape or not _is_close(_scaled_and_capped(head, given[0]), logits):
        return False
    return _leaves(logits) <= {given[0]}


def _scaled_and_capped(head: Head, product: Tensor) -> Tensor:
    product = product.float() * (head.scale or 1.0)
    return product if head.softcap is None else head.softcap * torch.tanh(product / head.softcap)


def _leaves(value: Tensor) -> set[Tensor]:
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
