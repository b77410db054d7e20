"""Checks that a model's own loss equals a routed step's on whole batches, whatever labels their rows have."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from cggr_core.routing.agreement import plain_arguments
from cggr_core.routing.architectures import MODEL_ERRORS, Architecture, unwrapped
from cggr_core.routing.context_pass import LayerOutput
from cggr_core.routing.head_check import random_logits
from cggr_core.routing.inputs import TokenInputs
from cggr_core.routing.labelled_tokens import IGNORED, takes_mask, text_alone
from cggr_core.routing.loss_agreement import (
    TRACED_AND_NOT,
    Alignment,
    another_loss,
    loss_and_logits,
    routed_loss,
    same_loss,
)
from cggr_core.routing.patches import attention_of_any_mask, smaller_vocabulary, without_checkpointing
from cggr_core.routing.truncation import truncated

# Logits of one check: a few copies are held at a time, in float32 half a gigabyte for the larger number.
_LOGITS, _LOGITS_OF_IDS = 1 << 23, 1 << 25
_FEWEST_CLASSES, _MOST_CLASSES = 16, 256
_ROWS, _LABELS, _COUNTS = 2, 3, 4


@dataclass(frozen=True)
class _Look:
    """Rows with labels, and the logits that replace the model's.

    Attributes:
        said: What is checked, for a message.
        arguments: Of the forward.
        labels: int64 ``[R, S]``.
        scale: Standard deviation of the logits.
        sure: Added to the logit of every label.
    """

    said: str
    arguments: dict[str, Any]
    labels: Tensor
    scale: float = 8.0
    sure: float = 0.0


@torch.no_grad()
def check_loss_of_batch(
    model: nn.Module, architecture: Architecture, inputs: TokenInputs, labels: Tensor, layer_output: LayerOutput
) -> None:
    """Compare the model's own loss with a routed step's on the rows of a batch, with its labels and with others.

    A mean cross-entropy is the same function of logits and labels whether one label or all of them count, in one row or
    many, in long rows or short ones, and whether they are predicted well or badly; a loss that weights, caps, drops or
    normalises by any of those differs in at least one of eight checks. No layer is run for them, and random logits over
    few classes replace the head's, so that they cost little compared with a step; one more check covers which tokens
    the labels are. If the model does not run in this way, two rows are run unchanged.

    Args:
        model: The model, whose loss agreed on a few tokens.
        architecture: Its description, with the alignment of its labels.
        inputs: The batch.
        labels: int64 ``[B, S]``, -100 where a token is not counted.
        layer_output: Wraps a hidden state the way the model's layers return it.

    Raises:
        ValueError: If the losses differ, or the model's own cannot be computed.
    """
    base, found = unwrapped(model), None
    with suppress(*MODEL_ERRORS), without_checkpointing(architecture), truncated(architecture, 0, layer_output):
        found = _without_layers(model, architecture, inputs, labels)
        if found is None:
            return
    rows, length = min(inputs.shape[0], _ROWS), inputs.shape[1]
    most = max(_LOGITS_OF_IDS // (rows * architecture.head.classes), 8)
    try:
        with attention_of_any_mask(), without_checkpointing(architecture):
            try:
                whole = _as_it_is(model, architecture, inputs, labels, rows, min(length, most))
            except MODEL_ERRORS:  # some models run only on rows of certain lengths, such as the batch's
                whole = _as_it_is(model, architecture, inputs, labels, rows, length, halves=False)
    except MODEL_ERRORS as error:
        raise ValueError(
            f"{type(base).__name__} raised when called with labels for rows of the batch, to compare its own loss with "
            f"cross-entropy: {type(error).__name__}: {error}"
        ) from error
    if whole is None and length <= most and rows == inputs.shape[0]:
        return
    differs = found or whole
    if differs is not None:
        raise another_loss(base, *differs)


def _without_layers(
    model: nn.Module, architecture: Architecture, inputs: TokenInputs, labels: Tensor
) -> tuple[str, Tensor, dict[Alignment, float]] | None:
    """The first check in which the losses differ, without the layers and over few classes."""
    classes, (rows, length) = architecture.head.classes, inputs.shape
    few = min(classes, _MOST_CLASSES, max(_FEWEST_CLASSES, _LOGITS // (rows * length)))
    if few < classes:
        # Checked with the full vocabulary: which tokens the labels are.
        for look in _of_ids(model, inputs, labels, classes):
            if (found := _difference(model, architecture, look, classes)) is not None:
                return found
    fewest = min(few, _FEWEST_CLASSES)
    for number, looks in (
        (few, _looks(model, inputs, labels, few, as_given=True)),
        (fewest, _of_counts(model, inputs, labels, fewest)),
    ):
        with smaller_vocabulary(architecture.configured, classes, number) if number < classes else ExitStack():
            for look in looks:
                if (found := _difference(model, architecture, look, number)) is not None:
                    return found
    return None


def _difference(
    model: nn.Module, architecture: Architecture, look: _Look, classes: int
) -> tuple[str, Tensor, dict[Alignment, float]] | None:
    def run(traced: bool) -> tuple[Any, Tensor]:
        with _logits_for(architecture, look, classes, traced=traced):
            output = model(**look.arguments, labels=look.labels, use_cache=False)
        return output, output.logits

    return _compared(model, architecture, look, run)


def _compared(
    model: nn.Module, architecture: Architecture, look: _Look, run: Callable[[bool], tuple[Any, Tensor]]
) -> tuple[str, Tensor, dict[Alignment, float]] | None:
    counted, mask = look.labels, look.arguments.get("attention_mask")
    if not architecture.counts_padding and mask is not None and mask.shape == counted.shape:
        counted = counted.masked_fill(mask == 0, IGNORED)
    own, ours = None, dict[Alignment, float]()
    for traced in TRACED_AND_NOT:
        output, logits = run(traced)
        own = output.loss.detach() if own is None else own
        for shifted in (architecture.shifted, not architecture.shifted):
            alignment = Alignment(shifted, architecture.counts_padding)
            ours[alignment] = routed_loss(model, output, logits, counted, shifted=shifted)
        found = ours[Alignment(architecture.shifted, architecture.counts_padding)]
        if found != found or same_loss(own, found, logits):  # the mean over no labels is NaN, and cannot be compared
            return None
    assert own is not None
    return look.said, own, ours


def _as_it_is(
    model: nn.Module,
    architecture: Architecture,
    inputs: TokenInputs,
    labels: Tensor,
    rows: int,
    length: int,
    *,
    halves: bool = True,
) -> tuple[str, Tensor, dict[Alignment, float]] | None:
    """The first check in which the losses differ, on a few rows and with the whole model."""
    classes = architecture.head.classes
    for look in (
        *_looks(model, inputs, labels, classes, rows=rows, length=length, halves=halves),
        *_of_counts(model, inputs, labels, classes, rows=rows, length=length),
    ):
        arguments = {**look.arguments, "use_cache": False}
        run = partial(_with_layers, model, architecture, arguments, look)
        found = _compared(model, architecture, look, run)
        if found is not None:
            return found
    return None


def _with_layers(
    model: nn.Module, architecture: Architecture, arguments: dict[str, Any], look: _Look, traced: bool
) -> tuple[Any, Tensor]:
    change = partial(_stand_in, architecture, look)
    return loss_and_logits(model, architecture, arguments, look.labels, traced=traced, change=change)


def _looks(
    model: nn.Module,
    inputs: TokenInputs,
    labels: Tensor,
    classes: int,
    *,
    rows: int | None = None,
    length: int | None = None,
    as_given: bool = False,
    halves: bool = True,
) -> Iterator[_Look]:
    """Four checks of the rows: as many for every batch, since ranks that hold parts of a model run them together."""
    text = _text(model, inputs, rows, length)
    every = torch.randint(classes, labels.shape, generator=torch.Generator().manual_seed(0)).to(labels.device)
    labels, every = labels[:rows, :length], every[:rows, :length]
    few = torch.where(labels == IGNORED, IGNORED, labels % classes)
    yield _Look("with the batch's labels", plain_arguments(inputs) if as_given else text, few)
    yield _Look("with a label at every token", text, every, scale=100.0)
    number, size = every.shape
    place = torch.arange(size, device=labels.device)
    chance = torch.rand(every.shape, generator=torch.Generator().manual_seed(1)).to(labels.device)
    # From a row without labels to a fully labelled one; half of a single row.
    share = torch.linspace(0, 1, number, device=labels.device)[:, None] if number > 1 else 0.5
    yield _Look("with more labels in some rows than in others", text, every.masked_fill(chance >= share, IGNORED))
    half = max(size // 2, 2) if halves else size
    some = every[:1, :half].masked_fill(place[:half] >= 1 + _LABELS, IGNORED)
    single = _text(model, inputs, 1, half)
    yield _Look("with few labels in one row, predicted well", single, some, scale=1.0, sure=log(classes) + 3.0)


def _of_counts(
    model: nn.Module,
    inputs: TokenInputs,
    labels: Tensor,
    classes: int,
    *,
    rows: int | None = None,
    length: int | None = None,
) -> Iterator[_Look]:
    """Checks with one label and more, growing by a constant factor: a later batch may have any number of labels."""
    text = _text(model, inputs, rows, length)
    generator = torch.Generator().manual_seed(2)
    labels = labels[:rows, :length]
    every = torch.randint(classes, labels.shape, generator=generator).to(labels.device)
    order = torch.rand(labels.shape, generator=generator).to(labels.device)
    order[:, 0] = 2.0  # which a causal model does not predict
    mask = text.get("attention_mask")
    if mask is not None and mask.shape == order.shape:
        order = order.masked_fill(mask == 0, 2.0)
    rank = order.flatten().argsort().argsort().view_as(labels)
    for share in range(_COUNTS):
        count = round(labels.numel() ** (share / _COUNTS))
        yield _Look(f"with {count} of the tokens labelled", text, every.masked_fill(rank >= count, IGNORED))


def _of_ids(model: nn.Module, inputs: TokenInputs, labels: Tensor, classes: int) -> Iterator[_Look]:
    """A check of as many of the labels' tokens as fit."""
    length = max(2, min(inputs.shape[1], _LOGITS_OF_IDS // classes))
    rows = max(1, min(inputs.shape[0], _LOGITS_OF_IDS // (classes * length)))
    ids = labels[labels != IGNORED].unique()
    if ids.numel() == 0:
        ids = torch.arange(classes, device=labels.device)
    shuffled = ids[torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(0)).to(ids.device)]
    places = torch.arange(rows * length, device=ids.device) % ids.numel()
    yield _Look(
        "with the tokens that the batch's labels are",
        _text(model, inputs, rows, length),
        shuffled[places].view(rows, length),
    )


def _text(model: nn.Module, inputs: TokenInputs, rows: int | None, length: int | None) -> dict[str, Any]:
    """The first rows of a batch, text only; a mask marks padding, which models would otherwise guess."""
    text = {name: tensor[:rows, :length] for name, tensor in inputs.per_token.items()}
    base = unwrapped(model)
    if "input_ids" in text:
        text["input_ids"] = text_alone(text["input_ids"], base.config)
    if inputs.padding is not None:
        text["attention_mask"] = inputs.padding[:rows, :length]
    elif takes_mask(base):
        text["attention_mask"] = torch.ones_like(inputs.position_ids[:rows, :length])
    return {**text, **inputs.quiet}


def _logits_for(architecture: Architecture, look: _Look, classes: int, *, traced: bool) -> AbstractContextManager[None]:
    """Let the head return the logits of a check, whatever its number of classes."""
    return random_logits(architecture.head.module, classes, partial(_stand_in, architecture, look), traced=traced)


def _stand_in(architecture: Architecture, look: _Look, noise: Tensor) -> Tensor:
    logits = noise * look.scale
    if look.sure and logits.shape[:2] == look.labels.shape:
        targets = look.labels[:, int(architecture.shifted) :, None]
        logits[:, : targets.shape[1]] += look.sure * (targets == torch.arange(logits.shape[-1], device=logits.device))
    return logits
