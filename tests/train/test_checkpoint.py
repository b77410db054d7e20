import errno
import resource

import pytest
import torch

from cggr_train import checkpoint as module
from cggr_train.checkpoint import (
    TrainingState,
    latest_checkpoint,
    list_checkpoints,
    load_training_state,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from cggr_train.errors import InputError, SaveError
from cggr_train.loop import Progress, build_optimizer
from cggr_train.presets import build_config, build_model, load_model
from cggr_train.state_file import load_state, save_state

CPU = torch.device("cpu")


@pytest.fixture
def model():
    return build_model(build_config("nano", vocab_size=300, length=32), seed=0)


def state(model, step):
    optimizer = build_optimizer(model, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return TrainingState(Progress(step, 7, 1.5), optimizer.state_dict(), {"draw": 3}, random_state(CPU))


def test_state_comes_back(tmp_path):
    value = {
        "a": torch.arange(3),
        3: [True, None, 1.5, "x", (torch.ones(2, 2, dtype=torch.bfloat16), 2)],
        "nested": {"empty": {}, "scalar": torch.tensor(0.1, dtype=torch.float64), "tensor": "a name"},
    }
    save_state(tmp_path, "state", value)
    again = load_state(tmp_path, "state")
    assert again["a"].equal(value["a"])
    assert again[3][:4] == [True, None, 1.5, "x"]
    assert again[3][4][0].dtype == torch.bfloat16
    assert again["nested"]["scalar"].item() == 0.1
    assert again["nested"]["tensor"] == "a name"
    assert again["nested"]["empty"] == {}


def test_state_of_other_things_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"a set at state\.a"):
        save_state(tmp_path, "state", {"a": {1}})
    with pytest.raises(TypeError, match="key of type tuple"):
        save_state(tmp_path, "state", {(1, 2): 1})
    with pytest.raises(InputError, match="incomplete or damaged: nothing"):
        load_state(tmp_path, "nothing")


def test_a_checkpoint_comes_back(tmp_path, model, tokenizer):
    saved = state(model, 12)
    path = save_checkpoint(tmp_path / "c", model, tokenizer, saved)
    assert path.name == "step-00000012"
    assert latest_checkpoint(tmp_path / "c") == path
    again = load_training_state(path)
    assert again.progress == Progress(12, 7, 1.5)
    assert again.learner == {"draw": 3}
    for key, moments in saved.optimizer["state"].items():
        for name, tensor in moments.items():
            assert again.optimizer["state"][key][name].equal(tensor)
    fresh = build_optimizer(model, weight_decay=0.1)
    fresh.load_state_dict(again.optimizer)
    loaded = load_model(str(path))
    for parameter, other in zip(model.parameters(), loaded.parameters(), strict=True):
        assert parameter.equal(other)


def test_random_state_comes_back(tmp_path):
    save_state(tmp_path, "random", random_state(CPU))
    expected = torch.rand(4)
    restore_random_state(load_state(tmp_path, "random"), CPU)
    assert torch.rand(4).equal(expected)


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path, model, tokenizer):
    (tmp_path / "unfinished-step-00000001-99").mkdir()
    for step in (1, 2, 30):
        save_checkpoint(tmp_path, model, tokenizer, state(model, step), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000030"]
    assert len(list(tmp_path.iterdir())) == 2
    assert latest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("stage", ["model", "state", "flush"])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, model, tokenizer, monkeypatch, stage):
    good = save_checkpoint(tmp_path, model, tokenizer, state(model, 1))
    next_state = state(model, 2)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if stage == "model":
        monkeypatch.setattr(model, "save_pretrained", full)
    else:
        monkeypatch.setattr(module, "save_state" if stage == "state" else "_flush", full)
    with pytest.raises(SaveError, match=r"No space left on device; the last good checkpoint is .*step-00000001"):
        save_checkpoint(tmp_path, model, tokenizer, next_state, keep=1)
    assert list(tmp_path.iterdir()) == [good]
    assert load_training_state(good).progress.step == 1


def test_the_file_system_itself_refusing(tmp_path, model, tokenizer):
    good = save_checkpoint(tmp_path, model, tokenizer, state(model, 1))
    next_state = state(model, 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(SaveError, match="the last good checkpoint is"):
            save_checkpoint(tmp_path, model, tokenizer, next_state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [good]


def test_a_damaged_checkpoint_is_named(tmp_path, model, tokenizer):
    path = save_checkpoint(tmp_path, model, tokenizer, state(model, 1))
    (path / "training_state.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="step-00000001 is incomplete or damaged"):
        load_training_state(path)
