"""CGGRModule in Lightning's own trainer."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from cggr_train import CGGRConfig
from tests.support.trainer_kit import examples, pad, relative_error, tiny_model

lightning = pytest.importorskip("lightning", reason="the Lightning module is an extra, cggr-train[lightning]")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(num_workers|log_every_n_steps|sequential sampler|`val_dataloader`).*"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning[.]"),
    pytest.mark.filterwarnings("ignore::FutureWarning:(lightning|torch)[.]"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]


def fit(module, folder, *, steps=3, batch_size=4, rows=12, checkpoint=None, **settings):
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, **{"enable_checkpointing": False, **settings},
    )  # fmt: skip
    trainer.fit(module, DataLoader(examples(rows), batch_size, collate_fn=pad), ckpt_path=checkpoint)
    return trainer


def module(**settings):
    from cggr_train.lightning import CGGRModule

    return CGGRModule(tiny_model(), CGGRConfig(**settings), learning_rate=1e-2, seed=3)


def weights(made):
    return {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}


def test_everything_kept_is_ordinary_training(tmp_path):
    made = module(min_tokens_ratio=1.0)
    fit(made, tmp_path)
    model = tiny_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in DataLoader(examples(12), 4, collate_fn=pad):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert relative_error(weights(made), {name: p.detach() for name, p in model.named_parameters()}) <= 1e-4


def test_it_logs_steps_and_keeps_what_it_says(tmp_path):
    made = module(min_tokens_ratio=0.5, ratio_warmup_steps=2)
    trainer = fit(made, tmp_path, accumulate_grad_batches=1)
    assert made.routed.schedule.steps == 3
    logged = trainer.callback_metrics
    assert logged["keep_ratio"] == pytest.approx(0.5, abs=0.05)
    assert {"train_loss", "score_kept", "gradnorm_kept", "full_loss"} <= logged.keys()


def test_steps_count_optimizer_steps(tmp_path):
    made = module(ratio_warmup_steps=10)
    fit(made, tmp_path, steps=2, batch_size=2, accumulate_grad_batches=2)
    assert made.routed.schedule.steps == 2


def test_a_checkpoint_resumes_with_the_same_selections(tmp_path):
    # At the end of an epoch and for one step: Lightning itself then starts with the batch of the uninterrupted run.
    checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1)
    whole = module(selection="random")
    fit(whole, tmp_path, steps=3, rows=8, callbacks=[checkpoints], enable_checkpointing=True)
    path = tmp_path / "epoch=0-step=2.ckpt"
    saved = torch.load(path, weights_only=True)
    assert all(name.startswith("model.") for name in saved["state_dict"])
    tiny_model().load_state_dict({name.removeprefix("model."): value for name, value in saved["state_dict"].items()})
    second = module(selection="random")
    fit(second, tmp_path, steps=3, rows=8, checkpoint=path)
    assert second.routed.schedule.steps == 3
    assert all(value.equal(weights(second)[name]) for name, value in weights(whole).items())


def test_sharded_parameters_are_refused():
    from lightning.pytorch.strategies import FSDPStrategy

    made, trainer = module(), SimpleNamespace(strategy=FSDPStrategy())  # a Trainer with it needs GPUs
    made.trainer = trainer
    with pytest.raises(ValueError, match=r"single device or DDP \(strategy='ddp'\), got FSDPStrategy"):
        made.setup("fit")


def test_validation_is_of_the_full_loss(tmp_path):
    made = module()
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                                default_root_dir=tmp_path)  # fmt: skip
    (found,) = trainer.validate(made, DataLoader(examples(4), 4, collate_fn=pad), verbose=False)
    assert found["val_loss"] == pytest.approx(float(made.model.eval()(**pad(examples(4))).loss.detach()))
