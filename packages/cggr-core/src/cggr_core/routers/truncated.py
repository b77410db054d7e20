"""The first layers of a model as a router, and token statistics by any router."""

import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cggr_core.checks import check_at_least
from cggr_core.readout import HeadReadout
from cggr_core.settings import default_router_depth
from cggr_core.statistics import TokenStatistics, token_statistics

if TYPE_CHECKING:
    from cggr_core.routing import Engine


class TruncatedRouter(nn.Module):
    """The first layers of a model with its own norm and head; created by :func:`create_truncated_router`.

    It shares every parameter with the model. In a :class:`~cggr_core.CGGRModel` around the same model, nothing is
    computed twice: the gradient pass continues from its keys, values and hidden states.

    Attributes:
        model: The whole model.
        num_layers: Number of layers to run; 0 if none were found and the whole model runs.
    """

    def __init__(self, model: nn.Module, num_layers: int) -> None:
        super().__init__()
        self.model = model
        self.num_layers = num_layers
        self._engine: Engine | None = None

    @property
    def engine(self) -> "Engine":
        """The passes over :attr:`model`."""
        if self._engine is None:
            from cggr_core.routing import Engine

            self._engine = Engine(self.model)
        return self._engine

    @torch.no_grad()
    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Logits after the first layers, with the model's norm, head, softcap and scale.

        Args:
            input_ids: int64 ``[B, S]``.
            **inputs: ``attention_mask``, ``position_ids`` and other arguments of the model's forward.

        Returns:
            Logits ``[B, S, V]``.
        """
        arguments = {"input_ids": input_ids, **inputs}
        self.engine.prepare(self.engine.inputs(**arguments), routing=False)
        return self.engine.logits(arguments, depth=self.num_layers or None)

    @torch.no_grad()
    def statistics(
        self,
        inputs: dict[str, Any],
        targets: Tensor | None,
        *,
        fields: Collection[str],
        ignore_index: int = -100,
        precision: str | None = None,
    ) -> TokenStatistics:
        """Token statistics without a logits tensor.

        Args:
            inputs: Arguments of the model's forward.
            targets: Aligned targets, int64 ``[B, S]``, or ``None``.
            fields: Statistics that are needed.
            ignore_index: Target that is not scored.
            precision: Of the head's product, as in :func:`~cggr_core.linear_token_statistics`.

        Returns:
            float32 ``[B, S]`` each.
        """
        self.engine.prepare(self.engine.inputs(**inputs), routing=False)
        readout = HeadReadout(self.engine.architecture.head, ignore_index=ignore_index)
        values, _ = self.engine.plain(inputs, depth=self.num_layers or None)
        return readout.statistics(values, targets, fields=fields, precision=precision)


def create_truncated_router(model: nn.Module, num_layers: int | None = None) -> TruncatedRouter:
    """Create a router that runs the first layers of the model itself.

    Args:
        model: A Hugging Face language model (or a PEFT wrapper of one). Nothing is copied.
        num_layers: Number of layers to run, at least 1; ``None`` for an eighth of the model's. If the model has no more
            layers than that, or its layers are not found, the whole model runs, with a warning.

    Returns:
        The router.

    Raises:
        TypeError: If ``model`` is not a Hugging Face model, or ``num_layers`` not an integer.
        ValueError: If ``num_layers`` is less than 1.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
        >>> router = create_truncated_router(LlamaForCausalLM(config), num_layers=1)
        >>> router.num_layers
        1
    """
    if num_layers is not None:
        check_at_least("num_layers", num_layers, 1)
    router = TruncatedRouter(model, 0)
    depth = router.engine.depth
    router.num_layers = num_layers = default_router_depth(depth) if num_layers is None else num_layers
    if num_layers >= depth:
        warnings.warn(
            f"create_truncated_router(num_layers={num_layers}) runs the full model: "
            + (f"it has {depth} layers" if depth else f"the layers of {type(model).__name__} were not found")
            + "; scoring then costs a full forward",
            stacklevel=2,
        )
        router.num_layers = depth
    return router


@torch.no_grad()
def router_statistics(
    router: Any,
    inputs: dict[str, Any],
    targets: Tensor | None,
    *,
    shape: tuple[int, ...],
    fields: Collection[str],
    ignore_index: int = -100,
    precision: str | None = None,
) -> TokenStatistics:
    """Token statistics by any router.

    Args:
        router: A :class:`TruncatedRouter`, or a callable ``router(**inputs)`` that returns logits ``[B, S, V]`` or an
            object with ``.logits``.
        inputs: Arguments of the model's forward.
        targets: Aligned targets, int64 ``[B, S]``, or ``None``.
        shape: ``(B, S)``.
        fields: Statistics that are needed.
        ignore_index: Target that is not scored.
        precision: Of the head's product of a :class:`TruncatedRouter`.

    Returns:
        float32 ``[B, S]`` each.

    Raises:
        TypeError: If the router returned neither.
        ValueError: If it did not return logits for every token.
    """
    if isinstance(router, TruncatedRouter):
        return router.statistics(inputs, targets, fields=fields, ignore_index=ignore_index, precision=precision)
    output = router(**inputs)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(f"router must return logits [B, S, V] or an object with .logits, got {type(output).__name__}")
    if tuple(logits.shape[:-1]) != tuple(shape):
        raise ValueError(
            f"router must return logits [B, S, V] for input tokens of shape {list(shape)}, got {list(logits.shape)}"
        )
    return token_statistics(logits, targets, ignore_index=ignore_index, fields=fields)
