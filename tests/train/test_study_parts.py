"""The parts of a study that need no training: arms, plan, intervals, averages, analysis."""

import dataclasses
import io
import statistics

import pytest
import torch
from rich.console import Console

from cggr_train.commands.study import precisions, split
from cggr_train.data import TokenStore
from cggr_train.errors import InputError
from cggr_train.learner import Routing
from cggr_train.report.explanation import explain
from cggr_train.settings import TrainSettings
from cggr_train.study.analysis import controls
from cggr_train.study.arms import Arm, plan_arms, relative_cost
from cggr_train.study.average import DECAY, RunningAverage
from cggr_train.study.intervals import Interval, interval, student_t
from cggr_train.study.plan import make_plan
from cggr_train.study.run import prepare_study, reached_share
from cggr_train.study.settings import StudySettings


def settings(steps=100, seconds=None, **values):
    train = TrainSettings(data=("a.txt",), config="nano", steps=steps, seconds=seconds, batch_size=8, length=64)
    return StudySettings(train=train, **values)


def arms(**values):
    asked = {"gradients": ["kv"], "ratios": [0.25], "selections": ["stratified"], "scorings": ["gradnorm"]}
    return plan_arms(Routing(), **{**asked, "batch_size": 8, "num_layers": 4, **values})


def test_every_setting_comes_with_its_controls():
    found = {
        arm.name: arm for arm in arms(gradients=["kv", "exact"], selections=["topk", "random"], batch_sizes=[1, 8])
    }
    assert list(found) == [
        "standard", "standard-b1", "standard-b4", "standard-b5", "kv-0.25-random", "exact-0.25-random",
        "kv-0.25-topk-gradnorm", "exact-0.25-topk-gradnorm",
    ]  # fmt: skip
    asked = found["kv-0.25-topk-gradnorm"]
    assert (asked.equal_cost, asked.random) == ("standard-b5", "kv-0.25-random")
    assert found["kv-0.25-random"].equal_cost == "standard-b4", "random needs no scoring pass: a cheaper step"
    assert found["exact-0.25-topk-gradnorm"].equal_cost == "standard"
    assert found["standard-b1"].role == "batch"
    assert Arm.from_dict({**vars(asked), "routing": vars(asked.routing)}) == asked


def test_routers_are_arms_of_their_own():
    found = {arm.name: arm for arm in arms(routers=["full_depth", "learned", "remembered"])}
    base = "kv-0.25-stratified-gradnorm"
    assert list(found)[-3:] == [f"{base}-full_depth", f"{base}-learned", f"{base}-remembered"]
    learned, remembered = found[f"{base}-learned"], found[f"{base}-remembered"]
    assert learned.label == "stratified 0.25 by gradnorm (learned), kv"
    assert [arm.scores_from_own_run for arm in found.values()] == [False] * (len(found) - 2) + [True] * 2
    assert remembered.remembers
    assert not learned.remembers
    assert remembered.equal_cost == found["kv-0.25-random"].equal_cost, "nothing scores"


def test_fp8_is_an_arm_beside_the_same_without():
    found = {arm.name: arm for arm in arms(gradients=["kv", "exact"], context_precisions=[None, "fp8"],
                                           selections=["stratified", "supervised"])}  # fmt: skip
    low = {name: arm for name, arm in found.items() if arm.routing.context_precision == "fp8"}
    assert {name: (arm.own_precision, arm.random) for name, arm in low.items()} == {
        "kv-0.25-random-fp8": ("kv-0.25-random", None),
        "kv-0.25-stratified-gradnorm-fp8": ("kv-0.25-stratified-gradnorm", "kv-0.25-random-fp8"),
        "kv-supervised-fp8": ("kv-supervised", None),
    }, "exact has no tokens that need no gradient"
    assert low["kv-supervised-fp8"].label == "supervised tokens, kv, fp8 context"
    assert controls(low["kv-supervised-fp8"])[-1] == "kv-supervised"
    assert {"exact-0.25-random", "exact-0.25-stratified-gradnorm", "exact-supervised"} <= set(found)
    assert all(arm.own_precision is None for arm in arms(context_precisions=["fp8"])), "nothing to compare with"
    asked = "kv-0.25-stratified-gradnorm-fp8"
    assert "those tokens and for the keys and values of all tokens, the rest in FP8." in explain(found[asked], [])
    assert Arm.from_dict({**vars(found[asked]), "routing": vars(found[asked].routing)}) == found[asked]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"context_precisions": (None, "fp8"), "gradients": ("exact",)},
            "requires --gradient kv or detached, .* got exact",
        ),
        ({"context_precisions": ()}, "--context-precision is empty"),
        ({"context_precisions": ("fp4",)}, "context_precision must be"),
        ({"context_margins": (-1,)}, "--context-margin must be at least 0"),
        ({"context_margins": (0, 32)}, "--context-margin 32 requires an arm with --selection supervised"),
    ],
)
def test_precisions_that_do_not_go(values, message):
    with pytest.raises(InputError, match=message):
        settings(**values)


