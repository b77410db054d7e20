"""The figures of a passage, and its page in a real browser."""

import html
import json
import re

import pytest
import torch

from cggr_train.errors import InputError, SaveError
from cggr_train.inspection import SCORINGS, STRATEGIES, inspect_text, read_passage
from cggr_train.presets import build_config, build_model
from cggr_train.report.inspection_page import write_inspection_page
from tests.support.browser import look, widths

TEXT = 'def f(a):\n    return "<b>é🙂</b>" & a\n' * 3


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_model(build_config("nano", vocab_size=len(tokenizer), length=64), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def found(folder):
    return inspect_text(folder, TEXT, reference=folder, length=48)


def test_scores_stand_on_the_token_they_are_about(found, tokenizer):
    from cggr_core import token_statistics

    assert len(found.tokens) == 48
    assert TEXT.startswith("".join(found.tokens))
    model = build_model(build_config("nano", vocab_size=len(tokenizer), length=64), seed=0).eval()
    ids = tokenizer(TEXT)["input_ids"][:48]
    statistics = token_statistics(model(input_ids=torch.tensor([ids])).logits[0, :-1].detach(), torch.tensor(ids[1:]))
    assert found.figures["nll"] == pytest.approx(statistics.nll.tolist(), abs=1e-4)
    assert found.scores["gradnorm"] == pytest.approx(statistics.gradnorm.tolist(), abs=1e-4)
    assert found.scores["excess"] == pytest.approx([0.0] * 47, abs=1e-5), "the reference is the model itself"
    for name, ranks in found.ranks.items():
        assert (min(ranks), max(ranks)) == pytest.approx((0, 1))
        by_score = sorted(zip(found.scores[name], ranks, strict=True))
        assert [rank for _, rank in by_score] == sorted(ranks)


def test_every_strategy_keeps_its_share_by_every_score(found):
    assert set(found.weights) == {*SCORINGS, "excess"}
    for scoring, by in found.weights.items():
        assert tuple(by) == STRATEGIES
        for strategy, weights in by.items():
            kept = [t for t, weight in enumerate(weights) if weight > 0]
            assert len(kept) == round(0.25 * 47), (scoring, strategy)
        if scoring == "excess":
            continue  # all alike
        highest = sorted(range(47), key=lambda t: -found.ranks[scoring][t])[:12]
        assert sorted(highest) == [t for t, weight in enumerate(by["topk"]) if weight > 0]


def test_a_router_scores_with_the_first_layers(folder, found):
    shallow = inspect_text(folder, TEXT, router_depth=1, length=48)
    assert shallow.router_depth == 1
    assert shallow.figures["nll"] != pytest.approx(found.figures["nll"], abs=1e-3)


def test_what_is_left_out_is_said(folder, found, tokenizer, tmp_path):
    whole = len(tokenizer(TEXT)["input_ids"])
    assert found.left_out == whole - 48
    write_inspection_page(tmp_path / "a.html", found)
    assert f"48 tokens (the last {whole - 48} were left out)" in (tmp_path / "a.html").read_text("utf-8")
    short = inspect_text(folder, "def f(a):\n    return a\n")
    assert short.left_out == 0
    write_inspection_page(tmp_path / "b.html", short)
    assert "left out" not in (tmp_path / "b.html").read_text("utf-8")


def test_a_page_that_cannot_be_written_leaves_the_one_before(found, tmp_path, monkeypatch):
    path = tmp_path / "a.html"
    path.write_text("before")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(SaveError, match=r"the page .*a\.html could not be written: No space left on device"):
        write_inspection_page(path, found)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("a.html", "before")]


