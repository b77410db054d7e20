from types import SimpleNamespace

import pytest
import torch

from cggr_core.scorer import CGGRScorer
from cggr_core.scoring import score
from cggr_core.selection import Selection
from cggr_core.settings import SELECTIONS
from cggr_core.statistics import token_statistics

B, S, V = 3, 16, 30


class Router(torch.nn.Module):
    def __init__(self, wrap=False):
        super().__init__()
        self.table = torch.nn.Embedding(V, V)
        self.wrap = wrap
        self.seen = []

    def forward(self, tokens, **rest):
        self.seen.append(sorted(rest))
        logits = self.table(tokens)
        return SimpleNamespace(logits=logits) if self.wrap else logits


def batch():
    input_ids = torch.randint(0, V, (B, S))
    labels = input_ids.clone()
    labels[0, :5] = -100
    return input_ids, labels


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("scoring", ["combined", "gradnorm", "entropy"])
def test_difficulty_is_about_the_next_label(wrap, scoring):
    router, (input_ids, labels) = Router(wrap), batch()
    difficulty, mask, info = CGGRScorer(router, scoring=scoring)(input_ids, labels=labels)
    targets = torch.cat([labels[:, 1:], torch.full((B, 1), -100)], 1)
    expected = score(token_statistics(router.table(input_ids), targets), scoring=scoring)
    torch.testing.assert_close(difficulty, expected.masked_fill(targets == -100, 0.0))
    assert torch.equal(info["countable"], targets != -100)
    assert difficulty.shape == mask.shape == (B, S) and mask.dtype == torch.bool
    assert not mask[:, -1].any() and not mask[0, :4].any()
    assert not difficulty.requires_grad


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("scope", ["row", "batch"])
def test_mask_and_selection(selection, scope):
    input_ids, labels = batch()
    scorer = CGGRScorer(Router(), selection=selection, scope=scope, min_tokens_ratio=0.5)
    _, mask, info = scorer(input_ids, labels=labels)
    assert isinstance(info["selection"], Selection)
    assert torch.equal(info["selection"].mask, mask)
    assert info["keep_ratio"] == pytest.approx(mask.sum().item() / info["countable"].sum().item())
    if scope == "row":
        assert mask.sum(1).tolist() == [round(0.5 * n) for n in info["countable"].sum(1).tolist()]


def test_without_labels_the_attention_mask_counts():
    input_ids, _ = batch()
    attention_mask = torch.ones(B, S, dtype=torch.long)
    attention_mask[0, 6:] = 0
    router = Router()
    difficulty, mask, info = CGGRScorer(router, scoring="entropy", min_tokens_ratio=1.0)(
        input_ids, attention_mask=attention_mask
    )
    assert torch.equal(mask, attention_mask.bool())
    assert (difficulty[0, 6:] == 0).all() and info["statistics"].nll is None
    assert router.seen == [["attention_mask"]]
    router.seen.clear()
    CGGRScorer(router, scoring="entropy")(input_ids, position_ids=torch.arange(S).expand(B, S))
    assert router.seen == [["position_ids"]]


def test_masked_language_models_are_not_shifted():
    input_ids, labels = batch()
    _, mask, _ = CGGRScorer(Router(), shifted=False, min_tokens_ratio=1.0)(input_ids, labels=labels)
    assert torch.equal(mask, labels != -100)


def test_steps_and_draws():
    input_ids, labels = batch()
    scorer = CGGRScorer(Router(), warmup_steps=1, min_tokens_ratio=0.25, scope="batch")
    _, mask, info = scorer(input_ids, labels=labels)
    assert torch.equal(mask, info["countable"])
    scorer.step()
    first, second = scorer(input_ids, labels=labels)[1], scorer(input_ids, labels=labels)[1]
    assert first.sum() == second.sum() == 10
    assert not torch.equal(first, second)


def test_confidence_moves_the_next_ratio():
    input_ids, labels = batch()
    scorer = CGGRScorer(Router(), dynamic_threshold=True, threshold_sensitivity=5.0, scope="batch")
    before = scorer(input_ids, labels=labels)[2]["keep_ratio"]
    after = scorer(input_ids, labels=labels)[2]["keep_ratio"]
    assert after == pytest.approx(2 * before.item(), abs=0.05)  # an unsure model, bounded by twice


def test_bad_input():
    input_ids, labels = batch()
    scorer = CGGRScorer(Router())
    with pytest.raises(ValueError, match=r"labels must have shape \(3, 16\) \(that of input_ids\), got \(3, 15\)"):
        scorer(input_ids, labels=labels[:, 1:])
    with pytest.raises(TypeError, match=r"labels must hold integers, got dtype torch\.float32"):
        scorer(input_ids, labels=labels.float())
    with pytest.raises(ValueError, match=r"input_ids must be \[B, S\], got shape \(16,\)"):
        scorer(input_ids[0])
    with pytest.raises(ValueError, match="labels is on meta but input_ids is on cpu"):
        scorer(input_ids, labels=labels.to("meta"))
    with pytest.raises(ValueError, match=r"targets holds 1 value\(s\) outside the vocabulary \(the first is 30\)"):
        scorer(input_ids, labels=labels.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(V)))
    with pytest.raises(ValueError, match="scoring='gradnorm' needs targets, but none were given"):
        CGGRScorer(Router(), scoring="gradnorm")(input_ids)
    with pytest.raises(TypeError, match="router must be callable, got int"):
        CGGRScorer(3)
    with pytest.raises(TypeError, match=r"router must return logits \[B, S, V\] or an object with \.logits, got str"):
        CGGRScorer(lambda tokens: "no")(input_ids, labels=labels)
    with pytest.raises(ValueError, match=r"router must return logits \[B, S, V\] for input tokens of shape \[3, 16\]"):
        CGGRScorer(lambda tokens: torch.zeros(3, 5))(input_ids, labels=labels)
    with pytest.raises(TypeError, match="input_ids must be a tensor, got list"):
        scorer([[1, 2]])
    with pytest.raises(TypeError, match="seed must be an integer, got 'a'"):
        CGGRScorer(Router(), seed="a")
    with pytest.raises(ValueError, match=r"scope must be one of 'row', 'batch', got 'rows'; did you mean 'row'"):
        CGGRScorer(Router(), scope="rows")
    assert scorer.schedule.next_draw() == 0


def test_what_a_device_reported_is_raised_by_the_next_call():
    input_ids, labels = batch()
    scorer = CGGRScorer(Router())
    scorer(input_ids, labels=labels)
    scorer._monitor.post(torch.tensor([1.0, 0.0, 0.5]))
    with pytest.raises(ValueError, match=r"in an earlier call, labels holds 1 value\(s\) outside the vocabulary"):
        scorer(input_ids, labels=labels)
    scorer._monitor.post(torch.tensor([0.0, 2.0, 0.5]))
    with pytest.raises(ValueError, match=r"in an earlier call, the router's logits were NaN at 2 countable"):
        scorer(input_ids, labels=labels)
    scorer(input_ids, labels=labels)
