"""The engine of a model, and a call that reaches it through the model's wrappers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from cggr_core.checks import check_not_compiled
from cggr_core.model import CGGRModel
from cggr_core.monitor import Monitor

if TYPE_CHECKING:
    from cggr_core.routing import Engine

__all__ = ["EngineOfModel", "call_in_forward", "engine_of", "language_model"]

_ATTRIBUTE = "_cggr_engine_of_model"


class EngineOfModel:
    """A model's engine and the errors its steps defer, stored in the model's own ``__dict__``.

    A global table would keep every model alive forever, since an engine holds its model. A copy or a pickle of the
    model gets an empty dictionary instead, and builds its own engine when it is used.
    """

    def __init__(self, model: nn.Module) -> None:
        from cggr_core.routing import Engine

        self.engine: Engine = Engine(model)
        check_not_compiled(model, self.engine.architecture.layers)
        self.monitor = Monitor()

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[()]]:
        return dict, ()


def engine_of(model: nn.Module) -> EngineOfModel:
    """The engine of a Hugging Face model, built at the first call."""
    found = model.__dict__.get(_ATTRIBUTE)
    if not (isinstance(found, EngineOfModel) and found.engine.model is model):
        found = model.__dict__[_ATTRIBUTE] = EngineOfModel(model)
    return found


def language_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model, or the PEFT wrapper of one, inside ``DistributedDataParallel`` and the like.

    Raises:
        TypeError: If ``model`` is not a module, or contains no Hugging Face model.
        ValueError: If that one was compiled.
    """
    inner: Any = model
    while True:
        if isinstance(inner, CGGRModel):
            inner = inner.model
        elif isinstance(inner, nn.Module) and hasattr(inner, "get_output_embeddings"):
            if "_orig_mod" in inner._modules or inner._compiled_call_impl is not None:
                check_not_compiled(inner, nn.ModuleList())
            return inner
        elif isinstance(inner, nn.Module) and isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            raise TypeError(
                "model must be a Hugging Face language model, a PEFT or CGGRModel wrapper of one, or one of these "
                f"wrapped for several devices (with the model as its .module), got {type(model).__name__}"
                + ("; pass the model from before torch.compile" if hasattr(inner, "_orig_mod") else "")
            )


def call_in_forward(model: nn.Module, inner: nn.Module, run: Callable[[], Any], arguments: dict[str, Any]) -> Any:
    """Call ``model`` and let ``run`` be the forward of the ``inner`` one.

    ``DistributedDataParallel``, FSDP2's ``fully_shard`` and other hooks see one ordinary call around all passes of
    ``run``.
    """
    from cggr_core.routing import forward_replaced_by

    with forward_replaced_by(inner, lambda *args, **kwargs: run()):
        return model(**arguments)
