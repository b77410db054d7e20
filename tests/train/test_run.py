import dataclasses
import errno
import signal

import pytest
import torch

from cggr_train import checkpoint as checkpoint_module
from cggr_train.checkpoint import latest_checkpoint, list_checkpoints, load_training_state
from cggr_train.errors import DivergedError, InputError, SaveError
from cggr_train.folder_lock import FolderLock
from cggr_train.learner import Routing, StandardLearner
from cggr_train.log import JsonlLog, read_log
from cggr_train.presets import load_model
from cggr_train.run import resume_run, start_run
from cggr_train.tokenizer import load_tokenizer
from tests.support.runs import assert_continues_exactly, interrupt_at, settings

METHODS = {
    "standard": {"method": "standard"},
    "random": {"method": "random"},
    "cggr": {"method": "cggr"},
    "router": {"method": "cggr", "routing": Routing(router_depth=1)},
    "warming up": {"method": "cggr", "routing": Routing(ratio_warmup_steps=8, selection="sampled")},
    "exact": {"method": "cggr", "routing": Routing(gradient="exact")},
}


def test_a_run_leaves_everything_it_promises(tmp_path, data_files, console, monkeypatch):
    monkeypatch.undo()  # with its learning curve
    folder = tmp_path / "run"
    result = start_run(settings(data_files), folder, console)
    assert result.exit_code == 0
    assert result.progress.step == 6
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step-00000004", "step-00000006"]
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    records = read_log(folder / "log.jsonl")
    assert [record["step"] for record in records if record["event"] == "heldout"] == [3, 6]
    train = [record for record in records if record["event"] == "train"]
    assert [record["step"] for record in train] == [2, 3, 4, 6]
    assert {"loss", "keep_ratio", "tokens_per_second", "memory_bytes", "learning_rate"} <= train[0].keys()
    assert records[-1]["heldout_loss"] == result.heldout_loss
    model, tokenizer = load_model(str(result.checkpoint)), load_tokenizer(str(result.checkpoint))
    assert model.config.vocab_size == len(tokenizer)
    printed = console.file.getvalue()
    assert "12 documents" in printed
    assert "keep 100%" in printed


@pytest.mark.parametrize("name", METHODS)
def test_resume_continues_exactly(tmp_path, data_files, console, monkeypatch, name):
    wanted = settings(data_files, **METHODS[name])
    stopped, resumed = assert_continues_exactly(wanted, tmp_path, console, monkeypatch, interrupted_at=3)
    assert stopped.exit_code == 130
    assert stopped.checkpoint.name == "step-00000003"
    assert resumed.exit_code == 0
    states = [load_training_state(latest_checkpoint(tmp_path / part / "checkpoints")) for part in ("whole", "parts")]
    assert states[0].learner == states[1].learner
    assert states[0].random["cpu"].equal(states[1].random["cpu"])
    logs = [
        [
            record["loss"]
            for record in read_log(tmp_path / part / "log.jsonl")
            if record.get("step") == 6 and "loss" in record
        ]
        for part in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    logged = [record["step"] for record in read_log(tmp_path / "parts" / "log.jsonl") if record["event"] == "train"]
    assert logged == [2, 3, 4, 6], "a resumed run goes on with the log it had"


def test_kept_ratio_and_engine_are_logged(tmp_path, data_files, console):
    start_run(settings(data_files, method="cggr", routing=Routing(ratio=0.5)), tmp_path / "run", console)
    record = next(record for record in read_log(tmp_path / "run" / "log.jsonl") if record["event"] == "train")
    assert record["keep_ratio"] == pytest.approx(0.5, abs=0.02)
    assert record["engine"] == "two_pass"
    assert record["countable_tokens"] == 2 * 31


def test_a_finished_run_can_be_prolonged(tmp_path, data_files, console):
    start_run(settings(data_files), tmp_path / "run", console)
    assert resume_run(tmp_path / "run", console, steps=8).progress.step == 8
    assert resume_run(tmp_path / "run", console, steps=8).progress.step == 8, "nothing left to do is no error"


def test_without_a_budget_it_is_one_pass_over_the_text(tmp_path, data_files, console):
    result = start_run(settings(data_files, steps=None, batch_size=8), tmp_path / "run", console)
    sequences = (tmp_path / "run" / "tokens" / "train.bin").stat().st_size // 2 // 32
    assert result.progress.step == -(-sequences // 8)
    assert resume_run(tmp_path / "run", console).progress.step == result.progress.step


def test_sigterm_stops_cleanly_too(tmp_path, data_files, console, monkeypatch):
    interrupt_at(monkeypatch, 1, signal.SIGTERM)
    result = start_run(settings(data_files), tmp_path / "run", console)
    assert result.exit_code == 143
    assert result.checkpoint.name == "step-00000001"


def test_training_goes_on_from_a_model_directory(tmp_path, data_files, console):
    first = start_run(settings(data_files), tmp_path / "first", console)
    second = settings(data_files, config=None, model=str(first.checkpoint), steps=2)
    result = start_run(second, tmp_path / "second", console)
    assert result.progress.step == 2
    with pytest.raises(InputError, match=r"--length must be at most 2,048, .* of the model in .*, got 4,096"):
        start_run(dataclasses.replace(second, length=4096), tmp_path / "third", console)


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path, data_files, console, texts):
    from cggr_train.tokenizer import train_tokenizer

    first = start_run(settings(data_files, steps=1), tmp_path / "first", console)
    train_tokenizer(texts, vocab_size=310).save_pretrained(tmp_path / "other")
    wrong = settings(data_files, config=None, model=str(first.checkpoint), tokenizer=str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"does not match the model: its ids go up to 309, .* 300 rows"):
        start_run(wrong, tmp_path / "run", console)
    assert not (tmp_path / "run").exists(), "nothing half-done"


def test_a_model_directory_without_tokenizer(tmp_path, data_files, console):
    first = start_run(settings(data_files, steps=1), tmp_path / "first", console)
    load_model(str(first.checkpoint)).save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="give its tokenizer with --tokenizer"):
        start_run(settings(data_files, config=None, model=str(tmp_path / "bare")), tmp_path / "run", console)


