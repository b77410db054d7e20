"""Whether a model's logits are its head's matrix, a scale and a softcap, and nothing besides."""

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def large_random_logits(head: nn.Module) -> Iterator[list[Tensor]]:
    """Let a head give large random logits, the same in every block; whatever stands around it is as it was.

    Reach: this module, whoever calls it.

    Yields:
        The logits that the head gave, for every call.
    """
    own, given = head.forward, list[Tensor]()

    def with_noise(*args: Any, **kwargs: Any) -> Any:
        logits = own(*args, **kwargs)
        if type(logits) is not Tensor:  # sharded over ranks
            return logits
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(len(given)), device="cpu")
        given.append((noise * _LOGIT_SCALE).to(logits))
        return given[-1]

    with replaced_forwards({head: with_noise}):
        yield given


@torch.no_grad()
def gives_the_logits(model: nn.Module, architecture: Architecture, inputs: TokenInputs) -> bool:
    """Whether what a model makes of its head's output is the scale and the softcap that its description says.

    Args:
        model: The model.
        architecture: Its description.
        inputs: A few tokens.
    """
    head = architecture.head
    if getattr(model, "final_logits_bias", None) is not None:  # a buffer that is 0 until a checkpoint brings another
        return False
    with large_random_logits(head.module) as given, without_checkpointing(architecture):
        logits = model(**inputs.arguments(), use_cache=False).logits
    if not given:
        return True  # sharded over ranks: the probe compares the values alone
    return len(given) == 1 and logits.shape == given[0].shape and _is_close(_scaled_and_capped(head, given[0]), logits)


def _scaled_and_capped(head: Head, product: Tensor) -> Tensor:
    product = product.float() * (head.scale or 1.0)
    return product if head.softcap is None else head.softcap * torch.tanh(product / head.softcap)


def _is_close(value: Tensor, expected: Tensor) -> bool:
    tolerance = _TOLERANCE if expected.dtype in (torch.float32, torch.float64) else _HALF_TOLERANCE
    return torch.allclose(value, expected.float(), rtol=tolerance, atol=tolerance * _LOGIT_SCALE)
