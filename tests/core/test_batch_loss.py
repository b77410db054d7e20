"""How a model is run to check its own loss on a batch: without layers, over fewer classes, or as it is."""

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from cggr_core import CGGRModel
from cggr_core.routing import batch_loss
from tests.support.own_losses import batch, counted, mean, model_with
from tests.support.tiny_models import ROUTABLE, VOCAB


# Where the look cannot be had without the layers or over fewer classes.
def with_weight_of_classes(logits, labels):
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), weight=torch.ones(VOCAB))


def test_a_model_that_does_not_run_over_fewer_classes_is_run_as_it_is(monkeypatch):
    monkeypatch.setattr(batch_loss, "_MOST_CLASSES", 16)
    CGGRModel(model_with(with_weight_of_classes), gradient="exact")(batch(), labels=batch())

    def short(logits, labels):
        return with_weight_of_classes(logits, labels) * (len(labels) > 1)

    with pytest.raises(ValueError, match=r"own loss is not .*: with few labels in one row, predicted well it is 0"):
        CGGRModel(model_with(short), gradient="exact")(batch(), labels=batch())


def test_which_tokens_the_labels_are_is_looked_at_over_the_whole_vocabulary(monkeypatch):
    monkeypatch.setattr(batch_loss, "_MOST_CLASSES", 16)
    rare = int(batch()[3, -1])
    assert rare not in batch()[:2, :8]

    def own(logits, labels):
        weight = torch.ones(logits.shape[-1])
        weight[rare % logits.shape[-1]] = 5.0 if logits.shape[-1] == VOCAB else 1.0
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), weight=weight)

    with pytest.raises(ValueError, match="with the tokens that the batch's labels are it is"):
        CGGRModel(model_with(own), gradient="exact")(batch(), labels=batch())


@pytest.mark.parametrize("gradient", ["exact", "kv", "detached", "sequence"])
@pytest.mark.parametrize(("rows", "length"), [(2, 40), (6, 16)], ids=["longer", "more"])
def test_a_larger_batch_is_looked_at_again(gradient, rows, length):
    def own(logits, labels):
        return mean(logits, labels) * (1.0 if labels.shape[1] <= 16 and len(labels) <= 2 else 0.5)

    wrapped = CGGRModel(model_with(own), gradient=gradient)
    for _ in range(2):
        wrapped(batch(2, 16), labels=batch(2, 16))
    with pytest.raises(ValueError, match="own loss is not the mean cross-entropy"):
        wrapped(batch(rows, length), labels=batch(rows, length))


@pytest.mark.parametrize(
    ("size", "most", "refused"),
    [((2, 24), 48, False), ((2, 24), 24, False), ((2, 24), 23, True), ((4, 24), 48, True), ((1, 24), 48, False)],
)
def test_a_loss_that_differs_without_layers_alone_is_held_to_whole_rows(size, most, refused, monkeypatch):
    """It is the same loss if the batch itself could be run as it is, every row and every token of it."""
    rows, length = size
    looks = []

    class OfLayers(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **options):
            output = super().forward(input_ids=input_ids, labels=labels, **options)
            if labels is not None:
                looks.append((self.ran, tuple(labels.shape)))
                output.loss = output.loss * (1.0 if self.ran else 2.0)
            self.ran = False
            return output

    model = OfLayers(ROUTABLE["llama"]().config).train()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: setattr(model, "ran", True))
    model.ran = False
    wrapped, labels = CGGRModel(model, gradient="exact"), batch(rows, length)
    monkeypatch.setattr(batch_loss, "_LOGITS_OF_IDS", min(rows, 2) * VOCAB * most)
    if refused:
        with pytest.raises(ValueError, match="own loss is not the mean cross-entropy"):
            wrapped(labels, labels=labels)
    else:
        wrapped(labels, labels=labels)
    whole = [shape for ran, shape in looks if ran][1:]  # but for the look at a few tokens
    length, rows = min(length, most), min(rows, 2)
    assert whole == [*[(rows, length)] * 3, (1, length // 2), *[(rows, length)] * 4]


def test_a_loss_that_cannot_be_had_for_the_batch_is_refused():
    def own(logits, labels):
        if labels.shape[1] > 8:
            raise ValueError("too long for me")
        return mean(logits, labels)

    with pytest.raises(ValueError, match=r"OwnLoss raised when called with labels for rows of the batch.*too long"):
        CGGRModel(model_with(own), gradient="exact")(batch(), labels=batch())


@pytest.mark.parametrize("chunk", [24, 48])
def test_rows_that_run_at_the_batchs_length_alone_are_run_at_it(chunk, monkeypatch):
    """Half a row, and a row as short as there is room for, are no rows of such a model."""
    lengths = []

    def own(logits, labels):
        lengths.append(labels.shape[1])
        if labels.shape[1] % chunk and labels.shape[1] > 8:
            raise ValueError("whole chunks alone")
        return with_weight_of_classes(logits, labels)

    monkeypatch.setattr(batch_loss, "_MOST_CLASSES", 16)
    monkeypatch.setattr(batch_loss, "_LOGITS_OF_IDS", 2 * VOCAB * 30)
    CGGRModel(model_with(own), gradient="exact")(batch(), labels=batch())
    assert lengths[-8:] == [48] * 8


@pytest.mark.parametrize("padded", [False, True])
def test_a_loss_that_reads_the_mask_is_looked_at_without_layers(padded):
    class WithoutPadding(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, attention_mask=None, **options):
            output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)
            if labels is not None:
                counts = torch.ones_like(labels) if attention_mask is None else attention_mask
                output.loss = mean(output.logits, labels.masked_fill(counts.view(labels.shape) == 0, -100))
            return output

    model, calls = WithoutPadding(ROUTABLE["llama"]().config).train(), []
    wrapped, mask = CGGRModel(model, gradient="exact", min_tokens_ratio=1.0), torch.ones_like(batch())
    mask[1, 30:] = 0
    options = {"attention_mask": mask} if padded else {}
    wrapped(batch(2, 8), labels=batch(2, 8), **{name: mask[:2, :8] for name in options})
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *given: calls.append(given[2].shape[:2]))
    wrapped(batch(2, 8), labels=batch(2, 8), **{name: mask[:2, :8] for name in options})
    calls.clear()
    found = wrapped(batch(), labels=batch(), **options)
    assert calls == [(4, 48)]
    hook.remove()
    torch.testing.assert_close(found, model(batch(), labels=batch(), **options).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own", ["no logits", "logits of labels", "another head", "right"])
def test_logits_that_are_not_those_of_all_tokens_are_looked_at_as_they_are(own):
    """Whatever replaces them, a loss that differs for the batch is refused."""

    class Sparse(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, attention_mask=None, **options):
            output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)
            if labels is None:
                return output
            factor = 1.0 if own == "right" or (len(labels) < 3 and labels.shape[1] <= 8) else 1.1
            output.loss = mean(output.logits, labels) * factor
            if self.training and own in ("no logits", "right"):
                output.logits = None
            elif own == "logits of labels":
                output.logits = output.logits[:, :-1][counted(labels)]
            elif own == "another head":
                output.logits = output.logits[..., :-1]
            return output

    wrapped = CGGRModel(Sparse(ROUTABLE["llama"]().config).train(), gradient="exact")
    if own == "right":
        wrapped(batch(), labels=batch())
    else:
        with pytest.raises(ValueError, match="own loss is not the mean cross-entropy"):
            wrapped(batch(), labels=batch())
