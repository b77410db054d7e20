"""Remembered scores on disk and in a run: atomic, memory-mapped, for the right examples, and equal after resuming."""

import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cggr_core.experimental import RememberedScores
from cggr_train import remembered_file as module
from cggr_train.checkpoint import latest_checkpoint
from cggr_train.data import Batches
from cggr_train.errors import InputError, SaveError
from cggr_train.learner import Routing, build_learner
from cggr_train.log import read_log
from cggr_train.presets import build_config, build_model
from cggr_train.remembered_file import FILE_NAME, fingerprint, load_remembered, save_remembered
from cggr_train.run import resume_run, start_run
from tests.support.runs import assert_continues_exactly, interrupt_at, settings

REMEMBERED = {"method": "cggr", "routing": Routing(router="remembered", selection="sampled")}


def memory(value: float = 1.5) -> RememberedScores:
    score = torch.full((20, 8), value, dtype=torch.float16)
    return RememberedScores(score, torch.full((20, 8), 3, dtype=torch.int32), forwards=7)


class TestFile:
    def test_comes_back(self, tmp_path):
        path = tmp_path / FILE_NAME
        save_remembered(path, memory(), examples="text")
        again = load_remembered(path, examples="text")
        assert again.scores.equal(memory().scores)
        assert again.observed.equal(memory().observed)
        assert again.forwards == 7
        with safe_open(path, framework="pt") as file:
            assert file.get_tensor("score").dtype == torch.float16
        assert [entry.name for entry in tmp_path.iterdir()] == [FILE_NAME]

    def test_is_mapped_and_written_only_by_saving(self, tmp_path):
        path = tmp_path / FILE_NAME
        save_remembered(path, memory(), examples="text")
        before = path.read_bytes()
        opened = load_remembered(path, examples="text")
        if sys.platform == "linux":
            with open("/proc/self/maps") as maps:
                assert any(str(path) in line for line in maps)
        for _ in range(2):
            ids, row = torch.tensor([4]), torch.tensor([0])
            opened.remember(ids, row, torch.tensor([[2]]), torch.tensor([[9.0]]), torch.tensor([[True]]))
        assert opened.scores[4, 2] == 9
        assert path.read_bytes() == before
        save_remembered(path, opened, examples="text")
        assert load_remembered(path, examples="text").scores[4, 2] == 9
        assert opened.scores[4, 2] == 9, "the memory goes on after its file was replaced"

    @pytest.mark.parametrize("where", ["write", "rename"])
    def test_a_full_disk_leaves_the_last_good_file(self, tmp_path, monkeypatch, where):
        path = tmp_path / FILE_NAME
        save_remembered(path, memory(), examples="text")
        before = path.read_bytes()

        def full(*_args, **_more):
            raise OSError(errno.ENOSPC, "No space left on device")

        target = (os, "fsync") if where == "write" else (module.Path, "replace")
        monkeypatch.setattr(*target, full)
        with pytest.raises(SaveError, match="No space left on device; the earlier file is unchanged"):
            save_remembered(path, memory(9.0), examples="text")
        monkeypatch.undo()
        assert path.read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == [FILE_NAME]

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(SaveError, match="there is no earlier file"):
            save_remembered(tmp_path / "nowhere" / FILE_NAME, memory(), examples="text")

    def test_a_kill_between_write_and_rename_leaves_the_last_good_file(self, tmp_path):
        path = tmp_path / FILE_NAME
        save_remembered(path, memory(), examples="text")
        script = (
            "import os, signal, sys, torch\n"
            "from pathlib import Path\n"
            "from cggr_core.experimental import RememberedScores\n"
            "from cggr_train import remembered_file\n"
            "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
            "memory = RememberedScores.empty(examples=20, length=8)\n"
            "remembered_file.save_remembered(Path(sys.argv[1]), memory, examples='text')\n"
        )
        killed = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert len(list(tmp_path.iterdir())) == 2, "the unfinished file is there under another name"
        assert load_remembered(path, examples="text").scores.equal(memory().scores)

    def test_other_examples(self, tmp_path):
        path = tmp_path / FILE_NAME
        save_remembered(path, memory(), examples="text")
        with pytest.raises(InputError, match="scores of other examples"):
            load_remembered(path, examples="another text")

    @pytest.mark.parametrize("content", [None, b"", b"no safetensors", "cut"])
    def test_a_missing_or_damaged_file(self, tmp_path, content):
        path = tmp_path / FILE_NAME
        if content is not None:
            save_remembered(path, memory(), examples="text")
            path.write_bytes(path.read_bytes()[:-9] if content == "cut" else content)
        with pytest.raises(InputError, match=f"{FILE_NAME} holds no remembered scores"):
            load_remembered(path, examples="text")

    def test_another_safetensors_file(self, tmp_path):
        save_file({"weight": torch.zeros(2)}, tmp_path / FILE_NAME)
        with pytest.raises(InputError, match="holds no remembered scores"):
            load_remembered(tmp_path / FILE_NAME, examples="text")


