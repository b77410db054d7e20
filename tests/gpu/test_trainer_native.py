"""CGGRTrainer and CGGRModule on a GPU: low precision, resuming, adapters, and ranks that share a batch over NCCL."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import cggr_core.step.selecting
from cggr_train import CGGRConfig
from tests.support.launchers import finish, launched
from tests.support.trainer_kit import CHECKPOINTING, change, examples, pad, relative_error, trainer
from tests.support.trainer_ranks import LEARNING_RATE, SETTINGS, STEPS, run, wide_model

pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Relative, of what training did to the weights; a few units of rounding.
ROUNDING = {"bf16": 0.02, "fp16": 0.005}
# Selections that rounding cannot turn: a step is compared with the same step.
FIXED = {
    "interleaved": CGGRConfig(selection="random"),
    "two passes": CGGRConfig(selection="supervised", engine="two_pass"),
    "exact": CGGRConfig(gradient="exact", selection="random"),
}


@pytest.fixture(autouse=True)
def _one_gpu(monkeypatch):
    """A Trainer in one process would split its batches over all GPUs of the machine, which is refused."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", 1)


@pytest.fixture
def selections(monkeypatch):
    """The mask of every selection that is made."""
    made, select = [], cggr_core.step.selecting.select

    def noted(*args, **kwargs):
        selection = select(*args, **kwargs)
        made.append(selection.mask)
        return selection

    monkeypatch.setattr(cggr_core.step.selecting, "select", noted)
    return made


def plain_loop(model, cggr: CGGRConfig, precision: str) -> tuple[list[float], int]:
    """What the Trainer does, written out: losses, and how many steps the scaler let through."""
    routed = cggr.build(model.cuda().train(), seed=42)  # the seed of training arguments
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    losses, taken = [], 0
    for step, batch in enumerate(DataLoader(examples(4 * STEPS), 4, collate_fn=pad)):
        batch = {name: value.cuda() for name, value in batch.items()}
        with torch.autocast("cuda", dtype=DTYPES[precision]):
            loss = routed(**batch, draw=step, num_items=int((batch["labels"][:, 1:] != -100).sum()))
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        taken += scaler.get_scale() >= before
        optimizer.zero_grad()
        routed.step()
        losses.append(float(loss.detach()))
    return losses, taken


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("precision", DTYPES)
def test_low_precision_is_that_of_a_plain_loop(tmp_path, precision, name):
    by_hand = wide_model()
    losses, taken = plain_loop(by_hand, FIXED[name], precision)
    assert taken >= 2, "steps that the scaler skips show nothing"
    made, found = run(FIXED[name], tmp_path, **{precision: True})
    assert [record["loss"] for record in found["log"]] == pytest.approx(losses, abs=1e-3)  # the log rounds
    assert relative_error(found["change"], change(wide_model(), by_hand.cpu())) <= ROUNDING[precision]
    assert all(parameter.dtype == torch.float32 for parameter in made.model.parameters())


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("precision", DTYPES)
def test_low_precision_is_close_to_full(tmp_path, precision, name):
    _, wanted = run(FIXED[name], tmp_path, max_steps=1)
    made, found = run(FIXED[name], tmp_path, max_steps=1, **{precision: True})
    scaler = made.accelerator.scaler
    assert (scaler is not None) == (precision == "fp16")
    assert 0 < relative_error(found["change"], wanted["change"]) <= 2 * ROUNDING[precision]


@pytest.mark.parametrize("precision", [None, *DTYPES])
def test_accumulation_changes_nothing(tmp_path, precision):
    """The remaining difference is rounding in products over different numbers of rows."""
    low = {} if precision is None else {precision: True}
    limit = ROUNDING.get(precision, 1e-5)
    for cggr in (FIXED["interleaved"], FIXED["two passes"]) if low else SETTINGS.values():
        _, one = run(cggr, tmp_path, **low)
        _, four = run(cggr, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, **low)
        assert relative_error(four["change"], one["change"]) <= limit