def test_margins_are_arms_of_the_supervised_tokens():
    found = {arm.name: arm for arm in arms(gradients=["kv", "exact"], selections=["supervised"], supervised=0.1,
                                           context_margins={0: 0.1, 32: 0.6})}  # fmt: skip
    assert [name for name in found if "supervised" in name] == [
        "kv-supervised", "kv-supervised-margin32", "exact-supervised",
    ]  # fmt: skip
    plain, margin = found["kv-supervised"], found["kv-supervised-margin32"]
    assert (plain.routing.context_margin, margin.routing.context_margin) == (0, 32)
    assert (plain.equal_cost, margin.equal_cost) == ("standard-b3", "standard-b6"), "what gradients reach costs"
    assert "Trains on the supervised tokens and 32 tokens before them: " in explain(margin, [])


@pytest.mark.parametrize("margin", [0, 1, 2, 5])
def test_the_share_that_gradients_reach_is_counted(margin):
    generator = torch.Generator().manual_seed(margin)
    rows = torch.randint(1, 9, (7, 6), generator=generator)
    rows = torch.where(torch.rand(7, 6, generator=generator) < 0.2, rows, -rows)
    store = TokenStore(rows.flatten().numpy().astype("int32"), rows.flatten().numpy(), 1, 0)
    reached = [
        any(row[at + 1 : at + 2 + margin] >= 0) for row in rows.numpy() for at in range(5)
    ]  # fmt: skip
    assert reached_share(store, 6, margin) == pytest.approx(sum(reached) / len(reached))


def test_precisions_on_the_command_line(tmp_path):
    assert precisions("own, fp8") == (None, "fp8")
    with pytest.raises(InputError, match="--context-precision must be one or more of own, fp8, got 'bf16'"):
        precisions("bf16")
    made = settings(context_precisions=(None, "fp8"))
    made.save(tmp_path)
    assert StudySettings.load(tmp_path) == made


def test_fp8_is_refused_where_it_would_be_emulated(tmp_path):
    """Its time would be meaningless, and arms are compared at equal time."""
    made = settings(context_precisions=(None, "fp8"))
    made = dataclasses.replace(made, train=dataclasses.replace(made.train, device="cpu"))
    with pytest.raises(InputError, match=r"fp8 needs a GPU with FP8 matrix products .* the device is cpu"):
        prepare_study(made, tmp_path / "study", Console(file=io.StringIO()))
    assert not (tmp_path / "study").exists(), "before anything is read"


@pytest.mark.parametrize(
    ("routing", "cost"),
    [
        (Routing("exact", 0.25), 1.0),
        (Routing("detached", 0.25), 1.75 / 3),
        (Routing("kv", 0.25, router_depth=2), (1.5 + 0.25 / 4) / 3),
        (Routing("kv", 0.25, router="learned"), (1.5 + 0.25 / 8) / 3),
        (Routing("kv", 0.25, router="remembered"), 1.5 / 3),
        (Routing("sequence", 0.25), 1.75 / 3),
        (Routing("sequence", 0.25, "random"), 0.25),
    ],
)
def test_costs_are_those_of_the_table(routing, cost):
    assert relative_cost(routing, num_layers=8) == pytest.approx(cost)


