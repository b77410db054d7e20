"""Checks that a model's own loss is the cross-entropy of a routed step, on a few tokens before the first step."""

import inspect
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cggr_core.head import autocast_active
from cggr_core.routing.architectures import MODEL_ERRORS, Architecture, unwrapped
from cggr_core.routing.head_check import large_random_logits, leaves
from cggr_core.routing.inputs import TokenInputs
from cggr_core.routing.labelled_tokens import IGNORED, few_labelled_tokens
from cggr_core.routing.patches import evaluation_mode, without_checkpointing

_TOKENS = 8
# Nearly all models compute their loss in float32; the others round it to the logits' dtype.
_TOLERANCE, _HALF_TOLERANCE = 1e-5, 1e-2
# Words in the names of settings that change a loss or add a term to it.
_LOSS_SETTINGS = re.compile(r"loss|smoothing|aux|mtp|nextn|focal")
# A loss is checked with gradients on, as in a step; if the logits then differ, perhaps because the loss wrote its
# gradient into them, they are computed again without.
TRACED_AND_NOT = True, False


@dataclass(frozen=True)
class Alignment:
    """Which prediction a label belongs to in a model's own loss.

    Attributes:
        shifted: Whether it is the one before the label (causal models) rather than the one at its position (masked
            models).
        counts_padding: Whether a label counts where the attention mask is 0.
    """

    shifted: bool
    counts_padding: bool


@torch.no_grad()
def own_alignment(
    model: nn.Module, architecture: Architecture, inputs: TokenInputs, *, tokens: int = _TOKENS
) -> Alignment | None:
    """Compare the model's own loss on a few labelled tokens with the cross-entropy of its own logits.

    Both come from one forward in the model's current mode, with large logits: a loss may have a term only in training,
    and with the logits of initial weights every loss is near the logarithm of the vocabulary size.

    Args:
        model: The model.
        architecture: Its description.
        inputs: The batch to take tokens from.
        tokens: Number of tokens per row.

    Returns:
        How the model aligns its labels; ``None`` if that cannot be determined: it computes no loss, or rows have a
        single token.

    Raises:
        ValueError: If its loss differs with either alignment, or cannot be computed.
    """
    base = unwrapped(model)
    parameters = inspect.signature(base.forward).parameters
    takes_labels = "labels" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_labels or inputs.shape[1] < 2:
        return None
    arguments, labels = few_labelled_tokens(base, inputs, tokens)
    arguments["use_cache"] = False
    name = type(base).__name__
    output: Any = None
    own, found = None, dict[Alignment, float]()
    for traced in TRACED_AND_NOT:
        try:
            with without_checkpointing(architecture):
                output, logits = loss_and_logits(model, architecture, arguments, labels, traced=traced)
        except MODEL_ERRORS as error:
            raise ValueError(
                f"{name} raised when called with labels for a few tokens, to compare its own loss with cross-entropy: "
                f"{type(error).__name__}: {error}"
            ) from error
        if own is None:
            own = _single_loss(base, output, "labels" in parameters)
            if own is None:
                return None
            _check_leaves(model, own, logits)
        likely = architecture.shifted
        attended = arguments.get("attention_mask")
        unpadded = labels if attended is None else labels.masked_fill(attended == 0, IGNORED)
        for alignment in (Alignment(shifted, counts) for shifted in (likely, not likely) for counts in (True, False)):
            counted = labels if alignment.counts_padding else unpadded
            found[alignment] = routed_loss(model, output, logits, counted, shifted=alignment.shifted)
            if same_loss(own, found[alignment], logits):
                return alignment
    assert own is not None
    raise another_loss(base, f"on {labels.numel()} tokens", own, found, without_gradients=output.loss)


def _single_loss(base: nn.Module, output: Any, promised: bool) -> Tensor | None:
    own = getattr(output, "loss", None)
    name = type(base).__name__
    if own is None and promised:
        raise ValueError(f"{name} returns no loss for labels alone, so a routed step would train something else")
    if own is not None and own.numel() != 1:
        raise ValueError(f"{name} returns a loss of shape {list(own.shape)}, but a routed step needs a single number")
    return own


