"""What `benchmarks.frontier` compares: settings, the ways of training in them, and the arms that take their steps."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Way:
    """A way of training; it determines the results, so one run serves every arm that takes its steps.

    Attributes:
        label: Name for people. batch: Sequences per step.
        gradient: Gradient mode.
        selection: ``supervised``, or a strategy of ``CGGRModel`` at ``ratio``.
        ratio: Keep ratio among the supervised tokens.
        block: Number of neighbouring tokens chosen together.
        margin: Number of tokens before each supervised stretch that are kept without a loss.
        unit: The unit in which supervised tokens are kept, if only some are; see
            :func:`benchmarks._frontier_units.keep_part`.
        parts: Number of supervised tokens over the number kept.
        layers: First and last of the layers that route, as shares of the depth; the others are exact.
        rates: Learning rates to try.
        rate_of: The way whose learning rate it uses instead of trying its own.
        answers: Whether it answers test problems.
        late: Whether it runs after all seeds of the others.
    """

    label: str
    batch: int
    gradient: str = "kv"
    selection: str = "supervised"
    ratio: float = 1.0
    block: int = 1
    margin: int = 0
    unit: str | int = "tokens"
    parts: int = 1
    layers: tuple[float, float] = (0.0, 1.0)
    rates: tuple[float, ...] = (1e-4, 2e-4)
    rate_of: str | None = None
    answers: bool = False
    late: bool = False

    @property
    def given(self) -> bool:
        """Whether the kept tokens follow from the labels, and are passed in with a fixed number of slots."""
        return self.selection == "supervised"

    @property
    def mixed(self) -> bool:
        """Whether some layers route and others are exact; such a pass does not have the time of such a step."""
        return self.layers != (0.0, 1.0)


@dataclass(frozen=True)
class Arm:
    """A way of training, and how its step is fitted into memory.

    Attributes:
        way: Name of the way.
        label: Name for people; None for the way's.
        micro_batch: Sequences per forward; None for the whole batch.
        checkpointing: Whether activations are recomputed in the backward pass.
        role: Role of the arm in a study; see :class:`cggr_train.study.arms.Arm`.
        counted: Arms and weights: the weighted sum of their time and memory stands for this arm's.
    """

    way: str
    label: str | None = None
    micro_batch: int | None = None
    checkpointing: bool = False
    role: str = "asked"
    counted: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Setting:
    """The data, and how long to train on it.

    Attributes:
        length: Tokens of a row.
        problems: Training problems.
        slots: Most answer tokens of a training row, and the slots for its kept ones.
        ways: By name; the first is the standard one.
        arms: By name; times are compared between these.
        clock: The arm whose steps, at ``steps`` or in ``seconds``, give the time that all arms get.
        steps: Of the clock arm; None takes ``seconds``.
        seconds: Time that every arm gets.
        shares: Shares of that time at which all arms are evaluated; the last is 1.
        context: Whether a problem is preceded by others that fill the row.
        limit: Most training rows.
        itself: Whether steps recorded by ``CGGRModel`` itself are timed too.
    """

    length: int
    problems: int
    slots: int
    ways: dict[str, Way]
    arms: dict[str, Arm]
    clock: str
    steps: int | None = None
    seconds: float | None = None
    shares: tuple[float, ...] = (1.0,)
    context: bool = False
    limit: int | None = None
    itself: bool = True


def _routed(batch: int, *, margins: tuple[int, ...], late: tuple[str, ...]) -> dict[str, Way]:
    every = {
        "kv": Way("kv, supervised tokens", batch, answers=True),
        **{
            f"kv-margin{m}": Way(
                f"kv, supervised and {m} before", batch, margin=m, rate_of="kv", answers=m == max(margins)
            )
            for m in margins
        },
        "kv-random": Way("kv, random quarter", batch, selection="random", ratio=0.25),
        "kv-sampled": Way(
            "kv, quarter sampled by gradient norm", batch, selection="sampled", ratio=0.25, rate_of="kv-random"
        ),
        "exact-sampled": Way(
            "exact, quarter sampled by gradient norm", batch, gradient="exact", selection="sampled", ratio=0.25
        ),
        "kv-stretches": Way(
            "kv, random quarter in stretches of 32", batch, selection="random", ratio=0.25, block=32,
            rate_of="kv-random",
        ),
    }  # fmt: skip
    return {name: replace(way, late=name in late) for name, way in every.items()}


def _standard(batch: int, **more: object) -> Way:
    return Way(f"standard, batch {batch}", batch, gradient="exact", **more)  # pyright: ignore[reportArgumentType]


_CONTEXT = {
    "standard": _standard(16, answers=True),
    **_routed(16, margins=(32, 128), late=("kv-margin32", "kv-stretches")),
    "standard-b6": _standard(6, answers=True),
}
_ANSWERS = {
    "standard": _standard(32, answers=True),
    **_routed(32, margins=(32,), late=("kv-sampled", "exact-sampled", "kv-stretches")),
    "standard-b16": _standard(16, answers=True),
}


def _parts(batch: int, *, margin: int) -> dict[str, Way]:
    """Ways to keep half of the supervised tokens, or to route in half of the layers."""
    half = Way("", batch, rate_of="kv", parts=2)
    return {
        "standard": _standard(batch),
        "kv": Way("kv, supervised tokens", batch),
        f"kv-margin{margin}": Way(f"kv, supervised and {margin} before", batch, margin=margin, rate_of="kv"),
        "kv-half": replace(half, label="kv, half of them, scattered"),
        "kv-window": replace(half, label="kv, half of them, a window that moves", unit="window"),
        "kv-sentences": replace(half, label="kv, half of them, whole sentences", unit="sentences"),
        **{
            f"kv-stretch{n}": replace(half, label=f"kv, half of them, stretches of {n}", unit=n, late=n in (32, 64))
            for n in (16, 32, 64, 128)
        },
        "kv-lower": Way("kv in the lower half, exact above", batch, layers=(0.0, 0.5), rate_of="kv"),
        "kv-upper": Way("kv in the upper half, exact below", batch, layers=(0.5, 1.0), rate_of="kv"),
    }


_CONTEXT_PARTS, _ANSWERS_PARTS = _parts(16, margin=128), _parts(32, margin=32)
_BATCHES = {
    "standard-b4": _standard(4, answers=True),
    "standard-b1": _standard(1, answers=True, rates=(5e-5, 1e-4, 2e-4)),
    "kv": Way("kv, supervised tokens, batch 4", 4, answers=True),
    "kv-stratified": Way("kv, stratified quarter, batch 4", 4, selection="stratified", ratio=0.25, answers=True),
    "kv-random": Way(
        "kv, random quarter, batch 4", 4, selection="random", ratio=0.25, rate_of="kv-stratified", answers=True
    ),
}
_TOY = {
    "standard": _standard(4, answers=True),
    **_routed(4, margins=(8,), late=("exact-sampled", "kv-stretches")),
    "standard-b2": _standard(2),
}
_TOY_PARTS = _parts(4, margin=8)
_ROLES = {"kv-random": "random", "kv-half": "random", "standard-b6": "equal_cost", "standard-b16": "equal_cost",
          "standard-b2": "equal_cost", "standard-b1": "batch"}  # fmt: skip


def _arms(ways: dict[str, Way], **fitted: Arm) -> dict[str, Arm]:
    standard = next(iter(ways))
    roles = {standard: "standard", **_ROLES}
    first = {standard: Arm(standard, role="standard")}
    own = {name: Arm(name, role=roles.get(name, "asked")) for name in ways if name != standard}
    return {**first, **own, **{name.replace("_", "-"): arm for name, arm in fitted.items()}}


def _checkpointed(ways: dict[str, Way]) -> Arm:
    label = f"{ways['standard'].label}, checkpointed"
    return Arm("standard", label, checkpointing=True, role="checkpointed")


_COUNTED = (("kv", 0.5), ("standard", 0.5))
_HALVES = {
    "kv_lower": Arm("kv-lower", "kv in the lower half, exact above; counted", counted=_COUNTED),
    "kv_upper": Arm("kv-upper", "kv in the upper half, exact below; counted", counted=_COUNTED),
}


SETTINGS: dict[str, Setting] = {
    "context": Setting(
        2048, 4800, 256, _CONTEXT,
        _arms(
            _CONTEXT,
            standard_micro4=Arm("standard", "standard, batch 16, 4 at a time", micro_batch=4, role="equal_memory"),
            standard_checkpointed=_checkpointed(_CONTEXT),
            exact_sampled=Arm("exact-sampled", "exact, quarter sampled, 4 at a time", micro_batch=4),
        ),
        clock="standard-checkpointed", seconds=8.0, context=True,
    ),
    "answers": Setting(
        320, 2400, 256, _ANSWERS,
        _arms(
            _ANSWERS,
            standard_checkpointed=_checkpointed(_ANSWERS),
        ),
        clock="standard", steps=225, shares=(1 / 3, 1.0),
    ),
    "toy": Setting(
        320, 200, 256, _TOY,
        _arms(
            _TOY,
            standard_micro2=Arm("standard", "standard, 2 at a time", micro_batch=2, role="equal_memory"),
            standard_checkpointed=_checkpointed(_TOY),
        ),
        clock="standard", steps=4, shares=(0.5, 1.0),
    ),
    "context-parts": Setting(
        2048, 4800, 256, _CONTEXT_PARTS, _arms(_CONTEXT_PARTS, **_HALVES),
        clock="standard", seconds=8.0, context=True, limit=640, itself=False,
    ),
    "answers-parts": Setting(
        320, 2400, 256, _ANSWERS_PARTS, _arms(_ANSWERS_PARTS, **_HALVES),
        clock="standard", seconds=4.0, limit=1000, itself=False,
    ),
    "toy-parts": Setting(
        320, 200, 256, _TOY_PARTS, _arms(_TOY_PARTS, **_HALVES), clock="standard", steps=2, limit=40, itself=False,
    ),
    "batches": Setting(320, 7473, 256, _BATCHES, _arms(_BATCHES), clock="standard-b4", seconds=10.0),
}  # fmt: skip
