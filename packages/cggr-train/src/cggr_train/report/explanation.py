"""Explanations of a study's arms, for its page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cggr_train.study.arms import Arm

MODES = {
    "exact": "the full gradient of their loss",
    "kv": "a backward pass for those tokens and for the keys and values of all tokens",
    "detached": "a backward pass for those tokens only",
    "sequence": "whole sequences, the rest of the batch left out",
}
SELECTIONS = {
    "random": "at random",
    "stratified": "drawn at random from buckets of {score}, more from those where it varies most, and weighted",
    "sampled": "drawn with probability proportional to {score}, and weighted",
    "topk": "those with the highest {score}, unweighted",
    "sequence_aware": "those with the highest {score}, a few in every sequence, unweighted",
}
SCORES = {
    "gradnorm": "gradient norm",
    "loss": "loss",
    "entropy": "entropy",
    "margin": "margin",
    "combined": "combined score",
}


def explain(arm: Arm, arms: Sequence[Arm], *, supervised: float = 1.0) -> str:
    """What an arm does and what it is for, in one sentence.

    Args:
        arm: The arm.
        arms: All arms of the study.
        supervised: Share of all tokens that are supervised; a keep ratio is of these.

    Example:
        >>> from cggr_train.study.arms import Arm
        >>> explain(Arm("standard", "standard, batch 8", "standard", "standard", 8), [])
        'Ordinary training on every token, 8 sequences per step: the baseline of every comparison.'
    """
    kind = "token" if supervised == 1.0 else "supervised token"
    if arm.method != "standard":
        routing = arm.routing
        if routing.selection == "supervised":
            before = f" and {routing.context_margin} tokens before them" if routing.context_margin else ""
            which = f"the supervised tokens{before}"
        else:
            how = SELECTIONS[routing.selection].format(score=SCORES[routing.scoring])
            which = f"{routing.ratio:.0%} of the {kind}s, {how}"
        purpose = "; the control that shows what the score is worth" if arm.role == "random" else ""
        low = "" if routing.context_precision is None else f", the rest in {routing.context_precision.upper()}"
        return f"Trains on {which}: {MODES[routing.gradient]}{low}{purpose}."
    rivals = [other.title for other in arms if other.equal_cost == arm.name]
    purpose = {
        "standard": "the baseline of every comparison",
        "checkpointed": "with gradient checkpointing, which uses less memory and more time",
        "equal_cost": "as many operations per step as " + " and ".join(rivals or ["the routed arms"]),
        "equal_memory": "as many sequences at a time as fit into the memory of a routed step",
        "batch": "another batch size, as requested",
    }[arm.role]
    sequences = "1 sequence" if arm.batch_size == 1 else f"{arm.batch_size} sequences"
    return f"Ordinary training on every {kind}, {sequences} per step: {purpose}."
