"""A study's measurements, in this process; tests/e2e runs whole studies in separate processes."""

import dataclasses
import io
import json
import re
import shutil
import statistics

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import PreTrainedModel

from cggr_train.errors import DivergedError, InputError, SaveError
from cggr_train.study import kept, resume_study, stages, start_study
from cggr_train.study.arms import Arm
from cggr_train.study.context import StudyContext
from cggr_train.study.estimators import compare_gradients
from cggr_train.study.kept import BINS, kept_shares
from cggr_train.study.timing import time_steps
from cggr_train.study.training import train_run
from tests.support.studies import CPU, OwnPool, settings


@pytest.fixture(autouse=True)
def _own_pool(monkeypatch):
    monkeypatch.setattr(stages, "Pool", OwnPool)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, texts):
    """A complete study, its outcome and what it printed."""
    folder = tmp_path_factory.mktemp("study")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    console = Console(file=io.StringIO(), width=160)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "Pool", OwnPool)
        result = start_study(settings([data]), folder / "study", console)
    return folder / "study", result, console.file.getvalue()


@pytest.fixture
def study(finished, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(finished[0], tmp_path / "study")


def records(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_gradients_are_not_compared_on_less_than_a_batch(tmp_path, texts):
    data, heldout = tmp_path / "data.jsonl", tmp_path / "heldout.txt"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    heldout.write_text(texts[0][:150])
    train = {"heldout": (str(heldout),), "steps": 2}
    asked = settings([data], train, seeds=1, evaluations=1, controls=(), timing_turns=1)
    console = Console(file=io.StringIO(), width=160)
    result = start_study(asked, tmp_path / "study", console)
    assert result.exit_code == 0 and result.outcome.gradients == {}
    text = console.file.getvalue()
    assert re.search(
        "gradients are not compared: the held-out text has [123] sequences of 32 tokens, fewer than a batch", text
    )
    assert "cosine" not in text.lower()


def test_a_study_from_beginning_to_end(finished):
    folder, result, text = finished
    assert result.exit_code == 0
    outcome = result.outcome
    names = ["standard", "standard-b2", "kv-0.25-random", "kv-0.25-stratified-gradnorm"]
    assert [arm.name for arm in outcome.arms] == names
    found = records(folder)
    kinds = [record["event"] for record in found]
    assert [kinds.count(kind) for kind in ("study", "timing", "run", "gradients", "kept")] == [1, 8, 8, 6, 1]
    runs = {(record["arm"], record["seed"]): record for record in found if record["event"] == "run"}
    for seed in (0, 1):
        starts = {runs[name, seed]["points"][0]["heldout_loss"] for name in names}
        assert len(starts) == 1, "all start from the same weights"
        ends = {runs[name, seed]["points"][-1]["tokens"] for name in names}
        assert ends == {6 * 4 * 32}
        for name in names:
            points = runs[name, seed]["points"]
            assert points[-1]["heldout_loss"] < points[0]["heldout_loss"]
            share = points[-1]["kept_tokens"] / (6 * 4 * 31)
            assert share == pytest.approx(1.0 if "standard" in name else 0.25, abs=0.02)
    assert "Held-out loss, nats per token" in text
    assert f"report: {(folder / 'report.html').resolve()}\n" in text
    assert f"records: {(folder / 'results.jsonl').resolve()}\n" in text
    assert (folder / "report.html").exists()
    assert (folder / "runs" / "standard-seed0" / "model" / "model.safetensors").exists()
    assert [path.name for path in (folder / "runs").iterdir()] == ["standard-seed0"], "no leftovers"


def test_a_study_that_was_cut_short_measures_only_what_is_missing(study, console, monkeypatch):
    folder = study
    lines = (folder / "results.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["event"] != "kept"]
    kept.remove(next(line for line in kept if '"run"' in line and '"seed": 1' in line))
    (folder / "results.jsonl").write_text("\n".join(kept) + '\n{"event": "run", "arm": "kv-0.25-ra')
    asked = []
    original = OwnPool.run

    def run(self, requests, **options):
        asked.extend((request.event, *request.fields.values()) for request in requests)
        yield from original(self, requests, **options)

    monkeypatch.setattr(OwnPool, "run", run)
    before = {(r["arm"], r["seed"]): r["points"] for r in map(json.loads, lines) if r["event"] == "run"}
    result = resume_study(folder, console)
    assert asked == [("run", "standard", 1), ("kept",)]
    assert result.exit_code == 0
    assert "7 of 8 runs are done" in console.file.getvalue()
    again = next(r for r in stages.read_log(folder / "results.jsonl")[::-1] if r["event"] == "run")
    assert again["points"] == before["standard", 1], "the same run gives the same losses"


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(study):
    folder = study
    context = StudyContext(folder, CPU)
    arm = context.arms["kv-0.25-stratified-gradnorm"]
    options = {"points": [3, 6], "warmup_steps": 1, "eval_sequences": 8, "save_model": False}
    whole = train_run(context, arm, 5, **options, tell=lambda **values: None)
    asked = iter([False] * 4 + [True])
    assert train_run(context, arm, 5, **options, tell=lambda **values: None, stop=lambda: next(asked)) is None
    assert (folder / "runs" / f"{arm.name}-seed5" / "checkpoints" / "step-00000004").is_dir()
    resumed = train_run(context, arm, 5, **options, tell=lambda **values: None)
    assert resumed["points"] == whole["points"]
    assert not (folder / "runs" / f"{arm.name}-seed5").exists()


def diverge(monkeypatch, name, step):
    """Make the loss of an arm's learner infinite from a step on."""
    original = StudyContext.session

    def session(self, arm, *arguments, **options):
        made = original(self, arm, *arguments, **options)
        train = made.train

        def diverging(on_step, **options):
            def after(loss, rate):
                on_step(loss * float("inf") if made.progress.step >= step and arm.name == name else loss, rate)

            train(after, **options)

        made.train = diverging
        return made

    monkeypatch.setattr(StudyContext, "session", session)


def without_runs(folder, *names):
    log = folder / "results.jsonl"
    kept = [line for line in log.read_text().splitlines() if json.loads(line)["event"] != "run"
            or json.loads(line)["arm"] not in names]  # fmt: skip
    log.write_text("\n".join(kept) + "\n")


def test_an_arm_that_diverges_is_reported_and_the_study_goes_on(study, console, monkeypatch):
    asked = "kv-0.25-stratified-gradnorm"
    without_runs(study, asked)
    diverge(monkeypatch, asked, step=4)
    result = resume_study(study, console)
    assert result.exit_code == 0
    assert set(result.outcome.diverged) == {asked} and set(result.outcome.diverged[asked]) == {0, 1}
    # seen when the loss is looked at: here at an evaluation, whose steps depend on the times of the arms
    step = result.outcome.diverged[asked][1]
    assert 4 <= step <= 6
    assert asked not in result.outcome.comparisons["time"]
    said = console.file.getvalue()
    assert f"stratified 0.25 by gradnorm, kv, seed 1: diverged at step {step}" in said
    assert "Diverged, and left out of all comparisons: stratified 0.25 by gradnorm, kv (2 of 2 seeds, first at" in said
    assert not (study / "runs" / f"{asked}-seed0").exists(), "no leftovers"
    assert resume_study(study, console).outcome.diverged == result.outcome.diverged, "and it is not run again"


def test_a_standard_run_that_diverges_ends_the_study(study, console, monkeypatch):
    without_runs(study, "standard")
    diverge(monkeypatch, "standard", step=4)
    for _ in range(2):
        with pytest.raises(
            DivergedError, match=r"standard, batch 4, seed 0: the loss is inf at step [456]; .* another study"
        ):
            resume_study(study, console)
    assert sum(record["event"] == "run" and "diverged" in record for record in records(study)) == 1


def test_a_model_that_cannot_be_saved_leaves_its_run_to_be_done_again(study, monkeypatch):
    context = StudyContext(study, CPU)

    def full(self, *arguments, **options):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    options = {"points": [2], "warmup_steps": 1, "eval_sequences": 8, "save_model": True}
    with pytest.raises(SaveError, match=r"the model .*model could not be saved: No space left on device"):
        train_run(context, context.arms["standard"], 7, **options, tell=lambda **values: None)


def test_a_learning_rate_that_diverges_at_once_does_not_spoil_the_timing(study):
    context = StudyContext(study, CPU)
    context.settings = dataclasses.replace(
        context.settings, train=dataclasses.replace(context.settings.train, learning_rate=1e30, clip=0.0)
    )
    assert len(time_steps(context, context.arms["kv-0.25-stratified-gradnorm"], seconds=0.01)["step_seconds"]) >= 2


def test_bad_settings_leave_nothing_to_resume(tmp_path, data_files, console):
    with pytest.raises(InputError, match="stratifed"):
        start_study(settings(data_files, selections=("stratifed",)), tmp_path / "a", console)
    assert not (tmp_path / "a" / "study.json").exists()
    with pytest.raises(InputError, match="holds no run that can be resumed"):
        resume_study(tmp_path / "a", console)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("arms.json", "{", r"holds no study that can be resumed \(arms\.json"),
        ("results.jsonl", None, r"holds no study that can be resumed \(.*No such file"),
        ("results.jsonl", "", r"results\.jsonl was changed after the study wrote it"),
        ("results.jsonl", '{"event": "study"}\n[1, 2]\n', r"results\.jsonl was changed after the study wrote it"),
    ],
)
def test_a_folder_that_was_changed_by_hand(study, console, name, content, message):
    (study / name).unlink()
    if content is not None:
        (study / name).write_text(content)
    with pytest.raises(InputError, match=message):
        resume_study(study, console)


def test_fewer_seeds_than_are_on_record(study, console):
    path = study / "study.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seeds": 1}))
    outcome = resume_study(study, console).outcome
    assert outcome.seeds == 1
    assert {len(runs) for runs in outcome.curves.values()} == {1}


