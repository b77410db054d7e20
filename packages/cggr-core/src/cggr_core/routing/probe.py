"""Probes the model on a batch before training: what its layers return, and whether routing is exact."""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cggr_core.head import autocast_active
from cggr_core.routing.agreement import (
    alternate_tokens,
    apart,
    comparable,
    difference,
    early_tokens,
    finite,
    gradients_matter,
)
from cggr_core.routing.architectures import MODEL_ERRORS, Architecture, unwrapped
from cggr_core.routing.context_pass import LayerOutput
from cggr_core.routing.fusions import fused_forwards
from cggr_core.routing.head_check import gives_the_logits
from cggr_core.routing.inputs import TokenInputs
from cggr_core.routing.labelled_tokens import text_alone
from cggr_core.routing.loss_agreement import own_alignment
from cggr_core.routing.patches import attention_of_any_mask, evaluation_mode, grown_parameters, without_checkpointing

_ROWS, _TOKENS = 2, 8
# If the head is one matrix, the logits of three quarters of the tokens have at most this relative error.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
_HALF_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Probe:
    """What a probe found.

    Attributes:
        architecture: The description, corrected: ``head.fused``, ``obstacle`` and ``fused`` hold what was found.
        layer_output: Wraps a hidden state the way the model's layers return it.
        packing_obstacle: Why packed rows cannot be routed; ``None`` if they can be (or were not tried).
        saw_loss: Whether the model's own loss was compared with cross-entropy.
        has_loss: Whether the model computes a loss of its own.
    """

    architecture: Architecture
    layer_output: LayerOutput
    packing_obstacle: str | None
    saw_loss: bool
    has_loss: bool


@torch.no_grad()
def probe(model: nn.Module, architecture: Architecture, inputs: TokenInputs, *, routing: bool, own_loss: bool) -> Probe:
    """Run the model on a few tokens of a batch to check its head, and on whole rows, plainly and routed.

    Args:
        model: The model; its training flags are restored.
        architecture: Its description.
        inputs: The batch to take tokens from.
        routing: Also compare the routed passes with the plain forward.
        own_loss: Also compare the model's own loss with cross-entropy, which shows how it aligns its labels.

    Returns:
        The corrected description. This reads values on the host, once, before the first step.

    Raises:
        ValueError: If the logits are NaN or not one row per token, or if the model's own loss differs.
    """
    with attention_of_any_mask():
        try:
            return _probe(model, architecture, inputs, _TOKENS, routing=routing, own_loss=own_loss)
        except MODEL_ERRORS as error:
            # Some models run only on rows of certain lengths, such as the batch's.
            if inputs.shape[1] > _TOKENS:
                with suppress(*MODEL_ERRORS):
                    return _probe(model, architecture, inputs, inputs.shape[1], routing=routing, own_loss=own_loss)
            raise error


def _probe(
    model: nn.Module, architecture: Architecture, inputs: TokenInputs, tokens: int, *, routing: bool, own_loss: bool
) -> Probe:
    few = _few_tokens(model, inputs, tokens)
    if routing:
        architecture = replace(architecture, fused=fused_forwards(model.modules()))
    with evaluation_mode(model):
        layer_output, head_input, logits = _plain_forward(model, architecture, few)
        if logits.shape[:2] != few.shape:
            raise ValueError(
                f"{type(model).__name__} returned logits {list(logits.shape)} for {list(few.shape)} tokens, but every "
                "token needs its own; instead of prompt tuning, whose virtual tokens come first, use LoRA or prefix "
                "tuning"
            )
        nan = logits.isnan().any(-1)
        if nan.any():
            raise ValueError(
                f"logits are NaN at {int(nan.sum())} of the first {nan.numel()} positions of a trial forward; look for "
                "NaN in the model's weights"
            )
        head = architecture.head
        if head.fused:
            head = replace(head, fused=head_input is not None and gives_the_logits(model, architecture, few))
        if head.fused:
            # A bias in the head's own module (GPT-J) is part of the matrix product.
            fused_logits = head.module(head_input) * (head.scale or 1.0)
            if head.softcap is not None:
                fused_logits = head.softcap * torch.tanh(fused_logits / head.softcap)
            head = replace(head, fused=_close(fused_logits, logits))
    if head.fused:  # some change their logits only in training
        head = replace(head, fused=gives_the_logits(model, architecture, few))
    architecture = replace(architecture, head=head)
    obstacle, packing_obstacle = architecture.obstacle, None
    if head_input is None and obstacle is None:
        obstacle = f"{type(model).__name__} uses the weight of its head without calling the head"
    if routing and obstacle is None:
        obstacle = _layer_drop(model) or gradients_matter(model, architecture, few)
    if routing and obstacle is None:
        architecture, obstacle, packing_obstacle = _routed(model, architecture, _whole_rows(inputs), layer_output)
    own = own_alignment(model, architecture, inputs, tokens=tokens) if own_loss else None
    architecture = replace(architecture, obstacle=obstacle)
    if own is not None:
        architecture = replace(architecture, shifted=own.shifted, counts_padding=own.counts_padding)
    # Rows of one token do not show the alignment; wait for longer ones.
    saw_loss = own_loss and inputs.shape[1] > 1
    return Probe(architecture, layer_output, packing_obstacle, saw_loss, own is not None)


