"""Checks that routed passes give kept tokens the values of a plain forward, on whole rows of a real batch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cggr_core.head import autocast_active
from cggr_core.routing.architectures import Architecture
from cggr_core.routing.context_pass import NO_CONTEXT, LayerOutput, context_pass, head_read_by, ignore_head
from cggr_core.routing.gradient_pass import gradient_pass
from cggr_core.routing.inputs import TokenInputs
from cggr_core.routing.patches import evaluation_mode, without_checkpointing, without_dropout
from cggr_core.selection import Selection

# Tolerated relative error, and the share of the tokens that must stay within it. Half precision: all but tokens whose
# experts change. float32: reordered sums; more with TF32 and with kernels.
_HALF = 5e-2, 0.75
_TOLERANCE = {torch.float64: (1e-7, 1.0), torch.float32: (2e-4, 0.99)}
_SINGLE_ON_DEVICE = 1e-2, 0.75


def verification_interval() -> int | None:
    """Steps between comparisons with the plain forward, as ``CGGR_VERIFY`` says; ``None`` for no comparisons.

    Raises:
        ValueError: If it is not a whole number of at least 1.
    """
    value = os.environ.get("CGGR_VERIFY", "")
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(
            f"CGGR_VERIFY={value!r} must be a whole number n of at least 1, to compare every n-th step with a plain "
            "forward; unset it to compare none"
        )
    return int(value)


@contextmanager
def comparable(model: nn.Module, architecture: Architecture, inputs: TokenInputs) -> Iterator[Tensor]:
    """Run the model plainly, and within the block stay in a mode in which its values are reproducible.

    The values are the head's input if the head is one matrix, else the model's logits.

    Args:
        model: The model. It stays in training mode if two forwards agree; otherwise dropout and jitter are switched
            off; if they still differ, it runs in evaluation mode. Random generators are restored at the end.
        architecture: Its description.
        inputs: Whole rows.

    Yields:
        The values ``[B, S, ...]``.
    """
    device = inputs.position_ids.device
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        training = any(module.training for module in model.modules())
        for quiet in (nullcontext, without_dropout) if training else ():
            with quiet(model):
                expected = _head_values(model, architecture, inputs)
                if torch.equal(expected, _head_values(model, architecture, inputs)):
                    yield expected
                    return
        with evaluation_mode(model):
            yield _head_values(model, architecture, inputs)


def difference(
    model: nn.Module,
    architecture: Architecture,
    inputs: TokenInputs,
    selection: Selection,
    expected: Tensor,
    *,
    depth: int,
    layer_output: LayerOutput,
) -> str | None:
    """Compare the kept tokens' values with a plain forward's.

    Args:
        model: The model.
        architecture: Its description.
        inputs: Whole rows.
        selection: The kept tokens.
        expected: The plain forward's values ``[B, S, ...]``, from :func:`comparable`.
        depth: Layers that a context pass runs first; 0 interleaves all.
        layer_output: Wraps a hidden state the way the model's layers return it.

    Returns:
        A description of the difference, or ``None`` if they agree. Values are read on the host.
    """
    context = NO_CONTEXT
    if depth:
        context = context_pass(
            model,
            architecture,
            inputs,
            depth=depth,
            keep_graph=False,
            read_head=ignore_head,
            layer_output=layer_output,
        )
    seen: list[Tensor] = []
    read_head = seen.append if architecture.head.fused else None
    output = gradient_pass(model, architecture, inputs, selection, context, keep_graph=False, read_head=read_head)
    found = seen[0] if architecture.head.fused else output.logits
    index, counted = selection.index, selection.valid
    if inputs.padding is not None:
        counted = counted & inputs.padding.bool().gather(1, index)
    wanted = expected.gather(1, index[:, :, None].expand(-1, -1, expected.shape[2]))
    if found.shape != wanted.shape:
        return f"head input or logits {list(found.shape)} instead of {list(wanted.shape)}"
    tolerance, share = _tolerance(architecture, expected)
    value, wanted = found[counted], wanted[counted]
    if not value.shape[0]:
        return None
    largest = _largest_error(value, wanted, share)
    if largest <= tolerance:
        return None
    return f"relative error {largest:.2g}, tolerance {tolerance:.2g}"


def _largest_error(value: Tensor, wanted: Tensor, share: float) -> float:
    """Error of the rows of ``[N, ...]`` relative to their size, which ``share`` of them do not exceed."""
    parts = apart(value, wanted), finite(wanted)
    error, size = (torch.linalg.vector_norm(part, dim=-1, dtype=torch.float64) for part in parts)
    error = error / size.clamp(min=1e-30)
    # Positions where the plain forward is NaN must be NaN here too.
    error = error.masked_fill(value.isnan().any(-1) & wanted.isnan().any(-1), 0.0)
    return float(error.quantile(share)) if share < 1.0 else float(error.max())


def gradients_matter(model: nn.Module, architecture: Architecture, inputs: TokenInputs) -> str | None:
    """Whether a model computes different values with gradients than without; other tokens run partly without.

    Args:
        model: The model.
        architecture: Its description.
        inputs: A few tokens, whose graph is small.

    Returns:
        A description of the difference, or ``None``. Values are read on the host.
    """
    with comparable(model, architecture, inputs) as expected, torch.enable_grad():
        found = _head_values(model, architecture, inputs).detach()
    tolerance, share = _tolerance(architecture, expected)
    largest = _largest_error(found.flatten(0, 1), expected.flatten(0, 1), share)
    if largest <= tolerance:
        return None
    name = type(model).__name__
    return f"{name} computes other values with gradients enabled than without (relative error {largest:.2g})"


def apart(value: Tensor, wanted: Tensor) -> Tensor:
    """The difference of two tensors, 0 where both have the same infinity (logits of excluded tokens)."""
    return (value - wanted).masked_fill(value == wanted, 0.0)


def finite(values: Tensor) -> Tensor:
    """``values`` with infinities set to 0, since they would make any relative difference small."""
    return values.masked_fill(values.isinf(), 0.0)


def alternate_tokens(inputs: TokenInputs) -> Selection:
    """Every second token of every row, including the last one."""
    batch, length = inputs.shape
    mask = torch.zeros(batch, length, dtype=torch.bool, device=inputs.position_ids.device)
    mask[:, (length + 1) % 2 :: 2] = True
    return Selection.from_mask(mask, capacity=(length + 1) // 2)


def early_tokens(inputs: TokenInputs) -> Selection:
    """The first half of every row, which exposes layers that take their queries for the last positions."""
    batch, length = inputs.shape
    mask = torch.zeros(batch, length, dtype=torch.bool, device=inputs.position_ids.device)
    mask[:, : (length + 1) // 2] = True
    return Selection.from_mask(mask, capacity=(length + 1) // 2)


def _head_values(model: nn.Module, architecture: Architecture, inputs: TokenInputs) -> Tensor:
    if not architecture.head.fused:
        with without_checkpointing(architecture):
            return model(**plain_arguments(inputs), use_cache=False).logits
    seen: list[Tensor] = []
    with without_checkpointing(architecture), head_read_by(architecture, seen.append):
        model(**plain_arguments(inputs), use_cache=False)
    return seen[0]


def plain_arguments(inputs: TokenInputs) -> dict[str, Any]:
    """The arguments of an ordinary forward on the caller's batch."""
    padding = {} if inputs.padding is None else {"attention_mask": inputs.padding}
    return {**inputs.arguments(), **padding, **inputs.quiet}


def _tolerance(architecture: Architecture, values: Tensor) -> tuple[float, float]:
    # Logits may be float32 where the layers are not.
    dtypes = {values.dtype, *(part.dtype for part in architecture.layers.parameters() if part.is_floating_point())}
    if autocast_active(values.device.type) or not dtypes <= _TOLERANCE.keys():
        return _HALF
    if values.dtype == torch.float32 and values.device.type != "cpu":
        return _SINGLE_ON_DEVICE
    return _TOLERANCE[values.dtype]
