"""The kept tokens' pass through a model: replayed as a CUDA graph if shapes repeat, and run eagerly otherwise."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cggr_core import Selection, SharedContext
from cggr_core.logprobs import SharedRun
from cggr_core.recording import Outcome, PassCall, Recorder, slots_in_buckets
from cggr_core.routing import NO_CONTEXT, Engine, TokenInputs


class GradientRuns:
    """Runs kept tokens through all layers with gradients, the others without, in one pass.

    Args:
        engine: The passes over the model.
        gradient: ``"kv"`` or ``"detached"``.
        precision: ``"fp8"`` or ``None``, for the other tokens.
        margin: Number of positions before every kept stretch that gradients also reach.
        records: Whether passes of equal shapes are recorded as CUDA graphs.

    Attributes:
        recorder: Records and replays them; ``None`` if they are not recorded.
    """

    def __init__(self, engine: Engine, gradient: str, precision: str | None, margin: int, *, records: bool) -> None:
        self._engine = engine
        self._gradient = gradient
        self._precision = precision
        self._margin = margin
        self.recorder = Recorder(self._run, engine) if records else None

    def inputs(self, arguments: dict[str, Any], prompts: SharedContext | None) -> TokenInputs:
        """The tokens that run row by row, after the prompts that run once.

        Args:
            arguments: Of the model's forward, over whole rows.
            prompts: The shared beginnings of the rows; ``None`` if they share nothing.
        """
        if prompts is None:
            batch = self._engine.inputs(**arguments)
            self._engine.prepare(batch, routing=True, applies_head=False)  # the head is TRL's
            return batch
        start = prompts.input_ids.shape[1]
        run = SharedRun(self._engine, prompts, {name: value[:, start:] for name, value in arguments.items()})
        run.prepare(applies_head=False)
        return run.after_context(gradient_mode=self._gradient, precision=self._precision)

    def selected(self, kept: Tensor, arguments: dict[str, Any], *, recurring: bool) -> Selection:
        """The slots of kept tokens; reads their number from the device.

        Args:
            kept: bool ``[b, s]``, the last positions of the rows.
            arguments: Of the model's forward.
            recurring: Whether the pass may be recorded, so that its shape should recur.
        """
        mask = arguments.get("attention_mask")
        within = None if mask is None or mask.dim() != 2 else mask[:, -kept.shape[1] :].bool()
        selection = Selection.from_mask(kept, margin=self._margin, within=within)
        slots = slots_in_buckets(selection.index.shape[1], kept.shape[1])
        if slots == selection.index.shape[1] or not (recurring and self.recorder and self.recorder.ready(kept.device)):
            return selection
        return Selection.from_mask(kept, margin=self._margin, within=within, capacity=slots)

    def run(
        self, arguments: dict[str, Any], prompts: SharedContext | None, selection: Selection
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states ``[b, K, H]`` of the slots, and the expert routers' balancing loss if the model reports one.

        Args:
            arguments: As for :meth:`inputs`.
            prompts: As for :meth:`inputs`.
            selection: Of :meth:`selected`.
        """
        call = PassCall(arguments, {} if prompts is None else vars(prompts), selection)
        outcome = None
        if self.recorder is not None and self.recorder.ready(call.device):
            if self.recorder.recordings:
                self._engine.follow()
            outcome = self.recorder.take(call)
        values = (self._run(call) if outcome is None else outcome).values
        return values[0], values[1] if len(values) > 1 else None

    def _run(self, call: PassCall) -> Outcome:
        prompts = SharedContext(**call.context) if call.context else None
        batch = self.inputs(dict(call.arguments), prompts)
        hidden, auxiliary = self._engine.gradient(
            batch,
            call.selection,
            NO_CONTEXT,
            keep_graph=self._gradient == "kv",
            hidden=True,
            precision=self._precision,
        )
        return Outcome((hidden,) if auxiliary is None else (hidden, auxiliary), {})
