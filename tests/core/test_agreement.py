"""When values of two computations count as the same, and the tokens on which they are compared."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cggr_core import Selection
from cggr_core.routing import agreement

ARCHITECTURE = SimpleNamespace(head=SimpleNamespace(fused=True), layers=nn.ModuleList())


def rows(batch, length, padding=None, **more):
    return SimpleNamespace(
        shape=(batch, length), padding=padding, position_ids=torch.zeros(batch, length, dtype=torch.int64), **more
    )


@pytest.mark.parametrize(
    ("length", "alternate", "early"),
    [(1, [0], [0]), (2, [1], [0]), (3, [0, 2], [0, 1]), (6, [1, 3, 5], [0, 1, 2]), (7, [0, 2, 4, 6], [0, 1, 2, 3])],
)
def test_tokens_that_are_compared(length, alternate, early):
    for made, wanted in (
        (agreement.alternate_tokens(rows(3, length)), alternate),
        (agreement.early_tokens(rows(3, length)), early),
    ):
        assert made.index.tolist() == [wanted] * 3
        assert made.valid.all()


def test_a_pass_before_the_kept_tokens_is_compared_with_it(monkeypatch):
    passes, expected = [], torch.randn(1, 4, 8)
    selection = Selection.from_mask(torch.ones(1, 4, dtype=torch.bool), capacity=4)

    def context_pass(model, architecture, inputs, *, depth, keep_graph, read_head, layer_output):
        passes.append((depth, keep_graph, layer_output))
        return "context"

    def gradient_pass(model, architecture, inputs, selection, context, *, keep_graph, read_head):
        passes.append((context, keep_graph))
        read_head(expected)

    monkeypatch.setattr(agreement, "context_pass", context_pass)
    monkeypatch.setattr(agreement, "gradient_pass", gradient_pass)
    given = nn.Identity(), ARCHITECTURE, rows(1, 4), selection, expected
    assert agreement.difference(*given, depth=2, layer_output="wrap") is None
    assert passes == [(2, False, "wrap"), ("context", False)]


def test_infinities_are_apart_from_other_values_alone():
    inf = float("inf")
    value, wanted = torch.tensor([inf, -inf, inf, 1.0]), torch.tensor([inf, -inf, -inf, 3.0])
    assert agreement.apart(value, wanted).tolist() == [0.0, 0.0, inf, -2.0]
    assert agreement.finite(value).tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("dtype", "of_layers", "tolerance"),
    [
        (torch.float64, [torch.float64], (1e-7, 1.0)),
        (torch.float64, [torch.float64, torch.int8], (1e-7, 1.0)),
        (torch.float64, [torch.float32], (1e-7, 1.0)),
        (torch.float32, [torch.float64], (2e-4, 0.99)),
        (torch.float64, [torch.bfloat16], (5e-2, 0.75)),
    ],
)
def test_the_tolerance_is_that_of_the_least_precise_part(dtype, of_layers, tolerance):
    layers = nn.ModuleList(nn.ParameterList([nn.Parameter(torch.zeros(1, dtype=each), False)]) for each in of_layers)
    architecture = SimpleNamespace(layers=layers)
    assert agreement._tolerance(architecture, torch.zeros(1, dtype=dtype)) == tolerance
    on_device = torch.zeros(1, dtype=dtype, device="meta")
    assert agreement._tolerance(architecture, on_device) == (tolerance if dtype == torch.float64 else (1e-2, 0.75))


@pytest.mark.parametrize(("value", "steps"), [("", None), ("1", 1), ("2", 2), ("10", 10)])
def test_steps_between_comparisons(value, steps, monkeypatch):
    monkeypatch.setenv("CGGR_VERIFY", value)
    assert agreement.verification_interval() == steps


def compared(monkeypatch, change, *, dtype=torch.float64, padding=None, tokens=400, scale=1.0):
    """The result of ``difference`` if the gradient pass returns ``change`` of the plain forward's values."""
    expected = torch.randn(1, tokens, 8, generator=torch.Generator().manual_seed(0)).to(dtype) * scale
    selection = Selection.from_mask(torch.ones(1, tokens, dtype=torch.bool), capacity=tokens)

    def gradient_pass(model, architecture, inputs, selection, context, *, keep_graph, read_head):
        assert context is agreement.NO_CONTEXT and not keep_graph
        read_head(change(expected.clone()))

    monkeypatch.setattr(agreement, "gradient_pass", gradient_pass)
    return agreement.difference(
        nn.Identity(), ARCHITECTURE, rows(1, tokens, padding), selection, expected, depth=0, layer_output=None
    )


def off(share, error):
    """Changes the first ``share`` of the rows by a relative ``error``."""

    def change(values):
        count = round(share * values.shape[1])
        values[:, :count] = values[:, :count] * (1 + error)
        return values

    return change


