"""Runs the models' RMSNorm layers through torch's own op for the length of a pass.

transformers implements the norm in elementary ops: eight kernels forward and about twenty backward, most of them in
float32. On a GPU they take as long as the attention. ``torch.nn.functional.rms_norm`` computes the same formula in one
kernel each way; it rounds to the hidden states' dtype once, after the weight, while the models also round before it.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

_NAME = "RMSNorm"
_EPSILONS = ("variance_epsilon", "eps")


def fused_norms(modules: Iterable[nn.Module]) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Find replacement forwards for a model's norms.

    Args:
        modules: Of a model.

    Returns:
        A forward for each transformers norm that computes ``weight * x / rms(x)``, which is checked numerically for
        each class. Others (Gemma's ``1 + weight``), and norms whose forward was replaced or compiled, are unchanged.
    """
    same: dict[tuple[type[nn.Module], float], bool] = {}
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    for module in modules:
        epsilon = _epsilon(module)
        if epsilon is None:
            continue
        kind = (type(module), epsilon)
        if kind not in same:
            same[kind] = _computes_it(module, epsilon)
        if same[kind]:
            forwards[module] = partial(_forward, module, epsilon)
    return forwards


def _forward(module: nn.Module, epsilon: float, hidden_states: Tensor) -> Tensor:
    weight: Any = module.weight
    if not _takes(weight, hidden_states):
        return type(module).forward(module, hidden_states)
    return rms_norm(hidden_states, weight.shape, weight, epsilon)


def _takes(weight: Tensor, hidden_states: Tensor) -> bool:
    # The model promotes mixed dtypes in its own way, and computes in float32 even for float64.
    return hidden_states.dtype == weight.dtype != torch.float64


def without_weight(forward: Callable[..., Any], hidden_states: Tensor) -> Tensor:
    """``x / rms(x)`` in the dtype of a fused norm's result.

    Args:
        forward: One of :func:`fused_norms`.
        hidden_states: ``x``, in the dtype of the norm's weight.
    """
    module, epsilon = cast("partial[Tensor]", forward).args
    return rms_norm(hidden_states, module.weight.shape, None, epsilon)


def is_fused(forward: Callable[..., Any], hidden_states: Tensor) -> bool:
    """Whether a forward is one of :func:`fused_norms` and runs as torch's op on these hidden states."""
    if not isinstance(forward, partial) or forward.func is not _forward:
        return False
    return _takes(forward.args[0].weight, hidden_states)


def is_untouched(module: nn.Module) -> bool:
    """Whether a module still runs its class's forward, neither replaced nor compiled."""
    return "forward" not in module.__dict__ and module._compiled_call_impl is None


def _epsilon(module: nn.Module) -> float | None:
    """The norm's epsilon; ``None`` for modules that are not such a norm, or are no longer transformers' own."""
    kind = type(module)
    if not kind.__name__.endswith(_NAME) or not kind.__module__.startswith("transformers."):
        return None
    parameters = [name for name, value in module._parameters.items() if value is not None]
    alone = parameters == ["weight"] and not module._buffers and not module._modules
    if not alone or not is_untouched(module) or len(inspect.signature(kind.forward).parameters) != 2:
        return None
    return next((float(getattr(module, name)) for name in _EPSILONS if hasattr(module, name)), None)


@torch.no_grad()
def _computes_it(module: nn.Module, epsilon: float) -> bool:
    own_weight: Any = module.weight
    shape = own_weight.shape
    options: dict[str, Any] = {
        "generator": torch.Generator().manual_seed(0),
        "dtype": torch.float32,
        "device": "cpu",
    }
    weight = torch.randn(shape, **options)
    # The second row is so small that its norm is mostly epsilon.
    sizes = torch.tensor([[1.0], [epsilon**0.5]], dtype=torch.float32, device="cpu")
    rows = torch.randn(2, *shape, **options) * sizes
    stand_in = type(module).__new__(type(module))
    stand_in.__dict__.update(module.__dict__, _parameters={"weight": weight})
    expected = type(module).forward(stand_in, rows)
    return torch.allclose(rms_norm(rows, weight.shape, weight, epsilon), expected, rtol=1e-5, atol=1e-6)
