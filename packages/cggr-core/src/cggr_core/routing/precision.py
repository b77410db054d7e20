"""The linear layers of decoder layers in FP8, for calls on tokens that need no gradient.

Both factors of a product are quantised in the call, with one scale per row. A layer runs on a context once per training
step, so caching quantised weights would gain nothing. Quantising in the call also means that they are never stale: not
after an optimiser that bypasses torch's version counters, not in a replayed graph, not when FSDP2 gathers again.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from cggr_core.backends import has_fp8_products
from cggr_core.fp8 import STEP, product, quantize_rows, quantize_silu_mul
from cggr_core.head import autocast_active
from cggr_core.routing.fusions import gated_mlps
from cggr_core.routing.norms import is_untouched
from cggr_core.routing.patches import replaced_forwards

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Expert routers: a token sent to a different expert is more than a rounding error.
_ROUTERS = ("gate", "router")
_QUERIES, _BESIDE_QUERIES = "q_proj", ("k_proj", "v_proj")

Quantised = tuple[Tensor, Tensor]


class LowPrecision:
    """Runs decoder layers' linear layers in FP8 within a block.

    It does not convert quantised or sharded weights, replaced linear layers, expert routers, sizes that are not
    multiples of 16, or calls under autograd (keys and values, in gradient mode ``kv``) except for queries, whose
    gradient is not used. Adapters around a linear layer are not converted, but their base layer is.

    Args:
        layers: The decoder layers.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._last: tuple[Tensor, int, Quantised] | None = None
        self._warned = False
        self._forwards = [self._of_layer(layer) for layer in layers]

    def _of_layer(self, layer: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        adapters = _adapters(layer)
        for name, module in layer.named_modules():
            if takes_fp8(module) and module not in adapters and name.rpartition(".")[2] not in _ROUTERS:
                forwards[module] = partial(self._linear, module, makes_queries(layer, module))
        for module in gated_mlps(layer.modules()):
            if module.down_proj in forwards:
                forwards[module] = partial(self._gated_mlp, module)
        return forwards

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """In all layers. Scope: these modules, whoever calls them."""
        every = {module: forward for forwards in self._forwards for module, forward in forwards.items()}
        with replaced_forwards(every), self._forgetting():
            yield

    @contextmanager
    def at(self, layer: int) -> Iterator[None]:
        """In one layer. Scope: its modules, whoever calls them."""
        with replaced_forwards(self._forwards[layer]), self._forgetting():
            yield

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._last = None

    def _linear(self, linear: nn.Linear, queries: bool, x: Tensor) -> Tensor:
        out_dtype = _result_dtype(x, linear.weight)
        if (torch.is_grad_enabled() and not queries) or out_dtype is None:
            return nn.Linear.forward(linear, x)
        with torch.no_grad():
            return self._product(linear, self._quantised(x), out_dtype).unflatten(0, x.shape[:-1])

    def _gated_mlp(self, module: Any, x: Tensor) -> Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        out_dtype = _result_dtype(gate, module.down_proj.weight)
        same = gate.shape == up.shape and gate.dtype == up.dtype
        down: nn.Module = module.down_proj
        watched = bool(down._forward_hooks or down._forward_pre_hooks)
        if torch.is_grad_enabled() or out_dtype is None or not same or watched:
            return down(module.act_fn(gate) * up)
        quantised = quantize_silu_mul(gate.flatten(0, -2), up.flatten(0, -2))
        return self._product(module.down_proj, quantised, out_dtype).unflatten(0, x.shape[:-1])

    def _product(self, linear: nn.Linear, x: Quantised, out_dtype: torch.dtype) -> Tensor:
        self._warn_where_emulated(linear.weight.device)
        return product(*x, *quantize_rows(linear.weight), linear.bias).to(out_dtype)

    def _quantised(self, x: Tensor) -> Quantised:
        """The input's rows; queries, keys and values share theirs, as do the two halves of a gated MLP."""
        version = -1 if x.is_inference() else x._version
        if self._last is not None and self._last[0] is x and self._last[1] == version:
            return self._last[2]
        made = quantize_rows(x.detach().flatten(0, -2))
        self._last = None if version < 0 else (x, version, made)
        return made

    def _warn_where_emulated(self, device: torch.device) -> None:
        if self._warned or has_fp8_products(device):
            return
        self._warned = True
        warnings.warn(
            f"context_precision='fp8' is emulated on {device}, with the rounding errors of FP8 but not its speed "
            "(row-scaled FP8 products need compute capability 9.0); use context_precision=None unless you are studying "
            "the errors",
            stacklevel=2,
        )


def runs_plainly(forward: Callable[..., Any]) -> bool:
    """Whether a linear layer's forward is ``nn.Linear``'s own where gradients are on."""
    if isinstance(forward, partial):
        of = getattr(forward.func, "__func__", None)
        return of is LowPrecision._linear and not forward.args[1]
    return getattr(forward, "__func__", None) is nn.Linear.forward


def takes_fp8(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a plain linear layer whose product can run in FP8."""
    if type(module) is not nn.Linear or not is_untouched(module):
        return False
    return module.in_features % STEP == 0 and module.out_features % STEP == 0


def _adapters(layer: nn.Module) -> set[nn.Module]:
    """The modules that adapters add beside their base layers."""
    return {
        module
        for wrapper in layer.modules()
        if "base_layer" in wrapper._modules
        for name, child in wrapper.named_children()
        if name != "base_layer"
        for module in child.modules()
    }


def makes_queries(layer: nn.Module, linear: nn.Linear) -> bool:
    """Whether a linear layer makes an attention's queries, and others beside it the keys and values."""
    name = next(name for name, module in layer.named_modules() if module is linear)
    # An adapter's base layer is one level deeper than the layer it replaced.
    parent, _, own = name.removesuffix(".base_layer").rpartition(".")
    siblings = layer.get_submodule(parent)._modules
    return own == _QUERIES and all(siblings.get(beside) is not None for beside in _BESIDE_QUERIES)


def _result_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype of the layer's output from an FP8 product; ``None`` if the layer itself has to run."""
    plain = type(weight) in (nn.Parameter, Tensor) and weight.device == x.device
    if not plain or x.numel() == 0 or x.dim() < 2 or x.dtype not in _FLOATS or weight.dtype not in _FLOATS:
        return None
    if autocast_active(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype if x.dtype == weight.dtype else None