@pytest.mark.parametrize(
    ("dtype", "share", "error", "same"),
    [
        (torch.float64, 1.0, 0.9e-7, True),
        (torch.float64, 1 / 400, 1.2e-7, False),  # every row counts
        (torch.float32, 1.0, 1e-4, True),
        (torch.float32, 1.0, 4e-4, False),
        (torch.float32, 0.005, 1.0, True),  # a few rows may fall on the other side of a router's choice
        (torch.float32, 0.02, 1.0, False),
        (torch.bfloat16, 1.0, 0.02, True),
        (torch.bfloat16, 1.0, 0.1, False),
        (torch.bfloat16, 0.2, 1.0, True),
        (torch.bfloat16, 0.3, 1.0, False),
    ],
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_tolerance_follows_the_dtype(dtype, share, error, same, scale, monkeypatch):
    said = compared(monkeypatch, off(share, error), dtype=dtype, scale=scale)
    assert (said is None) is same
    if said is not None:
        assert said.startswith("relative error ") and ", tolerance " in said


def test_under_autocast_the_tolerance_is_that_of_half_precision(monkeypatch):
    with torch.autocast("cpu", torch.bfloat16):
        assert compared(monkeypatch, off(1.0, 0.02), dtype=torch.float32) is None
    assert compared(monkeypatch, off(1.0, 0.02), dtype=torch.float32) is not None


def test_float32_values_of_layers_in_half_precision_have_its_tolerance(monkeypatch):
    monkeypatch.setattr(ARCHITECTURE, "layers", nn.ModuleList([nn.Linear(2, 2, dtype=torch.bfloat16)]))
    assert compared(monkeypatch, off(1.0, 0.02), dtype=torch.float32) is None
    assert compared(monkeypatch, off(1.0, 0.1), dtype=torch.float32) is not None


def test_the_error_that_is_said_is_the_one_there_is(monkeypatch):
    assert compared(monkeypatch, off(0.5, 0.25)) == "relative error 0.25, tolerance 1e-07"

    def zero(values):
        values[0, 0] = 0
        return values

    assert compared(monkeypatch, zero) == "relative error 1, tolerance 1e-07"


def test_rows_without_a_number_agree_where_both_have_none(monkeypatch):
    expected = torch.ones(1, 4, 3, dtype=torch.float64)
    expected[0, 1, 2] = torch.nan
    selection = Selection.from_mask(torch.ones(1, 4, dtype=torch.bool), capacity=4)
    value = expected.clone()
    monkeypatch.setattr(agreement, "gradient_pass", lambda *_, read_head, **__: read_head(value))

    def said():
        return agreement.difference(
            nn.Identity(), ARCHITECTURE, rows(1, 4), selection, expected, depth=0, layer_output=None
        )

    assert said() is None
    value[0, 2, 0] = torch.nan
    assert said() is not None
    value = expected.nan_to_num(0.0)
    assert said() is not None


def test_rows_of_zeros_agree(monkeypatch):
    assert compared(monkeypatch, lambda values: values, scale=0.0) is None


def test_padding_and_empty_slots_are_not_compared(monkeypatch):
    padding = torch.ones(1, 40, dtype=torch.int64)
    padding[0, :10] = 0
    assert compared(monkeypatch, off(0.25, 1.0), tokens=40) is not None
    assert compared(monkeypatch, off(0.25, 1.0), tokens=40, padding=padding) is None
    assert compared(monkeypatch, off(0.3, 1.0), tokens=40, padding=padding) is not None
    assert compared(monkeypatch, off(1.0, 1.0), tokens=40, padding=padding * 0) is None
    said = compared(monkeypatch, lambda values: values[:, :-1], tokens=40)
    assert said is not None and said.endswith("[1, 39, 8] instead of [1, 40, 8]")


class Jittered(nn.Module):
    """Noise from a rate attribute, or from a source that cannot be switched off."""

    def __init__(self, jitter_noise: float | None):
        super().__init__()
        self.jitter_noise = jitter_noise

    def forward(self, given):
        if not self.training:
            return given
        return given + torch.rand(()) * (1.0 if self.jitter_noise is None else self.jitter_noise)


@pytest.mark.parametrize(
    ("noise", "training", "modes", "seen_in"),
    [
        (nn.Dropout(0.0), True, [True] * 2, True),
        (nn.Dropout(0.5), True, [True] * 4, True),
        (Jittered(0.3), True, [True] * 4, True),
        (Jittered(None), True, [True] * 4 + [False], False),
        (nn.Dropout(0.5), False, [False], False),
    ],
)
def test_values_are_compared_in_a_mode_that_gives_them_again(noise, training, modes, seen_in):
    model = nn.Sequential(nn.Linear(4, 4), noise).train(training)
    model[0].eval()  # as a part that is frozen
    given, calls = torch.randn(3, 4), []
    rates = {name: value for name, value in vars(noise).items() if isinstance(value, float)}

    def run(model, architecture, inputs):
        calls.append(model.training)
        return model(given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "_head_values", run)
        state = torch.get_rng_state()
        with agreement.comparable(model, ARCHITECTURE, rows(1, 3)) as expected:
            assert torch.equal(expected, model(given)) and not expected.requires_grad
            assert model.training is seen_in
        assert model.training is training and not model[0].training
        assert {name: getattr(noise, name) for name in rates} == rates
        assert torch.equal(state, torch.get_rng_state())
        # A second look where the mode may matter alone.
        assert calls == modes


def test_an_ordinary_forward_is_given_the_whole_batch():
    padding = torch.ones(2, 3)
    for given, wanted in ((None, {"a": 1, "b": 2}), (padding, {"a": 1, "b": 2, "attention_mask": padding})):
        made = agreement.plain_arguments(rows(2, 3, given, quiet={"b": 2}, arguments=lambda: {"a": 1}))
        assert made == wanted
