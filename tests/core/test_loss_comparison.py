"""How a model's own loss is compared with a routed step's: the labelled tokens, the tolerance and the error."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cggr_core.routing import labelled_tokens, loss_agreement, loss_arguments
from cggr_core.routing.architectures import describe
from tests.support.tiny_models import ROUTABLE, VOCAB


@pytest.mark.parametrize(
    ("own", "ours", "dtype", "autocast", "same"),
    [
        (0.5, 0.5 + 0.9e-5, torch.float32, False, True),
        (0.5, 0.5 + 1.2e-5, torch.float32, False, False),
        (0.5, 0.5 - 1.2e-5, torch.float64, False, False),
        (100.0, 100.0 + 9e-4, torch.float64, False, True),
        (100.0, 100.0 + 2e-3, torch.float64, False, False),
        (-100.0, -100.0 + 9e-4, torch.float64, False, True),
        (2.0, 2.015, torch.bfloat16, False, True),
        (2.0, 2.03, torch.bfloat16, False, False),
        (2.0, 2.015, torch.float32, True, True),
    ],
)
def test_two_losses_are_the_same(own, ours, dtype, autocast, same):
    logits = torch.zeros(1, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert loss_agreement.same_loss(torch.tensor(own, dtype=torch.float64), ours, logits) is same


def test_a_loss_in_half_precision_has_its_tolerance_whatever_the_logits_are():
    assert loss_agreement.same_loss(torch.tensor(2.0, dtype=torch.bfloat16), 2.015, torch.zeros(1))


def labelled(input_ids, padding=None, *, embeds=None, masked=False, **settings):
    config = SimpleNamespace(**settings)
    config.get_text_config = lambda: config

    def forward(input_ids, attention_mask=None):
        pass

    base = SimpleNamespace(
        config=config,
        get_output_embeddings=lambda: nn.Linear(4, VOCAB),
        forward=forward if masked else lambda input_ids: None,
    )
    per_token = {"input_ids": input_ids} if embeds is None else {"inputs_embeds": embeds}
    return labelled_tokens.few_labelled_tokens(
        base, SimpleNamespace(per_token=per_token, padding=padding), loss_agreement._TOKENS
    )


def test_the_tokens_that_a_loss_is_tried_on():
    input_ids = torch.arange(3, 33).view(3, 10)
    given, labels = labelled(input_ids)
    assert torch.equal(given["input_ids"], input_ids[:2, :8]) and set(given) == {"input_ids"}
    wanted = input_ids[:2, :8].clone()
    wanted[:, 3] = wanted[1, 5] = -100
    assert torch.equal(labels, wanted)
    # A special token is a target like any other.
    wanted[0, 2] = 0
    assert torch.equal(labelled(input_ids, pad_token_id=0)[1], wanted)
    for outside in (-1, VOCAB, None, [], "0", True):
        assert labelled(input_ids, pad_token_id=outside)[1][0, 2] == input_ids[0, 2]
    assert labelled(input_ids, pad_token_id=VOCAB - 1)[1][0, 2] == VOCAB - 1
    wanted[1, 2], wanted[0, 4], wanted[1, 4], wanted[0, 6], wanted[1, 6] = 90, 91, 2, 92, 93
    specials = {"size": 95, "bos_token_id": 2, "x_token_index": 92, "pad_token_id": 0, "y_token_ids": [90, 93, 94]}
    assert torch.equal(labelled(input_ids, eos_token_id=[90, 91], **specials)[1], wanted)
    assert torch.equal(labelled(input_ids[:2], eos_token_id=[90, 91], **specials)[1], wanted)
    assert labelled(input_ids[:, :2], pad_token_id=0)[1].tolist() == input_ids[:2, :2].tolist()
    assert labelled(input_ids[:, :3], pad_token_id=0)[1].tolist() == [[3, 4, 0], [13, 14, 15]]
    assert labelled(input_ids[:, :4])[1].tolist() == [[3, 4, 5, -100], [13, 14, 15, -100]]
    assert torch.equal(input_ids, torch.arange(3, 33).view(3, 10))
    # A single row is two.
    given, labels = labelled(input_ids[:1, :6])
    assert torch.equal(given["input_ids"], input_ids[[0, 0], :6])
    assert labels.tolist() == [[3, 4, 5, -100, 7, 8], [3, 4, 5, -100, 7, -100]]


@pytest.mark.parametrize("padding", [None, torch.zeros(3, 10, dtype=torch.int64), torch.zeros(3, 10).bool()])
def test_the_tokens_that_a_loss_is_tried_on_are_attended_to_but_for_one(padding):
    for masked in (True, False):
        given, labels = labelled(torch.arange(3, 33).view(3, 10), padding, masked=masked)
        if padding is None and not masked:
            assert "attention_mask" not in given
            continue
        wanted = torch.ones(2, 8, dtype=torch.int64 if padding is None else padding.dtype)
        wanted[0, 7] = 0
        assert torch.equal(given["attention_mask"], wanted) and given["attention_mask"].dtype == wanted.dtype
        assert labels[0, 7] == 10
    for length, last in ((4, 1), (5, 0)):
        given, _ = labelled(torch.arange(3, 33).view(3, 10)[:, :length], masked=True)
        assert given["attention_mask"].tolist() == [[*[1] * (length - 1), last], [1] * length]


def test_embeddings_have_labels_too():
    given, labels = labelled(None, embeds=torch.randn(3, 9, 4))
    assert given["inputs_embeds"].shape == (2, 8, 4)
    wanted = torch.arange(16).view(2, 8) % VOCAB
    wanted[:, 3] = wanted[1, 5] = -100
    assert torch.equal(labels, wanted)


def test_placeholders_of_images_become_other_tokens():
    inner = SimpleNamespace(audio_token_id=1, eoi_token_index=2, hidden_size=5, image_size=7, image_token_id="6")
    config = SimpleNamespace(image_token_id=0, bos_token_id=4, get_text_config=lambda: inner)
    input_ids = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    assert labelled_tokens.text_alone(input_ids, config).tolist() == [[3, 3, 3, 3, 4, 5, 6, 7]]
    plain = SimpleNamespace(bos_token_id=0, hidden_size=4)
    plain.get_text_config = lambda: plain
    assert labelled_tokens.text_alone(input_ids, plain) is input_ids


def test_which_arguments_only_a_loss_reads():
    def loss_function(
        logits, labels, vocab_size, input_ids, attention_mask, position_ids, inputs_embeds, token_type_ids, focal_gamma
    ):
        raise AssertionError("not called")

    model = SimpleNamespace(loss_function=loss_function)
    # What the model reads besides is no argument of its loss alone.
    read = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_type_ids", "labels", "vocab_size")
    given = {**dict.fromkeys(read, 1), "use_cache": 5}
    assert loss_arguments.loss_arguments(model, given) == {}
    of_loss = {"num_items_in_batch": 6, "ignore_index": 7, "focal_gamma": 8, "my_labels": 9, "reduction": "sum"}
    of_loss |= {"shift_labels": 1, "label_smoothing": 0.1, "class_weights": 2}
    assert loss_arguments.loss_arguments(model, given | of_loss) == of_loss
    assert loss_arguments.loss_arguments(SimpleNamespace(), {"focal_gamma": 8, "reduction": "sum"}) == {
        "reduction": "sum"
    }


@pytest.mark.parametrize("name", ["router_aux_loss_coef", "aux_loss_coef", "router_aux_loss_coefficient"])
@pytest.mark.parametrize("place", ["model", "config"])
def test_an_auxiliary_loss_is_weighted_by_whichever_name_its_weight_has(name, place):
    config = SimpleNamespace()
    config.get_text_config = lambda: config
    model = SimpleNamespace(config=config)
    output = SimpleNamespace(aux_loss=torch.tensor(4.0))
    with pytest.raises(ValueError, match="returns an auxiliary loss"):
        loss_agreement.auxiliary_loss(model, output)
    setattr(model if place == "model" else config, name, 0.25)
    assert loss_agreement.auxiliary_loss(model, output) == 1.0
    for none in (SimpleNamespace(aux_loss=None), SimpleNamespace(aux_loss=4.0), SimpleNamespace()):
        assert loss_agreement.auxiliary_loss(model, none) is None


def test_the_error_gives_the_loss_with_either_alignment():
    base = nn.Identity()
    base.config = SimpleNamespace(get_text_config=SimpleNamespace)
    kinds = [(False, True), (False, False), (True, True), (True, False)]
    for of_kind in (kinds, kinds[::-1]):
        found = {loss_agreement.Alignment(*kind): 1.0 + sum(kind) + 2 * kind[0] for kind in of_kind}
        said = str(loss_agreement.another_loss(base, "on 16 tokens", torch.tensor(9.5), found))
        shifted, unshifted = (5, 2) if of_kind is kinds else (4, 1)
        assert f"on 16 tokens it is 9.5, cross-entropy {shifted} with shifted labels and {unshifted} without" in said
        assert "(it has an additional term, another weighting or other ignored labels)" in said
    for value, cause in (
        (5.0, "(with gradients enabled; without, it is cross-entropy)"),
        (7.0, "(it has an additional"),
    ):
        without = torch.tensor(value)
        error = loss_agreement.another_loss(base, "here", torch.tensor(9.5), found, without_gradients=without)
        assert cause in str(error)


def test_what_a_routed_step_makes_of_logits():
    logits, labels = torch.randn(2, 6, 9).bfloat16(), torch.randint(9, (2, 6))
    labels[0, 2] = labels[1] = -100
    output, items = SimpleNamespace(), torch.tensor(7.0)
    for shifted in (True, False):
        targets, predictions = (labels[:, 1:], logits[:, :-1]) if shifted else (labels, logits)
        nll = -predictions.double().log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
        nll, count = nll[targets != -100].sum().item(), (targets != -100).sum().item()
        for divided, by in ((None, count), (items, 7)):
            found = loss_agreement.routed_loss(nn.Identity(), output, logits, labels, shifted=shifted, items=divided)
            assert found == pytest.approx(nll / by, rel=1e-6), "in float32"


@pytest.mark.parametrize(
    ("of_model", "of_config", "said"),
    [
        ({"loss_function": 1}, {"label_smoothing": 0.1}, "loss_function was replaced"),
        ({"_loss_function": 1}, {}, "loss_function was replaced"),
        ({}, {"label_smoothing": 0.1, "aux_weight": 2, "hidden_size": 5}, "has aux_weight=2, label_smoothing=0.1"),
        (
            {},
            {"loss_kind": "focal", "loss_a": 0, "loss_b": "", "loss_c": False, "loss_d": [1]},
            "its config has loss_kind='focal'",
        ),
        ({}, {"loss_d": [1], "loss_a": 0, "loss_c": False}, "another weighting or other ignored labels"),
        ({}, {"loss_a": 1, "loss_c": True}, "its config has loss_a=1, loss_c=True"),
    ],
)
def test_a_likely_cause_is_named(of_model, of_config, said):
    config = SimpleNamespace(**of_config)
    base = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config), **of_model)
    assert loss_agreement._likely_cause(base).endswith(said)


def test_a_batch_without_a_mask_counts_all_its_labels(monkeypatch):
    """Even where labels of padding do not count."""
    labels, seen = torch.tensor([[3, 4, 5, 6]] * 2), []
    monkeypatch.setattr(loss_agreement, "few_labelled_tokens", lambda *_: ({"input_ids": labels}, labels))
    monkeypatch.setattr(loss_agreement, "_reads", lambda *args, **options: seen.append((args, options)) or True)
    architecture = SimpleNamespace(shifted=True, counts_padding=False)
    loss_agreement.check_reads("num_items_in_batch", nn.Identity(), architecture, None)
    ((_, _, arguments, _, targets), options) = seen[0]
    assert targets is labels and options["items"] is arguments["num_items_in_batch"] and options["shifted"]


@pytest.mark.parametrize("logits_in_training", [True, False])
@pytest.mark.parametrize("traced", [True, False])
def test_a_loss_is_had_from_logits_that_are_chosen(traced, logits_in_training):
    class Llama(type(ROUTABLE["llama"]())):
        def forward(self, *args, labels=None, **options):
            output = super().forward(*args, labels=labels, **options)
            if self.training and not logits_in_training:
                output.logits = None
            return output

    model = ROUTABLE["llama"]().train()
    model.__class__ = Llama
    ids = torch.tensor([[3, 4, 5, 6]] * 2)
    with torch.no_grad():
        output, logits = loss_agreement.loss_and_logits(
            model, describe(model), {"input_ids": ids}, ids, traced=traced, change=lambda noise: noise.sign()
        )
    assert logits.unique().tolist() == [-1, 1] and logits.requires_grad is output.loss.requires_grad is traced
    assert model.training
