"""Recomputes norms in the backward pass, so that other tokens keep only the input of every layer.

The gradient of a projection's weight needs the projection's input, which is a norm of the layer's. Autograd would keep
the input and its norm, under autocast one copy of the norm per projection, and for norms made of elementary ops their
intermediate results too. The norm is cheap in comparison, so it is recomputed in the backward pass.

Where a norm is ``n * w`` with ``n = x / rms(x)``, one product gives the gradients of a projection's weight ``W`` and of
``w``: with ``G = dy.T @ n``, that of ``W`` is ``G * w``, and that of ``w`` the sum of ``W * G`` over its rows. The
gradient of the norm's output, which nothing else needs, is not computed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cggr_core.head import autocast_active
from cggr_core.routing.architectures import Architecture
from cggr_core.routing.norms import is_fused, without_weight
from cggr_core.routing.patches import own_parameters, replaced_forwards
from cggr_core.routing.precision import runs_plainly

Forward = Callable[..., Any]


@contextmanager
def remade_norms(architecture: Architecture, layer: int) -> Iterator[None]:
    """Do not save norms of a layer's input for the backward pass of what the block computes.

    The numbers of the forward do not change, and gradients only by rounding. Saved-tensor hooks entered before the
    block do not see its tensors.

    Scope: the norms and linear layers of this layer, whoever calls them.

    Args:
        architecture: Of the model.
        layer: Number of the layer that is called in the block, on hidden states without a graph.
    """
    segment = _Segment()
    forwards: dict[nn.Module, Forward] = {
        norm: partial(segment.norm, norm, norm.forward) for norm in architecture.norms[layer] if not _is_watched(norm)
    }
    if forwards and not any(map(_is_compiled, architecture.layers[layer].modules())):
        forwards |= {linear: partial(segment.linear, linear, linear.forward) for linear in architecture.linears[layer]}
    with (
        replaced_forwards(forwards),
        torch.autograd.graph.saved_tensors_hooks(segment.pack, _unpack),
    ):
        try:
            yield
        finally:
            segment.forget()


def saved_tensors_are_hooked() -> bool:
    """Whether saved-tensor hooks are active (such as ones that offload to another device)."""
    return cast(Any, torch._C)._autograd._top_saved_tensors_default_hooks(True) is not None


def _is_watched(module: nn.Module) -> bool:
    # A norm's hooks, which may gather its weights, would not run when it is recomputed.
    return bool(module._forward_hooks or module._forward_pre_hooks) or _is_compiled(module)


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None


class _Norm:
    """A norm of a layer's input, to be recomputed.

    Args:
        module: The norm.
        forward: Its forward in this pass.
        x: Its input, without a graph.

    Attributes:
        parameters: Of the module.
        in_turn: Whether its graph is built in the backward pass too.
    """

    def __init__(self, module: nn.Module, forward: Forward, x: Tensor) -> None:
        self._module, self._forward, self._x = module, forward, x
        self._named = dict(module._parameters)
        self.parameters = [parameter for parameter in self._named.values() if parameter is not None]
        self.in_turn = any(parameter.requires_grad for parameter in self.parameters) and not _keeps_little(forward, x)
        self._versions = self._seen()
        kind = x.device.type
        self._autocast = {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
            "cache_enabled": False,
        }
        self._again: Tensor | None = None
        self._made: dict[tuple[torch.dtype | None, bool], Tensor] = {}

    @property
    def weight(self) -> Tensor | None:
        """The weight of a norm that is ``weight * x / rms(x)``, if it is trained."""
        weight = self._named.get("weight")
        trained = weight is not None and weight.requires_grad
        return weight if trained and is_fused(self._forward, self._x) else None

    def __call__(self) -> Tensor:
        """The norm."""
        return self._forward(self._x)

    def again(self, *, weighted: bool = True) -> Tensor:
        """The norm recomputed, with the graph to its parameters if that is built in the backward pass.

        Args:
            weighted: Whether it is multiplied by its :attr:`weight`; without, it has no graph.
        """
        if self._again is not None and weighted:
            return self._again
        if self._seen() != self._versions:
            raise RuntimeError(
                "a hidden state or a norm's weight was changed in place between the forward and the backward pass, "
                "which needs its original value"
            )
        in_turn = self.in_turn and weighted
        with (
            own_parameters(self._module, self._named),
            torch.set_grad_enabled(in_turn),
            torch.autocast(**self._autocast),
        ):
            made = self() if weighted else without_weight(self._forward, self._x)
        if in_turn:
            self._again = made
        return made

    def take(self, dtype: torch.dtype | None, *, weighted: bool) -> Tensor:
        """The norm recomputed, without a graph, in its own dtype or another; held until nothing needs it."""
        key = dtype, weighted
        if key not in self._made:
            whole = self.again(weighted=weighted).detach()
            self._made[key] = whole if dtype is None else whole.to(dtype)
        return self._made[key]

    def forget(self) -> None:
        """Release what was recomputed."""
        self._again = None
        self._made.clear()

    def _seen(self) -> list[int]:
        return [tensor._version for tensor in (self._x, *self.parameters)]


class _Part(NamedTuple):
    """A saved tensor that is a norm, or a cast or a view of one."""

    norm: _Norm
    dtype: torch.dtype | None
    weighted: bool
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    return packed.norm.take(packed.dtype, weighted=packed.weighted).as_strided(
        packed.size, packed.stride, packed.offset
    )


class _Segment:
    """A layer's call on other tokens, until it passes on its keys and values."""

    def __init__(self) -> None:
        # Held so that no other tensor can reuse their memory: tensor, its norm, and the dtype it was cast to.
        self._norms: list[tuple[Tensor, _Norm, torch.dtype | None]] = []
        self._weighted = True

    def forget(self) -> None:
        """Release the norms."""
        self._norms.clear()

    def norm(self, module: nn.Module, forward: Forward, x: Any, *args: Any, **kwargs: Any) -> Any:
        """A norm's forward."""
        if not torch.is_grad_enabled():
            self.forget()  # keys and values were passed on
            return forward(x, *args, **kwargs)
        if args or kwargs or not isinstance(x, Tensor) or x.requires_grad:
            return forward(x, *args, **kwargs)
        norm = _Norm(module, forward, x)
        made = _NormInTurn.apply(norm, *norm.parameters) if norm.in_turn else norm()
        self._norms.append((made, norm, None))
        return made

    def linear(self, module: nn.Linear, forward: Forward, x: Tensor) -> Tensor:
        """A linear layer's forward; under autocast, layers that read the same norm share one cast of it."""
        norm = next((norm for made, norm, _ in self._norms if made is x), None) if torch.is_grad_enabled() else None
        if norm is None:
            return forward(x)
        mixed = autocast_active(x.device.type)
        weight, own = norm.weight, module._parameters.get("weight")
        if weight is None or type(own) is not nn.Parameter or not runs_plainly(forward):
            return forward(_CastOf.apply(x, self._cast(x, norm)) if mixed else x)
        self._weighted = False
        try:
            of_both = _WeightOfBoth.apply(own, weight)
            return nn.functional.linear(self._cast(x, norm) if mixed else x.detach(), of_both, module.bias)
        finally:
            self._weighted = True

    def _cast(self, x: Tensor, norm: _Norm) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type)
        if x.dtype == dtype or x.dtype == torch.float64:
            return x.detach()
        for made, of, to in self._norms:
            if of is norm and to == dtype:
                return made
        made = x.detach().to(dtype)
        self._norms.append((made, norm, dtype))
        return made

    def pack(self, tensor: Tensor) -> Any:
        """What to keep of a tensor that the backward pass needs."""
        if tensor.layout != torch.strided:
            return tensor  # a sparse one has no storage
        place = tensor.untyped_storage().data_ptr()
        for made, norm, dtype in self._norms:
            if made.untyped_storage().data_ptr() == place:
                return _Part(norm, dtype, self._weighted, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return tensor


def _keeps_little(forward: Forward, x: Tensor) -> bool:
    """Whether a norm keeps only its input and a few numbers per token in its own graph."""
    return x.is_cuda and is_fused(forward, x)


class _NormInTurn(torch.autograd.Function):
    """A norm whose graph is built in the backward pass."""

    @staticmethod
    def forward(ctx: Any, norm: _Norm, *parameters: Tensor) -> Tensor:
        ctx.norm = norm
        return norm()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        norm: _Norm = ctx.norm
        needs = ctx.needs_input_grad[1:]
        needed = [parameter for parameter, need in zip(norm.parameters, needs, strict=True) if need]
        found = iter(torch.autograd.grad(norm.again(), needed, grad))
        norm.forget()
        return None, *(next(found) if need else None for need in needs)


class _WeightOfBoth(torch.autograd.Function):
    """A linear layer's weight ``W``, whose input is a norm with weight ``w``; its gradient is taken for ``G``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, norm_weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight, norm_weight)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, product: Tensor) -> tuple[Tensor | None, Tensor]:
        weight, norm_weight = ctx.saved_tensors
        of_norm = (weight * product).sum(0, dtype=norm_weight.dtype)
        of_weight = (product * norm_weight).to(weight.dtype) if ctx.needs_input_grad[0] else None
        return of_weight, of_norm


class _CastOf(torch.autograd.Function):
    """``x.to(cast.dtype)`` if that is available."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None
