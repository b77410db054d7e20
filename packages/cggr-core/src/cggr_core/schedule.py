"""How many tokens to keep at which step, and the counter of random draws."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from cggr_core.checks import check_at_least, check_finite_number
from cggr_core.settings import SelectionSettings
from cggr_core.slots import slots_for

__all__ = ["Schedule"]

_BUCKETS = 32
_FORWARDS_BEFORE_WARNING = 100


class Schedule:
    """The keep ratio of each step.

    **Curriculum.** After t of ``warmup_steps`` steps c = 1 - (1 - ``min_tokens_ratio``) · min(1, t / ``warmup_steps``):
    from all tokens down to ``min_tokens_ratio``, linearly; without a warmup c is ``min_tokens_ratio`` from the start.

    **Dynamic ratio.** With ``dynamic_threshold`` and the mean top-1 probability p of the previous batch, ratio = c ·
    exp(``threshold_sensitivity`` · (0.5 - p)), kept within [c / 2, min(1, 2c)]: an unsure model gets more tokens, a
    confident one fewer; a sensitivity of 0 switches it off.

    Args:
        min_tokens_ratio: Keep ratio after the warmup, in (0, 1].
        warmup_steps: Steps from 1.0 to ``min_tokens_ratio``; 0 for none.
        dynamic_threshold: Whether the confidence changes the ratio.
        threshold_sensitivity: How strongly the confidence changes the ratio, at least 0.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If a number is out of range, or ``threshold_sensitivity`` is given without ``dynamic_threshold``.

    Example:
        >>> schedule = Schedule(min_tokens_ratio=0.5, warmup_steps=2)
        >>> schedule.step()
        >>> schedule.ratio
        0.75
    """

    def __init__(
        self,
        *,
        min_tokens_ratio: float = SelectionSettings.min_tokens_ratio,
        warmup_steps: int = SelectionSettings.warmup_steps,
        dynamic_threshold: bool = SelectionSettings.dynamic_threshold,
        threshold_sensitivity: float = SelectionSettings.threshold_sensitivity,
    ) -> None:
        SelectionSettings(
            min_tokens_ratio=min_tokens_ratio,
            warmup_steps=warmup_steps,
            dynamic_threshold=dynamic_threshold,
            threshold_sensitivity=threshold_sensitivity,
        )  # checks them
        self.min_tokens_ratio = float(min_tokens_ratio)
        self.warmup_steps = warmup_steps
        self.dynamic_threshold = dynamic_threshold
        self.threshold_sensitivity = float(threshold_sensitivity)
        self._steps = 0
        # A tensor, because compiled code takes a changing Python number as a reason to recompile.
        self._draws = torch.zeros((), dtype=torch.int64, device="cpu")
        self._confidence: float | None = None
        self._forwards_without_step = 0
        self._awaiting_step = self.warmup_steps > 0
        self._place()

    @classmethod
    def of(cls, settings: SelectionSettings) -> Schedule:
        """The schedule that settings ask for."""
        return cls(
            min_tokens_ratio=settings.min_tokens_ratio,
            warmup_steps=settings.warmup_steps,
            dynamic_threshold=settings.dynamic_threshold,
            threshold_sensitivity=settings.threshold_sensitivity,
        )

    def __repr__(self) -> str:
        return (
            f"Schedule(min_tokens_ratio={self.min_tokens_ratio}, warmup_steps={self.warmup_steps}, "
            f"dynamic_threshold={self.dynamic_threshold}, threshold_sensitivity={self.threshold_sensitivity}; "
            f"step {self._steps}, ratio {self.ratio:.4g})"
        )

    def _place(self) -> None:
        """Derive what forwards read from the step; constant after the warm-up, so that nothing is recompiled."""
        self._warming_up = self._steps < self.warmup_steps
        self._curriculum_ratio = self.min_tokens_ratio
        if self._warming_up:
            self._curriculum_ratio = 1.0 - (1.0 - self.min_tokens_ratio) * self._steps / self.warmup_steps

    @property
    def steps(self) -> int:
        """Calls of :meth:`step` so far."""
        return self._steps

    @property
    def reads_confidence(self) -> bool:
        """Whether the ratio depends on the confidence of the previous batch, which a forward then waits for."""
        return self.dynamic_threshold and self.threshold_sensitivity > 0.0

    @property
    def moving(self) -> bool:
        """Whether the ratio can still change from step to step."""
        return self.reads_confidence or self._warming_up

    @property
    def curriculum_ratio(self) -> float:
        """The ratio before the confidence changes it."""
        return self._curriculum_ratio

    @property
    def ratio(self) -> float:
        """Keep ratio of the next forward."""
        base = self.curriculum_ratio
        if not self.reads_confidence or self._confidence is None:
            return base
        moved = base * math.exp(self.threshold_sensitivity * (0.5 - self._confidence))
        return min(max(moved, base / 2), min(1.0, 2 * base))

    def capacity(self, length: int) -> int:
        """Slots for ``length`` tokens at the current ratio.

        While the ratio changes, the number of slots is a multiple of 1/32 of the length (rounded up), so that shapes
        repeat and compiled code is not recompiled at every step.

        Example:
            >>> Schedule(min_tokens_ratio=0.3).capacity(10)
            3
        """
        ratio = self.ratio
        if self.moving:
            ratio = min(1.0, math.ceil(ratio * _BUCKETS - 1e-9) / _BUCKETS)
        return slots_for(ratio, length)

    def observe(self, confidence: float | None) -> None:
        """Record the mean top-1 probability of a batch; None (not measured) and NaN (no token) are ignored."""
        if confidence is not None and not math.isnan(confidence):
            self._confidence = min(1.0, max(0.0, float(confidence)))

    def next_draw(self) -> int:
        """The number of this forward's random draw; counts up, one per micro-batch."""
        draw = int(self._draws)
        self._draws.add_(1)
        return draw

    def next_draw_tensor(self) -> Tensor:
        """:meth:`next_draw` as a 0-dim int64 CPU tensor, for compiled code."""
        draw = self._draws.clone()
        self._draws.add_(1)
        return draw

    def note_forward(self) -> None:
        """Count a training forward; warn once if there is a warmup but :meth:`step` is never called."""
        if not self._awaiting_step or torch.compiler.is_compiling():
            return
        self._forwards_without_step += 1
        if self._forwards_without_step >= _FORWARDS_BEFORE_WARNING:
            self._awaiting_step = False
            warnings.warn(
                f"warmup_steps={self.warmup_steps}, but step() was not called in {_FORWARDS_BEFORE_WARNING} training "
                f"forwards: the keep ratio is still {self.ratio:g}. Call step() after each optimizer step, or use "
                f"warmup_steps=0 to start at min_tokens_ratio",
                UserWarning,
                stacklevel=3,
            )

    def step(self) -> None:
        """Advance by one optimizer step."""
        self._steps += 1
        self._awaiting_step = False
        self._place()

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs to keep the same tokens, as plain numbers."""
        return {"steps": self._steps, "draws": int(self._draws), "confidence": self._confidence}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            TypeError: If a value is not a number; nothing is changed in that case.
            ValueError: If a key is missing or unknown, or a number is not accepted; nothing is changed in that case.
        """
        expected = {"steps", "draws", "confidence"}
        if set(state) != expected:
            raise ValueError(f"state must have the keys {sorted(expected)}, got {sorted(state)}")
        steps = check_at_least("state['steps']", state["steps"], 0)
        draws = check_at_least("state['draws']", state["draws"], 0)
        confidence = state["confidence"]
        if confidence is not None:
            check_finite_number("state['confidence']", confidence)
        self._steps, self._confidence = steps, confidence
        self._draws.fill_(draws)
        self._awaiting_step = self._awaiting_step and steps == 0
        self._place()
