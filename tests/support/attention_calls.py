"""The attention functions of transformers that a block of code calls."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextmanager
def attention_calls() -> Iterator[list[tuple[str, int]]]:
    """The attention functions that are called in the block, in order, each with its number of queries."""
    calls: list[tuple[str, int]] = []
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: Any, query: Any, *args: Any, **options: Any) -> Any:
            calls.append((name, query.shape[2]))
            return function(module, query, *args, **options)

        return call

    try:
        for name in ALL_ATTENTION_FUNCTIONS.valid_keys():
            ALL_ATTENTION_FUNCTIONS[name] = noting(name, ALL_ATTENTION_FUNCTIONS[name])
        yield calls
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.clear()
        ALL_ATTENTION_FUNCTIONS._local_mapping.update(before)
