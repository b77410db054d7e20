"""A look at the model on a few tokens before it is trusted: what its layers return, and whether routing is exact."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cggr_core.head import autocast_active
from cggr_core.routing.architectures import Architecture
from cggr_core.routing.context_pass import NO_CONTEXT, LayerOutput, context_pass, ignore_head
from cggr_core.routing.gradient_pass import gradient_pass
from cggr_core.routing.head_check import gives_the_logits
from cggr_core.routing.inputs import TokenInputs
from cggr_core.routing.loss_agreement import own_alignment
from cggr_core.routing.masks import packed_segments
from cggr_core.routing.norms import fused_norms
from cggr_core.routing.patches import evaluation_mode, without_checkpointing
from cggr_core.selection import Selection

_ROWS, _TOKENS = 2, 8
# Relative error that three quarters of the tokens stay under: reordered sums (TF32 among them) do,
# and so do all but a few tokens whose experts change; with a wrong mask or position they do not.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
_HALF_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Probe:
    """What was seen.

    Attributes:
        architecture: The description, corrected: ``head.fused`` and ``obstacle`` say what held; and ``norms`` found.
        layer_output: Wraps a hidden state the way the model's layers return it.
        packing_obstacle: Why packed rows cannot be routed, or ``None`` where they can (or were not tried).
        saw_loss: Whether the model's own loss was held to cross-entropy.
    """

    architecture: Architecture
    layer_output: LayerOutput
    packing_obstacle: str | None = None
    saw_loss: bool = False


@torch.no_grad()
def probe(
    model: nn.Module, architecture: Architecture, inputs: TokenInputs, *, routing: bool, own_loss: bool = False
) -> Probe:
    """Run the model on at most 2 x 8 tokens of a batch, in evaluation mode, plainly and routed.

    Args:
        model: The model; its training flags are restored.
        architecture: Its description.
        inputs: The batch to take tokens from.
        routing: Also compare the routed passes with the plain forward.
        own_loss: Also hold the model's own loss to cross-entropy, which says how it aligns its labels.

    Returns:
        The corrected description. Values are read on the host: this happens once, before the first step.

    Raises:
        ValueError: If the logits are NaN, or not one row for each token; or if the model's own loss is another one.
    """
    few = _few_tokens(inputs)
    packing_obstacle = None
    if routing:
        architecture = replace(architecture, norms=fused_norms(model.modules()))
    with evaluation_mode(model):
        layer_output, head_input, logits = _plain_forward(model, architecture, few)
        if logits.shape[:2] != few.shape:
            raise ValueError(
                f"{type(model).__name__} returned logits {list(logits.shape)} for {list(few.shape)} tokens, and every "
                "token needs its own; with prompt tuning, whose virtual tokens come first, use LoRA or prefix tuning"
            )
        nan = logits.isnan().any(-1)
        if nan.any():
            raise ValueError(
                f"logits are NaN at {int(nan.sum())} of the first {nan.numel()} positions that the model was tried on; "
                "look for NaN among its weights"
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
        obstacle = architecture.obstacle
        if head_input is None and obstacle is None:
            obstacle = f"{type(model).__name__} reads the weight of its head without calling it"
        if routing and obstacle is None:
            assert head_input is not None
            obstacle = _routing_obstacle(model, architecture, few, head_input, layer_output)
            if obstacle is not None:
                spread = replace(architecture, whole_after_layers=True)
                if _routing_obstacle(model, spread, few, head_input, layer_output) is None:
                    architecture, obstacle = spread, None
            if obstacle is None and inputs.segment is not None:
                packed = _packed_in_halves(few)
                _, head_input, _ = _plain_forward(model, architecture, packed)
                assert head_input is not None
                if _routing_obstacle(model, architecture, packed, head_input, layer_output) is not None:
                    packing_obstacle = (
                        f"position_ids start anew inside a row, and {type(model).__name__} attends across such packed "
                        "documents; pass an attention_mask to say that rows are whole, or do not pack"
                    )
    shifted = own_alignment(model, architecture, inputs) if own_loss else None
    saw_loss, architecture = shifted is not None, replace(architecture, head=head, obstacle=obstacle)
    if shifted is not None:
        architecture = replace(architecture, shifted=shifted)
    return Probe(architecture, layer_output, packing_obstacle, saw_loss)


def _few_tokens(inputs: TokenInputs) -> TokenInputs:
    length = min(inputs.shape[1], _TOKENS)
    # Consecutive, whatever packing or padding made of them: RoBERTa's start at an offset.
    first_positions = inputs.position_ids[:_ROWS, :1]
    return replace(
        inputs,
        per_token={name: tensor[:_ROWS, :_TOKENS] for name, tensor in inputs.per_token.items()},
        position_ids=first_positions + torch.arange(length, device=first_positions.device),
        padding=None,
        segment=None,
    )


def _packed_in_halves(inputs: TokenInputs) -> TokenInputs:
    batch, length = inputs.shape
    positions = torch.arange(length, device=inputs.position_ids.device) % max((length + 1) // 2, 1)
    positions = positions.expand(batch, length).contiguous()
    return replace(inputs, position_ids=positions, segment=packed_segments(positions))


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
            logits = model(**inputs.arguments(), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    layer_returned = outputs[0] if outputs else None

    def layer_output(hidden: Tensor) -> Any:
        if isinstance(layer_returned, tuple):
            return (hidden, *([None] * (len(layer_returned) - 1)))
        return hidden

    return layer_output, head_inputs[0] if head_inputs else None, logits


def _routing_obstacle(
    model: nn.Module, architecture: Architecture, inputs: TokenInputs, expected: Tensor, layer_output: LayerOutput
) -> str | None:
    batch, length = inputs.shape
    keep = max(length // 2, 1)
    index = torch.arange(length - 1, -1, -2, device=expected.device)[:keep].flip(0).expand(batch, keep).contiguous()
    mask = torch.zeros(batch, length, dtype=torch.bool, device=expected.device).scatter_(1, index, True)
    selection = Selection.from_mask(mask, capacity=keep)
    name = type(model).__name__
    try:
        for depth in sorted({0, len(architecture.layers)}):
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
            gradient_pass(
                model,
                architecture,
                inputs,
                selection,
                context,
                keep_graph=False,
                read_head=seen.append,
            )
            rows = expected.gather(1, index[:, :, None].expand(-1, -1, expected.shape[2]))
            if seen[0].shape != rows.shape or not _close(seen[0], rows):
                return f"{name} gives kept tokens other values than a plain forward does"
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        return f"{name} does not run on kept tokens with a cache ({type(error).__name__}: {error})"
    return None


def _close(value: Tensor, expected: Tensor) -> bool:
    tolerance = _TOLERANCE.get(expected.dtype, _HALF_TOLERANCE)
    if autocast_active(expected.device.type):
        tolerance = _HALF_TOLERANCE
    value, expected = value.flatten(0, -2).float(), expected.flatten(0, -2).float()
    error = (value - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
    return bool(error.quantile(0.75) <= tolerance)
