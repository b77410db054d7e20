"""What holds for all tests."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _small_heap_to_collect() -> None:
    """Leave what stands when a file's tests begin out of garbage collection.

    Most of it is the modules of torch and transformers, which every ``gc.collect()`` of what weighs memory would go
    through, for up to a second.
    """
    gc.collect()
    gc.freeze()
