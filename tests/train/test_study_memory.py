"""Studies with a memory limit, learning-rate tuning and exact-match answers."""

import dataclasses
import io
import json
import os
import signal

import pytest
import torch
from rich.console import Console

from cggr_train.errors import InputError, RunError
from cggr_train.log import read_log
from cggr_train.option_checks import parse_bytes
from cggr_train.presets import build_config, build_model
from cggr_train.study import context as context_module
from cggr_train.study import fitting, resume_study, stages, start_study, worker
from cggr_train.study.arms import Arm
from cggr_train.study.context import StudyContext
from cggr_train.study.estimators import compare_gradients
from cggr_train.study.frontier import measured_by_accuracy
from cggr_train.study.run import prepare_study
from cggr_train.study.stages import RESULTS
from tests.support.studies import CPU, OwnPool, settings


@pytest.fixture(autouse=True)
def _own_pool(monkeypatch):
    monkeypatch.setattr(stages, "Pool", OwnPool)
    # What the page draws is test_report's matter.
    monkeypatch.setattr("cggr_train.report.study_page.write_study_page", lambda path, **values: None)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "questions.jsonl"
    lines = [{"text": f"what is {n} + {n}?", "a": f"{2 * n} #### {2 * n}"} for n in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def asked(data, *, train=(), **values):
    given = {"seeds": 1, "draws": 0, "equal": ("time",), "evaluations": 1, "timing_turns": 1, **values}
    return settings([data], train={"answer": "a", "length": 48, **dict(train)}, **given)


def run(wanted, folder):
    console = Console(file=io.StringIO(), width=200)
    result = start_study(wanted, folder, console)
    return result.outcome, console.file.getvalue()


def peaks(monkeypatch, *, row=100, base=200, checkpointed=0.4, routed=0.5):
    """Memory as if a sequence of a standard step took so much; a step of routed tokens, or a checkpointed one, less."""

    def peak(context, arm):
        share = (checkpointed if arm.checkpointing else 1.0) * (1.0 if arm.method == "standard" else routed)
        return round(base + row * share * arm.forward_size)

    monkeypatch.setattr(fitting, "peak_of_steps", peak)


def fits(folder):
    lines = [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]
    return {line["arm"]: (line["micro_batch"], line["checkpointing"]) for line in lines if line["event"] == "fit"}


def test_every_arm_gets_what_fits_and_checkpoints_only_where_it_must(monkeypatch, data, tmp_path):
    peaks(monkeypatch)
    wanted = asked(data, memory_limit=300, controls=("checkpointed",), selections=("supervised",))
    outcome, _ = run(wanted, tmp_path / "study")
    assert fits(tmp_path / "study") == {
        "standard": (1, False), "standard-checkpointed": (2, True), "kv-supervised": (2, False),
    }  # fmt: skip
    assert [arm.title for arm in outcome.arms] == [
        "standard, batch 4, 1 at a time", "standard, batch 4, checkpointed, 2 at a time",
        "supervised tokens, kv, 2 at a time",
    ]  # fmt: skip
    assert set(outcome.losses["time"]) == {arm.name for arm in outcome.arms}


def test_what_needs_checkpointing_takes_it_and_is_compared_once(monkeypatch, data, tmp_path):
    peaks(monkeypatch)
    wanted = asked(data, memory_limit=285, controls=("checkpointed",), selections=("supervised",))
    outcome, _ = run(wanted, tmp_path / "study")
    assert fits(tmp_path / "study")["standard"] == (2, True)
    assert outcome.arms[0].title == "standard, batch 4, 2 at a time, checkpointed"
    assert outcome.left_out == {
        "standard-checkpointed": "standard, batch 4, checkpointed: the same as "
        "standard, batch 4, 2 at a time, checkpointed"
    }
    again = resume_study(tmp_path / "study", Console(file=io.StringIO()))
    assert again.outcome.losses == outcome.losses, "nothing is measured twice"


def test_a_study_that_is_stopped_while_it_finds_what_fits_goes_on_from_there(monkeypatch, data, tmp_path):
    peaks(monkeypatch)
    peak, stops = fitting.peak_of_steps, [signal.SIGINT]

    def stopped(context, arm):
        if stops:
            os.kill(os.getpid(), stops.pop())
        return peak(context, arm)

    monkeypatch.setattr(fitting, "peak_of_steps", stopped)
    wanted = asked(data, memory_limit=300, controls=(), selections=("supervised",), train={"steps": 2})
    result = start_study(wanted, tmp_path / "study", Console(file=io.StringIO()))
    assert (result.outcome, result.exit_code) == (None, 130)
    assert [record["event"] for record in read_log(tmp_path / "study" / RESULTS)][-1] == "fit"
    assert set(fits(tmp_path / "study")) == {"standard"}, "nothing else was begun"
    again = resume_study(tmp_path / "study", Console(file=io.StringIO()))
    assert fits(tmp_path / "study") == {"standard": (1, False), "kv-supervised": (2, False)}
    assert set(again.outcome.losses["time"]) == {"standard", "kv-supervised"}


def test_a_limit_that_nothing_fits_into(monkeypatch, data, tmp_path):
    peaks(monkeypatch)
    with pytest.raises(InputError, match="not even one sequence of standard, batch 4 fits with checkpointing"):
        run(asked(data, memory_limit=230, controls=()), tmp_path / "study")


def test_the_control_of_equal_memory_has_the_routed_steps(monkeypatch, data, tmp_path):
    """Its limit is what the routed step was measured to take."""
    seen = []

    def fit(context, arm, *, limit):
        seen.append((arm.name, limit))
        return {"micro_batch": 2, "checkpointing": False, "peak_bytes": limit}

    monkeypatch.setattr("cggr_train.study.worker.fit_arm", fit)
    outcome, _ = run(asked(data, controls=("equal_memory",), selections=("supervised",)), tmp_path / "study")
    measured = [json.loads(line) for line in (tmp_path / "study" / RESULTS).read_text().splitlines()]
    routed = [line["peak_bytes"] for line in measured if line["event"] == "timing" and line["arm"] == "kv-supervised"]
    assert seen == [("standard-equal-memory", routed[-1])]
    assert outcome.arm("standard-equal-memory").title == "standard, batch 4, equal memory, 2 at a time"
    assert "standard-equal-memory" in outcome.comparisons["time"]["kv-supervised"].against


def test_parts_of_a_batch_and_checkpointing_change_no_loss(data, tmp_path):
    """A micro-batch is a way to compute the same step."""
    wanted = asked(data, controls=(), selections=("supervised",))
    prepare_study(wanted, tmp_path / "study", Console(file=io.StringIO()))
    context, losses = StudyContext(tmp_path / "study", CPU), {}
    for name in ("standard", "kv-supervised"):
        for changes in ({}, {"micro_batch": 2}, {"checkpointing": True}):
            arm = dataclasses.replace(context.arms[name], **changes)
            session = context.session(arm, 0, steps=3, warmup_steps=1, eval_sequences=8)
            seen = []
            session.train(lambda loss, rate, seen=seen: seen.append(loss))
            losses[name, *changes] = torch.stack(seen)
        for changed in ("micro_batch", "checkpointing"):
            torch.testing.assert_close(losses[name, changed], losses[(name,)], rtol=1e-5, atol=0)


def test_memory_of_a_step_is_measured(data, tmp_path):
    prepare_study(asked(data, controls=(), selections=("supervised",)), tmp_path / "study", Console(file=io.StringIO()))
    context = StudyContext(tmp_path / "study", CPU)
    arm = context.arms["standard"]
    assert fitting.fit_arm(context, arm, limit=2**50)["micro_batch"] == 4
    found = fitting.fit_arm(context, arm, limit=1)
    assert found["micro_batch"] is None and found["peak_bytes"] > 2**20


def test_each_arm_gets_the_rate_that_suits_it(data, tmp_path):
    wanted = asked(data, controls=(), selections=("supervised",), rates=(1e-6, 3e-3), train={"eval_sequences": 4})
    outcome, text = run(wanted, tmp_path / "study")
    assert [arm.learning_rate for arm in outcome.arms] == [3e-3, 3e-3]
    assert "standard, batch 4, learning rate 1e-06: held-out loss" in text
    context = StudyContext(tmp_path / "study", CPU)
    tuning = context.tuning_tokens.reshape(-1, 48)
    trained = {tuple(row) for row in context.tokens.train.reshape(-1, 48)}
    assert len(tuning) == 4 and not [row for row in tuning if tuple(row) in trained], "chosen on text of their own"


def test_a_model_that_is_kept_is_read_once_and_copied(data, tmp_path, monkeypatch):
    build_model(build_config("nano", vocab_size=300, length=48), seed=0).save_pretrained(tmp_path / "model")
    prepare_study(asked(data, controls=(), selections=("supervised",)), tmp_path / "study", Console(file=io.StringIO()))
    context, read = StudyContext(tmp_path / "study", CPU), []
    load = context_module.load_model
    monkeypatch.setattr(context_module, "load_model", lambda source: read.append(source) or load(source))
    first, second = (context._copy(str(tmp_path / "model")) for _ in range(2))
    assert len(read) == 1
    with torch.no_grad():
        first.model.norm.weight.zero_()
    assert (second.model.norm.weight == 1).all()
    monkeypatch.setattr(context_module, "KEPT_PARAMETERS", 10)
    context._kept = None
    for _ in range(2):
        context._copy(str(tmp_path / "model"))
    assert len(read) == 3


def test_some_arms_alone_answer(data, tmp_path):
    wanted = asked(
        data, controls=(), selections=("supervised",), accuracy=True, accuracy_readings=("tokens",), questions=2,
        accuracy_of=("kv-supervised",),
    )  # fmt: skip
    outcome, text = run(wanted, tmp_path / "study")
    assert (outcome.accuracy, outcome.accuracy_after_tokens) == ({}, {"kv-supervised": [0.0]})
    assert "Use" in text or "Undecided" in text
    assert not measured_by_accuracy(outcome)
    timings = [record for record in read_log(tmp_path / "study" / RESULTS) if record["event"] == "timing"]
    assert [record["turn"] for record in timings] == [0, 0]


def test_answers_are_asked_at_the_end_of_the_time(data, tmp_path):
    readings = ("time", "tokens")
    wanted = asked(
        data, controls=(), selections=("supervised",), accuracy=True, accuracy_readings=readings, answer_after="####",
        questions=3,
    )  # fmt: skip
    outcome, text = run(wanted, tmp_path / "study")
    assert outcome.accuracy == outcome.accuracy_after_tokens == {"standard": [0.0], "kv-supervised": [0.0]}
    runs = [record for record in read_log(tmp_path / "study" / RESULTS) if record["event"] == "run"]
    assert [run["accuracy"] for run in runs] == [{key: {"right": 0, "questions": 3} for key in readings}] * 2
    assert "Exact match on the held-out questions" in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"controls": ("none",)}, "--controls must be one or more of .*, got 'none'"),
        ({"memory_limit": -1}, "--memory-limit must be positive"),
        ({"rates": (0.0,)}, "--rates must be positive"),
        ({"accuracy": True, "equal": ("tokens",)}, "include time in --equal"),
        ({"accuracy_readings": ("kept",)}, "accuracy_readings must be tokens, time or both, got 'kept'"),
        ({"answer_after": "#"}, "--answer-after requires --eval exact-match"),
        ({"accuracy": True, "accuracy_of": ("standard",)}, "accuracy_of limits accuracy to some arms"),
        ({"accuracy": True, "questions": 0}, "--questions must be at least 1"),
    ],
)
def test_settings_that_do_not_go(data, values, message):
    with pytest.raises(InputError, match=message):
        asked(data, **values)


