"""Checked batches: what the model gets, what its tokens see, and what is refused."""

from dataclasses import replace

import pytest
import torch

from cggr_core.routing.architectures import describe
from cggr_core.routing.inputs import other_positions, token_inputs
from cggr_core.routing.shared import Shared
from tests.support.model_steps import tokens
from tests.support.tiny_models import ROUTABLE

IDS = tokens(length=6)[:2]


def inputs(model=None, **given):
    model = ROUTABLE["llama"]() if model is None else model
    names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "options")
    given = {"input_ids": IDS} | given
    return token_inputs(model, describe(model), **{name: given.get(name) for name in names})


@pytest.mark.parametrize(
    ("forward", "takes"),
    [
        (lambda input_ids, position_ids=None: None, True),
        (lambda *args, **further: None, True),
        (lambda input_ids, *, position_ids: None, True),
        (lambda input_ids, attention_mask=None: None, False),
        (lambda *args, positions=None: None, False),
    ],
)
def test_position_ids_are_taken_by_name_or_among_further_arguments(forward, takes):
    model = ROUTABLE["llama"]()
    model.forward = forward
    assert describe(model).takes_positions is takes
    assert inputs(model, position_ids=torch.arange(6)[None]).passes_positions is takes
    assert inputs(model).passes_positions is False


@pytest.mark.parametrize("index", [[[0, 3], [4, 1]], [[4, 3], [0, 1]], [[0, 1, 2, 3, 4]] * 2])
def test_the_other_positions(index):
    found = other_positions(torch.tensor(index), 5)
    assert found.tolist() == [[at for at in range(5) if at not in row] for row in index]


def test_a_batch_made_explicit():
    made = inputs()
    assert made.shape == (2, 6) and made.padding is None and made.segment is None and not made.passes_positions
    assert made.position_ids.tolist() == [list(range(6))] * 2
    assert set(made.arguments()) == {"input_ids"} and made.quiet == {} and made.passes_padding
    types, mask = torch.zeros_like(IDS), torch.ones_like(IDS)
    made = inputs(token_type_ids=types, attention_mask=mask, options={"output_attentions": True})
    assert set(made.arguments()) == {"input_ids", "token_type_ids", "attention_mask", "output_attentions"}
    assert made.arguments()["attention_mask"] is mask and made.arguments()["output_attentions"] is True
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    made = inputs(position_ids=positions)
    assert made.passes_positions and made.segment.tolist() == [[0, 0, 0, 1, 1, 1]] * 2
    assert made.arguments()["position_ids"].tolist() == positions.tolist() * 2
    assert inputs(position_ids=positions, attention_mask=mask).segment is None
    embedded, several = torch.randn(2, 6, 32), torch.zeros(2, 6, 7, dtype=torch.int64)
    made = inputs(input_ids=None, inputs_embeds=embedded, attention_mask=mask, token_type_ids=several)
    assert set(made.arguments()) == {"inputs_embeds", "token_type_ids", "attention_mask"}
    assert made.arguments()["inputs_embeds"] is embedded and made.arguments()["token_type_ids"] is several
    seen = torch.ones(2, 1, 6, 6)
    for form in (seen, seen[:, 0], seen[:1]):
        assert inputs(attention_mask=form).arguments()["attention_mask"] is form
    kinds = positions.expand(3, 1, 6)
    assert inputs(position_ids=kinds).arguments()["position_ids"] is kinds
    made = inputs(position_ids=positions, attention_mask=seen)
    assert made.segment is made.padding is None and made.arguments()["attention_mask"] is seen


@pytest.mark.parametrize(
    ("given", "more"),
    [
        ({}, set()),
        ({"attention_mask": torch.ones(2, 6)}, {"padding"}),
        ({"position_ids": torch.arange(6)[None]}, {"position_ids", "segment"}),
        ({"position_ids": torch.arange(6)[None], "attention_mask": torch.ones(2, 6)}, {"position_ids", "padding"}),
        ({"token_type_ids": torch.zeros_like(IDS)}, {"token_type_ids"}),
        ({"options": {"output_attentions": True, "seq_idx": None}}, {"output_attentions"}),
    ],
)
def test_the_form_of_a_batch_is_what_there_is_in_it(given, more):
    assert inputs(**given).form == {"input_ids"} | more