def test_a_run_is_not_overwritten(tmp_path, data_files, console):
    start_run(settings(data_files, steps=1), tmp_path / "run", console)
    with pytest.raises(InputError, match="already holds a run; continue it with --resume"):
        start_run(settings(data_files, steps=1), tmp_path / "run", console)


def test_nothing_to_resume(tmp_path, console):
    with pytest.raises(InputError, match="holds no run that can be resumed"):
        resume_run(tmp_path, console)


def test_a_full_disk_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path, data_files, console, monkeypatch):
    original = checkpoint_module.save_state

    def save_state(folder, name, state):
        if state["progress"]["step"] > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(folder, name, state)

    monkeypatch.setattr(checkpoint_module, "save_state", save_state)
    with pytest.raises(SaveError, match=r"No space left on device; the last good checkpoint is .*step-00000004"):
        start_run(settings(data_files), tmp_path / "run", console)
    monkeypatch.undo()
    assert resume_run(tmp_path / "run", console).progress.step == 6


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path, data_files, console, monkeypatch):
    original = StandardLearner.loss
    calls = []

    def loss(self, input_ids, **place):
        calls.append(None)
        return original(self, input_ids, **place) * (float("nan") if len(calls) > 4 else 1.0)

    monkeypatch.setattr(StandardLearner, "loss", loss)
    with pytest.raises(DivergedError, match=r"step 6 failed: the loss is NaN.*; lower --learning-rate"):
        start_run(settings(data_files), tmp_path / "run", console)
    last = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert last.name == "step-00000004"
    assert all(torch.isfinite(parameter).all() for parameter in load_model(str(last)).parameters())


def test_a_log_that_cannot_be_written_ends_the_run_with_the_last_good_checkpoint(
    tmp_path, data_files, console, monkeypatch
):
    original = JsonlLog.write

    def write(self, **record):
        if record["step"] > 4:
            monkeypatch.setattr("pathlib.Path.open", full)
        original(self, **record)

    def full(self, *arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JsonlLog, "write", write)
    with pytest.raises(SaveError, match=r"log\.jsonl could not be written: No space .*; the last good .*-00000004"):
        start_run(settings(data_files), tmp_path / "run", console)
    monkeypatch.undo()
    assert resume_run(tmp_path / "run", console).progress.step == 6


