import json

import pytest

from cggr_train.data import build_token_store
from cggr_train.demo import DemoSettings, run_demo
from cggr_train.demo import compare as compare_module
from cggr_train.demo.corpus import standard_library
from cggr_train.demo.turns import run_in_turns
from cggr_train.demo.worker import RunSpec, run
from cggr_train.errors import InputError, RunError
from cggr_train.learner import Routing


def test_the_corpus_is_the_standard_library_each_file_once():
    texts = standard_library(max_characters=300_000)
    assert 300_000 <= sum(map(len, texts)) < 2_000_000
    assert len(set(texts)) == len(texts)
    assert standard_library(max_characters=300_000) == texts
    assert texts == standard_library(max_characters=600_000)[: len(texts)], "a larger corpus goes on from the smaller"


def test_the_corpus_leaves_out_copies_tests_and_installed_packages(tmp_path):
    line = "value = 'something long enough'\n"
    for name, text in {
        "a.py": "a" + line * 10, "copy.py": "a" + line * 10, "short.py": "x = 1\n", "notes.txt": line * 10,
        "test/b.py": "b" + line * 10, "site-packages/c.py": "c" + line * 10, "pkg/d.py": "d" + line * 10,
    }.items():  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n" * 100)
    assert sorted(text[0] for text in standard_library(max_characters=10**6, root=tmp_path)) == ["a", "d"]
    with pytest.raises(InputError, match="no Python source under"):
        standard_library(max_characters=10, root=tmp_path / "test" / "none")


@pytest.fixture
def spec(tmp_path, tokenizer, texts):
    build_token_store(texts, tokenizer, tmp_path / "tokens", length=32, heldout_fraction=0.3)
    return RunSpec(
        name="cggr", method="cggr", batch_size=2, routing=Routing(), tokens=str(tmp_path / "tokens"), out=str(tmp_path),
        preset="nano", vocab_size=300, length=32, seconds=0.3, turn_seconds=0.1, learning_rate=1e-3, seed=0,
        evaluations=3, eval_sequences=2, save_model=True,
    )  # fmt: skip


def test_one_run_reports_its_figures_and_takes_turns(spec, tmp_path, capsys):
    turns = []
    result = run(spec, wait_for_turn=lambda: turns.append(None))
    assert 2 <= len(turns) <= 4
    assert result["seconds"] >= 0.3
    assert 0 < result["core_share"] < 1.5
    assert result["tokens"] == result["steps"] * 64
    assert result["keep_ratio"] == pytest.approx(0.25, abs=0.02)
    assert result["kept_tokens"] == pytest.approx(0.25 * result["steps"] * 62, rel=0.1)
    assert result["peak_bytes"] >= result["start_bytes"] > 0
    assert result["engine"] == "two_pass"
    assert 2 <= len(result["curve"]) <= 4
    assert result["curve"][0]["seconds"] == 0
    assert (tmp_path / "model" / "model.safetensors").exists()
    steps = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(steps) == result["steps"]
    assert steps[-1]["spent"] >= 1


def test_a_specification_comes_back(spec):
    assert RunSpec.from_json(spec.to_json()) == spec


def test_a_run_that_fails_is_named_with_its_last_words(spec, tmp_path, console):
    import dataclasses

    broken = dataclasses.replace(spec, tokens=str(tmp_path / "nowhere"))
    with pytest.raises(RunError, match=r"the run 'cggr' failed: .*holds no token store"):
        run_in_turns([broken], {"cggr": "CGGR"}, tmp_path, console)


def test_settings_that_cannot_be_used(tmp_path, console):
    with pytest.raises(InputError, match="--seconds must be positive"):
        DemoSettings(seconds=0)
    with pytest.raises(InputError, match="--batch-size must be even"):
        DemoSettings(batch_size=3)
    with pytest.raises(InputError, match="gradnorm"):
        run_demo(DemoSettings(routing=Routing(scoring="gradnrm")), tmp_path / "demo", console)
    assert not (tmp_path / "demo").exists()


def test_the_demo_from_beginning_to_end(tmp_path, console, monkeypatch):
    """With the runs in this process: tests/e2e starts the real ones."""

    def in_this_process(specs, labels, folder, console):
        return [run(spec) for spec in specs]

    monkeypatch.setattr(compare_module, "run_in_turns", in_this_process)
    settings = DemoSettings(seconds=0.2, preset="nano", vocab_size=300, length=32, batch_size=2, max_characters=200_000)
    results = run_demo(settings, tmp_path, console)
    assert [result["name"] for result in results] == ["standard", "half_batch", "random", "cggr"]
    assert len({result["curve"][0]["heldout_loss"] for result in results}) == 1, "all start from the same weights"
    assert [result["engine"] for result in results] == ["", "", "interleaved", "two_pass"]
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["settings"]["routing"]["gradient"] == "kv"
    assert len(saved["results"]) == 4
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "A held-out passage" in (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert "Lowest held-out loss in the same time" in console.file.getvalue()
