"""Parts of a probe: the rows and tokens that it takes, what counts as close, and what it puts together."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from cggr_core.routing import probe as probes
from cggr_core.routing.engine import Engine
from tests.support.model_steps import tokens
from tests.support.tiny_models import ROUTABLE

ROWS, LENGTH = 5, 12
PACKED = torch.tensor([[*range(5), *range(LENGTH - 5)]]).expand(ROWS, -1)


def batch(**given):
    return Engine(ROUTABLE["llama"]()).inputs(input_ids=tokens(ROWS, LENGTH), **given)


def test_whole_rows_are_the_first_with_all_that_belongs_to_them():
    per_row = torch.arange(ROWS)[:, None]
    options = {"images": per_row, "shared": per_row[:1], "scale": torch.tensor(2.0), "flag": True, "name": "a"}
    inputs = replace(batch(position_ids=PACKED), options=options)
    cut = probes._whole_rows(inputs)
    assert cut.shape == (2, LENGTH) and cut.per_token["input_ids"].equal(tokens(ROWS, LENGTH)[:2])
    assert cut.position_ids.equal(PACKED[:2]) and cut.segment.equal(inputs.segment[:2])
    assert cut.options["images"].equal(per_row[:2]) and cut.options["shared"].equal(per_row[:1])
    assert {name: cut.options[name] for name in ("scale", "flag", "name")} == {"scale": 2.0, "flag": True, "name": "a"}
    assert probes._whole_rows(cut) is cut
    several = replace(batch(), options={"images": torch.zeros(7, 3)})
    assert probes._whole_rows(several) is several, "7 images of 5 rows cannot be told apart"


def test_a_few_tokens_and_unpacked_rows_are_one_document_each():
    model = ROUTABLE["llama"]()
    inputs = batch(position_ids=PACKED + 3)
    assert inputs.segment is not None
    few, whole = probes._few_tokens(model, inputs, 8), probes._unpacked(inputs)
    assert few.segment is None and few.position_ids.tolist() == [[*range(3, 11)]] * 2
    assert whole.segment is None and whole.position_ids.tolist() == [[*range(3, 3 + LENGTH)]] * ROWS


@pytest.mark.parametrize(
    ("dtype", "error", "close"),
    [
        (torch.float64, 1e-7, True),
        (torch.float64, 1e-5, False),
        (torch.float32, 5e-3, True),
        (torch.float32, 3e-2, False),
        (torch.bfloat16, 3e-2, True),
        (torch.bfloat16, 1e-1, False),
    ],
)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_logits_are_close_relative_to_their_size(dtype, error, close, scale):
    expected = torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(0)).double() * scale
    value = expected * (1 + error)
    if dtype == torch.float64:
        # Compared in float32, which has seven digits.
        assert probes._close(value, expected) is close
    else:
        assert probes._close(value.to(dtype), expected.to(dtype)) is close


def test_three_quarters_of_the_tokens_must_be_close():
    expected = torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(0))
    for wrong, close in ((3, True), (5, False)):
        value = expected.clone()
        value.view(16, 50)[:wrong] *= 2
        assert probes._close(value, expected) is close
    assert probes._close(torch.zeros(1, 4, 3), torch.zeros(1, 4, 3))


def test_under_autocast_logits_are_as_close_as_half_precision_is():
    expected = torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(0))
    assert not probes._close(expected * 1.03, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert probes._close(expected * 1.03, expected)
        assert not probes._close(expected * 1.1, expected)


def seen(model, **how):
    engine = Engine(model)
    return probes.probe(model, engine.architecture, engine.inputs(input_ids=tokens(2, 8)), **how)


def test_what_was_not_looked_at_is_not_claimed():
    model = ROUTABLE["llama"]()
    found = seen(model, routing=False, own_loss=False)
    assert not found.saw_loss and not found.has_loss and found.packing_obstacle is None
    assert not found.architecture.fused, "norms are replaced in routed passes"
    routed = seen(model, routing=True, own_loss=False).architecture.fused
    assert set(routed) >= {part for part in model.modules() if type(part).__name__ == "LlamaRMSNorm"}


def test_a_probe_keeps_no_graph_and_allows_attention_of_any_mask():
    model, modes = ROUTABLE["llama"](), []
    model.register_forward_pre_hook(
        lambda *_: modes.append((torch.is_grad_enabled(), torch.backends.cuda.math_sdp_enabled()))
    )
    torch.backends.cuda.enable_math_sdp(False)
    try:
        seen(model, routing=False, own_loss=False)
        assert not torch.backends.cuda.math_sdp_enabled(), "as it was asked for"
    finally:
        torch.backends.cuda.enable_math_sdp(True)
    assert modes[0] == (False, True)


def test_a_softcap_that_shows_is_the_heads():
    model = ROUTABLE["gemma2"]()
    model.config.final_logit_softcapping = 0.02
    assert seen(model, routing=False, own_loss=False).architecture.head.fused


@pytest.mark.filterwarnings("ignore:the head of:UserWarning")
def test_a_parameter_that_takes_part_in_evaluation_alone_is_no_part_of_the_head():
    class Shifted(type(ROUTABLE["llama"]())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if not self.training:
                output.logits = output.logits + self.shift
            return output

    model = ROUTABLE["llama"]()
    model.shift = torch.nn.Parameter(torch.zeros(1))
    model.__class__ = Shifted
    assert not seen(model.train(), routing=False, own_loss=False).architecture.head.fused


def test_the_heads_input_is_seen_before_hooks_of_others_change_it():
    model = ROUTABLE["llama"]().eval()
    engine = Engine(model)
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    inputs = engine.inputs(input_ids=tokens(2, 8))
    _, head_input, logits = probes._plain_forward(model, engine.architecture, inputs)
    torch.testing.assert_close(model.lm_head(head_input), logits)


OBSTACLES = {
    "at once": ([("a", "first", None)], ("a", "first", None)),
    "at once, packed": ([("a", "first", "packed")], ("a", "first", "packed")),
    "none": ([("a", None, None), ("b", None, None)], ("b", None, None)),
    "packed": ([("a", None, "packed"), ("b", None, None)], ("b", None, "packed")),
    "packed later": ([("a", None, None), ("b", None, "later")], ("b", None, "later")),
    "once trained": (
        [("a", None, "packed"), ("b", "it mixes", "later")],
        ("b", "it mixes, once constant parameters have been trained", "packed"),
    ),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_obstacles_as_it_is_and_once_it_was_trained(case, monkeypatch):
    found, wanted = OBSTACLES[case]
    results, given = iter(found), []

    @contextmanager
    def grown(model):
        yield True

    def as_it_is(model, architecture, rows, layer_output):
        given.append(architecture)
        return next(results)

    monkeypatch.setattr(probes, "grown_parameters", grown)
    monkeypatch.setattr(probes, "_routed_as_it_is", as_it_is)
    assert probes._routed(None, "described", None, None) == wanted
    assert given == ["described", "a"][: len(found)] and next(results, None) is None
