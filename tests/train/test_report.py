import dataclasses
import math
import re
from html.parser import HTMLParser

import hypothesis
import pytest
from hypothesis import strategies as st
from matplotlib.axes import Axes
from rich.console import Console

from cggr_train.display import Display, format_bytes, numbers
from cggr_train.learner import Routing
from cggr_train.loop import Budget, Progress
from cggr_train.report import plots
from cggr_train.report.curves import draw_learning_curve
from cggr_train.report.study_page import write_study_page
from cggr_train.report.tables import comparison_tables, study_cells
from cggr_train.report.verdict import verdict
from cggr_train.settings import TrainSettings
from cggr_train.study import StudySettings, frontier
from cggr_train.study.analysis import analyse
from cggr_train.study.arms import plan_arms
from cggr_train.study.plan import make_plan
from tests.support.browser import picture_of, widths

VOID = {"meta", "img", "br", "link", "input", "source"}
SETTINGS = StudySettings(
    train=TrainSettings(data=("a",), config="nano", steps=20, batch_size=8, length=64), evaluations=2
)
STANDARD, EQUAL, RANDOM, ASKED = "standard", "standard-b5", "kv-0.25-random", "kv-0.25-stratified-gradnorm"


def outcome(seeds=3, spread=0.01, selections=("stratified",), diverged=None, **losses):
    """A study whose losses at the end are those given, ``spread`` apart from seed to seed.

    ``diverged`` says at which step an arm did, at its last seed.
    """
    arms = plan_arms(
        Routing(), gradients=["kv"], ratios=[0.25], selections=selections, scorings=["gradnorm"], batch_size=8,
        num_layers=4,
    )  # fmt: skip
    seconds = {arm.name: 0.5 if arm.method == "standard" else 0.25 for arm in arms}
    plan = make_plan(SETTINGS, arms, seconds)
    records = []
    for arm in arms:
        records.append(
            {"event": "timing", "arm": arm.name, "turn": 0, "step_seconds": [seconds[arm.name]] * 3, "engine": "",
             "peak_bytes": 900 if arm.method == "standard" else 600, "start_bytes": 500}
        )  # fmt: skip
        for seed in range(seeds):
            # seeds differ by their own amount, shared by all arms, and a little besides
            end = losses.get(arm.name, 4.0) + 0.3 * seed + spread * ((seed * 7 + len(arm.name)) % 3 - 1)
            points = [{"step": 0, "tokens": 0, "kept_tokens": 0, "heldout_loss": 9.0}]
            for step in plan.points[arm.name]:
                tokens = step * arm.batch_size * 64
                points.append({"step": step, "tokens": tokens, "kept_tokens": step, "heldout_loss": end + 2 / step})
            run = {"event": "run", "arm": arm.name, "seed": seed, "points": points}
            if seed == seeds - 1 and arm.name in (diverged or {}):
                run |= {"points": points[:2], "diverged": diverged[arm.name], "reason": "the loss is nan"}
            records.append(run)
    shares = {name: [0.1 * n for n in range(10)] for name in ("position", "frequency", "score")}
    records.append({"event": "kept", "arms": {RANDOM: shares, ASKED: shares}})
    for at in ("end", "start"):
        figures = {"cosine": [0.5, 0.7], "variance": [1.25], "bias": [0.01]}
        records += [{"event": "gradients", "at": at, "arm": name, **figures} for name in (EQUAL, RANDOM, ASKED)]
    return analyse(arms, plan, records, seeds=seeds)


def test_differences_are_taken_seed_by_seed():
    found = outcome(**{STANDARD: 4.0, ASKED: 3.8}).comparisons["tokens"][ASKED]
    assert found.loss.high - found.loss.low > 1, "seeds are far apart"
    difference = found.against[STANDARD]
    assert difference.sign == -1
    assert difference.high - difference.low < 0.2, "their differences are not"
    assert set(found.against) == {STANDARD, EQUAL, RANDOM}


def said(**options):
    return verdict(outcome(**options))


