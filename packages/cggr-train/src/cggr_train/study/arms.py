"""The arms of a study: what is compared, and the controls of every comparison."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cggr_core.settings import KEY_VALUE_MODES, SCORELESS, SUPERVISED
from cggr_train.errors import InputError
from cggr_train.learner import Routing

CONTROLS = ("equal_cost", "checkpointed", "equal_memory")
"""Standard arms that a study may include besides the first."""
RANDOM = "random"
ARMS = "arms.json"


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name: Key of the arm, usable as a file name.
        label: Human-readable name.
        role: ``standard``, ``checkpointed`` (standard with gradient checkpointing), ``equal_cost`` (standard at the
            batch of equal cost), ``equal_memory`` (standard with as many sequences at a time as fit into a routed
            step's memory), ``batch`` (standard at another requested batch size), ``random`` (the control at the same
            ratio and gradient mode) or ``asked``.
        method: Which learner, see :func:`cggr_train.learner.build_learner`.
        batch_size: Sequences per step.
        routing: For the routed learners.
        equal_cost: For an asked arm: name of the standard arm whose step costs as many operations.
        random: For an asked arm: name of the random control.
        own_precision: For an arm with another context precision: name of the same arm without it.
        micro_batch: Sequences per forward, with gradients accumulated over the batch; None takes the whole batch.
        checkpointing: Whether activations are recomputed in the backward pass.
        learning_rate: Its own learning rate; None takes the study's.
        memory_of: For the equal-memory control: name of the arm whose peak memory it may use.
    """

    name: str
    label: str
    role: str
    method: str
    batch_size: int
    routing: Routing = dataclasses.field(default_factory=Routing)
    equal_cost: str = "standard"
    random: str | None = None
    own_precision: str | None = None
    micro_batch: int | None = None
    checkpointing: bool = False
    learning_rate: float | None = None
    memory_of: str | None = None

    @property
    def forward_size(self) -> int:
        """Sequences of one forward."""
        return self.micro_batch or self.batch_size

    @property
    def kept_share(self) -> float:
        """Share of the supervised tokens that it keeps."""
        return 1.0 if self.method == "standard" or self.routing.selection == SUPERVISED else self.routing.ratio

    @property
    def title(self) -> str:
        """The label, with the micro-batch and learning rate found for it."""
        found = [self.label]
        if self.forward_size < self.batch_size:
            found.append(f"{self.forward_size} at a time")
        if self.checkpointing and self.role != "checkpointed":
            found.append("checkpointed")
        return ", ".join(found)

    @property
    def remembers(self) -> bool:
        """Whether it uses scores that earlier epochs of the run observed."""
        return self.method == "cggr" and self.routing.scorer == "remembered"

    @property
    def scores_from_own_run(self) -> bool:
        """Whether its scores depend on what its own run observed, so that other weights cannot give them."""
        return self.method == "cggr" and self.routing.scorer in ("learned", "remembered")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Arm:
        """Rebuild an arm from ``dataclasses.asdict``."""
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