def test_a_mark_that_is_not_in_the_answers_is_found_before_any_training(data, tmp_path):
    wanted = asked(data, accuracy=True, answer_after="Answer:")
    with pytest.raises(InputError, match=r"'Answer:', but (\d+) of the \1 held-out answers lack it \(for example '\d+"):
        prepare_study(wanted, tmp_path / "study", Console(file=io.StringIO()))
    assert not (tmp_path / "study" / "study.json").exists(), "and the folder can be used again"


def test_questions_need_answers(data):
    with pytest.raises(InputError, match="needs answers: give their key with --answer"):
        settings([data], accuracy=True, equal=("time",))


@pytest.mark.parametrize("text", ["24 apples", "24", "", "1.2.3GB", "-1GB", "0.1B"])
def test_bytes_that_are_none(text):
    with pytest.raises(InputError, match="--memory-limit must be bytes with a unit"):
        parse_bytes("--memory-limit", text)


def test_the_title_of_an_arm_says_how_it_fits():
    arm = Arm("a", "standard, batch 8", "standard", "standard", 8, micro_batch=2, checkpointing=True)
    assert arm.title == "standard, batch 8, 2 at a time, checkpointed"


CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 "
    "bytes. Error code 12 (Cannot allocate memory)"
)


def run_out(monkeypatch, during, arm, error=None):
    """Let memory run out in one kind of measurement of one arm."""
    real = getattr(worker, during)

    def out(context, measured, *arguments, **options):
        if arm in (getattr(measured, "name", None), None):
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return real(context, measured, *arguments, **options)

    monkeypatch.setattr(worker, during, out)