def test_the_verdict_when_standard_training_wins():
    lines = said(**{STANDARD: 3.0, EQUAL: 3.5, RANDOM: 4.5, ASKED: 4.0})
    assert lines[0].startswith("Use standard, batch 8: its held-out loss in the same time, 3.400, is the lowest;")
    assert lines[0].endswith("with less memory than its 900 B: stratified 0.25 by gradnorm, kv (4.350 at 600 B).")
    assert "Lowest held-out loss in the same time: standard, batch 8" in lines[1]
    assert "worse than standard, batch 8 (95% interval" in lines[2]
    assert "better than random 0.25, kv" in lines[2]
    assert "Its step takes 0.50 of the standard step's time, scoring included, and adds 0.25 of the memory." in lines


def test_the_verdict_when_the_batch_of_equal_cost_wins():
    assert said(**{STANDARD: 5.0, EQUAL: 3.5, RANDOM: 4.5, ASKED: 4.0})[0].startswith("Use standard, batch 5: ")


@pytest.mark.parametrize("random", [4.0, 3.5])
def test_the_verdict_when_random_does_as_well(random):
    assert said(**{STANDARD: 5.0, EQUAL: 5.0, RANDOM: random, ASKED: 4.0})[0].startswith("Use random 0.25, kv: ")


def test_of_arms_that_are_not_told_apart_the_one_with_less_memory_is_used():
    lines = said(spread=0.2, **{STANDARD: 4.0, EQUAL: 5.5, RANDOM: 5.5, ASKED: 4.01})
    assert lines[0].startswith("Use stratified 0.25 by gradnorm, kv: ")


@pytest.mark.parametrize(("shares", "bold"), [([0.1, 0.2, 0.2, 0.0, 0.1], {"standard-b4", EQUAL}), ([0.0] * 5, set())])
def test_the_best_accuracies_are_set_bold_unless_all_are_equal(shares, bold):
    names = (STANDARD, "standard-b4", EQUAL, RANDOM, ASKED)
    found = outcome(**dict.fromkeys(names, 4.0))
    found = dataclasses.replace(found, accuracy={n: [s] * 3 for n, s in zip(names, shares, strict=True)})
    (cells,) = (cells for cells in study_cells(found) if cells.headings[-1] == "equal time")
    assert {name for name, _ in cells.best} == bold


def test_the_verdict_when_the_method_wins():
    lines = said(**{STANDARD: 5.0, EQUAL: 5.0, RANDOM: 4.5, ASKED: 4.0})
    assert lines[0].startswith("Use stratified 0.25 by gradnorm, kv: its held-out loss in the same time, 4.350, is the")
    assert "Cosine between one step's gradient and the full gradient at the end of the standard run" in " ".join(lines)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    st.lists(st.floats(1.0, 9.0), min_size=5, max_size=5), st.lists(st.integers(400, 900), min_size=5, max_size=5),
    st.sampled_from([0.0, 0.01, 0.5]), st.integers(2, 4), st.booleans(),
)  # fmt: skip
def test_the_verdict_and_every_table_say_the_same(means, peaks, spread, seeds, asked):
    """No table contradicts the recommendation, and the arm that the verdict calls lowest is bold."""
    names = (STANDARD, "standard-b4", EQUAL, RANDOM, ASKED)
    found = outcome(seeds=seeds, spread=spread, **dict(zip(names, means, strict=True)))
    found.memory.update({n: {"peak_bytes": p, "start_bytes": 300} for n, p in zip(names, peaks, strict=True)})
    if asked:
        found = dataclasses.replace(found, accuracy={n: [1 / c for c in found.losses["time"][n]] for n in names})
    every = frontier.points(found)
    lines, tables = verdict(found), {cells.headings[-1]: cells for cells in study_cells(found)}
    losses, differences = tables["equal kept tokens"], tables["random, same ratio"]
    chosen = frontier.recommended(every)
    assert lines[0].startswith(f"Use {found.arm(chosen.name).title}: ")
    bold = {name for name, number in losses.best if losses.headings[1 + number] == "equal time"}
    assert lines[1].startswith(f"Lowest held-out loss in the same time: {found.arm(*bold).title} (")
    if asked:
        bold = {name for name, _ in tables["equal time"].best}
    if len(bold) == 1:
        assert ("is statistically indistinguishable" in lines[0]) == (chosen.name not in bold)
    for name, cells in differences.rows:
        arm = found.arm(name)
        for control, cell in zip((STANDARD, arm.equal_cost, arm.random), cells, strict=True):
            low, high = (float(end) for end in re.findall(r"[+-][\d.]+", cell)[1:]) if cell else (0.0, 0.0)
            if control == chosen.name and not asked:
                assert not high < -5e-4, (name, "is shown to be better", cell)
            if name == chosen.name and not asked:
                assert not low > 5e-4, (control, "is shown to be better", cell)
    joined = frontier.non_dominated(every)
    for point in every:
        beaten = any(o.mean_cost < point.mean_cost and o.peak_bytes < point.peak_bytes for o in every)
        assert not (beaten and point in joined)
        named = f"{found.arm(point.name).title} (" in lines[0]
        assert not named or point in joined
        if point in joined and point.peak_bytes < 0.9 * chosen.peak_bytes:
            assert named, "the frontier for those who have less memory"


