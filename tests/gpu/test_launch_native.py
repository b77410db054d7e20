"""``cggr train`` on two GPUs, under ``torchrun`` and ``accelerate launch``, equals its run on one."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.launchers import LAUNCHERS, finish, launched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason=f"two ranks take a GPU each; {torch.cuda.device_count()} here"
    ),
]

SMALL = ["--config", "micro", "--vocab-size", "300", "--length", "64", "--batch-size", "8", "--heldout-fraction", "0.2",
         "--precision", "float32", "--steps", "6", "--log-every", "1", "--eval-every", "3", "--out"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    texts = (f"for n in range({n}):\n    print(n, {n} * n)\n" * 8 for n in range(60))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def on_one(data, tmp_path_factory) -> list[dict[str, float]]:
    """The log of a run of one process."""
    return _log(launched("torchrun", 1, "-m", "cggr_train.cli", "train", data, *SMALL), tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_gpus_train_as_one_does(launcher, data, on_one, tmp_path):
    on_two = _log(launched(launcher, 2, "-m", "cggr_train.cli", "train", data, *SMALL), tmp_path)
    assert len(on_two) == len(on_one)
    for alone, together in zip(on_one, on_two, strict=True):
        assert alone.keys() == together.keys()
        for key in ("step", "tokens", "event"):
            assert together[key] == alone[key]
        for key in {"loss", "heldout_loss"} & alone.keys():
            assert together[key] == pytest.approx(alone[key], rel=1e-4)


def _log(command: list[str], out: Path) -> list[dict[str, float]]:
    done = finish([*command, str(out / "run")])
    assert done.stdout.count("done: 6 steps") == 1, "rank 0 alone speaks"
    print(done.stdout, done.stderr)  # shown where a test fails, or with -rP
    return [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]
