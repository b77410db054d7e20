"""CGGRTrainer: the same step however it is split, and otherwise the plain Trainer."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    DataCollatorWithFlattening,
    HfArgumentParser,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from cggr_train import CGGRConfig, CGGRTrainer
from tests.support.trainer_kit import CHECKPOINTING, examples, pad, relative_error, tiny_model, trained, trainer

SETTINGS = {
    "default": CGGRConfig(),
    "exact": CGGRConfig(gradient="exact", selection="sampled"),
    "random": CGGRConfig(selection="random"),
    "detached": CGGRConfig(gradient="detached", selection="topk"),
    "supervised": CGGRConfig(selection="supervised"),
    "truncated": CGGRConfig(router="truncated", router_depth=1, min_tokens_ratio=0.5),
    "warming up": CGGRConfig(ratio_warmup_steps=3, selection="sampled", unbiased=False),
}


@pytest.fixture(autouse=True)
def _quiet(capsys):
    yield
    capsys.readouterr()


@pytest.mark.parametrize("name", SETTINGS)
def test_accumulation_changes_nothing(tmp_path, name):
    one = trained(tmp_path, SETTINGS[name], per_device_train_batch_size=4)
    four = trained(tmp_path, SETTINGS[name], per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert relative_error(four, one) <= 1e-6


def test_an_unfilled_last_step_is_divided_by_what_it_holds(tmp_path):
    # Six examples: the second step of the epoch has two of them.
    split = {"data": examples(6), "max_steps": -1, "num_train_epochs": 1}
    one = trained(tmp_path, CGGRConfig(), per_device_train_batch_size=4, **split)
    four = trained(tmp_path, CGGRConfig(), per_device_train_batch_size=1, gradient_accumulation_steps=4, **split)
    assert relative_error(four, one) <= 1e-6


@pytest.mark.parametrize("gradient", ["exact", "kv", "detached", "sequence"])
def test_with_everything_kept_it_is_the_plain_trainer(tmp_path, gradient):
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    plain = trained(tmp_path, kind=Trainer, **split)
    found = trained(tmp_path, CGGRConfig(gradient=gradient, min_tokens_ratio=1.0), **split)
    assert relative_error(found, plain) <= 1e-5


def test_checkpointing_changes_nothing(tmp_path):
    for cggr in (SETTINGS["default"], SETTINGS["random"]):
        wanted = trained(tmp_path, cggr)
        settings = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
        found = trained(tmp_path, cggr, **settings)
        assert relative_error(found, wanted) <= 1e-6


def test_bfloat16_is_close(tmp_path):
    for cggr in (SETTINGS["random"], SETTINGS["supervised"], CGGRConfig(gradient="exact", selection="random")):
        wanted = trained(tmp_path, cggr, max_steps=1)
        found = trained(tmp_path, cggr, max_steps=1, bf16=True)
        assert 0 < relative_error(found, wanted) <= 0.03


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked for by peft
def test_lora_trains_adapters_alone_and_saves_them_plainly(tmp_path):
    from peft import PeftModel

    base = tiny_model()
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    made = trainer(tmp_path / "run", CGGRConfig(), model=model)
    made.train()
    assert all(p.equal(frozen[name]) for name, p in model.named_parameters() if name in frozen)
    made.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")
    input_ids = torch.arange(3, 13)[None]
    torch.testing.assert_close(loaded.eval()(input_ids).logits, model.eval()(input_ids).logits)


@pytest.mark.parametrize("gradient", ["exact", "kv", "detached"])
def test_a_padding_free_batch_makes_the_step_of_the_padded_one(tmp_path, gradient):
    cggr = CGGRConfig(gradient=gradient, selection="supervised")
    padded = trained(tmp_path, cggr)
    for more in ({}, {"return_flash_attn_kwargs": True}):
        flat = trained(tmp_path, cggr, collator=DataCollatorWithFlattening(**more))
        assert relative_error(flat, padded) <= 2e-6


def test_evaluation_is_of_the_full_loss(tmp_path):
    model = tiny_model()
    plain = trainer(tmp_path, kind=Trainer, model=model).evaluate()
    routed = trainer(tmp_path, CGGRConfig(), model=model).evaluate()
    assert routed["eval_loss"] == plain["eval_loss"]


def test_evaluation_between_steps_changes_nothing(tmp_path):
    wanted = trained(tmp_path, CGGRConfig())
    assert relative_error(trained(tmp_path, CGGRConfig(), eval_strategy="steps", eval_steps=1), wanted) == 0.0


@pytest.mark.parametrize("name", ["default", "random", "warming up"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, name):
    values = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "random"}
    settings = {**values, "optim": "adamw_torch", "learning_rate": 1e-2, "per_device_train_batch_size": 2}

    def build():
        return trainer(tmp_path / "run", SETTINGS[name], model=tiny_model(attention_dropout=0.1), **settings)

    whole = build()
    whole.train()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoint-3").glob("cggr_state*")) == [
        "cggr_state.json",
        "cggr_state.safetensors",
    ]
    parts = build()
    parts.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    pairs = zip(whole.model.named_parameters(), parts.model.named_parameters(), strict=True)
    assert all(one.equal(other) for (_, one), (_, other) in pairs)
    assert parts.routed_model().schedule.steps == 5


def test_a_checkpoint_of_the_plain_trainer_can_be_resumed(tmp_path):
    values = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, kind=Trainer, **values).train()
    (tmp_path / "checkpoint-4").rename(tmp_path / "not-the-last")
    made = trainer(tmp_path, SETTINGS["warming up"], **values)
    made.train(resume_from_checkpoint=True)
    assert made.routed_model().schedule.steps == 4


def test_what_is_saved_is_the_plain_model(tmp_path):
    made = trainer(tmp_path, CGGRConfig(), max_steps=1, save_strategy="steps", save_steps=1)
    made.train()
    loaded, information = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-1", output_loading_info=True)
    assert not any(information[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(p.equal(q) for p, q in zip(loaded.parameters(), made.model.parameters(), strict=True))
    assert type(made.model) is LlamaForCausalLM and "forward" not in vars(made.model)


def test_the_log_tells_what_was_kept(tmp_path):
    made = trainer(tmp_path, CGGRConfig(min_tokens_ratio=0.5, selection="topk"), max_steps=4, logging_steps=2)
    made.train()
    records = [record for record in made.state.log_history if "loss" in record]
    assert len(records) == 2
    countable = sum(label != -100 for row in examples() for label in row["labels"][1:])
    for record in records:
        assert record["countable_tokens"] == countable
        assert record["keep_ratio"] == record["kept_tokens"] / countable == pytest.approx(0.5, abs=0.05)
        assert record["score_kept"] > record["score_dropped"] > 0
        assert record["keep_ratio"] < record["gradnorm_kept"] < 1
        assert record["full_loss"] == pytest.approx(record["loss"], rel=0.2)
        assert record["scoring_seconds"] > 0
    assert not {"kept_tokens", "scoring_seconds"} & made.state.log_history[-1].keys(), "the summary is the Trainer's"


def test_a_selection_without_scores_logs_none(tmp_path):
    made = trainer(tmp_path, CGGRConfig(selection="random"), max_steps=1)
    made.train()
    record = made.state.log_history[0]
    assert {"keep_ratio", "kept_tokens", "countable_tokens"} <= record.keys()
    assert not {"score_kept", "scoring_seconds", "gradnorm_kept", "full_loss"} & record.keys()


@pytest.mark.parametrize("selection", ["stratified", "sampled", "random", "topk", "sequence_aware", "supervised"])
def test_prompts_are_never_kept(tmp_path, selection, monkeypatch):
    made = trainer(tmp_path, CGGRConfig(selection=selection, gradient="detached"), max_steps=1)
    passes, seen = made.routed_model()._passes, []
    original = passes.gradient

    def gradient(batch, selection, *args, **kwargs):
        seen.append(selection.mask)
        return original(batch, selection, *args, **kwargs)

    monkeypatch.setattr(passes, "gradient", gradient)
    made.train()
    labels = pad(examples(4))["labels"]
    supervised = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    assert seen[0].any() and not (seen[0] & ~supervised).any()
    if selection == "supervised":
        assert seen[0].equal(supervised)


def test_a_step_without_labels_learns_nothing(tmp_path):
    data = [{**row, "labels": [-100] * len(row["labels"])} for row in examples(4)]
    done = trained(tmp_path, CGGRConfig(), data=data, max_steps=1)
    assert all(torch.isfinite(value).all() and not value.any() for value in done.values())


def test_reference_losses_and_weights_reach_the_step(tmp_path):
    def collate(rows):
        batch = pad(rows)
        weight = torch.zeros(batch["labels"].shape)
        weight[:, :6] = 1.0
        return {**batch, "reference_nll": torch.ones_like(weight), "token_weight": weight}

    one = trained(tmp_path, CGGRConfig(scoring="excess"), collator=collate)
    four = trained(tmp_path, CGGRConfig(scoring="excess"), collator=collate, per_device_train_batch_size=1,
                   gradient_accumulation_steps=4)  # fmt: skip
    assert relative_error(four, one) <= 1e-6
    assert relative_error(one, trained(tmp_path, CGGRConfig(scoring="loss"))) > 0.1


def test_a_datasets_columns_of_the_step_are_not_removed(tmp_path):
    rows = [{**row, "token_weight": [float(n % 2)] * 12} for n, row in enumerate(examples(length=12))]
    columns = {"data": Dataset.from_list(rows), "remove_unused_columns": True, "collator": default_data_collator}
    one = trained(tmp_path, CGGRConfig(), **columns)
    more = {"data": rows, "collator": default_data_collator}
    assert relative_error(one, trained(tmp_path, CGGRConfig(), **more)) == 0.0
    assert relative_error(one, trained(tmp_path, CGGRConfig(), data=examples(length=12))) > 0.1
    made = trainer(tmp_path, CGGRConfig(), **more)
    weighted, plain = (made.evaluate(Dataset.from_list(data)) for data in (rows, examples(length=12)))
    assert weighted["eval_loss"] == plain["eval_loss"], "the full loss"


class TestConfig:
    def test_from_the_command_line_and_yaml(self, tmp_path):
        parser = HfArgumentParser((TrainingArguments, CGGRConfig))
        line = ["--output_dir", str(tmp_path), "--gradient", "exact", "--engine", "two_pass", "--unbiased", "false",
                "--selection_seed", "7", "--seed", "3", "--cuda_graph", "auto"]  # fmt: skip
        training, cggr = parser.parse_args_into_dataclasses(line)
        assert training.seed == 3
        assert cggr == CGGRConfig(
            gradient="exact", engine="two_pass", unbiased=False, selection_seed=7, cuda_graph="auto"
        )
        path = tmp_path / "settings.yaml"
        path.write_text(f"output_dir: {tmp_path}\nmin_tokens_ratio: 0.125\nselection: sampled\nratio_warmup_steps: 9\n")
        _, cggr = parser.parse_yaml_file(path)
        assert cggr == CGGRConfig(min_tokens_ratio=0.125, selection="sampled", ratio_warmup_steps=9)
        with pytest.raises(SystemExit):
            parser.parse_args_into_dataclasses(["--output_dir", "x", "--gradient", "half"])

    def test_the_seed_is_the_trainers_unless_given(self, tmp_path):
        assert trainer(tmp_path, CGGRConfig(), seed=11).routed_model().settings.seed == 11
        assert trainer(tmp_path, CGGRConfig(selection_seed=5), seed=11).routed_model().settings.seed == 5

    def test_a_router_of_ones_own(self, tmp_path):
        calls = []

        def router(input_ids, **inputs):
            calls.append(input_ids.shape)
            return torch.nn.functional.one_hot(input_ids, 64).float()

        values = {"train_dataset": examples(), "data_collator": pad}
        made = CGGRTrainer(tiny_model(), trainer(tmp_path).args, router=router, **values)
        made.train()
        assert len(calls) == 2
        assert made.routed_model().metrics["engine"] == "interleaved"


def test_a_second_run_begins_anew(tmp_path):
    made = trainer(tmp_path, SETTINGS["warming up"], max_steps=3, learning_rate=0.0)
    runs = []
    for _ in range(2):
        made.train()
        runs.append([record["kept_tokens"] for record in made.state.log_history if "loss" in record])
    assert runs[0] == runs[1] and len(set(runs[0])) > 1


def test_a_batch_that_did_not_fit_leaves_no_trace(tmp_path, monkeypatch):
    values = {"auto_find_batch_size": True, "max_steps": 1, "data": examples(7)}
    found = trainer(tmp_path, CGGRConfig(), per_device_train_batch_size=8, **values)
    backward, failures = found.accelerator.backward, iter([torch.cuda.OutOfMemoryError("CUDA out of memory.")])

    def once(*args, **kwargs):
        for failure in failures:
            raise failure
        return backward(*args, **kwargs)

    monkeypatch.setattr(found.accelerator, "backward", once)
    found.train()
    smaller = found._train_batch_size
    assert smaller < 8
    wanted = trainer(tmp_path, CGGRConfig(), per_device_train_batch_size=smaller, **values)
    wanted.train()
    keys = ("loss", "kept_tokens", "countable_tokens")
    records = [[made.state.log_history[0][key] for key in keys] for made in (found, wanted)]
    assert records[0] == records[1]


def test_the_state_of_a_learned_router_is_saved(tmp_path):
    cggr = CGGRConfig(router="learned", router_depth=1)
    values = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "run", cggr, **values)
    whole.train()
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "cggr_state.json").read_text())
    assert state
    parts = trainer(tmp_path / "run", cggr, **values)
    parts.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    pairs = zip(whole.model.parameters(), parts.model.parameters(), strict=True)
    assert all(one.equal(other) for one, other in pairs)