def test_one_seed_decides_nothing():
    lines = said(seeds=1, **{STANDARD: 5.0, EQUAL: 5.0, RANDOM: 4.5, ASKED: 4.0})
    assert lines[0] == "Undecided: with one seed, a difference cannot be distinguished from chance."
    assert any("repeat with --seeds 3 or more" in line for line in lines)
    assert "one seed: no interval" in lines[2]


def test_the_best_of_many_is_flattered():
    many = ("stratified", "sampled", "topk", "sequence_aware")
    assert any(
        "Picking the best of 4 settings by the same numbers overestimates it" in line for line in said(selections=many)
    )
    assert not any("by the same numbers overestimates it" in line for line in said())


def test_an_arm_that_diverged_is_named_and_compared_with_nothing(tmp_path):
    found = outcome(diverged={ASKED: 7}, **{STANDARD: 5.0, EQUAL: 5.0, RANDOM: 4.0, ASKED: 3.0})
    lines = verdict(found)
    assert lines[0].startswith("Use random 0.25, kv: ")
    assert lines[1:3] == [
        "Diverged, and left out of all comparisons: stratified 0.25 by gradnorm, kv (1 of 3 seeds, at step 7). Try "
        "another "
        "study with a lower --learning-rate for every arm.",
        "None of the requested arms kept a finite loss at this learning rate.",
    ]
    assert "random 0.25, kv (" in lines[3]
    losses, differences, gradients = study_cells(found)
    assert dict(losses.rows)[ASKED][3:] == ["diverged"] * 3
    assert dict(differences.rows)[ASKED] == ["diverged"] * 3
    assert dict(gradients.rows)[ASKED][0] == "0.600", "of the standard run's weights, which are finite"
    assert all(name != ASKED for name, _ in losses.best)
    study = {"devices": ["x"], "workers": 1, "threads": 1, "versions": {}}
    write_study_page(tmp_path / "a.html", outcome=found, verdict=lines, settings=SETTINGS, study=study)
    assert re.search(r"<td[^>]*>diverged</td>", (tmp_path / "a.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("supervised", "which"), [(1.0, ""), (0.06, "supervised ")])
def test_shares_are_of_what_is_supervised(tmp_path, supervised, which, monkeypatch):
    monkeypatch.setattr(plots, "_png", lambda figure: b"")
    found = outcome()
    study = {"devices": ["x"], "workers": 1, "threads": 1, "versions": {}, "supervised": supervised}
    page = tmp_path / "page.html"
    write_study_page(page, outcome=found, verdict=verdict(found), settings=SETTINGS, study=study)
    text = page.read_text(encoding="utf-8")
    assert f"Trains on 25% of the {which}tokens, at random" in text
    assert f"Ordinary training on every {which}token, 8 sequences" in text
    assert f"the loss counts every {which}token, kept or not" in text


def test_an_arm_whose_control_diverged_is_not_recommended():
    good = {STANDARD: 5.0, EQUAL: 5.0, RANDOM: 4.5, ASKED: 4.0}
    found = outcome(diverged={RANDOM: 7}, **good)
    assert verdict(found)[0] == (
        "Undecided: stratified 0.25 by gradnorm, kv would be recommended, but random 0.25, kv, its control, diverged."
    )
    assert dict(study_cells(found)[1].rows)[ASKED][2] == "control diverged"
    assert verdict(outcome(diverged={RANDOM: 7}, **{**good, STANDARD: 3.0}))[0].startswith("Use standard, batch 8: ")
    many = outcome(selections=("stratified", "topk"), diverged={"kv-0.25-topk-gradnorm": 3}, **good)
    assert verdict(many)[0].startswith("Use stratified 0.25"), "another arm's end is no matter"


@pytest.fixture
def drawn(monkeypatch):
    """What the plots draw, as figures instead of bytes."""
    monkeypatch.setattr(plots, "_png", lambda figure: figure)


def test_no_kept_share_is_cut_off(drawn):
    found = outcome()
    steep = [0.0] * 9 + [1.0]
    found.kept[ASKED] = {**found.kept[ASKED], "score": steep}
    for axes in plots.draw_kept(found).axes:
        assert axes.get_ylim()[1] >= max(max(line.get_ydata()) for line in axes.lines)


def test_every_curve_of_a_plot_looks_its_own(drawn):
    found = outcome(selections=("stratified", "topk", "sampled"))
    arms = plan_arms(
        Routing(), gradients=["kv"], ratios=[0.25], selections=["stratified"], scorings=["gradnorm", "loss"],
        batch_size=8, batch_sizes=[1, 2, 3], num_layers=4,
    )  # fmt: skip
    for known in (found.arms, arms):
        some = dataclasses.replace(found, arms=known, curves={arm.name: found.curves[STANDARD] for arm in known})
        figure = plots.draw_losses(some)
        lines = [line for line in figure.axes[0].lines if not line.get_label().startswith("_")]
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines) == len(known)
        assert figure.axes[0].get_legend() is None, "beside the curves"


def test_the_tables_fit_a_narrow_terminal():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in comparison_tables(outcome()):
        console.print(table)
    console.file.close()
    text = console.export_text()
    assert "stratified" in text, "names are broken between words"
    assert "500 ms" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_best_of_a_column_is_marked():
    losses = study_cells(outcome(**{ASKED: 3.0}))[0]
    assert {(name, losses.headings[number + 1]) for name, number in losses.best} == {
        (ASKED, "equal time"), (ASKED, "equal tokens"), (ASKED, "equal kept tokens"),
    }  # fmt: skip


def test_figures_for_people():
    assert [format_bytes(n) for n in (5, 5_000, 5_000_000, 5 * 2**30)] == ["5 B", "5 KiB", "5 MiB", "5.00 GiB"]
    text = numbers(step=1200, loss=3.14159, keep_ratio=0.25, tokens_per_second=1234.5, memory=2**29)
    assert text == "step 1,200 · loss 3.142 · keep 25% · 1,234 tok/s · 512 MiB"


def test_a_terminal_gets_a_bar():
    console = Console(force_terminal=True, width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with Display(console, "cggr", Budget(steps=4)) as display:
        display.advance(Progress(step=2))
        display.show("loss 1.000")
    console.file.close()
    text = console.export_text()
    assert "cggr" in text
    assert "50%" in text
    assert "loss 1.000" in text


def test_learning_curves(tmp_path):
    train = [{"event": "train", "step": step, "loss": 5 / step, "keep_ratio": 0.25} for step in range(1, 60)]
    held = [{"event": "heldout", "step": 30, "heldout_loss": 1.0}]
    draw_learning_curve([*train, *held, {"event": "train", "step": 60, "loss": None}], tmp_path / "b.png")
    draw_learning_curve([], tmp_path / "c.png")
    for name in "bc":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2


class Checker(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links, self.rows = [], [], 0

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.links += [values[name] for name in ("src", "href") if name in values]
        self.rows += tag == "tr"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page_of(found, folder):
    page = folder / "report.html"
    study = {"devices": ["a device"], "workers": 2, "threads": 1, "versions": {"torch": "2"}}
    write_study_page(page, outcome=found, verdict=verdict(found), settings=SETTINGS, study=study)
    return page


@pytest.mark.parametrize("width", [901, 650])
def test_the_page_scrolls_nothing_sideways_at_widths_between(browser, tmp_path, width):
    page = page_of(outcome(**{STANDARD: 15.0, EQUAL: 14.6, RANDOM: 14.5, ASKED: 14.0}), tmp_path)
    shown, window = widths(browser, page, tmp_path, width=width)
    assert shown <= window == width


@pytest.mark.parametrize("width", [1400, 400])
def test_the_page_in_a_browser_has_its_plot_first_and_nothing_sideways(browser, tmp_path, width):
    from PIL import Image

    found = outcome(**{STANDARD: 5.0, EQUAL: 4.6, RANDOM: 4.5, ASKED: 4.0})
    page = page_of(found, tmp_path)
    shown, window = widths(browser, page, tmp_path, width=width)
    assert window == width and shown <= window, "no sideways scrolling"
    pixels = Image.open(picture_of(browser, page, tmp_path, size=(width, 1000))).convert("RGB")
    assert pixels.size == (width, 1000)
    colours = {colour: count for count, colour in pixels.getcolors(2**20)}
    for arm in found.arms:
        shade = tuple(int(plots.colour(arm, found)[n : n + 2], 16) for n in (1, 3, 5))
        assert colours.get(shade, 0) > 15, f"the curve of {arm.title} in the first view"


def test_no_two_arms_have_one_colour():
    arms = plan_arms(
        Routing(), gradients=["kv", "detached"], ratios=[0.25, 0.5, 0.75], selections=["stratified", "sampled"],
        scorings=["gradnorm", "loss"], batch_size=8, batch_sizes=[1, 2], context_precisions=[None, "fp8"], num_layers=4,
    )  # fmt: skip
    found = dataclasses.replace(outcome(), arms=arms)
    assert len({plots.colour(arm, found) for arm in arms[:55]}) == min(55, len(arms)) > 40


def test_kept_shares_that_are_all_alike_are_not_drawn():
    found = outcome()
    for by in found.kept.values():
        by.update(dict.fromkeys(by, [0.25] * 10))
    assert plots.draw_kept(found) is None


def test_a_tenth_without_a_share_is_a_gap_in_the_curve(monkeypatch):
    found = outcome()
    for by in found.kept.values():
        by.update({name: [None, *[0.1, 0.4] * 4, None] for name in by})
    drawn = []
    original = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, **style: drawn.append(y) or original(axes, x, y, **style))
    assert plots.draw_kept(found) is not None
    assert drawn and all(math.isnan(y[0]) and y[1:3] == [10, 40] and math.isnan(y[-1]) for y in drawn)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_page_is_whole_and_needs_no_network(tmp_path, seeds):
    study = {"devices": ["A <device>"], "workers": 2, "threads": 1, "versions": {"torch": "2"}}
    path = tmp_path / "report.html"
    found = outcome(seeds=seeds)
    write_study_page(
        path, outcome=found, verdict=["One & all <done>."],
        settings=dataclasses.replace(SETTINGS, seeds=seeds), study=study,
    )  # fmt: skip
    page = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.rows == (5 + 1) + (2 + 1) + (3 + 1)
    assert [link[:22] for link in checker.links] == ["data:image/png;base64,"] * 4
    assert page.count("<source media=") == 4, "the same plots, drawn for a phone"
    assert not re.search(r"https?://|@import|url\(", page)
    assert "One &amp; all &lt;done&gt;." in page
    assert "A &lt;device&gt;" in page
    assert [found.name for found in tmp_path.iterdir()] == ["report.html"]
