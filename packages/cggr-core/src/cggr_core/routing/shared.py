"""Tokens that several rows of a batch continue: their keys and values are computed once and attended to by all rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cggr_core.routing.ordering import backward_in_turn

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shared:
    """Tokens before every row of a batch.

    Attributes:
        recorded: Keys and values ``[N, H, L, D]`` of every layer.
        length: Tokens ``L`` before every row.
        rows: Which of the N each row of the batch continues, int64 ``[B]``; ``None`` for ``B / N`` neighbouring rows
            each.
        padding: ``[N, L]``, false or 0 at padding; ``None`` without padding.
    """

    recorded: dict[int, KeyValue]
    length: int
    rows: Tensor | None
    padding: Tensor | None

    @property
    def takes_gradients(self) -> bool:
        """Whether gradients of the rows' losses flow into the shared tokens' own pass."""
        return any(key.requires_grad for key, _ in self.recorded.values())

    def before(self, layer: int, own: KeyValue, *, constant: bool, in_turn: bool, made: KeyValue | None) -> KeyValue:
        """Keys and values ``[B, H, L + S, D]`` of the shared tokens and the batch's own.

        Args:
            layer: The layer.
            own: Keys and values of the rows' own tokens, ``[B, H, S, D]``.
            constant: Let no gradient reach the shared tokens.
            in_turn: Have the shared tokens' backward inside the layer's.
            made: The result, if it is already available; then only its gradients are attached.
        """
        shared = self.recorded[layer]
        if constant:
            shared = shared[0].detach(), shared[1].detach()
        elif in_turn:
            keys, values = backward_in_turn(shared, before=own[0])
            shared = keys, values
        results = made or (None, None)
        keys, values = (
            _PutBefore.apply(first, rest, self.rows, result)
            for first, rest, result in zip(shared, own, results, strict=True)
        )
        return keys, values

    def spread(self, per_shared: Tensor, batch_size: int) -> Tensor:
        """``per_shared`` ``[N, ...]`` for each row, ``[B, ...]``."""
        if self.rows is not None:
            return per_shared.index_select(0, self.rows)
        return per_shared.repeat_interleave(batch_size // per_shared.shape[0], dim=0)


class RemadeForBackward:
    """Avoids saving keys and values that include shared tokens for the backward pass.

    Saving them would hold a copy of the shared tokens for every row in every layer. Their parts are kept anyway, and
    are concatenated again when the backward pass reaches the layer.
    """

    def __init__(self) -> None:
        # Held until the next layer's exist, so that no other tensor can reuse their memory.
        self._whole: tuple[Tensor, ...] = ()
        self._remade: _Remade | None = None

    def watch(self, whole: KeyValue, make: Callable[[], KeyValue]) -> None:
        """Keys and values that the layer is about to attend to, and how to recompute them."""
        self._whole, self._remade = whole, _Remade(make)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Intercept what the block saves."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._whole, self._remade = (), None

    def _pack(self, tensor: Tensor) -> Any:
        for part, whole in enumerate(self._whole):
            if tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
                return _Part(self._remade, part, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return tensor

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        whole = packed.remade.take(packed.part)
        return whole.as_strided(packed.size, packed.stride, packed.offset)


class _Remade:
    """Keys and values recomputed at the first request for one of them, and released as they are taken."""

    def __init__(self, make: Callable[[], KeyValue]) -> None:
        self._make = make
        self._parts: dict[int, Tensor] = {}

    def take(self, part: int) -> Tensor:
        if part not in self._parts:
            with torch.no_grad():
                self._parts = dict(enumerate(self._make()))
        return self._parts.pop(part)


class _Part(NamedTuple):
    remade: _Remade | None
    part: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _PutBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shared: Tensor, own: Tensor, rows: Tensor | None, made: Tensor | None) -> Tensor:
        ctx.rows, ctx.count, ctx.length = rows, shared.shape[0], shared.shape[2]
        if made is not None:
            return made.view_as(made)
        batch, heads, own_length, size = own.shape
        full = own.new_empty(batch, ctx.length + own_length, heads, size)
        first, shared = full[:, : ctx.length], shared.transpose(1, 2)
        if rows is None:
            first.unflatten(0, (ctx.count, -1)).copy_(shared[:, None])
        else:
            first.copy_(shared.index_select(0, rows))
        full[:, ctx.length :] = own.transpose(1, 2)
        return full.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shared_grad = own_grad = None
        if ctx.needs_input_grad[0]:
            first = grad[:, :, : ctx.length]
            if ctx.rows is None:
                shared_grad = first.unflatten(0, (ctx.count, -1)).sum(1)
            else:
                # Accumulated in float32: in half precision, each of G additions would round.
                exact = torch.float64 if grad.dtype == torch.float64 else torch.float32
                total = grad.new_zeros(ctx.count, *first.shape[1:], dtype=exact)
                shared_grad = total.index_add_(0, ctx.rows, first.to(exact)).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            own_grad = grad[:, :, ctx.length :]
        return shared_grad, own_grad, None, None
