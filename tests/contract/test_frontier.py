"""The benchmark behind docs/evidence.md: what its arms compute, how their steps are counted, what is reported."""

import argparse
import json
import re
import statistics
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks import _record
from benchmarks._frontier_arms import SETTINGS, Way
from benchmarks._frontier_data import TUNING, load, prepare
from benchmarks._frontier_plan import Plan, setting_of
from benchmarks._frontier_report import Found, outcome_of, report, whole_seeds
from benchmarks._frontier_training import Learner, loss_on, train
from benchmarks._frontier_units import keep_part, line_ends, routed_layers
from benchmarks._greedy import Greedy
from benchmarks.evidence import frontier_tables, losses_table
from benchmarks.frontier_figures import draw
from benchmarks.noisy import earlier
from cggr_train.data import split_supervised
from cggr_train.report.verdict import verdict

TOY = SETTINGS["toy"]


def llama(vocab=50, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def rows(count, length, seed=0):
    """A prompt and an answer each, padded with what is not supervised."""
    generator = torch.Generator().manual_seed(seed)
    found = -1 - torch.randint(50, (count, length), generator=generator)
    for row in found:
        first = int(torch.randint(4, length // 2, (1,), generator=generator))
        row[first : first + 6] = -1 - row[first : first + 6]
    return found


def gradients(model):
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    "way",
    [Way("", 3, gradient="exact"), Way("", 3), Way("", 3, margin=5), Way("", 3, layers=(0.0, 1 / 3)),
     Way("", 3, layers=(1 / 3, 1.0))],
    ids=["exact", "kv", "margin", "kv below", "kv above"],
)  # fmt: skip
def test_a_way_is_what_its_name_says(way):
    model, batch = llama(), rows(3, 24)
    routed = llama()
    loss = Learner(routed, way, slots=6, seed=0).loss(batch)
    loss.backward()
    own = gradients(routed)

    input_ids, labels = split_supervised(batch)
    kept = torch.zeros_like(labels, dtype=torch.bool)
    for row, place in (labels[:, 1:] != -100).nonzero().tolist():
        kept[row, max(0, place - way.margin) : place + 1] = True
    if way.gradient == "exact":
        kept[:] = True
    with routed_layers(model.model.layers, way.layers, kept):
        expected = model(input_ids=input_ids, labels=labels).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(own, gradients(model), rtol=1e-4, atol=1e-6)


def supervised(rows, length, sizes):
    predicts = torch.zeros(rows, length, dtype=torch.bool)
    for row, size in enumerate(sizes):
        predicts[row, 3 + row : 3 + row + size] = True
    return predicts, torch.randint(50, (rows, length))


@pytest.mark.parametrize("unit", ["tokens", 4, 16, "sentences", "window"])
def test_every_row_keeps_its_half_in_whole_units(unit):
    torch.manual_seed(0)
    sizes = [20, 21, 1, 0, 33]
    predicts, targets = supervised(5, 48, sizes)
    targets[:, ::4] = 3  # short sentences: a longer one than the half is never kept whole
    ends = torch.zeros(50, dtype=torch.bool)
    ends[:6] = True
    seen = torch.zeros_like(predicts)
    for epoch in range(40):
        kept = keep_part(predicts, targets, unit=unit, parts=2, ends=ends, epoch=torch.tensor(epoch))
        assert not (kept & ~predicts).any()
        assert kept.sum(1).tolist() == [(size + 1) // 2 for size in sizes]
        seen |= kept
        for row, size in enumerate(sizes):
            own = kept[row, 3 + row : 3 + row + size].tolist()
            said = targets[row, 3 + row : 3 + row + size].tolist()
            begins = [n for n in range(size) if own[n] and (n == 0 or not own[n - 1])]
            if unit == "sentences":
                assert all(n == 0 or said[n - 1] < 6 for n in begins)
            if unit == 16:
                assert len(begins) <= 2
            if unit == "window":
                assert len(begins) <= 2
    assert (seen == predicts).all()


def test_a_window_moves_over_the_answer_from_epoch_to_epoch():
    predicts, targets = supervised(4, 40, [20, 20, 20, 20])
    windows = [keep_part(predicts, targets, unit="window", parts=4, ends=None, epoch=epoch) for epoch in range(4)]
    assert (torch.stack(windows).sum(0) == predicts).all()
    again = keep_part(predicts, targets, unit="window", parts=4, ends=None, epoch=4)
    assert torch.equal(again, windows[0])


def test_a_part_of_the_tokens_is_trained_on_and_fills_its_slots():
    model, batch = llama(), rows(3, 24)
    learner = Learner(model, Way("", 3, parts=2, unit="window"), slots=6, seed=0, steps_of_epoch=2)
    assert learner.slots == 3
    losses = [learner.loss(batch, draw=torch.tensor(step)).item() for step in range(4)]
    assert losses[0] == losses[1] != losses[2] == losses[3]
    whole = Learner(model, Way("", 3), slots=6, seed=0).loss(batch).item()
    assert (losses[0] + losses[2]) / 2 == pytest.approx(whole, rel=1e-5)


def test_tokens_that_end_a_line():
    class Tokenizer:
        def __len__(self):
            return 3

        def batch_decode(self, ids):
            return [["a", ".\n", "b"][token] for (token,) in ids]

    assert line_ends(Tokenizer()).tolist() == [False, True, False]


def test_micro_batches_and_checkpointing_are_the_same_training():
    setting = SimpleNamespace(length=24, slots=6)
    data = SimpleNamespace(train=rows(12, 24), tuning=rows(4, 24, 1), test=rows(4, 24, 2))
    curves = [
        train(llama(), data, setting, Way("", 4, gradient="exact"), seed=0, rate=1e-3, points=[2, 6], eval_rows=4,
              recorded=False, **fitted)["points"]
        for fitted in ({}, {"micro_batch": 2}, {"checkpointing": True})
    ]  # fmt: skip
    assert [point["step"] for point in curves[0]] == [2, 6]
    assert curves[0][1]["loss"] < curves[0][0]["loss"] < loss_on(llama(), data.test)
    for other in curves[1:]:
        assert [point["loss"] for point in other] == pytest.approx([point["loss"] for point in curves[0]], rel=1e-5)


@pytest.mark.parametrize(
    "way", [Way("", 4, layers=(0.0, 0.5)), Way("", 4, parts=2, unit="sentences")], ids=["mixed", "sentences"]
)
def test_a_way_trains_and_is_read_on_a_batch_of_another_size(way):
    setting = SimpleNamespace(length=24, slots=6)
    train_rows = rows(12, 24)
    data = SimpleNamespace(train=train_rows, tuning=rows(4, 24, 1), test=train_rows[:6])  # six at a time, not four
    ends = torch.arange(50) < 9
    points = train(llama(), data, setting, way, seed=0, rate=1e-2, points=[2, 6], eval_rows=6, recorded=False,
                   ends=ends)["points"]  # fmt: skip
    assert points[1]["loss"] < points[0]["loss"] < loss_on(llama(), data.test)


def test_the_loss_is_that_of_the_supervised_tokens():
    model, batch = llama(), rows(5, 24)
    input_ids, labels = split_supervised(batch)
    assert loss_on(model, batch) == pytest.approx(model(input_ids=input_ids, labels=labels).loss.item(), rel=1e-5)
    assert model.training


def test_greedy_answers_are_those_of_generate():
    model = llama().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(30)  # answers that differ
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(5, 40, (7,), generator=generator).tolist()
    questions = [torch.randint(50, (size,), generator=generator).tolist() for size in sizes]
    end = 7
    decoding = GenerationConfig(do_sample=False, max_new_tokens=25, eos_token_id=end, pad_token_id=end)
    expected = []
    for question in questions:
        said = model.generate(torch.tensor([question]), generation_config=decoding)[0, len(question) :].tolist()
        expected.append(said[: said.index(end) + 1] if end in said else said)
    assert len(set(map(tuple, expected))) == len(questions)
    own = Greedy(model, end=end, rows=3, prompt=40, new=25, prefill=2)
    own.load(dict(model.named_parameters()))
    assert own(questions) == expected


class _Words:
    """A tokenizer of words, each known by its length."""

    eos_token_id = 0

    def __call__(self, texts, **_):
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}


@pytest.mark.parametrize("end", [0, 151643], ids=["small vocabulary", "large vocabulary"])
def test_rows_come_back_from_the_file(tmp_path, end):
    problems = [{"question": f"q {'a' * n} b", "answer": " ".join(["cc"] * (1 + n % 3))} for n in range(TUNING + 5)]
    problems.append({"question": "long", "answer": "d " * 300})
    for side in ("train", "test"):
        lines = "".join(json.dumps(problem) + "\n" for problem in problems)
        (tmp_path / f"{side}.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = _Words()
    tokenizer.eos_token_id = end
    path = prepare(tmp_path / "rows.xz", TOY, tmp_path, tokenizer)
    found, noted = load(path)
    assert (len(found.train), len(found.tuning), noted["left_out"]) == (5, TUNING, 1)
    input_ids, labels = split_supervised(found.train)
    assert input_ids[4, :6].tolist() == [1, 4, 1, 2, 2, end]
    assert labels[4, :7].tolist() == [-100, -100, -100, 2, 2, end, -100]
    before = path.stat().st_mtime_ns
    assert prepare(path, TOY, tmp_path, tokenizer).stat().st_mtime_ns == before


times = st.floats(0.01, 1.0)


def plan_of(seconds, itself=None):
    timings = {
        name: {"eager": {"seconds": 2 * second, "peak_bytes": 10**9 * (1 + place)},
               "recorded": {"seconds": second, "peak_bytes": 10**9 * (1 + place)}}
        for place, (name, second) in enumerate(seconds.items())
    }  # fmt: skip
    for name, second in (itself or {}).items():
        timings[name]["itself"] = {"seconds": second, "peak_bytes": 10**9}
    return Plan(TOY, timings, seconds=20.0), timings


@settings(deadline=None, max_examples=50)
@given(st.lists(times, min_size=len(TOY.arms), max_size=len(TOY.arms)))
def test_every_arm_takes_the_steps_that_the_time_buys(seconds):
    plan, _ = plan_of(dict(zip(TOY.arms, seconds, strict=True)))
    for basis, per_step in ((plan.steps, plan.times), (plan.usual_steps, plan.usual)):
        for share, steps in basis.items():
            for name, count in steps.items():
                assert abs(count * per_step[name] - share * 20.0) <= per_step[name] / 2 + 1e-9 or count == 1
    for name, arm in TOY.arms.items():
        read = {plan.steps[1.0][name], plan.usual_steps[1.0][name], plan.equal[name]}
        assert read <= set(plan.points[arm.way])
        batch = TOY.ways[arm.way].batch
        assert plan.equal[name] * batch <= min(
            plan.steps[1.0][other] * TOY.ways[found.way].batch for other, found in TOY.arms.items()
        )


def records_of(plan, timings, losses, seeds):
    """Runs whose loss falls towards what is given for their way."""
    found = [{"event": "timing", "arm": name, **timing} for name, timing in timings.items()]
    for way in TOY.ways:
        for seed in range(seeds):
            points = [
                {"step": step, "loss": losses[way] + 1 / step + 0.001 * (seed + len(way) % 3)}
                for step in plan.points[way]
            ]
            found.append({"event": "run", "way": way, "seed": seed, "rate": 1e-4, "points": points})
    return found


def test_a_step_of_mixed_layers_is_counted_from_its_parts(tmp_path):
    setting = SETTINGS["toy-parts"]
    seconds = dict.fromkeys(setting.arms, 5.0) | {"standard": 3.0, "kv": 1.0}
    timings = {
        name: {"eager": {"seconds": second, "peak_bytes": round(1e9 * second)}} for name, second in seconds.items()
    }
    plan = Plan(setting, timings, seconds=30.0)
    assert plan.times["kv-lower"] == plan.usual["kv-upper"] == 2.0
    assert plan.steps[1.0]["kv-lower"] == 15
    records = [{"event": "timing", "arm": name, **timing} for name, timing in timings.items()]
    assert Found(plan, records).peak("recorded", "kv-lower") == 2_000_000_000


def test_some_ways_alone(tmp_path):
    asked = argparse.Namespace(setting="context", only=["standard", "kv"])
    setting = setting_of(asked)
    assert set(setting.ways) == {"standard", "kv"}
    assert {"standard-checkpointed", "standard", "kv"} <= set(setting.arms)
    asked.only = ["kv-32"]
    with pytest.raises(SystemExit, match="kv-margin128"):
        setting_of(asked)


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_the_verdict_says_what_the_rows_say(data, tmp_path_factory):
    seconds = {name: data.draw(times) for name in TOY.arms}
    losses = {way: data.draw(st.floats(0.5, 2.0)) for way in TOY.ways}
    plan, timings = plan_of(seconds, {"kv": 0.02})
    folder = tmp_path_factory.mktemp("out")
    arguments = argparse.Namespace(output=folder, name="frontier_toy", device="cpu")
    noted = {"model": "m", "supervised": 0.1, "rows": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.frontier_figures.draw", lambda path: path)  # 15 times over
        path = report(arguments, noted, plan, records_of(plan, timings, losses, 3))
    result = _record.load(path.stem, folder=folder)
    # Of routed steps, one alone was timed as CGGRModel records it by itself.
    usual = {name for name, row in result["rows"].items() if "usual" in row}
    assert {name for name in usual if not name.startswith("standard")} == {"kv"}
    for basis in ("recorded", "usual"):
        means = {
            row["label"]: statistics.fmean(row[basis]["readings"]["1.00"]["losses"])
            for row in result["rows"].values()
            if basis in row
        }
        first, lowest = result["settings"]["verdict"][basis][:2]
        label, value = re.fullmatch(r"Lowest held-out loss in the same time: (.*) \((.*)\)\.", lowest).groups()
        assert value == f"{min(means.values()):.3f}"
        assert value == f"{means[label]:.3f}"
        chosen = max((name for name in means if first.startswith(f"Use {name}: ")), default="", key=len)
        assert f"{means[chosen]:.3f}" in first


def test_noise_goes_on_with_the_seeds_that_a_result_lacks(tmp_path):
    given = {"seed": 0, "steps": 50, "seeds": 3, "name": "noisy"}
    losses = {"domain: standard": {"unit": "nat", "cost": 3, "losses": [1.5, 1.25], "median": 1.375}}
    _record.write("noisy", losses, settings=given, control="domain: standard", folder=tmp_path)
    found = earlier("noisy", tmp_path, {**given, "seeds": 4})
    assert found == {"domain: standard": {"unit": "nat", "cost": 3, "losses": [1.5, 1.25]}}
    assert earlier("other", tmp_path, given) == {}
    with pytest.raises(SystemExit, match="other settings"):
        earlier("noisy", tmp_path, {**given, "steps": 60})


def test_the_plot_is_drawn_from_the_file_alone(tmp_path):
    plan, timings = plan_of(dict.fromkeys(TOY.arms, 0.5))
    arguments = argparse.Namespace(output=tmp_path, name="frontier_toy", device="cpu")
    records = records_of(plan, timings, dict.fromkeys(TOY.ways, 1.0), 2)
    path = report(arguments, {"model": "m", "supervised": 0.1}, plan, records)
    plot = path.with_suffix(".png")
    first = plot.read_bytes()
    plot.unlink()
    assert draw(path).read_bytes() == first


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_a_verdict(name):
    setting = SETTINGS[name]
    timings = {arm: {"eager": {"seconds": 1.0, "peak_bytes": 10**9}} for arm in setting.arms}
    plan = Plan(setting, timings, seconds=8.0)
    records = [{"event": "timing", "arm": arm, **timing} for arm, timing in timings.items()]
    for place, way in enumerate(setting.ways):
        points = [{"step": step, "loss": 1 + 0.1 * place + 1 / step} for step in plan.points[way]]
        records.append({"event": "run", "way": way, "seed": 0, "rate": 1e-4, "points": points})
    said = verdict(outcome_of(Found(plan, records), "recorded"))
    first = next(iter(setting.ways.values())).label
    assert f"Lowest held-out loss in the same time: {first} (" in " ".join(said)


def test_the_tables_say_what_the_file_says(tmp_path):
    plan, timings = plan_of(dict.fromkeys(TOY.arms, 0.5))
    arguments = argparse.Namespace(output=tmp_path, name="frontier_toy", device="cpu")
    records = records_of(plan, timings, {way: 1 + 0.1 * place for place, way in enumerate(TOY.ways)}, 2)
    result = _record.load(report(arguments, {"model": "m", "supervised": 0.1}, plan, records).stem, folder=tmp_path)
    lines = frontier_tables(result).splitlines()
    for row in result["rows"].values():
        found = row["recorded"]["readings"]["1.00"]
        line = next(line for line in lines if line.startswith(f"| {row['label']} | 500 |"))
        assert f"| {found['steps']} |" in line
        assert f"| {statistics.fmean(found['losses']):.3f} [" in line
    apart = {"own": {"losses": {"0": 1.0, "1": 2.0}}, "fp8": {"losses": {"1": 2.5}}}
    told = {"benchmark": "b", "environment": {"device": "d", "commit": "c"}, "control": "own", "rows": apart}
    assert "| fp8 |  | 2.500 | +0.500 | 1 |" in losses_table(told)


def test_arms_of_one_way_are_read_off_one_run(tmp_path):
    seconds = dict.fromkeys(TOY.arms, 0.5) | {"standard-checkpointed": 1.0}
    plan, timings = plan_of(seconds, {"kv": 0.25})
    found = Found(plan, records_of(plan, timings, dict.fromkeys(TOY.ways, 1.0), 2))
    assert found.steps("recorded", 1.0)["standard"] == 2 * found.steps("recorded", 1.0)["standard-checkpointed"]
    assert found.losses("standard-checkpointed", 20) == found.losses("standard", 20)
    # kv has its control's last loss after as many steps, which take half of the control's time, or an eighth
    assert found.reached("kv", "standard-checkpointed", "recorded") == [pytest.approx(0.5)] * 2
    assert found.reached("kv", "standard-checkpointed", "usual") == [pytest.approx(0.125)] * 2


def test_seeds_count_where_all_but_the_late_ways_are_done():
    runs = [{"event": "run", "way": way, "seed": seed} for way in TOY.ways for seed in range(2)]
    assert whole_seeds(TOY, runs) == [0, 1]
    late = next(name for name, way in TOY.ways.items() if way.late)
    assert whole_seeds(TOY, [run for run in runs if run["way"] != late]) == [0, 1]
    assert whole_seeds(TOY, [run for run in runs if (run["way"], run["seed"]) != ("kv", 1)]) == [0]


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_settings_hold_together(setting):
    assert next(iter(setting.arms)) == next(iter(setting.ways))
    assert setting.clock in setting.arms
    assert setting.shares[-1] == 1.0
    assert {arm.way for arm in setting.arms.values()} == set(setting.ways)
    for arm in setting.arms.values():
        assert setting.ways[arm.way].batch % (arm.micro_batch or 1) == 0
    for way in setting.ways.values():
        assert way.rate_of is None or setting.ways[way.rate_of].rate_of is None
