"""Counts how often weights were loaded into a model, which invalidates earlier checks of it."""

from typing import Any

from torch import nn


class LoadCounter:
    """A ``load_state_dict`` hook that counts.

    Attributes:
        count: Loads so far.
    """

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        """Called by torch after weights were loaded."""
        self.count += 1


def count_loads(model: nn.Module) -> LoadCounter:
    """The counter of a model; there is one per model, however often it is wrapped."""
    for hook in model._load_state_dict_post_hooks.values():
        if isinstance(hook, LoadCounter):
            return hook
    counter = LoadCounter()
    model.register_load_state_dict_post_hook(counter)
    return counter
