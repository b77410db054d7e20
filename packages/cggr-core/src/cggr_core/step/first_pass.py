"""The pass over all tokens that comes before the selection."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cggr_core.settings import RoutingSettings
from cggr_core.step.batch import StepBatch
from cggr_core.step.router import Router

if TYPE_CHECKING:
    from cggr_core.routing import Context, Engine


@dataclass(frozen=True)
class FirstPass:
    """Results of the first pass.

    Attributes:
        depth: Number of layers that ran; 0 for no pass.
        values: Head values ``[B, S, ...]`` above them, if the head was run.
        hidden: Input ``[B, S, H]`` of the layer at the router's depth, if the router reads it.
        context: Keys and values for the gradient pass of ``kv`` and ``detached``.
        auxiliary_loss: The model's, of an ordinary forward.
    """

    depth: int = 0
    values: Tensor | None = None
    hidden: Tensor | None = None
    context: Context | None = None
    auxiliary_loss: Tensor | None = None


def first_pass(
    settings: RoutingSettings,
    mode: str,
    engine: str,
    batch: StepBatch,
    passes: Engine,
    router: Router | None,
    *,
    scored: bool,
) -> FirstPass:
    """Run all tokens through as many layers as the scores and the other passes need.

    Args:
        settings: Of the step.
        mode: Gradient mode of this step.
        engine: How ``kv`` and ``detached`` are computed.
        batch: The batch.
        passes: Over the model.
        router: What scores or observes; ``None`` for nothing.
        scored: Whether the selection is made from scores.
    """
    tap = router.depth if router is not None and router.reads_hidden else None
    own_head = router.depth if scored and router is not None and tap is None else None
    if mode == "sequence":
        # Whole rows are kept and run again: this pass only gives scores.
        with torch.no_grad():
            if tap is not None:
                return FirstPass(tap, hidden=passes.hidden(batch.arguments, depth=tap))
            if own_head == passes.depth:
                return FirstPass(passes.depth, passes.plain(batch.arguments)[0])
        return FirstPass()
    with nullcontext([]) if tap is None else passes.hidden_states(tap) as hidden:
        if mode == "exact":
            values, auxiliary_loss = passes.plain(batch.arguments)
            left = FirstPass(passes.depth, values, auxiliary_loss=auxiliary_loss)
        else:
            depth = passes.depth if engine == "two_pass" else (tap or own_head or 0)
            left = _context(settings, mode, depth, batch, passes, own_head)
    return left if not hidden else FirstPass(left.depth, left.values, hidden[0], left.context, left.auxiliary_loss)


def _context(
    settings: RoutingSettings, mode: str, depth: int, batch: StepBatch, passes: Engine, own_head: int | None
) -> FirstPass:
    from cggr_core.routing import NO_CONTEXT

    if depth == 0:
        return FirstPass(context=NO_CONTEXT)
    context, values = passes.context(
        batch.tokens,
        depth=depth,
        keep_graph=mode == "kv",
        head=own_head == depth,
        precision=settings.context_precision,
        hold_outputs=settings.reuse_outputs,
    )
    return FirstPass(depth, values, context=context)
