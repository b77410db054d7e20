"""What an engine holds for its model's layers, and what its passes tell others."""

from contextlib import contextmanager

import pytest
import torch

from cggr_core import Selection
from cggr_core.routing import engine as engines
from cggr_core.routing.context_pass import ignore_head
from cggr_core.routing.engine import Engine
from tests.support.model_steps import tokens
from tests.support.tiny_models import ROUTABLE


@pytest.fixture
def engine():
    return Engine(ROUTABLE["llama"]().train())


def prepared(engine):
    inputs = engine.inputs(input_ids=tokens(2, 8))
    engine.prepare(inputs, routing=True)
    return inputs


def test_what_was_made_for_layers_is_kept_as_long_as_they_are_the_models(engine):
    low, gathered = engine._in_low_precision(), engine._gathered
    assert engine.follow() is False
    assert engine._in_low_precision() is low and engine._gathered is gathered
    engine.model.model.layers[1] = ROUTABLE["llama"]().model.layers[1]
    assert engine.follow() is True
    assert engine._in_low_precision() is not low, "it would run the weights of the layer that is gone"
    assert engine._gathered is not gathered


def test_weights_are_gathered_around_a_context_pass_and_let_go_of_after_a_gradient_pass(engine, monkeypatch):
    inputs, order = prepared(engine), []

    class Gathered:
        @contextmanager
        def context_pass(self):
            order.append("before context")
            yield
            order.append("after context")

        def after_gradient_pass(self):
            order.append("after gradient")

    engine._gathered = Gathered()
    for own in (engines.context_pass, engines.gradient_pass):

        def run(*args, own=own, **options):
            order.append(own.__name__)
            return own(*args, **options)

        monkeypatch.setattr(engines, own.__name__, run)
    context, _ = engine.context(inputs, depth=engine.depth, keep_graph=True, head=True)
    keep = torch.zeros(2, 8, dtype=torch.bool)
    keep[:, 2:4] = True
    engine.gradient(inputs, Selection.from_mask(keep), context, keep_graph=True)
    assert order == ["before context", "context_pass", "after context", "gradient_pass", "after gradient"]


def test_a_context_pass_reads_the_head_if_its_values_are_wanted(engine, monkeypatch):
    inputs, readers = prepared(engine), []

    def run(*args, read_head, own=engines.context_pass, **options):
        readers.append(read_head)
        return own(*args, read_head=read_head, **options)

    monkeypatch.setattr(engines, "context_pass", run)
    for head in (False, True):
        _, values = engine.context(inputs, depth=engine.depth, keep_graph=False, head=head)
        assert (values is not None) is head
    assert readers[0] is ignore_head is not readers[1]
