"""Which code in a model is of others, and which tokens it names; rows that hold tokens no batch has held."""

import functools
from dataclasses import replace
from types import FunctionType, SimpleNamespace

import pytest
import torch
from torch import nn

from cggr_core.routing import own_code, rare_tokens
from cggr_core.routing.engine import Engine
from tests.support.model_steps import tokens
from tests.support.tiny_models import ROUTABLE, VOCAB


def of(module: str, function):
    """The same function as if it were written in ``module``."""
    known = {**function.__globals__, "__name__": module}
    made = FunctionType(function.__code__, known, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def plain(*args, **kwargs):
    return None


KNOWN = ["torch.nn", "torchao.x", "bitsandbytes.nn", "cggr_core.routing", "transformers.models.x", "peft.tuners.x"]
KNOWN += ["accelerate.hooks", "trl.models", "liger_kernel.transformers"]


@pytest.mark.parametrize("how", ["forward", "hook", "pre-hook", "partial", "callable", "wrapped"])
@pytest.mark.parametrize("home", [*KNOWN, "own", "torchless"])
def test_whose_code_a_module_runs(home, how):
    model, function = ROUTABLE["llama"](), of(home, plain)
    layer = model.model.layers[1]
    if how == "hook":
        layer.register_forward_hook(function)
    elif how == "pre-hook":
        layer.register_forward_pre_hook(function)
    else:
        layer.forward = {
            "forward": function,
            "partial": functools.partial(of("torch.x", plain), nn.Identity(), function, key=3),
            "callable": type("Callable", (), {"__call__": function})(),
            "wrapped": functools.wraps(function)(of("torch.x", plain)),
        }[how]
    others = home not in KNOWN
    assert own_code.is_in(model) is others
    assert own_code.surrounds_layers(model, model, model.model.layers) is False, "it runs inside of them"


@pytest.mark.parametrize("place", ["wrapper", "model", "backbone", "layers"])
def test_code_around_the_layers(place):
    model = ROUTABLE["llama"]()
    outer = nn.Sequential(model)
    part = {"wrapper": outer, "model": model, "backbone": model.model, "layers": model.model.layers}[place]
    assert not own_code.surrounds_layers(outer, model, model.model.layers)
    part.register_forward_pre_hook(plain)
    assert own_code.surrounds_layers(outer, model, model.model.layers) is (place != "layers")
    assert own_code.is_in(outer)


NUMBER, TABLE = 11, [12, 13]


def named(forward=None, *, vocab_size=90, configs=(), hook=None, **attributes) -> set[int]:
    module = nn.Identity()
    if forward is not None:
        module.forward = forward
    if hook is not None:
        module.register_forward_hook(hook)
    for name, value in attributes.items():
        setattr(module, name, value)
    return set(own_code.tokens_named(nn.Sequential(module), configs, vocab_size))


def helper():
    return 14


class Rule:
    special = 15

    def __init__(self):
        self.held = 16

    def check(self, x):
        return x == 17 or self.other() or self.special

    def other(self):
        return 18


def reads_much(x):
    def inner(y):
        return y == 19

    return NUMBER, TABLE, helper, inner


def closing_over(value):
    def forward(x):
        return x == value

    return forward


def test_tokens_that_code_of_others_names():
    assert named(reads_much) >= {11, 12, 13, 14, 19}
    assert named(hook=reads_much) >= {11, 12, 13, 14, 19}
    assert named(closing_over(21)) >= {21} and named(closing_over([22, (23,)])) >= {22, 23}
    assert named(Rule().check) >= {15, 16, 17, 18}
    assert named(functools.partial(plain, 24, key=25)) >= {24, 25}
    assert named(functools.partial(plain, Rule().check)) >= {15, 16, 17, 18}


def test_a_variable_that_is_not_yet_assigned_names_no_token():
    def forward(x):
        return x == later

    before, later = named(forward), 61
    assert before == named(plain) and 61 in named(forward) and later


def test_tokens_that_modules_with_such_code_hold():
    held = {"a": 31, "b": [32, {33}, "no"], "c": torch.tensor([[34], [35]]), "d": 36.0, "e": torch.tensor([1.0])}
    assert named(plain, **held) >= {31, 32, 33, 34, 35} and not named(plain, **held) & {36, 1}
    assert not named(**held) & {31, 32, 33, 34, 35}, "its own code is torch's"
    assert named(plain, a=True, b=90, c=-3, d=89, e=0) >= {0, 89} and 90 not in named(plain, b=90)
    assert named(plain, many=list(range(20, 85))) == named(plain) == named(plain, many=torch.arange(20, 85))
    assert named(plain, many=list(range(20, 84))) >= set(range(20, 84))
    assert named(plain, many=torch.arange(20, 84)) >= set(range(20, 84))
    assert named(plain, empty=torch.zeros(0, dtype=torch.int64)) == named(plain)
    module = nn.Identity()
    module.forward = plain
    module.register_buffer("special", torch.tensor([41]))
    assert 41 in own_code.tokens_named(module, (), 90)


def test_tokens_of_configs_come_last():
    config = SimpleNamespace(eos_token_id=50, image_token=51, stop_ids=[52], pad_id=53, start_index=54, hidden_size=55)
    assert named(configs=[config]) == {50, 51, 52, 53, 54}
    module = nn.Identity()
    module.forward = closing_over(60)
    found = own_code.tokens_named(module, [config], 90)
    assert found[-5:] == [50, 51, 52, 53, 54] and 60 in found[:-5]


def batch(model, rows=3, length=8, **given):
    return Engine(model).inputs(input_ids=tokens(rows, length), **given)


@pytest.mark.parametrize("batches", [1, 2, 9])
def test_rows_hold_the_named_tokens_and_then_those_of_the_highest_numbers(batches):
    model = ROUTABLE["llama"]()
    engine = Engine(model)
    inputs = engine.inputs(input_ids=tokens(3, 8))
    found = list(rare_tokens._rows_of(model, engine.architecture, inputs, [5, 7], VOCAB, batches))
    assert len(found) == min(batches, -(-VOCAB // 24)) and all(rows.shape == (3, 8) for rows in found)
    ids = torch.cat([rows.per_token["input_ids"] for rows in found])
    wanted = [5, 7, *(token for token in range(VOCAB - 1, -1, -1) if token not in (5, 7))][: batches * 24]
    assert set(wanted) <= set(ids.flatten().tolist())
    # Column by column from the second quarter on, so each of the first is in a row of its own.
    assert ids[:2, 2].tolist() == [5, 7] and ids[2, 2] == VOCAB - 1


def test_rows_of_other_tokens_have_nothing_of_the_batchs_own():
    model = ROUTABLE["llama"]()
    engine, ids = Engine(model), tokens(3, 8)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    inputs = replace(engine.inputs(input_ids=ids, attention_mask=mask), options={"images": ids, "flag": True})
    made = rare_tokens._with_tokens(model, engine.architecture, inputs, ids + 1)
    assert made.per_token["input_ids"].equal(ids + 1) and made.padding.all() and made.segment is None
    assert made.options == {"flag": True} and made.position_ids.equal(torch.arange(8).expand(3, -1))
    packed = engine.inputs(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 3))
    types = replace(packed, per_token={**packed.per_token, "token_type_ids": torch.ones_like(ids)})
    unpacked = rare_tokens._with_tokens(model, engine.architecture, types, ids)
    assert unpacked.segment is None and unpacked.padding is None
    assert unpacked.position_ids.equal(torch.arange(8).expand(3, -1))
    assert not unpacked.per_token["token_type_ids"].any()


@pytest.mark.parametrize("sharded", [False, True])
def test_the_first_difference_is_the_obstacle(sharded, monkeypatch):
    model, seen = ROUTABLE["llama"](), []
    engine, inputs = Engine(model), batch(model)
    engine.prepare(inputs, routing=True)
    probe = engine._findings._probe
    looked = iter([None, "relative error 1"])

    def difference(model, architecture, rows, layer_output):
        seen.append(rows)
        return next(looked)

    monkeypatch.setattr(rare_tokens, "_difference", difference)
    monkeypatch.setattr(rare_tokens, "_culprit", lambda *_: 42)
    found = rare_tokens.probe_rare_tokens(model, probe, inputs, sharded=sharded)
    if sharded:
        assert found is probe and len(seen) == 1
    else:
        assert found.architecture.obstacle.endswith("in rows that hold token 42 (relative error 1)")


def test_two_batches_of_tokens_are_compared_those_of_every_config_first(monkeypatch):
    model, seen = ROUTABLE["llama"](), []
    model.config.eos_token_id, model.config.own_token_id = 40, 41
    model.generation_config.suppress_tokens = [42]
    engine, inputs = Engine(model), batch(model, 2, 8)
    engine.prepare(inputs, routing=True)
    monkeypatch.setattr(rare_tokens, "_difference", lambda model, architecture, rows, output: seen.append(rows))
    probe = engine._findings._probe
    assert rare_tokens.probe_rare_tokens(model, probe, inputs, sharded=False) is probe
    assert len(seen) == 2
    # Column by column over the rows of both, so the first tokens are in the column of the second quarter.
    assert {40, 41, 42} <= {token for rows in seen for token in rows.per_token["input_ids"][:, 2:4].flatten().tolist()}


def test_a_pass_that_does_not_run_is_a_difference_and_a_forward_that_does_not_is_none(monkeypatch):
    model = ROUTABLE["llama"]()
    engine, inputs = Engine(model), batch(model)
    engine.prepare(inputs, routing=True)
    given = model, engine.architecture, inputs, engine._findings.layer_output
    depths = []

    def difference(*args, depth, layer_output):
        depths.append(depth)
        if depth:
            raise ValueError("no cache")

    monkeypatch.setattr(rare_tokens, "difference", difference)
    assert rare_tokens._difference(*given) == "ValueError: no cache" and depths == [0, 3]
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("an image is missing")))
    assert rare_tokens._difference(*given) is None


def test_the_token_that_makes_the_difference_is_looked_for_among_the_named(monkeypatch):
    model, ids = ROUTABLE["llama"](), []
    engine, inputs = Engine(model), batch(model)

    def difference(model, architecture, rows, layer_output):
        ids.append(rows.per_token["input_ids"])
        return "other" if (ids[-1] == 31).any() else None

    monkeypatch.setattr(rare_tokens, "_difference", difference)
    clean = replace(inputs, per_token={"input_ids": inputs.per_token["input_ids"].clamp(max=30)})
    assert rare_tokens._culprit(model, engine.architecture, clean, [1, 31, 2], None) == 31
    assert [rows[:, 2].tolist() for rows in ids] == [[1] * 3, [31] * 3]
    assert (ids[0] != clean.per_token["input_ids"]).any(0).nonzero().flatten().tolist() == [2]
    assert rare_tokens._culprit(model, engine.architecture, clean, [1, 2], None) is None
