"""Running only the first layers of a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cggr_core.routing.architectures import Architecture
from cggr_core.routing.context_pass import layer_input
from cggr_core.routing.patches import replaced_forwards


@contextmanager
def truncated(architecture: Architecture, depth: int, layer_output: Any) -> Iterator[None]:
    """Pass hidden states through the layers from ``depth`` on unchanged, so that norm and head follow directly."""

    def skip(*args: Any, **kwargs: Any) -> Any:
        return layer_output(layer_input(args, kwargs))

    with replaced_forwards(dict.fromkeys(list(architecture.layers)[depth:], skip)):
        yield