def probe_whole_rows(model: nn.Module, seen: Probe, inputs: TokenInputs) -> Probe:
    """Compare the routed passes with the plain forward once more; see :func:`probe`."""
    if seen.architecture.obstacle is not None:
        return seen
    architecture, obstacle, packing_obstacle = _routed(model, seen.architecture, _whole_rows(inputs), seen.layer_output)
    packing_obstacle = packing_obstacle or seen.packing_obstacle
    return replace(seen, architecture=replace(architecture, obstacle=obstacle), packing_obstacle=packing_obstacle)


def _routed(
    model: nn.Module, architecture: Architecture, rows: TokenInputs, layer_output: LayerOutput
) -> tuple[Architecture, str | None, str | None]:
    """Obstacles to routed passes on these rows and on packed ones, also with weights as after training."""
    found = _routed_as_it_is(model, architecture, rows, layer_output)
    if found[1] is not None:
        return found
    with grown_parameters(model) as grown:
        if not grown:
            return found
        later = _routed_as_it_is(model, found[0], rows, layer_output)
    if later[1] is None:
        return later[0], None, found[2] or later[2]
    return later[0], f"{later[1]}, once constant parameters have been trained", found[2]


def _routed_as_it_is(
    model: nn.Module, architecture: Architecture, rows: TokenInputs, layer_output: LayerOutput
) -> tuple[Architecture, str | None, str | None]:
    name = type(model).__name__
    with comparable(model, architecture, rows) as expected:
        obstacle = _obstacle(model, architecture, rows, expected, layer_output)
        if obstacle is None:
            return architecture, None, None
        spread = replace(architecture, whole_after_layers=True)
        if _obstacle(model, spread, rows, expected, layer_output) is None:
            return spread, None, None
    if rows.segment is None:
        return architecture, obstacle, None
    unpacked, own_obstacle, _ = _routed_as_it_is(model, architecture, _unpacked(rows), layer_output)
    if own_obstacle is not None:
        return architecture, own_obstacle, None
    return (
        unpacked,
        None,
        f"position_ids restart inside a row, and {name} attends across packed documents; pass an attention_mask if "
        "each row is one document, or do not pack",
    )


def _obstacle(
    model: nn.Module, architecture: Architecture, rows: TokenInputs, expected: Tensor, layer_output: LayerOutput
) -> str | None:
    name, depth = type(model).__name__, len(architecture.layers)
    try:
        for selection, before in (
            (alternate_tokens(rows), 0),
            (early_tokens(rows), 0),
            (alternate_tokens(rows), depth),
        ):
            found = difference(model, architecture, rows, selection, expected, depth=before, layer_output=layer_output)
            if found is not None:
                return f"{name} computes different values for kept tokens than a plain forward ({found})"
    except MODEL_ERRORS as error:
        return f"{name} does not run on kept tokens with a cache ({type(error).__name__}: {error})"
    return None


