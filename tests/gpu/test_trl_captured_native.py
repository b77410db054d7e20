"""Updates of TRL's trainers on a GPU whose pass is captured: the loss and the gradients of the updates as they are."""

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")

from cggr_core.recording import ledger
from cggr_train import CGGRConfig
from cggr_train.tokenizer import train_tokenizer
from tests.support.recorded_steps import worth_it
from tests.support.trl_kit import QUIET, error, step
from tests.support.trl_updates import CASES, trainer_of, updates

pytestmark = [
    pytest.mark.gpu,
    *QUIET,
    # With checkpointing torch warns that gradients of eager updates arrive on another stream than those of captures.
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning"),
]
ENOUGH = ledger.IN_A_ROW + 3


@pytest.fixture(scope="module")
def tokenizer():
    texts = [f"def function_{n}(a, b):\n    return a * {n} + b ** {n % 7}\n\n" for n in range(60)]
    return train_tokenizer(texts, vocab_size=300)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_numbers_of_the_updates_as_they_are(name, checkpointing, tmp_path, tokenizer, monkeypatch):
    worth_it(monkeypatch)
    kind, config, values = CASES[name]
    values = {"use_cpu": False, "gradient_checkpointing": checkpointing, **values}
    plain, made = (
        trainer_of(kind, config, tmp_path, tokenizer, CGGRConfig(selection="supervised", cuda_graph=graph), **values)
        for graph in (False, "auto")
    )
    if checkpointing:
        for one in (plain, made):
            one.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tolerance = 2e-2 if values.get("bf16") else 1e-4
    replays, taken = [], made._task_loss.forward().runs.recorder
    for batch in updates(plain, name, len(tokenizer), ENOUGH):
        wanted, expected = step(plain, batch)
        found, ours = step(made, batch)
        replays.append(taken.replayed)
        assert found == pytest.approx(wanted, rel=tolerance)
        assert error(ours, expected) <= tolerance
    assert replays[0] is False and any(replays), taken.reason
    torch.cuda.synchronize()
