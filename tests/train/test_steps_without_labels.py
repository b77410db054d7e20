"""An optimizer step of a Trainer in which no token has a label: a zero loss, and no change."""

import math

import pytest

from cggr_train import CGGRConfig
from tests.support.trainer_kit import change, examples, tiny_model, trainer


@pytest.fixture(autouse=True)
def _quiet(capsys):
    yield
    capsys.readouterr()


@pytest.mark.parametrize(
    "cggr",
    [
        CGGRConfig(gradient=gradient, selection=selection)
        for gradient in ("exact", "kv", "sequence")
        for selection in ("stratified", "supervised")
        if (gradient, selection) != ("sequence", "supervised")
    ],
    ids=lambda cggr: f"{cggr.gradient}-{cggr.selection}",
)
def test_a_step_without_a_label_changes_nothing(tmp_path, cggr):
    rows = [{**row, "labels": [-100] * len(row["input_ids"])} for row in examples(8)]
    model, before = tiny_model(), tiny_model()
    run = trainer(tmp_path, cggr, model=model, data=rows, gradient_accumulation_steps=2, max_steps=2, logging_steps=1)
    run.train()
    records = [record for record in run.state.log_history if "loss" in record]
    assert [record["loss"] for record in records] == [0.0, 0.0]
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert not any(difference.any() for difference in change(before, model).values())
