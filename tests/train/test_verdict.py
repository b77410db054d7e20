"""The verdict's first sentence and all tables agree, whatever the result of a study."""

import dataclasses
import re

import hypothesis
from hypothesis import strategies as st

from cggr_train.learner import Routing
from cggr_train.report.tables import study_cells
from cggr_train.report.verdict import verdict
from cggr_train.settings import TrainSettings
from cggr_train.study import StudySettings, frontier
from cggr_train.study.analysis import analyse, controls
from cggr_train.study.arms import plan_arms
from cggr_train.study.intervals import interval
from cggr_train.study.plan import make_plan

SETTINGS = StudySettings(
    train=TrainSettings(data=("a",), config="nano", steps=4, batch_size=8, length=64), evaluations=1
)
CONTROLS = ("equal_cost", "checkpointed", "equal_memory")
FEW = st.sampled_from([3.0, 3.5, 3.5001, 4.0])
"""So that ties are common."""


@st.composite
def outcomes(draw):
    """Possible results of a study: ties, diverged or missing arms, one seed, answers of all kinds."""
    precisions = draw(st.sampled_from([(None,), (None, "fp8"), ("fp8",)]))
    arms = plan_arms(
        Routing(), gradients=["kv"], ratios=[0.25], num_layers=4, batch_size=8, context_precisions=precisions,
        selections=draw(st.sampled_from([("stratified",), ("supervised",), ("supervised", "topk"), ("random",)])),
        scorings=["gradnorm"], controls=draw(st.sets(st.sampled_from(CONTROLS))),
    )  # fmt: skip
    others = [arm.name for arm in arms[1:]]
    gone = draw(st.sets(st.sampled_from(others))) if others and draw(st.booleans()) else set()
    plan = make_plan(SETTINGS, arms, {arm.name: 0.5 for arm in arms})
    arms = [arm for arm in arms if arm.name not in gone]
    names = {arm.name for arm in arms}
    arms = [
        dataclasses.replace(
            arm, equal_cost=arm.equal_cost if arm.equal_cost in names else "standard",
            random=arm.random if arm.random in names else None,
            own_precision=arm.own_precision if arm.own_precision in names else None,
        )
        for arm in arms
    ]  # fmt: skip
    seeds = draw(st.integers(1, 4))
    loss = draw(st.sampled_from([FEW, st.floats(1.0, 9.0)]))
    right = draw(st.sampled_from([None, st.just(0), st.integers(0, 7)]))
    diverged = draw(st.sets(st.sampled_from([arm.name for arm in arms[1:]]))) if len(arms) > 1 else set()
    records = []
    for arm in arms:
        peak, start = draw(st.sampled_from([1000, 990, 950, 900, 600])), draw(st.sampled_from([500, 1000]))
        records.append(
            {"event": "timing", "arm": arm.name, "turn": 0, "step_seconds": [0.5], "engine": "", "peak_bytes": peak,
             "start_bytes": start}
        )  # fmt: skip
        for seed in range(seeds):
            steps = [0, *plan.points[arm.name]]
            points = [{"step": s, "tokens": s, "kept_tokens": s, "heldout_loss": draw(loss)} for s in steps]
            run = {"event": "run", "arm": arm.name, "seed": seed, "points": points}
            if right is not None:
                run["accuracy"] = {"time": {"right": draw(right), "questions": 7}}
            if arm.name in diverged and seed == 0:
                run |= {"points": points[:1], "diverged": 3, "reason": "the loss is nan"}
            records.append(run)
    if draw(st.booleans()):
        figures = {"cosine": [0.5], "variance": [1.0], "bias": [0.0]}
        shown = draw(st.sets(st.sampled_from([arm.name for arm in arms])))
        records += [{"event": "gradients", "at": "start", "arm": name, **figures} for name in shown]
    return analyse(arms, plan, records, seeds=seeds, left_out={name: f"{name}: no memory" for name in gone})


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(outcomes())
def test_verdict_and_tables_agree(found):
    lines, tables = verdict(found), study_cells(found)
    first, rest = lines[0], " ".join(lines[1:])
    titles = {arm.title: arm for arm in found.arms}
    every = frontier.points(found)
    assert {point.name for point in every} == {arm.name for arm in found.arms} - set(found.diverged)
    assert not re.search(r"nan|inf\b|: \.|: ;|\bNone\b(?! of)", first + rest), lines

    by_accuracy = frontier.measured_by_accuracy(found)
    (lowest,) = [name for name, place in tables[0].best if tables[0].headings[1 + place] == "equal time"]
    assert f"Lowest held-out loss in the same time: {found.arm(lowest).title} (" in rest
    for cells in tables[1:]:
        for name, place in cells.best:  # of right answers
            assert cells.headings[1 + place] != "equal time" or all(
                sum(found.accuracy[name]) / len(found.accuracy[name]) >= sum(by) / len(by)
                for by in found.accuracy.values() if by
            )  # fmt: skip

    if found.seeds == 1:
        assert first == "Undecided: with one seed, a difference cannot be distinguished from chance."
    elif not by_accuracy or not found.accuracy:
        _agrees_with_losses(found, first, titles, lowest)
    else:
        _is_unbeaten(found, first, titles, {name: [-share for share in by] for name, by in found.accuracy.items()})

    differences = next(cells for cells in tables if cells.headings[1] == "standard")
    for name, cells in differences.rows:
        assert len(cells) == len(differences.headings) - 1
        sentence = next((line for line in lines if line.startswith("In the same time")), "")
        if not re.search(rf"(In the same time|settings,) {re.escape(found.arm(name).title)} \(", sentence):
            continue
        for control, value in found.comparisons["time"][name].against.items():
            said = sentence.partition(f" {found.arm(control).title} (95%")[0].rpartition(";")[2]
            if value.sign:
                assert (" better than" if value.sign < 0 else " worse than") in said
    for name in found.diverged:
        assert f"{found.arm(name).title} (" in lines[1] and "Diverged, and left out" in lines[1]
    for name in found.left_out:
        assert f"Left out: {name}: no memory." in lines


