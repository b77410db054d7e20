"""Caches of a pass: how long keys and values are held, and what models ask of them."""

import torch

from cggr_core.routing.cache import PassCache, taken


def cache(**settings):
    return PassCache(**{"queries": 2, "length": 5, "shared": None, "places": {}, **settings})


def test_keys_and_values_are_released_unless_the_layer_runs_again():
    pair = torch.ones(1), torch.ones(1)
    recorded = {0: pair, 1: pair}
    with torch.no_grad():  # the first run of a layer that is checkpointed by reentrant code
        assert taken(recorded, 0) is pair and set(recorded) == {0, 1}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert taken(recorded, 0) is pair and set(recorded) == {0, 1}
    assert taken(recorded, 0) is pair and set(recorded) == {1}


def test_what_models_ask_of_a_cache():
    made = cache()
    assert made.is_compileable is False
    assert made.get_query_offset() == made.get_query_offset(1) == 0
    assert made.get_mask_sizes(2, 0) == (5, 0)
    assert made.get_seq_length() == 0
    made.in_layers = True
    assert made.get_seq_length() == 3
    assert cache(queries=5).get_seq_length(1) == 0