@pytest.mark.parametrize("precision", DTYPES)
def test_a_resumed_run_makes_the_same_selections(tmp_path, selections, precision):
    values = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "data": examples(20), precision: True}
    cggr = CGGRConfig(ratio_warmup_steps=4)
    whole = run(cggr, tmp_path, **values)[0]
    uninterrupted, checkpoint = list(selections), str(tmp_path / "checkpoint-3")
    selections.clear()
    parts = trainer(tmp_path, cggr, model=wide_model(), use_cpu=False, **values)
    parts.train(resume_from_checkpoint=checkpoint)
    assert len(uninterrupted) == 5 and len(selections) == 2
    assert all(torch.equal(one, other) for one, other in zip(selections, uninterrupted[3:], strict=True))
    start = wide_model()
    assert relative_error(change(start, parts.model.cpu()), change(start, whole.model.cpu())) <= 1e-4


@pytest.mark.parametrize("precision", DTYPES)
def test_adapters_and_checkpointing(tmp_path, precision):
    """Only LoRA adapters are trained, and recomputed layers give the same step."""
    from peft import LoraConfig, get_peft_model

    def adapted():
        torch.manual_seed(1)
        return get_peft_model(wide_model(), LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))

    def moved(model):
        return {name: value for name, value in change(adapted(), model.cpu()).items() if value.any()}

    found = {}
    for checkpointing in (False, True):
        more = {CHECKPOINTING: checkpointing, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}, precision: True}
        made = trainer(tmp_path, FIXED["interleaved"], model=adapted(), use_cpu=False, max_steps=STEPS, **more)
        made.train()
        found[checkpointing] = moved(made.model)
    assert found[False] and all("lora_" in name for name in found[False])
    assert relative_error(found[True], found[False]) <= 1e-3


@pytest.mark.parametrize("precision", DTYPES)
def test_evaluation_is_of_the_full_loss(tmp_path, precision):
    model, low = wide_model(), {precision: True, "use_cpu": False}
    plain = trainer(tmp_path, kind=Trainer, model=model, **low).evaluate()
    assert trainer(tmp_path, CGGRConfig(), model=model, **low).evaluate()["eval_loss"] == plain["eval_loss"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """What one process does with every setting, as :mod:`trainer_ranks` reads it."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingArguments, "n_gpu", 1)
        for name, cggr in SETTINGS.items():
            torch.save(run(cggr, folder)[1], folder / f"{name}.pt")
    return folder


@pytest.mark.parametrize(("ranks", "engine"), [(1, "FSDP2"), (2, "DDP"), (2, "FSDP2")])
def test_ranks_train_as_one_process_does(alone, tmp_path, ranks, engine):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} ranks take a GPU each; {torch.cuda.device_count()} here")
    print(finish(launched("torchrun", ranks, "-m", "tests.support.trainer_ranks", engine, alone, tmp_path)).stdout)


@pytest.mark.filterwarnings("ignore:.*(num_workers|log_every_n_steps|sequential sampler|`val_dataloader`|litlogger).*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning[.]")
@pytest.mark.filterwarnings("ignore::FutureWarning:(lightning|torch)[.]")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning(tmp_path, precision):
    lightning = pytest.importorskip("lightning", reason="the Lightning module is an extra, cggr-train[lightning]")
    from cggr_train.lightning import CGGRModule

    def fit(precision: str):
        module = CGGRModule(wide_model(), FIXED["interleaved"], learning_rate=1e-3)
        settings = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "devices": 1}
        fitting = lightning.Trainer(max_steps=STEPS, accelerator="gpu", precision=precision, default_root_dir=tmp_path,
                                    enable_model_summary=False, **settings)  # fmt: skip
        fitting.fit(module, DataLoader(examples(4 * STEPS), 4, collate_fn=pad))
        assert module.routed.schedule.steps == fitting.global_step == STEPS
        return fitting.callback_metrics

    wanted, found = fit("32-true"), fit(precision)
    assert found["kept_tokens"] == wanted["kept_tokens"]
    assert found["train_loss"].item() == pytest.approx(wanted["train_loss"].item(), rel=0.01)
