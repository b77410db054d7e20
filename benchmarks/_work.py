"""The work of a step's operators, and a lower bound on the time that a device needs for it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

LABEL = "work#"
# Dense operations per second and bytes per second, as NVIDIA specifies them for the SXM boards.
PEAKS: dict[str, dict[str, float]] = {
    "H100": {"half": 989e12, "fp8": 1979e12, "single": 67e12, "bytes": 3.35e12},
    "H200": {"half": 989e12, "fp8": 1979e12, "single": 67e12, "bytes": 4.8e12},
}
# Operators that read only a few rows of their input.
_READ_ROWS = ("gather", "index", "embedding")
_HALF_SEEN = 0.5  # share of the keys that causal queries of a whole row see
_SDPA = "aten._scaled_dot_product_"


@dataclass(frozen=True)
class Work:
    """One call of an operator.

    Attributes:
        name: Of the operator, with its sizes where it is a matrix product.
        flop: Operations of its matrix products, and of attention's.
        bytes: Size of the tensors that it reads and writes, each counted once.
        kind: Precision of its products: ``"half"``, ``"single"`` or ``"fp8"``.
    """

    name: str
    flop: float
    bytes: float
    kind: str

    def floor(self, peaks: dict[str, float]) -> float:
        """A lower bound on its seconds on a device."""
        return max(self.flop / peaks[self.kind], self.bytes / peaks["bytes"])


class Counted(TorchDispatchMode):
    """Labels every operator call for the profiler, and records its work.

    Attributes:
        calls: The work of the call labelled ``work#N``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator under its label."""
        place = len(self.calls)
        self.calls.append(Work("", 0.0, 0.0, "half"))
        with record_function(f"{LABEL}{place}"):
            out = func(*args, **(kwargs or {}))
        self.calls[place] = work_of(func, args, kwargs or {}, out)
        return out


def work_of(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Work:
    """The work of one operator call."""
    packet = func.overloadpacket
    name = str(packet)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    moved = 2 * _bytes(made) if any(part in name for part in _READ_ROWS) else _bytes([*tensors, *made])
    dtypes = {tensor.dtype for tensor in tensors}
    kind = "fp8" if torch.float8_e4m3fn in dtypes and "scaled_mm" in name else "half"
    if kind == "half" and not dtypes & {torch.bfloat16, torch.float16}:
        kind = "single"
    flop = 0.0
    if name in _OWN:
        flop = _OWN[name](*args)
    elif name.startswith(_SDPA):
        # torch's own formulas refuse grouped keys in some versions.
        flop = _sdpa(5, *args[1:3]) if name.endswith("_backward") else _sdpa(2, *args[:2])
    elif packet in flop_registry:
        flop = float(flop_registry[packet](*args, **kwargs, out_val=out))
        sizes = [tuple(tensor.shape) for tensor in tensors if tensor.dim() > 1][-2:]
        name += " " + " @ ".join("x".join(map(str, size)) for size in sizes)
    return Work(name, flop, moved, kind)


def _bytes(tensors: Iterable[Tensor]) -> float:
    unique = {(tensor.data_ptr(), tensor.shape): tensor for tensor in tensors if tensor.numel()}
    # Expanded tensors are read once.
    return float(
        sum(
            min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()) for tensor in unique.values()
        )
    )


def _sdpa(products: int, q: Tensor, k: Tensor) -> float:
    return 2 * products * math.prod(q.shape) * k.shape[2] * _HALF_SEEN


def _attention(products: int) -> Callable[..., float]:
    def flop(q: Tensor, k: Tensor, *rest: Any) -> float:
        return 2 * products * math.prod(q.shape) * k.shape[1] * _HALF_SEEN

    return flop


def _of_head(products: int) -> Callable[..., float]:
    def flop(rows: Tensor, weight: Tensor, *rest: Any) -> float:
        return 2.0 * products * rows.shape[0] * math.prod(weight.shape)

    return flop


def _of_head_rows(hidden: Tensor, weight: Tensor, targets: Tensor, row_index: Tensor | None, *rest: Any) -> float:
    rows = hidden.shape[0] if row_index is None else row_index.shape[0]
    return 2.0 * 3 * rows * math.prod(weight.shape)


# Matrix products inside the project's own operators, by their number.
_OWN: dict[str, Callable[..., float]] = {
    "cggr_kernels.routed_attention": _attention(2),
    "cggr_kernels.routed_attention_query_gradient": _attention(3),
    "cggr_kernels.routed_attention_key_gradient": _attention(4),
    "cggr_kernels.linear_difficulty": _of_head(1),
    "cggr_kernels.linear_cross_entropy": _of_head(1),
    "cggr_kernels.linear_cross_entropy_gradient": _of_head(3),
    "cggr_kernels.linear_cross_entropy_sum": _of_head_rows,
}
