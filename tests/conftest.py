"""Settings shared by all tests."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _small_heap_to_collect() -> None:
    """Exclude objects that exist before a file's tests from garbage collection.

    Most are the modules of torch and transformers, which every ``gc.collect()`` in a memory test would scan, for up to
    a second.
    """
    gc.collect()
    gc.freeze()