def test_tokens_that_cannot_be_written(tmp_path, data_files, console, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cggr_train.data.token_store._write", full)
    with pytest.raises(SaveError, match=r"the text's tokens could not be written to .*run: No space left on device"):
        start_run(settings(data_files), tmp_path / "run", console)


@pytest.mark.parametrize("method", ["standard", "cggr"])
def test_weights_that_are_not_finite_are_neither_saved_nor_a_success(tmp_path, data_files, console, method):
    """The loss of a step is from before its update: the last ones of all are seen by the evaluation alone."""
    bad = settings(data_files, method=method, steps=2, learning_rate=1e36, clip=0.0, lr_warmup=0.0, save_every=1)
    with pytest.raises(DivergedError, match=r"lower --learning-rate.*; the last good checkpoint is .*step-00000001"):
        start_run(dataclasses.replace(bad, eval_every=100, log_every=100), tmp_path / "a", console)
    with pytest.raises(DivergedError, match=r"lower --learning-rate.*; there is no earlier checkpoint"):
        start_run(dataclasses.replace(bad, steps=5, save_every=100), tmp_path / "b", console)
    assert not (tmp_path / "b" / "checkpoints").exists()


def test_one_process_at_a_time_writes_a_folder(tmp_path, data_files, console):
    start_run(settings(data_files, steps=1), tmp_path / "run", console)
    with FolderLock(tmp_path / "run") as lock:
        lock.take()
        with pytest.raises(InputError, match=r"another process is writing to .*run; wait until it ends"):
            resume_run(tmp_path / "run", console)
        with FolderLock(tmp_path / "new") as other:
            other.take()
            with pytest.raises(InputError, match=r"another process is writing to .*new"):
                start_run(settings(data_files), tmp_path / "new", console)
    assert not (tmp_path / "new").exists(), "nothing was put into it"
    assert resume_run(tmp_path / "run", console).progress.step == 1, "let go of at the end"


def test_a_folder_that_cannot_be_made_or_holds_something_else(tmp_path, data_files, console):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"the folder .*file/run cannot be written: Not a directory"):
        start_run(settings(data_files), tmp_path / "file" / "run", console)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_text("{}")
    with pytest.raises(InputError, match="holds a study, whose files a run would overwrite; give another --out"):
        start_run(settings(data_files), tmp_path / "study", console)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"config": None}, "give either a model directory"),
        ({"model": "x"}, "give either a model directory"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "--learning-rate must be positive"),
        ({"learning_rate": float("nan")}, "--learning-rate must be a finite number, got nan"),
        ({"weight_decay": -0.1}, "--weight-decay must be at least 0, got -0.1"),
        ({"clip": -1.0}, "--clip must be at least 0, got -1.0"),
        ({"seconds": float("nan")}, "--seconds must be a finite number, got nan"),
        ({"seed": -1}, "--seed must be from 0 to"),
        ({"routing": Routing(router_depth=0)}, "--router-depth must be at least 1, got 0"),
        ({"routing": Routing(selection="startified")}, "--selection must be one of .* did you mean 'stratified'"),
        ({"routing": Routing(selection="supervised")}, "every token has one; give another selection"),
        ({"routing": Routing(router="lerned")}, "--router must be one of .* did you mean 'learned'"),
        ({"routing": Routing(scoring="excess")}, "--scoring excess needs a reference model"),
        ({"routing": Routing(ratio_warmup_steps=-1)}, "--ratio-warmup-steps must be at least 0, got -1"),
        ({"heldout_fraction": 0.9}, "--heldout-fraction must be in"),
        ({"precision": "half"}, "--precision must be auto, float32 or bfloat16, got 'half'"),
        ({"lr_warmup": 1.0}, "--lr-warmup must be in"),
        ({"steps": 0}, "--steps must be positive, got 0"),
        ({"device": "abacus"}, "--device abacus cannot be used here"),
        ({"method": "magic"}, "--method must be one of .*, got 'magic'"),
        ({"method": "cggr", "routing": Routing(ratio=1.5)}, "1.5"),
        ({"method": "cggr", "routing": Routing(scoring="gradnrm")}, "gradnorm"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, data_files, console, values, message):
    with pytest.raises(InputError, match=message):
        start_run(settings(data_files, **values), tmp_path / "run", console)
    assert not (tmp_path / "run").exists(), "nothing half-done"