@pytest.mark.parametrize(("during", "rates"), [("time_steps", ()), ("train_run", ()), ("train_run", (1e-3,))])
def test_an_arm_that_memory_does_not_last_for_is_left_out_and_the_others_go_on(
    monkeypatch, data, tmp_path, during, rates
):
    wanted = asked(
        data, seeds=1 if rates else 2, controls=("equal_memory",), selections=("supervised", "stratified"), rates=rates,
        train={"eval_sequences": 4, "steps": 2},
    )  # fmt: skip
    run_out(monkeypatch, during, "kv-supervised")
    outcome, text = run(wanted, tmp_path / "study")
    assert outcome.left_out["kv-supervised"] == ("supervised tokens, kv: ran out of memory (CUDA out of memory)")
    names = [arm.name for arm in outcome.arms]
    assert "kv-supervised" not in names and {"standard", "kv-0.25-stratified-gradnorm"} <= set(names)
    assert set(outcome.losses["time"]) == set(names)
    assert text.count("supervised tokens, kv ran out of memory (CUDA out of memory); the study continues") == 1
    assert "Left out: supervised tokens, kv: ran out of memory (CUDA out of memory)." in text
    if during == "time_steps":
        assert "standard-equal-memory" in outcome.left_out, "which had that step's memory"
    monkeypatch.undo()
    monkeypatch.setattr(stages, "Pool", OwnPool)
    monkeypatch.setattr("cggr_train.report.study_page.write_study_page", lambda path, **values: None)
    monkeypatch.setattr(worker, "_measure", None)
    again = resume_study(tmp_path / "study", Console(file=io.StringIO()))
    assert (again.outcome.losses, again.outcome.left_out) == (outcome.losses, outcome.left_out), "and not tried again"


