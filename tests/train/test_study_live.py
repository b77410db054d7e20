import io
import threading

from rich.console import Console

from cggr_train.learner import Routing
from cggr_train.study.arms import plan_arms
from cggr_train.study.live import LiveTable
from cggr_train.study.pool import Request

ARMS = plan_arms(
    Routing(), gradients=["kv"], ratios=[0.25], selections=["topk"], scorings=["loss"], batch_size=8, num_layers=4
)


def shown(terminal):
    console = Console(force_terminal=terminal, width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with LiveTable(console, ARMS, seeds=3) as table:
        table.stage("training")
        table.take({"event": "timing", "arm": "standard", "step_seconds": [0.5, 0.7], "peak_bytes": 2**21})
        table.take({"event": "run", "arm": "standard", "seed": 0, "points": [{"heldout_loss": 4.0}]})
        for seed, step in ((1, 5), (2, 2)):
            running = Request("run", {"arm": "standard", "seed": seed}, {})
            table.progress(running, {"step": step, "steps": 10, "loss": 3.0 + seed})
        table.take({"event": "run", "arm": "kv-0.25-topk-loss", "seed": 0, "points": [{"heldout_loss": 5.0}]})
        table.take({"event": "run", "arm": "kv-0.25-topk-loss", "seed": 1, "points": [], "diverged": 1200})
    console.file.close()
    return console.export_text()


def test_a_terminal_gets_a_table_of_all_arms():
    text = shown(terminal=True)
    assert "training · runs 4 to 5 of 15 · 50%, 20% · about" in text
    row = next(line for line in text.splitlines() if line.strip().startswith("standard, batch 8"))
    assert row.split()[3:] == ["600", "ms", "2", "MiB", "1/3", "50%", "20%", "4.500", "4.0000"]
    row = next(line for line in text.splitlines() if line.strip().startswith("topk 0.25 by loss, kv"))
    assert row.split()[-2:] == ["2/3", "diverged"]
    assert all(arm.label in text for arm in ARMS)


def test_elsewhere_every_run_gets_a_line():
    lines = shown(terminal=False).splitlines()
    assert lines == [
        "training …",
        "standard, batch 8, seed 0: held-out loss 4.0000",
        "topk 0.25 by loss, kv, seed 0: held-out loss 5.0000",
        "topk 0.25 by loss, kv, seed 1: diverged at step 1,200",
    ]


def test_where_it_stands_is_said_in_runs_and_time_left(monkeypatch):
    from cggr_train.study import live

    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    table = LiveTable(Console(file=io.StringIO()), ARMS, seeds=3)
    table.stage("timing every arm's step")
    now[0] = 103.0
    assert table.status_line() == "timing every arm's step · 3 s"
    table.stage("training")
    now[0] = 133.0
    table.take({"event": "run", "arm": "standard", "seed": 0, "points": [{"heldout_loss": 4.0}]})
    table.progress(Request("run", {"arm": "standard", "seed": 1}, {}), {"step": 5, "steps": 10, "loss": 3.0})
    assert table.status_line() == "training · run 2 of 15 · 50% · about 4:30 min left"  # 1.5 of 15 in 30 s


def test_nobody_waits_in_silence(monkeypatch):
    from cggr_train.study import live

    said = threading.Event()
    monkeypatch.setattr(live, "SILENCE_SECONDS", 0.0)
    monkeypatch.setattr(LiveTable, "_say", lambda table, line: said.set())
    with LiveTable(Console(file=io.StringIO()), ARMS, seeds=3):
        assert said.wait(30), "a line without anything having happened"