def _check_leaves(model: nn.Module, own: Tensor, logits: Tensor) -> None:
    """Raise if a loss depends on parameters that the logits do not; such a parameter may have no effect at first."""
    apart = leaves(own) - leaves(logits)
    names = [name for name, parameter in model.named_parameters() if parameter in apart]
    if names:
        raise ValueError(
            f"{type(unwrapped(model)).__name__}'s own loss trains parameters besides those of its logits "
            f"({', '.join(names)}), which a routed step would not; freeze them (requires_grad_(False)), train the "
            "model with its own forward, or build your loss from its logits"
        )


def another_loss(
    base: nn.Module, where: str, own: Tensor, found: dict[Alignment, float], *, without_gradients: Tensor | None = None
) -> ValueError:
    """The error that gives a model's own loss, and the cross-entropy that it should be.

    Args:
        base: The model.
        where: The tokens on which they differ.
        own: Its own loss.
        found: A routed step's loss for each alignment of labels.
        without_gradients: Its own loss with gradients disabled.
    """
    cause = _likely_cause(base)
    if without_gradients is not None and any(same_loss(without_gradients, value, own) for value in found.values()):
        cause = "with gradients enabled; without, it is cross-entropy"
    shifted, unshifted = (
        next(value for alignment, value in found.items() if alignment.shifted is kind) for kind in (True, False)
    )
    return ValueError(
        f"{type(base).__name__}'s own loss is not the mean cross-entropy of its logits that a routed step computes: "
        f"{where} it is {own.item():.6g}, cross-entropy {shifted:.6g} with shifted labels and {unshifted:.6g} without "
        f"({cause}); train it with its own forward, or build your loss from its logits"
    )


@torch.no_grad()
def check_reads(name: str, model: nn.Module, architecture: Architecture, inputs: TokenInputs) -> None:
    """Raise unless the model's own loss reads an argument besides ``labels`` as a routed step does.

    Args:
        name: ``"shift_labels"``, which take the place of labels, or ``"num_items_in_batch"``, which divides a sum.
        model: The model.
        architecture: Its description.
        inputs: The batch to take tokens from.

    Raises:
        ValueError: If it does not.
    """
    base = unwrapped(model)
    arguments, labels = few_labelled_tokens(base, inputs, _TOKENS)
    shifted, targets, items = architecture.shifted, labels, None
    if name == "shift_labels":
        shifted, targets = False, labels.flip(1)  # not aligned with the labels passed along with them
    elif not architecture.counts_padding and "attention_mask" in arguments:
        targets = labels.masked_fill(arguments["attention_mask"] == 0, IGNORED)
    if name == "num_items_in_batch":
        items = torch.tensor(37.0, device=labels.device)
    arguments |= {"use_cache": False, name: targets if items is None else items}
    if not _reads(model, architecture, arguments, labels, targets, shifted=shifted, items=items):
        said = (
            "does not use them; pass labels instead, in the model's own convention"
            if items is None
            else "is not a sum divided by it; pass num_items instead, if cross-entropy is to be divided by it"
        )
        raise ValueError(f"{name}: the loss of {type(base).__name__} {said}")


def _reads(
    model: nn.Module,
    architecture: Architecture,
    arguments: dict[str, Any],
    labels: Tensor,
    targets: Tensor,
    *,
    shifted: bool,
    items: Tensor | None,
) -> bool:
    own = None
    with suppress(*MODEL_ERRORS), without_checkpointing(architecture):
        for traced in TRACED_AND_NOT:
            output, logits = loss_and_logits(model, architecture, arguments, labels, traced=traced)
            own = output.loss if own is None else own
            if own is None or own.numel() != 1:
                return False
            if same_loss(own, routed_loss(model, output, logits, targets, shifted=shifted, items=items), logits):
                return True
    return False