def test_the_fingerprint_is_that_of_text_and_cut():
    tokens = np.arange(24, dtype=np.uint16)
    assert fingerprint(tokens.reshape(4, 6)) == fingerprint(tokens.reshape(4, 6).copy())
    others = [tokens.reshape(6, 4), tokens.reshape(4, 6)[::-1], tokens.reshape(4, 6).astype(np.uint32)]
    assert len({fingerprint(tokens.reshape(4, 6)), *map(fingerprint, others)}) == 4


def test_example_ids_name_the_same_text_in_every_epoch():
    batches = Batches(np.arange(40), length=4, batch_size=3, seed=1)
    for number in range(12):
        ids = batches.example_ids(number)
        assert ids.dtype == torch.int64
        assert batches.get(number).equal(torch.from_numpy(batches.sequences[ids]))


class TestRun:
    def test_remembers_over_epochs_and_reports_how_old_scores_are(self, tmp_path, data_files, console):
        wanted = settings(data_files, **REMEMBERED, steps=16, batch_size=32, eval_every=50, save_every=50)
        result = start_run(wanted, tmp_path / "run", console)
        train = [record for record in read_log(tmp_path / "run" / "log.jsonl") if record["event"] == "train"]
        assert train[0]["remembered"] < train[-1]["remembered"]
        assert train[-1]["remembered"] > 0.25
        assert train[-1]["engine"] == "interleaved"
        assert 0 < train[-1]["score_age_epochs"] < 12
        assert (result.checkpoint / FILE_NAME).is_file()

    def test_resume_continues_exactly(self, tmp_path, data_files, console, monkeypatch):
        wanted = settings(data_files, **{**REMEMBERED, "steps": 10, "batch_size": 32})
        assert_continues_exactly(wanted, tmp_path, console, monkeypatch, interrupted_at=5)
        files = [latest_checkpoint(tmp_path / part / "checkpoints") / FILE_NAME for part in ("whole", "parts")]
        scores = [load_file(path) for path in files]
        assert all(scores[0][name].equal(scores[1][name]) for name in ("score", "observed"))

    def test_a_full_disk_while_saving_keeps_the_last_checkpoint(self, tmp_path, data_files, console, monkeypatch):
        wanted = settings(data_files, **{**REMEMBERED, "steps": 4, "save_every": 2})
        saved = []

        def full_the_second_time(path, *args, **more):
            saved.append(path)
            if len(saved) == 2:
                raise SaveError("the remembered scores could not be saved: No space left on device")
            save_remembered(path, *args, **more)

        monkeypatch.setattr("cggr_train.session.save_remembered", full_the_second_time)
        with pytest.raises(SaveError, match=r"the last good checkpoint is .*step-00000002"):
            start_run(wanted, tmp_path / "run", console)
        checkpoints = tmp_path / "run" / "checkpoints"
        assert [entry.name for entry in checkpoints.iterdir()] == ["step-00000002"]
        assert (checkpoints / "step-00000002" / FILE_NAME).is_file()

    def test_a_checkpoint_without_its_scores(self, tmp_path, data_files, console, monkeypatch):
        with monkeypatch.context() as patch:
            interrupt_at(patch, 2)
            start_run(settings(data_files, **REMEMBERED), tmp_path / "run", console)
        (latest_checkpoint(tmp_path / "run" / "checkpoints") / FILE_NAME).unlink()
        with pytest.raises(InputError, match="holds no remembered scores"):
            resume_run(tmp_path / "run", console)

    def test_a_learned_router_resumes_exactly(self, tmp_path, data_files, console, monkeypatch):
        wanted = settings(data_files, method="cggr", routing=Routing(router="learned", router_depth=1))
        assert_continues_exactly(wanted, tmp_path, console, monkeypatch, interrupted_at=3)
        train = [record for record in read_log(tmp_path / "parts" / "log.jsonl") if record["event"] == "train"]
        assert all("router_correlation" in record for record in train)


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (Routing(router="remembred"), "--router must be one of .*did you mean 'remembered'"),
        (Routing(router="remembered"), "needs examples that return every epoch"),
        (Routing(router="remembered", router_depth=2), "--router-depth requires"),
        (Routing(router="full_depth", router_depth=2), "--router-depth requires"),
        (Routing(router="learned", selection="random"), "uses no score"),
        (Routing(router="learned", router_depth=2), "the model has only 2"),
    ],
)
def test_routers_that_cannot_be(routing, message):
    model = build_model(build_config("nano", vocab_size=300, length=32), seed=0)
    with pytest.raises(InputError, match=message):
        build_learner(model, "cggr", routing, seed=0)


def test_the_random_control_needs_no_router():
    model = build_model(build_config("nano", vocab_size=300, length=32), seed=0)
    learner = build_learner(model, "random", Routing(router="learned", router_depth=1), seed=0)
    learner.loss(torch.randint(0, 300, (2, 32))).backward()
    assert learner.memory is None
    assert learner.metrics["engine"] == "interleaved"