def test_steps_are_recorded_on_a_gpu_alone(tmp_path, data_files, console):
    given = settings(data_files)
    given = dataclasses.replace(given, train=dataclasses.replace(given.train, cuda_graph=True))
    with pytest.raises(InputError, match="--cuda-graph needs a CUDA device, but this runs on cpu"):
        start_study(given, tmp_path / "a", console)
    assert not (tmp_path / "a").exists(), "said before the text is read"


def test_a_folder_holds_one_study(study, data_files, console):
    with pytest.raises(InputError, match="already holds a study; continue it with --resume"):
        start_study(settings(data_files), study, console)


def test_the_exact_estimators_are_told_from_the_biased_ones(study):
    """Of everything kept the gradient is the full one; exact sampling has no bias; fewer tokens vary more."""
    folder = study
    context = StudyContext(folder, CPU)
    context.settings = dataclasses.replace(context.settings, draws=24)

    def arm(name, gradient, ratio, selection="random"):
        routing = dataclasses.replace(context.arms["kv-0.25-random"].routing, gradient=gradient, ratio=ratio)
        return Arm(name, name, "random", "cggr", 4, dataclasses.replace(routing, selection=selection))

    drawn = [
        arm("all", "exact", 1.0), arm("half", "exact", 0.5), arm("quarter", "exact", 0.25),
        arm("detached", "detached", 0.25), arm("top", "exact", 0.25, "topk"), context.arms["standard-b2"],
    ]  # fmt: skip
    weights = folder / "runs" / "standard-seed0" / "model"
    found = {arm.name: compare_gradients(context, arm, weights=weights, seed=0) for arm in drawn}
    cosine = {name: sum(values["cosine"]) / len(values["cosine"]) for name, values in found.items()}
    variance = {name: values["variance"][0] for name, values in found.items()}
    bias = {name: values["bias"][0] for name, values in found.items()}
    assert cosine["all"] == pytest.approx(1, abs=1e-6)
    assert variance["all"] == pytest.approx(0, abs=1e-6)
    assert cosine["quarter"] < cosine["half"] < 1
    assert variance["half"] < variance["quarter"]
    # unbiased: within four standard errors of nothing (the variance over draws, spread over many directions)
    for name in ("half", "quarter", "standard-b2"):
        assert abs(bias[name]) < 0.35 * variance[name], name
    assert variance["top"] == pytest.approx(0, abs=1e-6), "the same tokens each time"
    assert bias["top"] > 0.05
    assert bias["detached"] > bias["quarter"]


