"""Recorded training steps compared with the same steps run eagerly."""

import copy
from collections.abc import Hashable
from contextlib import nullcontext
from typing import Any

import torch

from cggr_core import CGGRModel, create_truncated_router
from cggr_core.recording import StepRecorder, ledger, recorder
from tests.support.model_steps import backward, tokens
from tests.support.reenacted import HostClock, Reenacted
from tests.support.tiny_models import ROUTABLE

ENOUGH = 3  # steps until one is a replay: the first one of a model also looks at it


def recording_model(base, *, depth: int | None = None, **settings: Any) -> CGGRModel:
    """A CGGRModel that records its steps: on a GPU as it does for anybody, on the CPU by doing them again."""
    router = None if depth is None else create_truncated_router(base, depth)
    model = CGGRModel(base, router, cuda_graph="auto", **settings).train()
    if next(base.parameters()).device.type == "cpu":
        record_by_doing_again(model)
    return model


def record_by_doing_again(model: CGGRModel) -> None:
    """Let a model on the CPU record its steps."""
    parts = (model._outcome, model.settings, model._passes, model.schedule, model._draws)
    model._recorder = StepRecorder(*parts, device_type="cpu", graphs=Reenacted, clock=HostClock)


def replayed(model: CGGRModel) -> bool:
    """Whether the last step was."""
    return model._recorder is not None and model._recorder.recordings > 0 and model._recorder.reason is None


def hold_to_eager(
    base,
    micro_batches: list[list[dict[str, Any]]],
    *,
    autocast: torch.dtype | None = None,
    scale: float = 1.0,
    depth: int | None = None,
    tolerance: float = 0.0,
    **settings: Any,
) -> list[bool]:
    """Losses, clipped gradients and their norms of every optimizer step, with and without recordings.

    Every optimizer step starts from the same weights, so that a kernel that adds in any order does not count twice.

    Args:
        base: The model.
        micro_batches: Of every optimizer step, arguments of each forward.
        autocast: Its dtype.
        scale: Of the losses, as a gradient scaler does it.
        depth: Of a truncated router; ``None`` for none.
        tolerance: Relative error of losses, norms and gradients.
        **settings: Of the model.

    Returns:
        Whether each optimizer step was replayed.
    """
    given = {"depth": depth, **settings}
    recorded = recording_model(base, **given)
    eager_base = copy.deepcopy(base)
    eager = CGGRModel(
        eager_base, None if depth is None else create_truncated_router(eager_base, depth), **settings
    ).train()
    device = next(base.parameters()).device
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (recorded, eager)]
    found = []
    for number, micro in enumerate(micro_batches):
        with torch.no_grad():
            for own, other in zip(recorded.model.parameters(), eager.model.parameters(), strict=True):
                own.copy_(other)
        losses, norms = ([], []), []
        for model, kept in zip((recorded, eager), losses, strict=True):
            for batch in micro:
                around = nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)
                with around:
                    loss = model(**batch)
                (loss * scale).backward()
                kept.append(loss.detach())
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        found.append(replayed(recorded))
        torch.testing.assert_close(torch.stack(losses[0]), torch.stack(losses[1]), rtol=tolerance, atol=0)
        torch.testing.assert_close(norms[0], norms[1], rtol=tolerance, atol=0)
        difference, size = 0.0, 0.0
        for own, other in zip(recorded.model.parameters(), eager.model.parameters(), strict=True):
            assert (own.grad is None) == (other.grad is None)
            if own.grad is not None:
                difference += float((own.grad - other.grad).double().square().sum())
                size += float(other.grad.double().square().sum())
        assert difference**0.5 <= tolerance * size**0.5
        assert recorded.metrics.keys() == eager.metrics.keys()
        assert recorded.metrics["kept_tokens"] == eager.metrics["kept_tokens"]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=number % 2 == 0)
    return found


def batch(seed: int, length: int = 12, **more: Any) -> dict[str, Any]:
    """Arguments of a forward of three rows."""
    input_ids = tokens(length=length, seed=seed)
    return {"input_ids": input_ids, "labels": input_ids, **more}


def recorded(architecture: str = "llama", **settings: Any) -> CGGRModel:
    """A model whose next step of three rows of 12 tokens is a replay."""
    model = recording_model(ROUTABLE[architecture](), **{"selection": "random", **settings})
    for seed in range(ENOUGH):
        backward(model, tokens(seed=seed))
    assert replayed(model)
    return model


def reason_of(model: CGGRModel, **inputs: Any) -> str:
    """Why the next step is not a replay."""
    backward(model, tokens(), **inputs)
    assert not replayed(model)
    return model._recorder.reason


def record_at_once(monkeypatch) -> None:
    """Let the step after the first of a shape be recorded, and kept whatever it saves: on the CPU it saves nothing."""
    monkeypatch.setattr(ledger, "IN_A_ROW", 1)
    worth_it(monkeypatch)


def worth_it(monkeypatch) -> None:
    """Let recordings be made after a few steps of a kind and be kept, whatever they cost and save."""
    monkeypatch.setattr(recorder, "_WORTH", 1e9)
    monkeypatch.setattr(ledger.Ledger, "objection", _too_few)
    monkeypatch.setattr(ledger.Ledger, "loses", lambda self, kind: False)


def _too_few(self: ledger.Ledger, kind: Hashable) -> str | None:
    return ledger._TOO_RARE if self._kinds[kind].count < ledger.IN_A_ROW else None
