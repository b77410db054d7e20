"""The result of `benchmarks.frontier`: what every arm reaches in the same time, on the seeds that all have done."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import _record
from benchmarks._frontier_arms import Setting, Way
from cggr_train.learner import Routing
from cggr_train.report.verdict import verdict
from cggr_train.study import arms as study_arms
from cggr_train.study import plan as study_plan
from cggr_train.study.analysis import Outcome, analyse

if TYPE_CHECKING:
    from benchmarks._frontier_plan import Plan

BASES = ("recorded", "usual")
"""Every arm's step recorded where it can be; or as it runs by default."""


def share_of_time(curve: Sequence[Mapping[str, float]], loss: float, seconds: float) -> float | None:
    """How long a curve takes to come down to a loss, between its points in a straight line, as a share of ``seconds``.

    Example:
        >>> points = [{"seconds": 2.0, "loss": 3.0}, {"seconds": 4.0, "loss": 1.0}]
        >>> share_of_time(points, 2.0, 6.0), share_of_time(points, 0.5, 6.0)
        (0.5, None)
    """
    before = None
    for point in curve:
        if point["loss"] <= loss:
            if before is None:
                return point["seconds"] / seconds
            part = (before["loss"] - loss) / (before["loss"] - point["loss"])
            return (before["seconds"] + part * (point["seconds"] - before["seconds"])) / seconds
        before = point
    return None


def whole_seeds(setting: Setting, records: Sequence[Mapping[str, Any]]) -> list[int]:
    """Seeds of which every way has been run that is not late and has not failed."""
    done = {(r["way"], r["seed"]) for r in records if r["event"] == "run"}
    failed = {r["way"] for r in records if r["event"] == "failed"}
    seeds = sorted({seed for _, seed in done})
    needed = [name for name, way in setting.ways.items() if not way.late and name not in failed]
    return [seed for seed in seeds if all((name, seed) in done for name in needed)]


def _is_standard(way: Way) -> bool:
    return way.gradient == "exact" and way.given and not way.mixed


class Found:
    """What a study's records say, of the seeds that all ways have done.

    Args:
        plan: The plan.
        records: All.

    Attributes:
        seeds: Which.
        arms: Those whose way has been run at all of them.
        runs: By way and seed.
    """

    def __init__(self, plan: Plan, records: Sequence[Mapping[str, Any]]) -> None:
        self.plan, self.setting = plan, plan.setting
        self.seeds = whole_seeds(plan.setting, records)
        self.runs = {(r["way"], r["seed"]): r for r in records if r["event"] == "run"}
        self.timings = {r["arm"]: r for r in records if r["event"] == "timing"}
        self.answers = {(r["way"], r["seed"], r["step"]): r for r in records if r["event"] == "answers"}
        self.rates = [r for r in records if r["event"] == "rate"]
        self.arms = [
            name
            for name, arm in plan.setting.arms.items()
            if self.seeds and all((arm.way, seed) in self.runs for seed in self.seeds)
        ]

    def of(self, basis: str) -> list[str]:
        """Arms whose steps were timed as ``basis`` has them: by default, routed ones as ``CGGRModel`` records them."""
        if basis == "recorded":
            return self.arms
        ways = {name: self.setting.ways[self.setting.arms[name].way] for name in self.arms}
        routed = [name for name in self.arms if "itself" in self.timings[name] and not _is_standard(ways[name])]
        return [name for name in self.arms if name in routed or _is_standard(ways[name])] if routed else []

    def seconds(self, basis: str) -> dict[str, float]:
        """Of a step of each arm."""
        return self.plan.times if basis == "recorded" else self.plan.usual

    def steps(self, basis: str, share: float) -> dict[str, int]:
        """Of each arm after a share of the time."""
        return (self.plan.steps if basis == "recorded" else self.plan.usual_steps)[share]

    def peak(self, basis: str, arm: str) -> int:
        """Bytes at the peak of a step."""
        if counted := self.setting.arms[arm].counted:
            return round(sum(share * self.peak(basis, other) for other, share in counted))
        timing = self.timings[arm]
        kinds = {"recorded": ("recorded", "eager"), "usual": ("itself", "eager")}[basis]
        if basis == "usual" and self.setting.ways[self.setting.arms[arm].way].gradient == "exact":
            kinds = ("eager",)
        return next((timing[kind].get("peak_bytes", 0) for kind in kinds if "seconds" in timing.get(kind, {})), 0)

    def losses(self, arm: str, step: int) -> list[float]:
        """Of each seed after a step."""
        way = self.setting.arms[arm].way
        return [
            next(point["loss"] for point in self.runs[way, seed]["points"] if point["step"] == step)
            for seed in self.seeds
        ]

    def diverged(self, arm: str) -> bool:
        """Whether it did at a seed."""
        return any("diverged" in self.runs[self.setting.arms[arm].way, seed] for seed in self.seeds)

    def accuracy(self, arm: str, step: int) -> list[dict[str, Any]]:
        """Right answers of each seed that was asked."""
        way = self.setting.arms[arm].way
        found = [self.answers.get((way, seed, step)) for seed in self.seeds]
        return [{"right": len(r["right"]), "questions": r["questions"]} for r in found if r is not None]

    def reached(self, arm: str, control: str, basis: str) -> list[float | None]:
        """Of each seed, after which share of the time an arm has the loss that the control ends with."""
        own, its = self.setting.arms[arm].way, self.setting.arms[control].way
        seconds, last = self.seconds(basis), self.steps(basis, self.setting.shares[-1])
        if self.diverged(arm) or self.diverged(control):
            return []
        found = []
        for seed in self.seeds:
            end = next(p["loss"] for p in self.runs[its, seed]["points"] if p["step"] == last[control])
            curve = [{**p, "seconds": p["step"] * seconds[arm]} for p in self.runs[own, seed]["points"]]
            within = [point for point in curve if point["step"] <= last[arm]]
            found.append(share_of_time(within, end, last[control] * seconds[control]))
        return found


