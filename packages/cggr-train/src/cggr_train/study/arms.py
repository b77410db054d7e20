"""The arms of a study: what is compared, and the controls that every comparison needs."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cggr_train.errors import InputError
from cggr_train.learner import Routing

SCORELESS = "random"
ARMS = "arms.json"


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name: Key of the arm, fit for a file name.
        label: Name for people.
        role: ``standard``, ``equal_cost`` (standard at the batch of equal cost), ``batch`` (standard at another batch
            that was asked for), ``random`` (the control at the same ratio and gradient mode) or ``asked``.
        method: Which learner, see :func:`cggr_train.learner.build_learner`.
        batch_size: Sequences per step.
        routing: For the routed learners.
        equal_cost: Of an asked arm: name of the standard arm whose step costs as many operations.
        random: Of an asked arm: name of the random control.
    """

    name: str
    label: str
    role: str
    method: str
    batch_size: int
    routing: Routing = dataclasses.field(default_factory=Routing)
    equal_cost: str = "standard"
    random: str | None = None

    @property
    def remembers(self) -> bool:
        """Whether it is served scores that earlier epochs of the run observed."""
        return self.method == "cggr" and self.routing.scorer == "remembered"

    @property
    def scores_by_its_run(self) -> bool:
        """Whether its scores are made of what the run itself observed, so that other weights do not tell them."""
        return self.method == "cggr" and self.routing.scorer in ("learned", "remembered")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Arm:
        """The arm that ``dataclasses.asdict`` took apart."""
        return cls(**{**values, "routing": Routing(**values["routing"])})


def save_arms(folder: Path, arms: Sequence[Arm]) -> None:
    """Write the arms into a study's folder."""
    (folder / ARMS).write_text(json.dumps([dataclasses.asdict(arm) for arm in arms], indent=1) + "\n")


def load_arms(folder: Path) -> list[Arm]:
    """Read what :func:`save_arms` wrote.

    Raises:
        InputError: If the file is missing, damaged or not of this version.
    """
    try:
        return [Arm.from_dict(values) for values in json.loads((folder / ARMS).read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no study that can be resumed ({ARMS}: {error})") from error


def relative_cost(routing: Routing, *, num_layers: int) -> float:
    """Operations of a routed step over those of the standard step, by the table of gradient modes.

    Args:
        routing: Gradient mode, ratio, selection and router.
        num_layers: Layers of the model.

    Example:
        >>> relative_cost(Routing("kv", 0.25, "stratified"), num_layers=8)
        0.5833333333333334
        >>> relative_cost(Routing("kv", 0.25, "random"), num_layers=8)
        0.5
    """
    ratio, depth = routing.ratio, routing.depth(num_layers)
    scored = routing.selection != SCORELESS and routing.scorer != "remembered"
    if routing.gradient == "exact":
        return 1.0
    if routing.gradient == "sequence":
        scoring = 0.0 if not scored else 1.0 if depth is None else depth / num_layers
        return (scoring + 3 * ratio) / 3
    if scored and depth is None:
        return (1 + 3 * ratio) / 3
    again = ratio * depth / num_layers if scored and depth is not None else 0.0
    return (1 + 2 * ratio + again) / 3


def plan_arms(
    base: Routing,
    *,
    gradients: Sequence[str],
    ratios: Sequence[float],
    selections: Sequence[str],
    scorings: Sequence[str],
    batch_size: int,
    batch_sizes: Sequence[int] = (),
    routers: Sequence[str] = (),
    num_layers: int,
) -> list[Arm]:
    """All combinations of the settings asked for, with their controls.

    Args:
        base: What the combinations leave open.
        gradients: Gradient modes.
        ratios: Keep ratios.
        selections: Strategies; ``random`` is added as the control in any case.
        scorings: Scores.
        batch_size: Sequences per step of the standard arm and of every routed one.
        batch_sizes: Further standard arms.
        routers: What scores; empty takes what ``base`` says.
        num_layers: Layers of the model, for the batch of equal cost.

    Returns:
        The controls first; no two arms do the same.

    Example:
        >>> arms = plan_arms(Routing(), gradients=["kv"], ratios=[0.25], selections=["topk"], scorings=["loss"],
        ...                  batch_size=8, num_layers=4)
        >>> [arm.name for arm in arms]
        ['standard', 'standard-b4', 'standard-b5', 'kv-0.25-random', 'kv-0.25-topk-loss']
    """
    standard = [Arm("standard", f"standard, batch {batch_size}", "standard", "standard", batch_size)]
    equal: dict[int, Arm] = {}
    random: dict[str, Arm] = {}
    asked: dict[str, Arm] = {}
    for gradient, ratio in itertools.product(gradients, ratios):
        control = dataclasses.replace(
            base, gradient=gradient, ratio=ratio, selection=SCORELESS, router=None, router_depth=None
        )
        name = f"{gradient}-{ratio:g}-random"
        cost = relative_cost(control, num_layers=num_layers)
        random[name] = Arm(
            name, f"random {ratio:g}, {gradient}", "random", "random", batch_size, control,
            equal_cost=_equal_cost(cost, batch_size, equal),
        )  # fmt: skip
        for selection, scoring, router in itertools.product(selections, scorings, routers or (None,)):
            if selection == SCORELESS:
                continue
            routing = dataclasses.replace(base, gradient=gradient, ratio=ratio, selection=selection, scoring=scoring)
            asked_name = f"{gradient}-{ratio:g}-{selection}-{scoring}"
            by = scoring
            if router is not None:
                depth = base.router_depth if router in ("truncated", "learned") else None
                routing = dataclasses.replace(routing, router=router, router_depth=depth)
                asked_name, by = f"{asked_name}-{router}", f"{scoring} ({router.replace('_', ' ')})"
            label = f"{selection} {ratio:g} by {by}, {gradient}"
            cost = relative_cost(routing, num_layers=num_layers)
            asked[asked_name] = Arm(
                asked_name, label, "asked", "cggr", batch_size, routing,
                equal_cost=_equal_cost(cost, batch_size, equal), random=name,
            )  # fmt: skip
    further = [
        Arm(f"standard-b{size}", f"standard, batch {size}", "batch", "standard", size)
        for size in dict.fromkeys(batch_sizes)
        if size != batch_size and size not in equal
    ]
    return [*standard, *further, *equal.values(), *random.values(), *asked.values()]


def _equal_cost(cost: float, batch_size: int, equal: dict[int, Arm]) -> str:
    """Name of the standard arm of that cost, to the nearest whole sequence; adds it to ``equal`` where it is new."""
    size = max(1, round(cost * batch_size))
    if size >= batch_size:
        return "standard"
    name = f"standard-b{size}"
    equal.setdefault(size, Arm(name, f"standard, batch {size}", "equal_cost", "standard", size))
    return name
