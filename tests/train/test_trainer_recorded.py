"""A Trainer's steps recorded on the CPU: the trained weights, with and without recordings."""

import pytest

from cggr_train import CGGRConfig
from tests.support.recorded_steps import record_at_once, record_by_doing_again
from tests.support.trainer_kit import CHECKPOINTING, change, examples, relative_error, tiny_model, trainer


@pytest.fixture(autouse=True)
def _recorded_at_once(monkeypatch):
    record_at_once(monkeypatch)


def trained(folder, cggr: CGGRConfig, *, recorded: bool, **values):
    """What training did, how many steps were replayed, and how many recordings there are."""
    made = trainer(folder, cggr, **values)
    before, routed, replays = tiny_model(), made.routed_model(), []
    if recorded:
        record_by_doing_again(routed)
        take = routed._recorder.take_step

        def noted(*args):
            taken = take(*args)
            replays.append(taken is not None)
            return taken

        routed._recorder.take_step = noted
    made.train()
    return change(before, made.model), replays, routed._recorder.recordings if recorded else 0


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
@pytest.mark.parametrize(
    "settings",
    [
        {"selection": "random"},
        {"selection": "supervised"},
        {"gradient": "exact", "selection": "random"},
        {"gradient": "exact", "selection": "supervised"},
        {"gradient": "sequence", "selection": "random", "min_tokens_ratio": 0.5},
        {"router": "truncated", "router_depth": 1, "selection": "sampled"},
    ],
)
def test_accumulation_and_clipping(settings, precision, tmp_path):
    """Four micro-batches per step, with different numbers of items: one recording serves them all."""
    values = {"max_steps": 4, "gradient_accumulation_steps": 4, "max_grad_norm": 0.1, "data": examples(64, length=24)}
    values |= {"per_device_train_batch_size": 4, **precision}
    wanted, *_ = trained(tmp_path / "plain", CGGRConfig(cuda_graph=False, **settings), recorded=False, **values)
    found, replays, recordings = trained(tmp_path / "own", CGGRConfig(**settings), recorded=True, **values)
    assert replays == [False, False, *[True] * 14]  # the first step also looks at the model
    assert recordings == 1
    assert relative_error(found, wanted) <= (2e-2 if precision else 1e-5)


def test_checkpointed_layers(tmp_path):
    """As TRL's trainers have them by default."""
    values = {"max_steps": 4, "gradient_accumulation_steps": 2, "data": examples(32, length=24), CHECKPOINTING: True}
    settings = {"selection": "supervised"}
    wanted, *_ = trained(tmp_path / "plain", CGGRConfig(cuda_graph=False, **settings), recorded=False, **values)
    found, replays, _ = trained(tmp_path / "own", CGGRConfig(**settings), recorded=True, **values)
    assert replays == [False, False, *[True] * 6]
    assert relative_error(found, wanted) <= 1e-5


def test_the_last_batch_is_shorter_and_rows_are_of_several_lengths(tmp_path):
    """Shapes that occur once run eagerly; those that recur are replayed."""
    data = examples(16, length=24) + examples(16, length=16) + examples(16, length=24) + examples(2, length=16)
    values = {"max_steps": 26, "per_device_train_batch_size": 4, "data": data}
    values |= {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
    settings = {"selection": "supervised"}
    wanted, *_ = trained(tmp_path / "plain", CGGRConfig(cuda_graph=False, **settings), recorded=False, **values)
    found, replays, recordings = trained(tmp_path / "own", CGGRConfig(**settings), recorded=True, **values)
    assert recordings == 3
    assert sum(replays) == len(replays) - 4  # the first step also looks at the model
    assert relative_error(found, wanted) <= 1e-5
