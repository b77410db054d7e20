"""DistillationTrainer and GKDTrainer: their own divergence on part of the tokens."""

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import log_softmax, pad
from trl import DistillationConfig, DistillationTrainer

from cggr_core import keep_top_entropy
from cggr_train import CGGRConfig
from tests.support.trl_kit import (
    COMPLETION,
    PROMPT,
    PROMPTS,
    QUIET,
    build,
    error,
    model_for,
    policy_batch,
    stopped_by_hand,
)

pytestmark = QUIET


def teacher_for(tokenizer):
    model = model_for(tokenizer, hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    return model.eval()


@pytest.fixture
def distillation(tmp_path, tokenizer):
    def make(cggr=None, **values):
        data = Dataset.from_list([{"prompt": text} for text in PROMPTS])
        return build(
            DistillationTrainer, DistillationConfig, tmp_path, tokenizer, cggr=cggr, train_dataset=data,
            teacher_model=teacher_for(tokenizer), max_completion_length=COMPLETION, **values,
        )  # fmt: skip

    return make


@pytest.fixture
def gkd(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def make(cggr=None, **values):
        data = Dataset.from_list([{"messages": [{"role": "user", "content": text}]} for text in PROMPTS])
        return build(
            GKDTrainer, GKDConfig, tmp_path, tokenizer, cggr=cggr, train_dataset=data,
            teacher_model=teacher_for(tokenizer), data_collator=lambda rows: gkd_batch(tokenizer)[1], **values,
        )  # fmt: skip

    return make


@torch.no_grad()
def expected_choice(made, inputs, scoring, *, beta, temperature=1.0):
    """The half of the completion's tokens with the largest entropy or divergence, from whole logits."""
    given = whole(inputs)
    student = log_softmax(made.model(**given).logits / temperature, -1)
    countable = pad(inputs["completion_mask"].bool(), (PROMPT - 1, 1))
    if scoring == "entropy":
        score = -(student.exp() * student).sum(-1)
    else:
        teacher = log_softmax(made.teacher_model(**given).logits / temperature, -1)
        mixture = torch.log((1 - beta) * student.exp() + beta * teacher.exp())
        score = {
            0.0: (teacher.exp() * (teacher - student)).sum(-1),
            1.0: (student.exp() * (student - teacher)).sum(-1),
        }.get(
            beta,
            beta * (teacher.exp() * (teacher - mixture)).sum(-1)
            + (1 - beta) * (student.exp() * (student - mixture)).sum(-1),
        )
    return keep_top_entropy(score, countable, 0.5)


def whole(inputs):
    return {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
    }


def step(made, inputs, **options):
    made.model.zero_grad(set_to_none=True)
    loss = made.compute_loss(made.model, dict(inputs), **options)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scoring", ["entropy", "divergence"])
@pytest.mark.parametrize("gradient", ["exact", "kv", "detached"])
def test_distillation_is_trls_loss_of_the_kept_tokens(distillation, tokenizer, gradient, scoring, beta):
    values = {"beta": beta, "temperature": 0.8}
    plain, made = distillation(**values), distillation(CGGRConfig(gradient=gradient, scoring=scoring), **values)
    inputs = policy_batch(len(tokenizer))
    del inputs["advantages"]
    keep = expected_choice(plain, inputs, scoring, beta=beta, temperature=0.8)
    assert keep.sum() == 16
    by_hand = {**inputs, "tool_mask": keep[:, PROMPT - 1 : -1].long(), "num_items_in_batch": keep.sum()}
    stopped = keep if gradient != "exact" else torch.ones_like(keep)
    with stopped_by_hand(plain.model, stopped, detached=gradient == "detached"):
        wanted, expected = step(plain, by_hand)
    found, ours = step(made, inputs)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert error(ours, expected) <= 1e-5
    assert made._task_loss.metrics["kept_tokens"] == 16


@pytest.mark.parametrize("selection", ["random", "supervised"])
def test_distillation_without_scores(distillation, tokenizer, selection):
    plain, made = distillation(), distillation(CGGRConfig(selection=selection))
    inputs = policy_batch(len(tokenizer))
    del inputs["advantages"]
    found, ours = step(made, inputs)
    kept = int(made._task_loss.metrics["kept_tokens"])
    assert kept == (32 if selection == "supervised" else 16)
    if selection == "supervised":
        with stopped_by_hand(plain.model, pad(inputs["completion_mask"].bool(), (PROMPT - 1, 1))):
            wanted, expected = step(plain, inputs)
        assert found == pytest.approx(wanted, rel=1e-5)
        assert error(ours, expected) <= 1e-5


def test_distillation_trains(distillation):
    made = distillation(CGGRConfig())
    made.train()
    record = made.state.log_history[0]
    assert record["keep_ratio"] == pytest.approx(0.5, abs=0.1)
    assert record["scoring_seconds"] > 0 and 0 < record["update_share"] <= 1 and record["entropy"] > 0


def gkd_batch(tokenizer):
    inputs = policy_batch(len(tokenizer))
    given = whole(inputs)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    labels[:, :PROMPT] = -100
    return inputs, {**given, "labels": labels}


@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("scoring", ["entropy", "divergence"])
@pytest.mark.parametrize("gradient", ["exact", "kv"])
def test_gkd_is_trls_loss_of_the_kept_tokens(gkd, tokenizer, gradient, scoring, items):
    plain, made = gkd(beta=0.5), gkd(CGGRConfig(gradient=gradient, scoring=scoring), beta=0.5)
    inputs, batch = gkd_batch(tokenizer)
    keep = expected_choice(plain, inputs, scoring, beta=0.5)
    by_hand = {**batch, "labels": batch["labels"].masked_fill(~pad(keep[:, :-1], (1, 0)), -100)}
    with stopped_by_hand(plain.model, keep if gradient != "exact" else torch.ones_like(keep)):
        wanted, expected = step(plain, by_hand, num_items_in_batch=None if items is None else items / 2)
    found, ours = step(made, batch, num_items_in_batch=items)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert error(ours, expected) <= 1e-5


def test_gkd_trains(gkd):
    made = gkd(CGGRConfig(), lmbda=0.0)
    made.train()
    assert made.state.log_history[0]["keep_ratio"] == 0.5
    assert made.state.log_history[0]["loss"] > 0


def test_settings_that_do_not_go_with_it(distillation):
    with pytest.raises(ValueError, match="selection='stratified' selects tokens by a cross-entropy score"):
        distillation(CGGRConfig(selection="stratified"))
    with pytest.raises(ValueError, match="scoring='gradnorm' does not apply to the loss of DistillationTrainer"):
        distillation(CGGRConfig(scoring="gradnorm"))
