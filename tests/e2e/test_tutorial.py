"""The tutorial's commands, in its order and each with its options, at a tiny size."""

import json
import re
import shlex

from tests.support.commands import finish
from tests.support.documents import ROOT

SMALLER = (
    ("--config micro --vocab-size 4096", "--config nano --vocab-size 300"),
    ("--length 256", "--length 64"),
    ("--batch-size 8", "--batch-size 2"),
    ("--batch-size 4", "--batch-size 2"),
    ("--steps 60", "--steps 2"),
    ("--steps 40", "--steps 2"),
    ("--seeds 2", "--seeds 1"),
    ("step-00000060", "step-00000002"),
)
"""What the tutorial says, and what is run instead."""


def test_the_commands_run_one_after_the_other(tmp_path, monkeypatch):
    text = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8").split("\n## With a GPU")[0]
    text = re.sub(r" \\\n +", " ", text)
    for said, run in SMALLER:
        assert said in text, f"the tutorial says {said} no longer"
        text = text.replace(said, run)
    commands = re.findall(r"^cggr (.+)$", text, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["train", "inspect", "study", "train"]
    monkeypatch.chdir(tmp_path)
    examples = [{"question": f"{n} + {n}?", "answer": f"{2 * n} #### {2 * n}"} for n in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    (tmp_path / "passage.txt").write_text("3 + 3? 6 #### 6")
    for command in commands:
        one_worker = ("--parallel", "1", "--calibration-seconds", "0.5") if command.startswith("study") else ()
        done = finish(*shlex.split(command), "--device", "cpu", *one_worker, folder=tmp_path)
        assert done.returncode == 0, f"cggr {command}\n{done.stdout}\n{done.stderr}"
    for made in ("inspect.html", "study/report.html", "run/learning_curve.png", "run/checkpoints/step-00000002"):
        assert (tmp_path / made).exists(), made
    page = (tmp_path / "study/report.html").read_text(encoding="utf-8")
    assert "3 ways to train" in page