OWN = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
BEFORE = torch.tensor([[0, 1, 1], [1, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
@pytest.mark.parametrize(
    ("padding", "before", "rows", "wanted"),
    [
        (None, None, None, None),
        (OWN, None, None, torch.cat([torch.ones(2, 3, dtype=torch.int64), OWN], 1)),
        (None, BEFORE, None, torch.cat([BEFORE, torch.ones_like(OWN)], 1)),
        (OWN, BEFORE, torch.tensor([1, 0]), torch.cat([BEFORE.flip(0), OWN], 1)),
    ],
)
def test_what_queries_of_rows_behind_shared_tokens_may_attend_to(padding, before, rows, wanted, dtype):
    padding, before = (None if mask is None else mask.to(dtype) for mask in (padding, before))
    made = replace(inputs(attention_mask=padding), shared=Shared({}, 3, rows, before))
    for index, position in ((None, list(range(3, 9))), (torch.tensor([[1, 5]]).expand(2, -1), [4, 8])):
        seen = made.visibility(index, key_gradient="kept")
        assert seen.position.tolist() == [position] * 2 and seen.length == 9 and seen.key_gradient == "kept"
        assert seen.segment is None and seen.position_ids.tolist() == [list(range(9))] * 2
        if wanted is None:
            assert seen.padding is None and "attention_mask" not in made.arguments()
        else:
            torch.testing.assert_close(seen.padding, wanted)
            torch.testing.assert_close(made.arguments()["attention_mask"], wanted)


@pytest.mark.parametrize(
    ("configured", "asked", "balancing"),
    [(False, None, False), (True, None, True), (False, True, True), (True, False, False), (True, True, True)],
)
def test_balancing_losses_are_about_the_gradient_pass_alone(configured, asked, balancing):
    """An argument goes before the config, as in the model; the loss takes the mask for one of its own tokens."""
    model, mask = ROUTABLE["mixtral"](output_router_logits=configured), torch.ones_like(IDS)
    options = {} if asked is None else {"output_router_logits": asked}
    made = inputs(model, attention_mask=mask, options=options)
    assert made.quiet == ({"output_router_logits": False} if balancing else {})
    assert ("attention_mask" in made.arguments()) is not balancing
    assert made.padding is mask and made.options == options


def test_what_queries_of_a_batch_may_attend_to():
    mask = torch.ones_like(IDS)
    seen = inputs(attention_mask=mask).visibility(torch.tensor([[1], [2]]), key_gradient="kept")
    assert seen.position.tolist() == [[1], [2]] and seen.length == 6 and seen.padding is mask
    assert seen.segment is None and seen.key_gradient == "kept"
    assert inputs().visibility().position is None and inputs().visibility().key_gradient == "all"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"inputs_embeds": torch.zeros(2, 6, 32)}, ValueError, "give exactly one of input_ids and inputs_embeds"),
        ({"input_ids": None}, ValueError, "give exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS.float()}, TypeError, "^input_ids must"),
        ({"input_ids": IDS[0]}, ValueError, r"^input_ids must be \[B, S\] with at least one token, got shape \[6\]"),
        (
            {"input_ids": IDS[:, :0]},
            ValueError,
            r"^input_ids must be \[B, S\] with at least one token, got shape \[2, 0",
        ),
        ({"input_ids": None, "inputs_embeds": IDS}, TypeError, "^inputs_embeds must have a floating dtype"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 6)}, ValueError, r"^inputs_embeds must be \[B, S, H\]"),
        ({"attention_mask": [[1]]}, TypeError, "^attention_mask must be a tensor, got list"),
        ({"attention_mask": torch.ones(2, 5)}, ValueError, r"^attention_mask must have shape \[2, 6\] like the input"),
        ({"attention_mask": torch.ones(3, 1, 6, 6)}, ValueError, r"^attention_mask must have .*, got \[3, 1, 6, 6\]"),
        ({"attention_mask": torch.ones(2, 1, 1, 6, 6)}, ValueError, r"^attention_mask must .*, got \[2, 1, 1, 6, 6\]"),
        ({"attention_mask": torch.ones(2, 6, 5)}, ValueError, r"^attention_mask must have .* or \[2, 1, 6, 6\], got"),
        ({"position_ids": IDS[None, :, :5]}, ValueError, r"^position_ids must have shape \[2, 6\], or \[3, 2, 6\] for"),
        (
            {"attention_mask": torch.ones(2, 6, device="meta")},
            ValueError,
            "^attention_mask is on meta but the input is",
        ),
        ({"position_ids": IDS[:, :1]}, ValueError, r"^position_ids must have shape \[2, 6\]"),
        ({"position_ids": IDS[:1, :1]}, ValueError, r"^position_ids must have shape \[2, 6\]"),
        ({"token_type_ids": IDS[:1]}, ValueError, r"^token_type_ids must have shape \[2, 6\] like the input tokens"),
        ({"token_type_ids": IDS.float()}, TypeError, "^token_type_ids must"),
        ({"position_ids": IDS.float()}, TypeError, "^position_ids must"),
    ],
)
def test_batches_that_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        inputs(**given)