def loss_and_logits(
    model: nn.Module,
    architecture: Architecture,
    arguments: dict[str, Any],
    labels: Tensor,
    *,
    traced: bool,
    change: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Any, Tensor]:
    """A model's output for labelled tokens, and the logits ``[B, S, V]`` from which its loss is computed.

    Args:
        model: The model.
        architecture: Its description.
        arguments: Of its forward.
        labels: int64 ``[B, S]``.
        traced: Compute the loss with gradients, as in a step; its graph ends at the logits.
        change: As for :func:`~cggr_core.routing.head_check.large_random_logits`.
    """
    with large_random_logits(architecture.head.module, traced=traced, change=change):
        output = model(**arguments, labels=labels)
    if isinstance(output.logits, Tensor) and output.logits.shape[:2] == labels.shape:
        return output, output.logits
    # In training, some models compute their loss without logits, or only with those of labelled tokens.
    with evaluation_mode(model), large_random_logits(architecture.head.module, traced=traced, change=change):
        output = model(**arguments, labels=labels)
    if isinstance(output.logits, Tensor) and output.logits.shape[:2] == labels.shape:
        return output, output.logits
    with evaluation_mode(model):
        return model(**arguments, labels=labels), model(**arguments).logits


def auxiliary_loss(model: nn.Module, output: Any) -> Tensor | None:
    """The part of a model's loss that comes from its expert routers, weighted as in the model."""
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):
        return None
    base = unwrapped(model)
    config = base.config.get_text_config()
    for holder in (base, config):
        for name in ("router_aux_loss_coef", "aux_loss_coef", "router_aux_loss_coefficient"):
            coefficient = getattr(holder, name, None)
            if coefficient is not None:
                return loss * coefficient
    raise ValueError(
        f"{type(base).__name__} returns an auxiliary loss, but neither it nor its config has a router_aux_loss_coef to "
        "weight it; set config.router_aux_loss_coef, or config.output_router_logits=False"
    )


def routed_loss(
    model: nn.Module, output: Any, logits: Tensor, labels: Tensor, *, shifted: bool, items: Tensor | None = None
) -> float:
    """A routed step's loss from logits ``[B, S, V]``: mean cross-entropy, plus the expert routers' loss.

    Args:
        model: The model.
        output: Of its forward.
        logits: Its logits.
        labels: int64 ``[B, S]``.
        shifted: Whether a label's prediction is the one before it.
        items: Divisor of the sum; the number of labels by default.
    """
    targets = labels[:, 1:] if shifted else labels
    predictions = logits[:, :-1] if shifted else logits
    reduction = "mean" if items is None else "sum"
    nll = cross_entropy(
        predictions.detach().flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction=reduction
    ) / (1.0 if items is None else items)
    auxiliary = auxiliary_loss(model, output)
    return float(nll if auxiliary is None else nll + auxiliary)


def same_loss(own: Tensor, ours: float, logits: Tensor) -> bool:
    """Whether two losses are equal, within the precision of the first one's dtype and the logits' dtype."""
    own = own.detach()
    exact = all(value.dtype in (torch.float32, torch.float64) for value in (own, logits))
    tolerance = _TOLERANCE if exact and not autocast_active(own.device.type) else _HALF_TOLERANCE
    return abs(float(own) - ours) <= tolerance * max(1.0, abs(float(own)))


def _likely_cause(base: Any) -> str:
    if "loss_function" in base.__dict__ or "_loss_function" in base.__dict__:
        return "its loss_function was replaced"
    settings = {
        name: value
        for name, value in vars(base.config.get_text_config()).items()
        if _LOSS_SETTINGS.search(name) and isinstance(value, int | float | str) and value not in (0, "", False)
    }
    if settings:
        return "its config has " + ", ".join(f"{name}={value!r}" for name, value in sorted(settings.items()))
    return "it has an additional term, another weighting or other ignored labels"
