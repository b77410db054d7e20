import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cggr_train.tokenizer import train_tokenizer
from tests.support.browser import browser  # noqa: F401

TEXT = "".join(f"def function_{n}(a, b):\n    return a * {n} + b ** {n % 7}\n\n" for n in range(60))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_learning_curves(monkeypatch):
    """Half of the time of a run of six steps; test_run has a run that draws its curve."""
    monkeypatch.setattr("cggr_train.report.curves.draw_learning_curve", lambda records, path: None)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [TEXT + f"# file {n}\n" * (n + 1) for n in range(12)]


@pytest.fixture(scope="session")
def tokenizer(texts):
    return train_tokenizer(texts, vocab_size=300)


@pytest.fixture
def data_files(tmp_path: Path, texts) -> list[Path]:
    paths = []
    for number, text in enumerate(texts):
        path = tmp_path / f"file_{number}.txt"
        path.write_text(text)
        paths.append(path)
    return paths


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=160)