def test_what_cannot_be_inspected(folder, tmp_path):
    with pytest.raises(InputError, match="--text '  ' is empty"):
        read_passage("  ")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    with pytest.raises(InputError, match=r"the text file .*latin.txt cannot be read"):
        read_passage(str(tmp_path / "latin.txt"))
    (tmp_path / "a.txt").write_text("from a file")
    assert read_passage(str(tmp_path / "a.txt")) == "from a file"
    assert read_passage("x" * 5000) == "x" * 5000
    for missing in ("nofile.txt", "folder/passage"):
        with pytest.raises(InputError, match=f"--text {missing} looks like a path, but no such file exists"):
            read_passage(missing)
    with pytest.raises(InputError, match="is a directory; give a text file in it"):
        read_passage(str(tmp_path))
    (tmp_path / "bom.txt").write_text("marked", encoding="utf-8-sig")
    assert read_passage(str(tmp_path / "bom.txt")) == "marked"
    for name, value, message in (
        ("ratio", 1.5, r"--ratio must be in \(0, 1\], got 1.5"), ("seed", -1, "--seed must be from 0"),
        ("router_depth", 0, "--router-depth must be at least 1"), ("length", 1, "--length must be at least 2"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            inspect_text(folder, "some words", **{name: value})
    with pytest.raises(InputError, match=r"the passage must have at least 2 tokens, got 1"):
        inspect_text(folder, "x")
    with pytest.raises(InputError, match="does not exist"):
        inspect_text(str(tmp_path / "none"), TEXT)
    with pytest.raises(InputError, match="ratio"):
        inspect_text(folder, TEXT, ratio=1.5)
    with pytest.raises(InputError, match="holds no tokenizer"):
        inspect_text(folder, TEXT, tokenizer=str(tmp_path))


USE = """<script>
  document.querySelector("input[value=loss]").click();
  document.querySelector("input[value=topk]").click();
  document.querySelectorAll(".t")[7].dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
</script></body>"""


def test_the_page_in_a_browser(browser, found, tmp_path):
    """Colours and marks follow what is picked, pointing shows the numbers, and it looks as it should."""
    page = tmp_path / "inspect.html"
    write_inspection_page(page, found)
    assert not re.search(r"https?://|@import|url\(", page.read_text(encoding="utf-8"))

    picture = tmp_path / "page.png"
    look(browser, page, tmp_path / "one", f"--screenshot={picture}")
    from PIL import Image

    pixels = Image.open(picture).convert("RGB")
    assert pixels.size == (1100, 900)
    colours = {colour: count for count, colour in pixels.getcolors(2**20)}
    assert colours.get((0, 95, 115), 0) > 200, "boxes around kept tokens"
    orange = sum(count for (r, g, b), count in colours.items() if r > 220 and g < 190 and b < 150)
    assert orange > 1000, "tokens with high scores"

    used = tmp_path / "used.html"
    used.write_text(page.read_text(encoding="utf-8").replace("</body>", USE), encoding="utf-8")
    dom = look(browser, used, tmp_path / "two", "--dump-dom")
    spans = re.findall(r'<span class="(t(?: k)?)" style="--s: ?([\d.]+);?" tabindex="0" data-t="(\d+)">', dom)
    assert [int(number) for _, _, number in spans] == list(range(48))
    weights = found.weights["loss"]["topk"]
    assert [kind == "t k" for kind, _, _ in spans[1:]] == [weight > 0 for weight in weights]
    assert [float(rank) for _, rank, _ in spans[1:]] == pytest.approx(found.ranks["loss"], abs=1e-3)
    assert "12 of 47 tokens" in dom
    panel = html.unescape(re.search(r'id="panel">(.*?)</div>', dom, re.DOTALL)[1])
    shown = dict(re.findall(r"<span>([^<]*?) <b>([^<]*)</b></span>", panel))
    assert shown["position"] == "7"
    assert shown["token"].replace("␣", " ") == found.tokens[7]
    assert float(shown["score gradnorm"]) == pytest.approx(found.scores["gradnorm"][6], abs=1e-4)
    assert shown["loss"] == f"{round(found.figures['nll'][6], 2):g} nats"
    assert set(shown) >= {"score excess", "entropy", "confidence", "margin", "gradient norm", "kept by", "guess"}
    kept_by = [name for name, by in found.weights["loss"].items() if by[6] > 0]
    assert [part.split(" ")[0] for part in shown["kept by"].split(", ")] == (kept_by or ["none"])


def test_the_page_fits_a_phone_and_no_box_is_empty(browser, found, tmp_path):
    page = tmp_path / "inspect.html"
    write_inspection_page(page, found)
    for width in (1400, 400):
        shown, window = widths(browser, page, tmp_path, width=width)
        assert window == width and shown <= window
    dom = look(browser, page, tmp_path / "three", "--dump-dom")
    panel = re.search(r'id="panel">(.*?)</div>', dom, re.DOTALL)[1]
    assert "<b>1</b>" in panel, "the numbers of the first token that is predicted"


def test_the_passages_own_markup_is_text(found, tmp_path):
    page = tmp_path / "inspect.html"
    write_inspection_page(page, found)
    text = page.read_text(encoding="utf-8")
    assert ">&lt;</span>" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert len(data["tokens"]) == 48
    assert "<b>" not in re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1], "no markup inside the script"