def outcome_of(found: Found, basis: str) -> Outcome:
    """What the product's tables, verdict and frontier are made of."""
    setting, seconds = found.setting, found.seconds(basis)
    last = found.steps(basis, setting.shares[-1])
    arms, records, readings = [], [], {}
    # The verdict compares with what it knows as "standard".
    called = {name: "standard" if place == 0 else name for place, name in enumerate(found.arms)}
    compared = found.of(basis)
    for name in compared:
        arm = setting.arms[name]
        way = setting.ways[arm.way]
        scored = way.selection in ("sampled", "stratified")
        arms.append(
            study_arms.Arm(
                called[name], arm.label or way.label, arm.role,
                "standard" if way.gradient == "exact" and way.given else "cggr", way.batch,
                Routing(gradient=way.gradient, ratio=way.ratio, selection=way.selection),
                equal_cost=next((n for n in compared if setting.arms[n].role == "equal_cost"), "standard"),
                random="kv-random" if "kv-random" in compared and scored and way.gradient == "kv" else None,
                checkpointing=arm.checkpointing,
            )
        )  # fmt: skip
        readings[called[name]] = {
            "tokens": min(found.plan.equal[name], last[name]), "kept": last[name], "time": last[name],
        }  # fmt: skip
        records.append(
            {"event": "timing", "arm": called[name], "step_seconds": [seconds[name]],
             "peak_bytes": found.peak(basis, name), "start_bytes": 0, "engine": ""}
        )  # fmt: skip
        for seed in found.seeds:
            run = found.runs[arm.way, seed]
            points = [
                {"step": p["step"], "tokens": p["step"] * way.batch * setting.length, "heldout_loss": p["loss"]}
                for p in run["points"]
            ]
            told = {"diverged": run["diverged"]} if "diverged" in run else {}
            records.append({"event": "run", "arm": called[name], "seed": seed, "points": points, **told})
    amounts = {"tokens": 0.0, "kept": 0.0, "time": found.plan.budget}
    plan = study_plan.Plan(amounts, readings, {}, 0.0, 0)
    return analyse(arms, plan, records, seeds=len(found.seeds))


def rows_of(found: Found) -> dict[str, dict[str, Any]]:
    """What the result says of each arm."""
    setting, plan = found.setting, found.plan
    rows: dict[str, dict[str, Any]] = {}
    for name in found.arms:
        arm = setting.arms[name]
        way = setting.ways[arm.way]
        timing = found.timings[name]
        row: dict[str, Any] = {
            "label": arm.label or way.label,
            "role": arm.role,
            "same_run_as": arm.way if arm.way != name else None,
            "batch": way.batch,
            "learning_rate": found.runs[arm.way, found.seeds[0]]["rate"],
            "counted": dict(arm.counted),
            "step": {kind: timing[kind] for kind in ("eager", "recorded", "itself") if kind in timing},
        }
        if found.diverged(name):
            rows[name] = {**row, "unit": "nat", "diverged": True, **_record.summary([0.0])}
            continue
        for basis in BASES:
            if name not in found.of(basis):
                continue
            row[basis] = {
                "step_seconds": found.seconds(basis)[name],
                "peak_bytes": found.peak(basis, name),
                "readings": {
                    f"{share:.2f}": {
                        "steps": (step := found.steps(basis, share)[name]),
                        "losses": found.losses(name, step),
                        "accuracy": found.accuracy(name, step),
                    }
                    for share in setting.shares
                },
                "share_of_the_time_of": {
                    control: found.reached(name, control, basis)
                    for control in ("standard", "standard-checkpointed", "standard-b4")
                    if control in found.of(basis) and control != name
                },
            }
        row["equal_examples"] = {
            "steps": plan.equal[name],
            "losses": found.losses(name, plan.equal[name]),
            "accuracy": found.accuracy(name, plan.equal[name]),
        }
        last = row["recorded"]["readings"][f"{setting.shares[-1]:.2f}"]["losses"]
        rows[name] = {"unit": "nat", **_record.summary(last), **row}
    return rows


def report(arguments: Namespace, noted: Mapping[str, Any], plan: Plan, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write the result of the seeds that all arms have done; there must be one.

    Args:
        arguments: ``output``, ``name`` and ``device``.
        noted: What the result says besides.
        plan: The plan.
        records: All.
    """
    found = Found(plan, records)
    before = next((p for (way, *_), p in found.answers.items() if way == "before"), None)
    settings = {
        **noted, "seed": found.seeds[0], "seeds": len(found.seeds), "length": plan.setting.length,
        "seconds": plan.budget, "shares": plan.setting.shares,
        "accuracy_before": before and {"right": len(before["right"]), "questions": before["questions"]},
        "trials": [
            {"way": r["way"], "rate": r["rate"], "loss": r["points"][-1]["loss"] if r["points"] else None}
            for r in found.rates
        ],
        "verdict": {basis: verdict(outcome_of(found, basis)) for basis in BASES if found.of(basis)},
    }  # fmt: skip
    path = _record.write(
        arguments.name, rows_of(found), settings=settings, control=found.arms[0], device=arguments.device,
        folder=arguments.output,
    )  # fmt: skip
    from benchmarks.frontier_figures import draw

    draw(path)
    return path