def test_kept_shares_follow_the_strategy(study):
    folder = study
    context = StudyContext(folder, CPU)
    asked = context.arms["kv-0.25-stratified-gradnorm"]
    top = dataclasses.replace(asked, name="top", routing=dataclasses.replace(asked.routing, selection="topk"))
    shares = kept_shares(
        context, [asked, top, context.arms["kv-0.25-random"]],
        weights=folder / "runs" / "standard-seed0" / "model", seed=0,
    )  # fmt: skip
    for by in shares.values():
        assert set(by) == {"position", "frequency", "score"}
        assert all(len(values) == BINS for values in by.values())
        # tokens of one frequency share a tenth, which leaves others empty
        assert all(0 <= value <= 1 for values in by.values() for value in values if value is not None)
        assert None not in by["position"] and any(by["frequency"])
        assert sum(by["position"]) / BINS == pytest.approx(0.25, abs=0.03)
    assert shares["top"]["score"][-1] > 0.7
    assert shares["top"]["score"][0] < 0.1
    assert shares["kv-0.25-random"]["score"][-1] == pytest.approx(0.25, abs=0.12)


def test_a_tenth_without_supervised_tokens_has_no_share(study, monkeypatch):
    """A prompt is never kept, which says nothing about the arm."""
    context = StudyContext(study, CPU)
    original = kept.in_order

    def masked(*arguments, **settings):
        for batch in original(*arguments, **settings):
            half = batch.shape[1] // 2
            yield torch.cat([~batch[:, :half], batch[:, half:]], dim=1)

    monkeypatch.setattr(kept, "in_order", masked)
    arm = context.arms["kv-0.25-random"]
    weights = study / "runs" / "standard-seed0" / "model"
    (shares,) = kept_shares(context, [arm], weights=weights, seed=0).values()
    assert shares["position"][:4] == [None] * 4
    assert statistics.fmean(shares["position"][5:]) == pytest.approx(0.25, abs=0.05)
    assert None not in shares["score"] and min(shares["score"]) > 0.05