def _layer_drop(model: nn.Module) -> str | None:
    dropped = next((module for module in model.modules() if getattr(module, "layerdrop", 0)), None)
    if dropped is None:
        return None
    return (
        f"{type(model).__name__} drops random layers in training (layerdrop={dropped.layerdrop}), different ones in "
        "every pass; set layerdrop to 0 before wrapping"
    )


def _whole_rows(inputs: TokenInputs) -> TokenInputs:
    """The first rows of a batch at full length; all rows if some input is not per row."""
    batch = inputs.shape[0]
    by_row = {name: value for name, value in inputs.options.items() if isinstance(value, Tensor) and value.dim() > 0}
    kinds = by_row.pop("position_ids", None)  # several kinds of positions: ``[kinds, B, S]``
    if batch <= _ROWS or any(value.shape[0] not in (1, batch) for value in by_row.values()):
        return inputs
    cut = {name: value[:_ROWS] for name, value in by_row.items()}
    if kinds is not None:
        cut["position_ids"] = kinds[:, :_ROWS]
    return replace(
        inputs,
        per_token={name: tensor[:_ROWS] for name, tensor in inputs.per_token.items()},
        position_ids=inputs.position_ids[:_ROWS],
        padding=None if inputs.padding is None else inputs.padding[:_ROWS],
        segment=None if inputs.segment is None else inputs.segment[:_ROWS],
        options={**inputs.options, **cut},
    )


def _unpacked(inputs: TokenInputs) -> TokenInputs:
    positions = torch.arange(inputs.shape[1], device=inputs.position_ids.device)
    return replace(inputs, position_ids=inputs.position_ids[:, :1] + positions, segment=None)


def _few_tokens(model: nn.Module, inputs: TokenInputs, tokens: int) -> TokenInputs:
    """Text only: other inputs (images, say) belong to whole rows."""
    length = min(inputs.shape[1], tokens)
    # Consecutive, regardless of packing or padding: RoBERTa's start at an offset.
    first_positions = inputs.position_ids[:_ROWS, :1]
    per_token = {name: tensor[:_ROWS, :length] for name, tensor in inputs.per_token.items()}
    if "input_ids" in per_token:
        per_token["input_ids"] = text_alone(per_token["input_ids"], unwrapped(model).config)
    return replace(
        inputs,
        per_token=per_token,
        position_ids=first_positions + torch.arange(length, device=first_positions.device),
        # Padding counts as text here. The mask says so explicitly, since models look for padding if there is none.
        padding=None if inputs.padding is None else torch.ones_like(inputs.padding[:_ROWS, :length]),
        segment=None,
        options={name: value for name, value in inputs.options.items() if not isinstance(value, Tensor)},
    )


def _plain_forward(
    model: nn.Module, architecture: Architecture, inputs: TokenInputs
) -> tuple[LayerOutput, Tensor | None, Tensor]:
    outputs: list[Any] = []
    head_inputs: list[Tensor] = []
    hooks = [
        *(
            layer.register_forward_hook(lambda module, args, output: outputs.append(output))
            for layer in architecture.layers[:1]
        ),
        architecture.head.module.register_forward_pre_hook(
            lambda module, args: head_inputs.append(args[0]), prepend=True
        ),
    ]
    try:
        with without_checkpointing(architecture):
            output = model(**inputs.arguments(), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    layer_returned = outputs[0] if outputs else None

    def layer_output(hidden: Tensor) -> Any:
        if isinstance(layer_returned, tuple):
            return (hidden, *([None] * (len(layer_returned) - 1)))
        return hidden

    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{type(model).__name__} returns no logits (its output has {', '.join(output)}); CGGR routes causal and "
            "masked language models"
        )
    return layer_output, head_inputs[0] if head_inputs else None, logits


def _close(value: Tensor, expected: Tensor) -> bool:
    tolerance = _TOLERANCE.get(expected.dtype, _HALF_TOLERANCE)
    if autocast_active(expected.device.type):
        tolerance = _HALF_TOLERANCE
    value, expected = value.flatten(0, -2).float(), expected.flatten(0, -2).float()
    error = apart(value, expected).norm(dim=-1) / finite(expected).norm(dim=-1).clamp(min=1e-30)
    return bool(error.quantile(0.75) <= tolerance)