def _agrees_with_losses(found, first, titles, best):
    costs = {name: by for name, by in found.losses["time"].items()}
    chosen = _is_unbeaten(found, first, titles, costs)
    if first.startswith("Use") and "statistically indistinguishable" not in first:
        assert chosen == best and "is the lowest" in first


def _is_unbeaten(found, first, titles, costs):
    """The arm that the sentence names, which no other is shown to beat; its claims about memory hold."""
    pattern = r"Use (.*?): its (held-out loss|accuracy) in|Undecided: (.*) would be recommended, but "
    named = re.match(pattern, first)
    assert named, first
    chosen = titles[named[1] or named[3]].name
    assert first.startswith("Undecided") == any(name in found.diverged for name in controls(found.arm(chosen)))
    assert chosen not in found.diverged
    for other, cost in costs.items():
        better = interval([one - own for one, own in zip(cost, costs[chosen], strict=True)])
        assert better.sign >= 0, (other, "is shown to be better than", chosen)
    peaks = {arm.name: found.memory[arm.name]["peak_bytes"] for arm in found.arms}
    compared = re.search(
        r"indistinguishable from the \w+, [\d.%]+ of (.*), and it (takes less memory|is simpler)", first
    )
    if compared:
        other = titles[compared[1]].name
        order = [arm.name for arm in found.arms]
        holds = (
            peaks[chosen] < peaks[other]
            if compared[2] == "takes less memory"
            else order.index(chosen) < order.index(other)
        )
        assert holds, first
    for title in re.findall(r"(?:memory than its [^:]*: |\), )(.*?) \([\d.%]+ at", first):
        assert peaks[titles[title].name] < peaks[chosen], first
    return chosen
