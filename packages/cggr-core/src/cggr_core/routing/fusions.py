"""Runs the elementwise work of decoder layers in fused ops for the length of a pass.

transformers implements norms, rotary embeddings and gated activations with one kernel per operation; on a GPU they take
as long as the attention. The fused ops compute the same formulas but round once, where the models also round in
between. Each is checked numerically for each class before it is used; unrecognised modules are unchanged.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from cggr_core.backends import resolve
from cggr_core.elementwise import rotary_in_place, rotary_reference, silu_mul_reference
from cggr_core.routing.norms import fused_norms, is_untouched

_ROTARY = "apply_rotary_pos_emb"
_GATED = ("gate_proj", "up_proj", "down_proj")
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fused_forwards(modules: Iterable[nn.Module]) -> dict[nn.Module, Callable[..., Any]]:
    """Find replacement forwards for a model's norms, attentions and gated MLPs.

    Args:
        modules: Of a model.

    Returns:
        A forward for each recognised module. Kernels for rotary embeddings and gated activations are looked up at each
        call, by device; without one, the model's own formulas run, on a CPU with fewer tensors in between.
    """
    modules = list(modules)
    rotaries: dict[type[nn.Module], FunctionType | None] = {}
    forwards: dict[nn.Module, Callable[..., Any]] = dict(fused_norms(modules))
    for module in modules:
        kind = type(module)
        if not _is_stock(module):
            continue
        if kind not in rotaries:
            rotaries[kind] = _with_fused_rotary(kind)
        forward = rotaries[kind]
        if forward is not None:
            forwards[module] = partial(forward, module)
    forwards |= {module: partial(_gated_mlp, module) for module in gated_mlps(modules)}
    return forwards


def gated_mlps(modules: Iterable[nn.Module]) -> list[Any]:
    """The modules that compute ``down_proj(silu(gate_proj(x)) * up_proj(x))``, checked numerically for each class."""
    gates: dict[type[nn.Module], bool] = {}
    found = []
    for module in modules:
        if _is_stock(module) and _has_gate(module):
            kind = type(module)
            if kind not in gates:
                gates[kind] = _computes_gated_product(module)
            if gates[kind]:
                found.append(module)
    return found


def _is_stock(module: nn.Module) -> bool:
    return is_untouched(module) and type(module).__module__.startswith("transformers.models.")


def _with_fused_rotary(kind: type[nn.Module]) -> FunctionType | None:
    """The forward of an attention class, with the name of its rotary embedding bound to the fused op."""
    forward = inspect.unwrap(kind.forward)
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return None
    own = forward.__globals__.get(_ROTARY)
    if not callable(own) or not _turns_in_halves(own):
        return None
    # A new function with the same code: the module that defines the class is not changed.
    names = forward.__globals__ | {_ROTARY: partial(_rotary, own)}
    fused = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    fused.__kwdefaults__ = forward.__kwdefaults__
    return fused


def _turns_in_halves(own: Callable[..., Any]) -> bool:
    if list(inspect.signature(own).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "device": "cpu", "dtype": torch.float32}
    q, k = torch.randn(1, 2, 3, 8, **options), torch.randn(1, 1, 3, 8, **options)
    cos, sin = torch.randn(1, 3, 8, **options), torch.randn(1, 3, 8, **options)
    try:
        found = own(q, k, cos, sin)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    if not isinstance(found, tuple) or len(found) != 2:
        return False
    pairs = zip(found, rotary_reference(q, k, cos, sin), strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)


def _rotary(own: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **options: Any) -> Any:
    turn = resolve("rotary", q.device.type, q.dtype)
    plain = not args and not options and q.dtype == k.dtype and q.dtype in _KERNEL_DTYPES
    shaped = q.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1] and not cos.requires_grad
    if not plain or not shaped:
        return own(q, k, cos, sin, *args, **options)
    if turn is not rotary_reference:
        return turn(q, k, cos, sin)
    if q.device.type == "cpu" and q.dtype == cos.dtype == sin.dtype == torch.float32:
        return rotary_in_place(q, cos, sin), rotary_in_place(k, cos, sin)
    return own(q, k, cos, sin)


def _has_gate(module: nn.Module) -> bool:
    children = module._modules
    activation = children.get("act_fn")
    rest = {name for name, child in children.items() if child is not None} - {"act_fn"}
    return rest == set(_GATED) and type(activation).__name__ in ("SiLU", "SiLUActivation")


@torch.no_grad()
def _computes_gated_product(module: nn.Module) -> bool:
    """Whether a class computes ``down(silu(gate(x)) * up(x))``, on a stand-in of few features."""
    stand_in = type(module).__new__(type(module))
    generator = torch.Generator().manual_seed(0)
    sizes = {"gate_proj": (4, 6), "up_proj": (4, 6), "down_proj": (6, 4)}
    small: dict[str, nn.Module] = {}
    for name, (inputs, outputs) in sizes.items():
        linear = nn.Linear(inputs, outputs, bias=False, device="meta")  # initialising there draws no random numbers
        weight = torch.randn(outputs, inputs, generator=generator, device="cpu", dtype=torch.float32)
        linear.weight = nn.Parameter(weight)
        small[name] = linear
    stand_in.__dict__.update(module.__dict__, _modules={**module._modules, **small})
    x = torch.randn(3, 4, generator=generator, device="cpu", dtype=torch.float32)
    wanted = small["down_proj"](silu(small["gate_proj"](x)) * small["up_proj"](x))
    try:
        found = type(module).forward(stand_in, x)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    return isinstance(found, Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-5)


def _gated_mlp(module: Any, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    multiply = resolve("silu_mul", gate.device.type, gate.dtype)
    same = gate.dtype == up.dtype and gate.dtype in _KERNEL_DTYPES and gate.shape == up.shape
    if multiply is silu_mul_reference or not same:
        activated = module.act_fn(gate)
        in_place = same and not torch.is_grad_enabled()
        return module.down_proj(activated.mul_(up) if in_place else activated * up)
    return module.down_proj(multiply(gate, up))
