"""Handing out work to processes, with small ones that speak the workers' protocol."""

import os
import subprocess
import sys
from subprocess import PIPE

import pytest
import torch

from cggr_train.errors import InputError, RunError
from cggr_train.study.pool import Pool, Request, Worker, places

CPU = torch.device("cpu")
SCRIPT = """
import json, signal, sys
stopped = False
def handle(*_):
    global stopped
    stopped = True
signal.signal(signal.SIGTERM, handle)
say = lambda **values: print(json.dumps(values), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "result":
        say(event="progress", step=1, steps=2, loss=3.0)
        say(event="result", result={"value": request["value"]})
    elif request["do"] == "wait":
        say(event="progress", step=1, steps=2, loss=3.0)
        while not stopped:
            signal.pause()
        say(event="stopped")
        break
    elif request["do"] == "killed":
        signal.raise_signal(9)
    elif request["do"] == "fail":
        sys.exit("something broke")
    else:
        say(event="error", kind=request["do"], message="not possible")
"""


PARENT = """
import os, subprocess, sys
process = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
print(process.pid, flush=True)
sys.stdin.readline()
os.kill(os.getpid(), 9)
"""
CHILD = """
import sys
from cggr_train.study import worker
worker.exit_with_parent(int(sys.argv[1]))
"""


@pytest.mark.skipif(os.name != "posix", reason="a process learns of its parent's end on POSIX only")
def test_a_worker_ends_with_the_study_that_started_it():
    """Its standard output, which it has from its parent, is closed when both have ended."""
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdin=PIPE, stdout=PIPE, text=True) as parent:
        assert int(parent.stdout.readline()) > 0
        parent.stdin.write("die\n")
        parent.stdin.flush()
        assert parent.stdout.read() == "", "ends"
    assert parent.returncode == -9


@pytest.fixture
def pool(tmp_path):
    with Pool(tmp_path, [(CPU, 1)] * 2) as pool:
        for worker in pool._workers:
            worker._command = [sys.executable, "-c", SCRIPT]
        yield pool


def request(do, **values):
    return Request("run", values, {"do": do, **values})


@pytest.mark.parametrize("alone", [False, True])
def test_every_request_comes_back_with_its_result(pool, alone, tmp_path):
    told = []
    found = pool.run(
        [request("result", value=n) for n in range(5)], alone=alone,
        on_progress=lambda asked, values: told.append((asked.fields["value"], values["step"])),
    )  # fmt: skip
    found = [(asked.fields["value"], result["value"]) for asked, result in found]
    assert sorted(found) == [(n, n) for n in range(5)]
    assert sorted(told) == [(n, 1) for n in range(5)]
    assert [worker._process is not None for worker in pool._workers] == [True, not alone]
    if alone:
        assert found == sorted(found)


def test_alone_is_once_on_each_device(tmp_path, monkeypatch):
    """The others are started meanwhile: loading their code takes nothing from what an accelerator is measured by."""
    asked, ask = set(), Worker.ask

    def noting(self, body):
        asked.add(self.errors.name)
        return ask(self, body)

    monkeypatch.setattr(Worker, "ask", noting)
    devices = [torch.device("cuda", number) for number in (0, 1, 0, 1)]
    with Pool(tmp_path, [(device, 1) for device in devices]) as pool:
        for worker in pool._workers:
            worker._command = [sys.executable, "-c", SCRIPT]
        assert len(list(pool.run([request("result", value=n) for n in range(4)], alone=True))) == 4
        # Whichever of the two is free; the requests may be over before both are up.
        assert asked and asked <= {worker.errors.name for worker in pool._workers[:2]}
        assert all(worker._process is not None for worker in pool._workers)


@pytest.mark.parametrize(("kind", "error"), [("input", InputError), ("run", RunError)])
def test_what_a_worker_cannot_do_is_told(pool, kind, error):
    with pytest.raises(error, match="not possible"):
        list(pool.run([request(kind)]))


def test_a_worker_that_fails_is_quoted(pool, tmp_path):
    with pytest.raises(RunError, match=r"a worker ended with status 1: something broke \(see .*worker-0.errors.txt\)"):
        list(pool.run([request("fail")]))
    pool.__exit__(None, None, None)
    assert (tmp_path / "worker-0.errors.txt").read_text().strip() == "something broke"


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a signal of POSIX")
def test_a_worker_that_is_killed_had_no_last_words(pool, tmp_path):
    with pytest.raises(RunError, match="a worker was killed, possibly because memory ran out"):
        list(pool.run([request("killed")]))
    pool.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == [], "no empty file of errors"


@pytest.mark.skipif(os.name != "posix", reason="workers are asked to stop by a signal")
def test_stopping_hands_out_nothing_more_and_lets_workers_save(pool, tmp_path):
    told = []
    requests = [request("wait"), request("wait"), request("result", value=0)]
    found = list(pool.run(requests, on_progress=lambda asked, values: told.append(asked), stop=lambda: len(told) == 2))
    assert found == []
    pool.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == [], "nothing is left of workers that ended well"


def test_workers_are_spread_over_the_devices(monkeypatch):
    monkeypatch.setattr("cggr_train.study.pool.pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert places("auto", None) == [(first, 4), (second, 4)]
    assert places("auto", 2) == [(first, 2), (second, 2)] * 2


def test_places_for_workers(monkeypatch):
    monkeypatch.setattr("cggr_train.study.pool.cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert places("cpu", None) == [(CPU, 1)] * 4
    assert places("cpu", 2) == [(CPU, 2)] * 2
    with pytest.raises(InputError, match="--device nowhere cannot be used"):
        places("nowhere", None)
