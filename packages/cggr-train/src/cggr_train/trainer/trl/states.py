"""Final hidden states of tokens chosen in a pass without gradients, and statistics of the heads' logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, linear, log_softmax

from cggr_core import Selection
from cggr_core.routing import NO_CONTEXT, Engine, without_hooks
from cggr_train.trainer.batch import routed_batch

if TYPE_CHECKING:
    from cggr_core.routing import Head
    from cggr_core.stopwatch import Stopwatch

_CHUNK = 1024  # tokens whose logits exist at once


@dataclass(frozen=True)
class KeptStates:
    """Hidden states with routed gradients.

    Attributes:
        hidden: ``[B, K, H]``.
        selection: What the slots hold.
    """

    hidden: Tensor
    selection: Selection


def kept_states(
    engine: Engine,
    arguments: dict[str, Any],
    *,
    gradient: str,
    context_precision: str | None,
    choose: Callable[[Tensor | None], Tensor],
    scored: bool,
    scoring: Stopwatch,
) -> KeptStates:
    """Run a model with a backward pass through the chosen tokens only.

    Args:
        engine: The model's engine; call this inside the model's own forward.
        arguments: Of its forward.
        gradient: ``"kv"``, ``"detached"`` or ``"exact"``.
        context_precision: ``"fp8"`` or ``None``.
        choose: From the hidden states of all tokens ``[B, S, H]``, without gradients (None where ``scored`` is false),
            to the kept tokens, bool ``[B, S]``.
        scored: Whether the choice needs them.
        scoring: Accumulates the time spent on scoring.
    """
    arguments = {name: value for name, value in routed_batch(arguments).items() if name != "use_cache"}
    with without_hooks(engine.model):
        batch = engine.inputs(**arguments)
        device = batch.position_ids.device
        engine.prepare(batch, routing=gradient != "exact")
        if gradient == "exact":
            hidden, _ = engine.plain(arguments, hidden=True)
            with scoring.measure(device):
                selection = _slots(choose(hidden.detach() if scored else None))
            return KeptStates(hidden.gather(1, _wide(selection.index, hidden)), selection)
        context, keep_graph = NO_CONTEXT, gradient == "kv"
        with scoring.measure(device):
            everything = None
            if scored:
                context, everything = engine.context(
                    batch,
                    depth=engine.depth,
                    keep_graph=keep_graph,
                    head=True,
                    hidden=True,
                    precision=context_precision,
                )
            selection = _slots(choose(everything))
        hidden, _ = engine.gradient(
            batch, selection, context, keep_graph=keep_graph, hidden=True, precision=context_precision
        )
    return KeptStates(hidden, selection)


def _slots(keep: Tensor) -> Selection:
    selection = Selection.from_mask(keep)
    # An empty slot keeps the graph connected where nothing is kept.
    return selection if selection.index.shape[1] else Selection.from_mask(keep, capacity=1)


def _wide(index: Tensor, hidden: Tensor) -> Tensor:
    return index[:, :, None].expand(-1, -1, hidden.shape[2])


class LogitsHead:
    """A language-model head, applied to a chunk of hidden states at a time.

    Args:
        head: The head.
    """

    def __init__(self, head: Head) -> None:
        self._head = head

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits ``[N, V]`` of hidden states ``[N, H]``."""
        head, module = self._head, self._head.module
        if isinstance(module, nn.Linear) and not head.fused:  # for example a LoRA layer
            logits = module(hidden)
        else:
            weight = module.weight
            assert isinstance(weight, Tensor)
            bias = module.bias
            logits = linear(hidden.to(weight.dtype), weight, bias if isinstance(bias, Tensor) else None)
        if head.scale is not None:
            logits = logits * head.scale
        return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@torch.no_grad()
def token_scores(
    student: Callable[[Tensor], Tensor],
    student_hidden: Tensor,
    teacher: Callable[[Tensor], Tensor] | None,
    teacher_hidden: Tensor | None,
    *,
    beta: float,
    temperature: float,
) -> tuple[Tensor, Tensor | None]:
    """Entropies of the student and its divergences from a teacher, with logits computed one chunk of tokens at a time.

    The divergence is the generalised Jensen-Shannon one of Agarwal et al. (2024, arXiv 2306.13649): 0 is the forward
    KL, 1 the reverse one.

    Args:
        student: Maps hidden states ``[N, H]`` to logits ``[N, V]``.
        student_hidden: ``[N, H]``.
        teacher: As ``student``; None for entropies alone.
        teacher_hidden: ``[N, H']``.
        beta: Of the divergence.
        temperature: What the logits of both are divided by.

    Returns:
        Float32 ``[N]`` each, in nats.
    """
    entropies, divergences = [], []
    for start in range(0, max(len(student_hidden), 1), _CHUNK):
        part = slice(start, start + _CHUNK)
        own = log_softmax(student(student_hidden[part]).float() / temperature, dim=-1)
        entropies.append(-(own.exp() * own).sum(-1))
        if teacher is None or teacher_hidden is None:
            continue
        other = log_softmax(teacher(teacher_hidden[part]).float() / temperature, dim=-1)
        divergences.append(_divergence(own, other, beta))
    return torch.cat(entropies), torch.cat(divergences) if divergences else None


def _divergence(own: Tensor, other: Tensor, beta: float) -> Tensor:
    if beta in (0, 1):
        mixture, target = (own, other) if beta == 0 else (other, own)
        return kl_div(mixture, target, reduction="none", log_target=True).sum(-1)
    share = own.new_tensor(beta)
    mixture = torch.logaddexp(own + torch.log1p(-share), other + torch.log(share))
    of_teacher = kl_div(mixture, other, reduction="none", log_target=True).sum(-1)
    of_student = kl_div(mixture, own, reduction="none", log_target=True).sum(-1)
    return beta * of_teacher + (1 - beta) * of_student