def relative_cost(routing: Routing, *, num_layers: int, supervised: float = 1.0) -> float:
    """Operations of a routed step relative to the standard step, by the table of gradient modes.

    Args:
        routing: Gradient mode, ratio, selection and router.
        num_layers: Layers of the model.
        supervised: Share of all tokens that are supervised; the ratio is of these.

    Example:
        >>> relative_cost(Routing("kv", 0.25, "stratified"), num_layers=8)
        0.5833333333333334
        >>> relative_cost(Routing("kv", 0.25, "random"), num_layers=8)
        0.5
    """
    ratio = supervised * (1.0 if routing.selection == SUPERVISED else routing.ratio)
    depth = routing.depth(num_layers)
    scored = routing.selection not in SCORELESS and routing.scorer != "remembered"
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
    context_precisions: Sequence[str | None] = (None,),
    context_margins: Mapping[int, float] | None = None,
    controls: Sequence[str] = ("equal_cost",),
    supervised: float = 1.0,
    num_layers: int,
) -> list[Arm]:
    """All combinations of the requested settings, with their controls.

    Args:
        base: Settings that the combinations do not set.
        gradients: Gradient modes.
        ratios: Keep ratios.
        selections: Strategies; ``random`` is added as the control in any case.
        scorings: Scores.
        batch_size: Sequences per step of the standard arm and of every routed one.
        batch_sizes: Further standard arms.
        routers: What scores; empty takes what ``base`` says.
        context_precisions: Precisions for tokens that need no gradient; None is the model's own. Modes without such
            tokens ignore them.
        context_margins: For arms of supervised tokens: maps each margin to the share of all tokens that gradients then
            reach; by default no margin, with ``supervised``.
        controls: Standard arms besides the first, of :data:`CONTROLS`.
        supervised: Share of all tokens that are supervised.
        num_layers: Layers of the model, for the batch of equal cost.

    Returns:
        The controls first; no two arms are the same.

    Example:
        >>> arms = plan_arms(Routing(), gradients=["kv"], ratios=[0.25], selections=["topk"], scorings=["loss"],
        ...                  batch_size=8, num_layers=4)
        >>> [arm.name for arm in arms]
        ['standard', 'standard-b4', 'standard-b5', 'kv-0.25-random', 'kv-0.25-topk-loss']
    """
    standard = [Arm("standard", f"standard, batch {batch_size}", "standard", "standard", batch_size)]
    if "checkpointed" in controls:
        label = f"standard, batch {batch_size}, checkpointed"
        standard.append(Arm("standard-checkpointed", label, "checkpointed", "standard", batch_size, checkpointing=True))
    equal: dict[int, Arm] = {}

    margins = context_margins or {0: supervised}

    def equal_cost(routing: Routing) -> str:
        if "equal_cost" not in controls:
            return "standard"
        reached = margins.get(routing.context_margin, supervised)
        return _equal_cost(relative_cost(routing, num_layers=num_layers, supervised=reached), batch_size, equal)

    random: dict[str, Arm] = {}
    asked: dict[str, Arm] = {}
    for gradient, ratio, precision in itertools.product(gradients, ratios, context_precisions):
        if precision is not None and gradient not in KEY_VALUE_MODES:
            continue
        control = dataclasses.replace(
            base, gradient=gradient, ratio=ratio, selection=RANDOM, router=None, router_depth=None,
            context_precision=precision,
        )  # fmt: skip
        random_arm = _named(Arm(f"{gradient}-{ratio:g}-random", f"random {ratio:g}, {gradient}", "random", "random",
                                batch_size, control, equal_cost=equal_cost(control)))  # fmt: skip
        if any(selection != SUPERVISED for selection in selections):
            random[random_arm.name] = random_arm
        for selection in selections:
            if selection == SUPERVISED:
                routing = dataclasses.replace(control, ratio=base.ratio, selection=SUPERVISED)
                found = _supervised_arms(routing, margins, batch_size=batch_size)
            elif selection in SCORELESS:
                continue
            else:
                routing = dataclasses.replace(
                    base, gradient=gradient, ratio=ratio, selection=selection, context_precision=precision
                )
                found = [
                    dataclasses.replace(
                        _scored_arm(dataclasses.replace(routing, scoring=scoring), router, batch_size=batch_size),
                        random=random_arm.name,
                    )
                    for scoring, router in itertools.product(scorings, routers or (None,))
                ]
            for arm in found:
                named = _named(dataclasses.replace(arm, equal_cost=equal_cost(arm.routing)))
                asked[named.name] = named
    random, asked = ({name: _with_own_precision(arm, arms) for name, arm in arms.items()} for arms in (random, asked))
    further = [
        Arm(f"standard-b{size}", f"standard, batch {size}", "batch", "standard", size)
        for size in dict.fromkeys(batch_sizes)
        if size != batch_size and size not in equal
    ]
    if "equal_memory" in controls and batch_size > 1:
        routed = next(iter(asked), None) or next(iter(random))
        standard.append(
            Arm("standard-equal-memory", f"standard, batch {batch_size}, equal memory", "equal_memory", "standard",
                batch_size, memory_of=routed)
        )  # fmt: skip
    return [*standard, *further, *equal.values(), *random.values(), *asked.values()]


def _named(arm: Arm) -> Arm:
    """The arm, with the context precision in its name and label."""
    precision = arm.routing.context_precision
    if precision is None:
        return arm
    return dataclasses.replace(arm, name=f"{arm.name}-{precision}", label=f"{arm.label}, {precision} context")


def _with_own_precision(arm: Arm, arms: Mapping[str, Arm]) -> Arm:
    precision = arm.routing.context_precision
    own = arm.name.removesuffix(f"-{precision}")
    return dataclasses.replace(arm, own_precision=own) if precision is not None and own in arms else arm


def _supervised_arms(routing: Routing, margins: Iterable[int], *, batch_size: int) -> list[Arm]:
    """The arms of the supervised tokens, with each margin that the gradient mode supports; without their controls."""
    found = []
    for margin in margins if routing.gradient in KEY_VALUE_MODES else (0,):
        name, which = f"{routing.gradient}-supervised", "supervised tokens"
        if margin:
            name, which = f"{name}-margin{margin}", f"supervised tokens and {margin} before"
        own = dataclasses.replace(routing, context_margin=margin)
        found.append(Arm(name, f"{which}, {routing.gradient}", "asked", "cggr", batch_size, own))
    return found


def _scored_arm(routing: Routing, router: str | None, *, batch_size: int) -> Arm:
    """The arm of a routing with scored tokens, by a router of that name if one is given; without its controls."""
    name = f"{routing.gradient}-{routing.ratio:g}-{routing.selection}-{routing.scoring}"
    scored_by = routing.scoring
    if router is not None:
        depth = routing.router_depth if router in ("truncated", "learned") else None
        routing = dataclasses.replace(routing, router=router, router_depth=depth)
        name, scored_by = f"{name}-{router}", f"{scored_by} ({router.replace('_', ' ')})"
    label = f"{routing.selection} {routing.ratio:g} by {scored_by}, {routing.gradient}"
    return Arm(name, label, "asked", "cggr", batch_size, routing)


def _equal_cost(cost: float, batch_size: int, equal: dict[int, Arm]) -> str:
    """Name of the standard arm of that cost, to the nearest whole sequence; added to ``equal`` if it is new."""
    size = max(1, round(cost * batch_size))
    if size >= batch_size:
        return "standard"
    name = f"standard-b{size}"
    equal.setdefault(size, Arm(name, f"standard, batch {size}", "equal_cost", "standard", size))
    return name