@pytest.mark.parametrize("during", ["time_steps", "train_run"])
def test_without_memory_for_the_standard_step_there_is_no_study(monkeypatch, data, tmp_path, during):
    run_out(monkeypatch, during, "standard", RuntimeError(CPU_ALLOCATOR))
    with pytest.raises(RunError, match=r"^standard, batch 4 ran out of memory \(\[enforce.*give --memory-limit, which"):
        run(asked(data, controls=(), selections=("supervised",)), tmp_path / "study")


def test_gradients_that_memory_does_not_last_for_are_not_shown(monkeypatch, data, tmp_path):
    wanted = asked(data, draws=2, controls=(), selections=("stratified",))
    run_out(monkeypatch, "compare_gradients", "kv-0.25-random")
    run_out(monkeypatch, "kept_shares", None)
    outcome, text = run(wanted, tmp_path / "study")
    assert set(outcome.gradients["end"]) == {"kv-0.25-stratified-gradnorm"} and not outcome.kept
    assert not outcome.left_out and "kv-0.25-random" in outcome.losses["time"]
    assert "out of memory while measuring gradients (CUDA out of memory); the page omits them" in text


def test_other_errors_are_not_taken_for_memory(monkeypatch, data, tmp_path):
    run_out(monkeypatch, "time_steps", "kv-supervised", RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(asked(data, controls=(), selections=("supervised",)), tmp_path / "study")


def test_sizes_that_the_host_has_no_memory_for_do_not_fit(monkeypatch, data, tmp_path):
    prepare_study(asked(data, controls=(), selections=("supervised",)), tmp_path / "study", Console(file=io.StringIO()))
    context = StudyContext(tmp_path / "study", CPU)
    real = StudyContext.session

    def session(self, arm, *arguments, **options):
        if arm.forward_size > 1:
            raise RuntimeError(CPU_ALLOCATOR)
        return real(self, arm, *arguments, **options)

    monkeypatch.setattr(StudyContext, "session", session)
    found = fitting.fit_arm(context, context.arms["standard"], limit=2**50)
    assert (found["micro_batch"], found["checkpointing"]) == (1, False)


@pytest.mark.parametrize("name", ["standard", "kv-0.25-stratified-gradnorm", "exact-0.25-stratified-gradnorm"])
def test_gradients_are_compared_in_the_parts_that_fit(data, tmp_path, name):
    """A memory limit also holds there, and changes no number."""
    wanted = asked(data, draws=2, controls=(), gradients=("kv", "exact"))
    prepare_study(wanted, tmp_path / "study", Console(file=io.StringIO()))
    context, found = StudyContext(tmp_path / "study", CPU), []
    for changed in ({}, {"micro_batch": 1}, {"micro_batch": 2, "checkpointing": True}):
        arm = dataclasses.replace(context.arms[name], **changed)
        found.append(compare_gradients(context, arm, weights=None, seed=0))
    for other in found[1:]:
        for key, values in found[0].items():
            assert other[key] == pytest.approx(values, abs=1e-4), key
