"""A policy update on two ranks under DDP is that of one process on all rows, also where a rank has no row to run."""

from pathlib import Path

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from cggr_train import CGGRConfig
from cggr_train.tokenizer import train_tokenizer
from tests.support.trl_kit import QUIET, ROWS, build, error, policy_batch, step
from tests.support.two_ranks import run_on_two_ranks

pytestmark = QUIET
ADVANTAGES = (1.0, -0.5, 0.0, 0.0)
CASES = {
    "kv": {"loss_type": "grpo", "top_entropy_quantile": 0.4},
    "exact": {"loss_type": "grpo"},
    "sequence": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
}


def made_for(name: str, folder: Path, rows: int):
    tokenizer = train_tokenizer(["def function(a, b):\n    return a * b\n" * 9], vocab_size=300)
    cggr = CGGRConfig(gradient="exact" if name == "exact" else "kv")
    made = build(GRPOTrainer, GRPOConfig, folder, tokenizer, cggr=cggr, per_device_train_batch_size=rows, **CASES[name])
    return made, policy_batch(len(tokenizer), advantages=ADVANTAGES)


def on_a_rank(folder: Path) -> None:
    for name in CASES:
        made, inputs = made_for(name, folder, ROWS // 2)
        half = slice(0, 2) if made.accelerator.process_index == 0 else slice(2, 4)
        mine = {key: value[half] if value.dim() else value for key, value in inputs.items()}
        model = made.accelerator.prepare(made.model)
        assert type(model).__name__ == "DistributedDataParallel"
        made.compute_loss(model, mine).backward()
        found = {key: p.grad for key, p in made.model.named_parameters() if p.grad is not None}
        wanted = torch.load(folder / f"{name}.pt")
        assert error(found, wanted) <= 1e-5, name


@pytest.mark.filterwarnings("ignore:No device id is provided:UserWarning")
def test_two_ranks_make_the_gradient_of_one(tmp_path):
    for name in CASES:
        made, inputs = made_for(name, tmp_path, ROWS)
        torch.save(step(made, inputs)[1], tmp_path / f"{name}.pt")
    run_on_two_ranks(on_a_rank, tmp_path, folder=tmp_path)