def test_arms_meet_at_equal_tokens_kept_tokens_and_time():
    found = arms()
    seconds = {"standard": 1.0, "standard-b4": 0.5, "standard-b5": 0.7, "kv-0.25-random": 0.5}
    seconds["kv-0.25-stratified-gradnorm"] = 0.625
    plan = make_plan(settings(evaluations=2), found, seconds)
    ends = {name: points[-1] for name, points in plan.points.items()}
    assert ends == {"standard": 100, "standard-b4": 200, "standard-b5": 160, "kv-0.25-random": 200,
                    "kv-0.25-stratified-gradnorm": 160}  # fmt: skip
    assert plan.amounts == {"tokens": 100 * 8 * 64, "time": 100.0, "kept": 160 * 8 * 63 * 0.25}
    assert plan.readings["standard"] == {"tokens": 100, "kept": 40, "time": 100}
    assert plan.readings["kv-0.25-random"] == {"tokens": 100, "kept": 160, "time": 200}
    assert plan.points["kv-0.25-random"] == [100, 160, 200]
    assert plan.warmup_steps == 5
    assert plan.eval_sequences == int(0.03 * 3 * 100 * 8 / 3), "evaluations cost little beside the training"


def test_time_alone_can_be_what_is_equal():
    found = arms()[:2]
    plan = make_plan(settings(steps=None, seconds=30.0, equal=("time",)), found, {"standard": 1.0, "standard-b4": 2.0})
    assert {name: points[-1] for name, points in plan.points.items()} == {"standard": 30, "standard-b4": 15}
    assert plan.amounts["tokens"] == 15 * 4 * 64, "compared where the arm that comes least far ends"


@pytest.mark.parametrize(
    ("degrees", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042)]
)
def test_student_t_is_that_of_the_tables(degrees, value):
    assert student_t(0.95, degrees) == pytest.approx(value, abs=6e-4)


def test_intervals_cover_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    covered = [found.low <= 0 <= found.high for found in map(interval, samples.tolist())]
    assert statistics.fmean(covered) == pytest.approx(0.95, abs=0.012)


def test_what_an_interval_shows():
    assert [Interval(1, 0.5, 2).sign, Interval(-1, -2, -0.5).sign, Interval(1, -1, 3).sign] == [1, -1, 0]
    assert interval([2.0]) == Interval(2.0, None, None)
    assert interval([2.0]).sign == 0
    with pytest.raises(ValueError, match="samples is empty"):
        interval([])


def test_the_average_reaches_back_a_fixed_share_of_the_run():
    model = torch.nn.Linear(1, 1, bias=False)
    average = RunningAverage(model)
    for step in range(1, 1001):
        model.weight.data.fill_(float(step))
        average.update(step)
    with average.average_parameters():
        lag = 1000 - model.weight.item()
    assert lag == pytest.approx(1000 / (DECAY + 2), rel=0.02)
    assert model.weight.item() == 1000
    other = RunningAverage(model)
    other.load_state_dict(average.state_dict())
    with other.average_parameters():
        assert model.weight.item() == pytest.approx(1000 - lag)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seconds": 3.0}, "either --steps or --seconds"),
        ({"steps": None}, "either --steps or --seconds"),
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"draws": 1}, r"at least 2 \(for a variance\), got 1"),
        ({"equal": ("epochs",)}, "--equal must be tokens, time or both, got 'epochs'"),
        ({"selections": ()}, "--selection is empty"),
        ({"parallel": 0}, "--parallel must be at least 1"),
        ({"calibration_seconds": 0.0}, "--calibration-seconds must be positive"),
        ({"batch_sizes": (0,)}, "--control-batch must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_used(values, message):
    with pytest.raises(InputError, match=message):
        settings(**values)


def test_settings_come_back(tmp_path):
    given = settings(ratios=(0.25, 0.5), batch_sizes=(1,), equal=("time",))
    given.save(tmp_path)
    assert StudySettings.load(tmp_path) == given
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(InputError, match="holds no study that can be resumed"):
        StudySettings.load(tmp_path)


def test_lists_on_the_command_line():
    assert split("--selection", "topk, random,topk") == ("topk", "random")
    with pytest.raises(InputError, match=r"--ratio must be numbers separated by commas, got '0\.25,x'"):
        split("--ratio", "0.25,x", float)