def test_routers_that_learn_and_remember_are_arms_like_others(study):
    context = StudyContext(study, CPU)
    asked = context.arms["kv-0.25-stratified-gradnorm"]
    options = {"points": [6], "warmup_steps": 1, "eval_sequences": 8, "save_model": False}
    told = {}
    for router in ("learned", "remembered"):
        arm = dataclasses.replace(asked, name=router, routing=dataclasses.replace(asked.routing, router=router))
        whole = train_run(context, arm, 3, **options, tell=lambda **values: None)
        stop = iter([False] * 4 + [True])
        assert (
            train_run(context, arm, 3, **options, tell=lambda **values: None, stop=lambda stop=stop: next(stop)) is None
        )
        resumed = train_run(context, arm, 3, **options, tell=lambda **values: None)
        assert resumed["points"] == whole["points"]
        assert resumed["router"] == whole["router"]
        assert resumed["engine"] == "interleaved"
        told[router] = set(whole["router"])
    assert told == {"learned": {"router_correlation"}, "remembered": {"remembered", "score_age_epochs"}}


def test_steps_are_timed_and_memory_is_the_arms_own(study):
    folder = study
    context = StudyContext(folder, CPU)
    found = time_steps(context, context.arms["standard"], seconds=0.01)
    assert len(found["step_seconds"]) >= 2
    assert all(value > 0 for value in found["step_seconds"])
    assert found["peak_bytes"] >= found["start_bytes"] > 0
