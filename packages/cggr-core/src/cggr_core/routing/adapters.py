"""Adapters that depend on token ids: PEFT's activated LoRA, active from its invocation tokens to the end of the row."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from cggr_core.routing.patches import replaced_forwards


class InvokedAdapters:
    """Where activated LoRA begins among the tokens that a layer runs on.

    PEFT finds the invocation tokens in the whole rows passed to the model and tells every adapter how many tokens at
    the end of each row to change.

    Args:
        model: The model; without such adapters, this does nothing.
        length: Positions ``S`` of a row.
    """

    def __init__(self, model: nn.Module, length: int) -> None:
        configs = getattr(model, "peft_config", None) or {}
        invoked = any(getattr(config, "alora_invocation_tokens", None) for config in configs.values())
        self._modules = [module for module in model.modules() if hasattr(module, "lora_A")] if invoked else []
        self._length = length
        self._whole: list[int | None] | None = None
        self._counts: dict[int, list[int]] = {}

    def at(self, index: Tensor) -> AbstractContextManager[None]:
        """Within the block, count among the positions ``index`` ``[B, Q]``, which ascend."""
        return self._replaced(index) if self._modules else nullcontext()

    @contextmanager
    def _replaced(self, index: Tensor) -> Iterator[None]:
        forwards = {module: partial(self._run, index, _own_forward(module)) for module in self._modules}
        with replaced_forwards(forwards):
            yield

    def _run(
        self, index: Tensor, forward: Callable[..., Any], *args: Any, alora_offsets: Any = None, **kwargs: Any
    ) -> Any:
        # A checkpointed layer is recomputed after PEFT's hooks are gone.
        self._whole = alora_offsets or self._whole
        if self._whole is None:
            return forward(*args, **kwargs)
        return forward(*args, alora_offsets=self._among(index, self._whole), **kwargs)

    def _among(self, index: Tensor, whole: list[int | None]) -> list[int]:
        if id(index) not in self._counts:
            first = index.new_tensor([self._length - (offset or 0) for offset in whole])
            self._counts[id(index)] = (index >= first[:, None]).sum(1).tolist()
        return self._counts[id(index)]


def _own_forward(module: nn.Module) -> Callable[..., Any]:
    """A module's own forward, even inside a block that replaces it."""
    forward = module.forward
    while isinstance(forward, partial) and isinstance(getattr(forward.func, "__self__", None), InvokedAdapters):
        forward = forward.args[1]
    return forward
