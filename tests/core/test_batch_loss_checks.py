"""Which rows, labels, classes and logits a model's own loss is checked with."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from cggr_core.routing import batch_loss
from cggr_core.routing.engine import Engine
from tests.support.own_losses import batch
from tests.support.tiny_models import ROUTABLE, VOCAB

ARCHITECTURE = SimpleNamespace(head=SimpleNamespace(classes=VOCAB), configured=(), counts_padding=True, shifted=True)


def given(input_ids=None, **more):
    """A model without special tokens, and a batch for it."""
    model = ROUTABLE["llama"]()
    return model, Engine(model).inputs(input_ids=batch() if input_ids is None else input_ids, **more)


@pytest.fixture
def looked(monkeypatch):
    """Every look without the layers, in turn, with over how many classes it is."""
    seen = []
    monkeypatch.setattr(batch_loss, "_difference", lambda model, arch, look, classes: seen.append((look, classes)))

    def looks(model, inputs, labels, architecture=ARCHITECTURE):
        seen.clear()
        assert batch_loss._without_layers(model, architecture, inputs, labels) is None
        return list(seen)

    return looks


@pytest.mark.parametrize(("rows", "length"), [(4, 48), (1, 48), (3, 2), (2, 5)])
def test_the_rows_and_labels_that_are_looked_at(rows, length, looked):
    labels = batch(rows, length)
    labels[-1, 1] = -100
    model, inputs = given(batch(rows, length))
    as_given, every, uneven, few = looks = [look for look, classes in looked(model, inputs, labels) if classes == VOCAB]
    assert [look.said for look in looks] == [
        "with the batch's labels",
        "with a label at every token",
        "with more labels in some rows than in others",
        "with few labels in one row, predicted well",
    ]
    assert torch.equal(as_given.labels, labels)
    assert "attention_mask" not in as_given.arguments, "the batch is looked at as it is"
    for look in (every, uneven):
        assert torch.equal(look.arguments["input_ids"], batch(rows, length))
        assert torch.equal(look.arguments["attention_mask"], torch.ones(rows, length, dtype=torch.int64))
    assert every.labels.shape == (rows, length) and every.labels.min() >= 0 and every.labels.max() < VOCAB
    assert every.labels.unique().numel() > min(every.labels.numel(), VOCAB) // 3
    counts = (uneven.labels != -100).sum(1)
    assert torch.equal(uneven.labels[uneven.labels != -100], every.labels[uneven.labels != -100])
    if rows > 1:
        assert counts[0] == 0 and counts[-1] == length and (counts.diff() >= 0).all()
        assert (rows, length) != (4, 48) or 0 < counts[1] < counts[2] < length
    else:
        assert length // 4 < counts < length * 3 // 4
    half = max(length // 2, 2)
    assert few.labels.tolist() == [every.labels[0, : min(half, 4)].tolist() + [-100] * (half - 4)]
    assert torch.equal(few.arguments["input_ids"], batch(rows, length)[:1, :half])
    assert few.arguments["attention_mask"].shape == (1, half)
    # The largest logits where every token counts; few labels are predicted well.
    assert every.scale > uneven.scale == as_given.scale > few.scale and few.sure > 5
    assert every.sure == uneven.sure == as_given.sure == 0
    again = [look.labels for look, _ in looked(model, inputs, labels)]
    assert all(map(torch.equal, again, (as_given.labels, every.labels, uneven.labels, few.labels))), "on every rank"


@pytest.mark.parametrize(("rows", "length", "counts"), [(4, 48, [1, 4, 14, 52]), (2, 8, [1, 2, 4, 8])])
def test_looks_from_a_single_label_to_many(rows, length, counts, looked):
    model, inputs = given(batch(rows, length))
    looks = [look for look, _ in looked(model, inputs, batch(rows, length))][-4:]
    assert [look.said for look in looks] == [f"with {count} of the tokens labelled" for count in counts]
    for look, count in zip(looks, counts, strict=True):
        assert int((look.labels != -100).sum()) == int((look.labels[:, 1:] != -100).sum()) == count
        assert torch.equal(look.arguments["input_ids"], batch(rows, length)) and look.labels.max() < 16
    padding = torch.ones(rows, length, dtype=torch.int64)
    padding[:, : length // 2] = 0
    model, inputs = given(batch(rows, length), attention_mask=padding)
    few = [look.labels for look, _ in looked(model, inputs, batch(rows, length))][-4:-1]
    assert all((labels[padding == 0] == -100).all() for labels in few)


def test_what_goes_with_text_is_left_out_and_padding_is_said(looked):
    padding, ids = torch.ones(4, 48, dtype=torch.int64), batch()
    padding[1, :20], ids[2, 5] = 0, 90
    model, inputs = given(ids, attention_mask=padding)
    model.config.image_token_id = 90
    as_given, every, uneven, few, *_ = (look.arguments for look, _ in looked(model, inputs, batch()))
    assert as_given["input_ids"][2, 5] == 90 and torch.equal(as_given["attention_mask"], padding)
    for arguments in (every, uneven):
        assert arguments["input_ids"][2, 5] == 0 and torch.equal(arguments["attention_mask"], padding)
    assert torch.equal(few["attention_mask"], padding[:1, :24])
    embedded = torch.randn(2, 6, 32)
    inputs = Engine(model).inputs(inputs_embeds=embedded)
    for look, _ in looked(model, inputs, batch(2, 6))[1:3]:
        assert set(look.arguments) == {"inputs_embeds", "attention_mask"}
        assert torch.equal(look.arguments["inputs_embeds"], embedded)
    model.forward = lambda input_ids=None, labels=None: None  # which takes no mask
    assert "attention_mask" not in looked(model, inputs, batch(2, 6))[1][0].arguments


@pytest.mark.parametrize(
    ("logits", "most", "classes"), [(4 * 48 * 32, 256, 32), (4 * 48 * 500, 40, 40), (1, 256, 16), (1 << 23, 256, 97)]
)
def test_over_how_many_classes_a_batch_is_looked_at(logits, most, classes, looked, monkeypatch):
    monkeypatch.setattr(batch_loss, "_LOGITS", logits)
    monkeypatch.setattr(batch_loss, "_MOST_CLASSES", most)
    told = []
    monkeypatch.setattr(batch_loss, "smaller_vocabulary", lambda *given: told.append(given) or nullcontext())
    model, inputs = given()
    labels = batch()
    labels[0, :7] = -100
    (first, over), *others = looked(model, inputs, labels)
    others, of_counts = others[:-4], others[-4:]
    assert [over for _, over in of_counts] == [16] * 4 and told.pop() == ((), VOCAB, 16), "many looks are cheap ones"
    if classes == VOCAB:
        assert told == [] and over == VOCAB and len(others) == 3
    else:
        assert told == [((), VOCAB, classes)]
        # Which tokens the labels are, first and over all classes.
        assert over == VOCAB and set(first.labels.flatten().tolist()) == set(labels[labels >= 0].tolist())
        first = others.pop(0)[0]
    assert [over for _, over in others] == [classes] * 3
    assert torch.equal(first.labels, labels.where(labels < 0, labels % classes))
    assert all(look.labels.max() < classes for look, _ in others)


@pytest.mark.parametrize(
    ("logits", "shape"), [(97 * 4 * 48, (4, 48)), (97 * 3 * 48, (3, 48)), (97 * 20, (1, 20)), (5, (1, 2))]
)
def test_which_tokens_the_labels_are_is_looked_at_where_there_is_room(logits, shape, monkeypatch):
    monkeypatch.setattr(batch_loss, "_LOGITS_OF_IDS", logits)
    model, inputs = given()
    labels = batch()
    labels[:, 10:] = -100
    ids = set(labels[labels >= 0].tolist())
    (look,) = batch_loss._of_ids(model, inputs, labels, VOCAB)
    assert look.labels.shape == look.arguments["input_ids"].shape == look.arguments["attention_mask"].shape == shape
    found = look.labels.flatten().tolist()
    assert set(found) == ids if len(found) >= len(ids) else set(found) < ids and len(set(found)) == len(found)
    assert found[: len(ids)] != sorted(found[: len(ids)]) or len(found) < 3, "in no order that means anything"
    (again,) = batch_loss._of_ids(model, inputs, labels, VOCAB)
    assert torch.equal(again.labels, look.labels)
    (none,) = batch_loss._of_ids(model, inputs, labels.fill_(-100), VOCAB)
    assert none.labels.min() >= 0 and none.labels.unique().numel() == min(len(found), VOCAB)


@pytest.mark.parametrize("traced", [False, True])
def test_the_logits_of_a_look(traced):
    head, hidden, labels = torch.nn.Linear(8, 5), torch.randn(1, 40, 8), torch.arange(40)[None] % 5
    labels[0, 3] = -100

    def logits(scale, sure, shifted, given=hidden):
        architecture = SimpleNamespace(head=SimpleNamespace(module=head), shifted=shifted)
        look = batch_loss._Look("", {}, labels, scale, sure)
        with torch.no_grad(), batch_loss._logits_for(architecture, look, 5, traced=traced):
            found = head(given)
        assert found.requires_grad is traced
        return found.detach()

    plain = logits(1.0, 0.0, True)
    assert 0.8 < plain.std() < 1.2
    torch.testing.assert_close(logits(7.0, 0.0, False), 7 * plain)
    added = torch.zeros(1, 40, 5)
    for place, label in enumerate(labels[0].tolist()):
        if label >= 0:
            added[0, place, label] = 3.0
    torch.testing.assert_close(logits(1.0, 3.0, False) - plain, added)
    torch.testing.assert_close(logits(2.0, 3.0, True)[:, :-1] - 2 * plain[:, :-1], added[:, 1:])
    assert torch.equal(logits(2.0, 3.0, True)[:, -1], 2 * plain[:, -1])
    part = hidden[:, :7]  # some apply the head to part of the tokens
    assert torch.equal(logits(1.0, 3.0, True, part), logits(1.0, 0.0, True, part))
