import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console

from cggr_train.display import Display, format_bytes, numbers
from cggr_train.learner import Routing
from cggr_train.loop import Budget, Progress
from cggr_train.presets import build_config, build_model
from cggr_train.report.curves import draw_comparison, draw_learning_curve
from cggr_train.report.page import figures, write_page
from cggr_train.report.passage import PassageToken, choose_passage, score_passage
from cggr_train.report.verdict import NOISE, results_table, verdict

LABELS = {"standard": "standard", "half_batch": "half the batch", "random": "random tokens", "cggr": "CGGR"}
VOID = {"meta", "img", "br", "link", "input"}


def results(standard=4.0, half_batch=4.0, random=4.0, cggr=4.0):
    losses = {"standard": standard, "half_batch": half_batch, "random": random, "cggr": cggr}
    return [
        {
            "name": name, "heldout_loss": loss, "steps": 10, "tokens": 12_345, "kept_tokens": 1_234_567,
            "seconds": 2.0, "step_seconds": 0.1 if name == "standard" else 0.06, "core_share": 0.98,
            "peak_bytes": 900, "start_bytes": 500,
            "curve": [{"seconds": s, "tokens": 10 * s, "heldout_loss": loss + 2 - s} for s in (0, 1, 2)],
        }
        for name, loss in losses.items()
    ]  # fmt: skip


def said(**losses):
    return " ".join(verdict(results(**losses), LABELS))


def test_the_verdict_speaks_against_the_method_where_the_figures_do():
    text = said(half_batch=3.7, random=3.8, standard=3.8)
    assert "Lowest held-out loss in the same time: half the batch (3.700)" in text
    assert "0.200 worse than standard, 0.300 worse than half the batch, 0.200 worse than random tokens" in text
    assert "Half the batch learns more in the same time: on this evidence, use it instead of CGGR." in text
    assert "Standard training learns more in the same time" in text
    assert "Random tokens do better than scored ones" in text
    assert "best use of the time" not in text


def test_the_verdict_when_random_does_as_well():
    text = said(standard=4.5, half_batch=4.5, random=4.0 + NOISE / 2)
    assert "Random tokens do as well as scored ones: the score does not pay for itself here." in text
    assert "Half the batch" not in text
    assert f"level ({-NOISE / 2:+.3f}) with random tokens" in text


def test_the_verdict_when_cggr_wins():
    text = said(standard=4.5, half_batch=4.5, random=4.5)
    assert "CGGR makes the best use of the time here." in text
    assert "Its step takes 0.60 of the standard step's time and adds 1.00 of the memory" in text
    assert "Compare on your own data" in text


def test_the_verdict_when_the_machine_was_busy():
    runs = results()
    runs[2]["core_share"] = 0.41
    assert "the runs had 41% to 98% of a core each" in verdict(runs, LABELS)[-1]
    assert "busy" not in said()


def test_the_table_fits_a_narrow_terminal():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_table(results(), LABELS, seconds=32))
    console.file.close()
    text = console.export_text()
    assert "half the batch" in text
    assert "60 ms" in text
    assert "…" not in text


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


def test_pictures(tmp_path):
    curves = {result["name"]: result["curve"] for result in results()}
    draw_comparison(curves, LABELS, tmp_path / "a.png")
    train = [{"event": "train", "step": step, "loss": 5 / step, "keep_ratio": 0.25} for step in range(1, 60)]
    held = [{"event": "heldout", "step": 30, "heldout_loss": 1.0}]
    draw_learning_curve([*train, *held, {"event": "train", "step": 60, "loss": None}], tmp_path / "b.png")
    draw_learning_curve([], tmp_path / "c.png")
    for name in "abc":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_passage_starts_at_a_definition():
    text = "x = 1\n" * 50 + "\ndef late(self):\n    pass\n" * 80
    assert choose_passage(["short", text]).startswith("def late(self):")
    assert choose_passage(["one line"]) == "one line"


@pytest.fixture(scope="module")
def passage(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_model(build_config("nano", vocab_size=len(tokenizer), length=64), seed=0).save_pretrained(folder)
    text = 'def f(a):\n    return "<b>é🙂</b>" & a\n' * 3
    return text, score_passage(folder, tokenizer, text, Routing(ratio=0.25), length=48, seed=0)


def test_scores_stand_on_the_token_they_are_about(passage, tokenizer):
    from cggr_core import token_statistics

    text, scored = passage
    assert len(scored.tokens) == 48
    assert text.startswith("".join(token.text for token in scored.tokens))
    assert scored.tokens[0].score is None
    model = build_model(build_config("nano", vocab_size=len(tokenizer), length=64), seed=0).eval()
    ids = tokenizer(text)["input_ids"][:48]
    statistics = token_statistics(model(input_ids=torch.tensor([ids])).logits[0, :-1].detach(), torch.tensor(ids[1:]))
    assert [token.nll for token in scored.tokens[1:]] == pytest.approx(statistics.nll.tolist(), abs=1e-4)
    assert [token.score for token in scored.tokens[1:]] == pytest.approx(statistics.gradnorm.tolist(), abs=1e-4)
    shades = [token.shade for token in scored.tokens[1:]]
    assert (min(shades), max(shades)) == pytest.approx((0, 1))
    by_score = sorted(scored.tokens[1:], key=lambda token: token.score)
    assert [token.shade for token in by_score] == sorted(shades)


def test_kept_tokens_are_marked_with_their_weight(passage):
    kept = [token for token in passage[1].tokens if token.kept]
    assert len(kept) == round(0.25 * 47)
    assert all(token.weight >= 1 for token in kept)
    assert all(token.weight == 0 for token in passage[1].tokens if not token.kept)
    assert passage[1].ratio == pytest.approx(12 / 47)


def test_figures_of_a_token():
    token = PassageToken("\n", 3, score=0.5, kept=True, weight=2.0, nll=1.0, confidence=0.25, guess=" x")
    shown = dict(figures(token))
    assert shown["token"] == "⏎"
    assert shown["kept"] == "yes, weight 2.00"
    assert (shown["score"], shown["loss"], shown["confidence"]) == ("0.500", "1.00 nats", "25%")
    assert shown["guess"] == "␣x"


class Checker(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links, self.tokens, self.kept = [], [], 0, 0

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.links += [values[name] for name in ("src", "href") if name in values]
        if tag == "span" and "data-f" in values:
            self.tokens += 1
            self.kept += "k" in values["class"].split()
            assert dict(json.loads(values["data-f"]))["token"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(tmp_path, passage):
    from cggr_train.demo import DemoSettings

    picture = tmp_path / "a.png"
    draw_comparison({result["name"]: result["curve"] for result in results()}, LABELS, picture)
    settings = dataclasses.replace(DemoSettings(), seconds=7)
    lines = ["One & all <done>."]
    write_page(tmp_path / "page.html", results=results(), labels=LABELS, verdict=lines, passage=passage[1],
               picture=picture, settings=settings)  # fmt: skip
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.tokens == 48
    assert checker.kept == 12
    assert [link[:22] for link in checker.links] == ["data:image/png;base64,"]
    assert not re.search(r"https?://|@import|url\(", page)
    assert "One &amp; all &lt;done&gt;." in page
    assert ">&lt;</span>" in page, "the passage's own markup is text"
    assert "The same 7 seconds" in page
