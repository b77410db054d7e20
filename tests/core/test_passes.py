"""Single context and gradient passes: what they run, under which changes, and what they leave behind."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from cggr_core import Selection
from cggr_core.routing import context_pass as context_passes
from cggr_core.routing import gradient_pass as gradient_passes
from cggr_core.routing.context_pass import NO_CONTEXT, context_pass, head_read_by, layer_input, with_layer_input
from cggr_core.routing.engine import Engine
from cggr_core.routing.gradient_pass import gradient_pass
from cggr_core.routing.masks import ROUTED_UNCAPPED
from tests.support.model_steps import checkpoint_activations, tokens
from tests.support.tiny_models import ROUTABLE

IDS = tokens(length=8)[:2]


class Passes:
    """A model, a batch of it, and its passes as the engine calls them."""

    def __init__(self, name="llama", **settings):
        self.model = ROUTABLE[name](**settings).eval()
        self.engine = Engine(self.model)
        self.inputs = self.engine.inputs(input_ids=IDS, attention_mask=torch.ones_like(IDS))
        self.engine.prepare(self.inputs, routing=True)
        mask = torch.zeros_like(IDS, dtype=torch.bool)
        mask[:, ::3] = True
        self.kept = Selection.from_mask(mask, countable=torch.ones_like(mask), capacity=3)
        self.read = []

    def context(self, depth=3, *, keep_graph=False, own_head=False):
        return context_pass(
            self.model,
            self.engine.architecture,
            self.inputs,
            depth=depth,
            keep_graph=keep_graph,
            read_head=None if own_head else self.read.append,
            layer_output=self.engine._findings.layer_output,
        )

    def gradient(self, context=NO_CONTEXT, **how):
        settings = {"keep_graph": True, "read_head": self.read.append, **how}
        return gradient_pass(self.model, self.engine.architecture, self.inputs, self.kept, context, **settings)


def test_what_a_context_pass_leaves():
    passes = Passes()
    wanted = passes.model(IDS, output_hidden_states=True)
    for depth in (1, 2, 3):
        found = passes.context(depth)
        assert sorted(found.recorded) == list(range(depth)) and found.depth == depth and found.logits is None
        if depth == 3:
            assert found.hidden is None
            torch.testing.assert_close(passes.read.pop(), wanted.hidden_states[3])
        else:
            torch.testing.assert_close(found.hidden, wanted.hidden_states[depth])
            torch.testing.assert_close(passes.read.pop(), passes.model.model.norm(found.hidden))
    torch.testing.assert_close(passes.context(own_head=True).logits, wanted.logits)


@pytest.mark.parametrize("keep_graph", [False, True])
def test_keys_and_values_alone_have_a_graph_and_only_where_it_is_kept(keep_graph):
    passes = Passes()
    found = passes.context(2, keep_graph=keep_graph)
    assert all(part.requires_grad is keep_graph for pair in found.recorded.values() for part in pair)
    assert not found.hidden.requires_grad and not passes.read[0].requires_grad


@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("watched", [False, True])
def test_norms_are_remade_where_nobody_else_watches_what_is_saved(keep_graph, watched, monkeypatch):
    passes, remade = Passes(), []

    def noted(architecture, number, make=context_passes.remade_norms):
        remade.append(number)
        return make(architecture, number)

    monkeypatch.setattr(context_passes, "remade_norms", noted)
    with torch.autograd.graph.save_on_cpu() if watched else nullcontext():
        passes.context(keep_graph=keep_graph)
    assert remade == ([0, 1, 2] if keep_graph and not watched else [])


def without_keys(layer):
    layer.forward = lambda hidden, **_: hidden + layer.mlp(hidden)


@pytest.mark.parametrize("place", [0, 2])
def test_layers_without_keys_are_named_by_either_pass(place):
    passes = Passes()
    without_keys(passes.model.model.layers[place])
    said = rf"^layers \[{place}\] did not pass their keys and values through the cache$"
    with pytest.raises(RuntimeError, match=said):
        passes.context()
    with pytest.raises(RuntimeError, match=said):
        passes.gradient()


def test_a_pass_runs_on_the_attention_and_masks_that_it_is_made_for(monkeypatch):
    passes, seen = Passes(), []
    config = passes.model.config

    def note(module, args, kwargs):
        cache = next(value for name, value in kwargs.items() if name in ("past_key_values", "cache"))
        seen.append((config._attn_implementation, getattr(cache, "in_layers", None)))

    passes.model.model.layers[1].self_attn.register_forward_pre_hook(note, with_kwargs=True)
    apart = []

    def routed_masks(visibility, *, taken_apart=False, change=gradient_passes.routed_masks, **options):
        apart.append(taken_apart)
        return change(visibility, taken_apart=taken_apart, **options)

    monkeypatch.setattr(gradient_passes, "routed_masks", routed_masks)
    context = passes.context()
    passes.gradient(context)
    assert [name for name, _ in seen] == [ROUTED_UNCAPPED] * 2 and config._attn_implementation == "sdpa"
    assert seen[1][1] is True and apart == [True]


@pytest.mark.parametrize("preserve", [True, False])
def test_checkpointed_layers_go_back_to_their_random_state_unless_told(preserve, monkeypatch):
    passes, seen = Passes(), []
    checkpoint_activations(passes.model.train())

    def checkpoint(run, *args, run_with=gradient_passes.checkpoint, **how):
        seen.append(how["preserve_rng_state"])
        return run_with(run, *args, **how)

    monkeypatch.setattr(gradient_passes, "checkpoint", checkpoint)
    passes.gradient(preserve_rng_state=preserve)
    assert seen == [preserve] * 3
    assert passes.read[0].requires_grad and passes.read[0].shape == (2, 3, 32)


@pytest.mark.parametrize("fused", [True, False])
def test_what_a_head_gives_that_is_only_read(fused):
    passes = Passes()
    architecture, head = passes.engine.architecture, passes.model.lm_head
    hidden = torch.randn(2, 3, 32, requires_grad=True)
    own, called = head(hidden), []
    head.register_forward_hook(lambda *_: called.append(1))
    with head_read_by(replace(architecture, head=replace(architecture.head, fused=fused)), passes.read.append):
        given = head(hidden)
    assert passes.read == [hidden] and not given.requires_grad and not called
    assert torch.equal(given, hidden if fused else torch.zeros_like(own))
    with head_read_by(architecture, None):
        assert torch.equal(head(hidden), own) and called


def test_the_hidden_state_among_a_layers_arguments():
    hidden, other = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    assert layer_input((hidden, 1), {}) is hidden is layer_input((), {"hidden_states": hidden})
    assert with_layer_input((hidden, 1), {"a": 2}, other) == ((other, 1), {"a": 2})
    args, kwargs = with_layer_input((), {"hidden_states": hidden, "a": 2}, other)
    assert args == () and kwargs == {"hidden_states": other, "a": 2}
