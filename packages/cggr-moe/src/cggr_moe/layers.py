"""The layer: a router, its experts, and the losses that balance their load."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cggr_core.backends import resolve
from cggr_core.checks import (
    check_at_least,
    check_choice,
    check_finite_number,
    check_flag,
    check_float,
    check_same_device,
    check_shape,
    values_are_free,
)
from cggr_core.monitor import Monitor
from cggr_moe.grouped import moe_experts_reference as moe_experts_reference  # registers the op
from cggr_moe.hf_block import Block, make_block, read_block
from cggr_moe.routing import Routing

__all__ = ["PersistentTRMLP", "create_persistent_tr_mlp"]

ACTIVATIONS = ("swiglu",)


class PersistentTRMLP(nn.Module):
    """Token-routed MLP: each token goes to the ``top_k`` best of ``num_experts`` SwiGLU experts; no token is dropped.

    With router probabilities ``p = softmax(gate.weight @ x)`` the output of a token is the sum over its experts of
    ``w_e · down_e (silu(gate_e x) * up_e x)``, where the weights ``w_e`` are the probabilities of the chosen experts,
    divided by their sum if ``norm_topk_prob``. On CUDA it runs in the persistent kernels of cggr-kernels: one launch
    per stage whatever the number of experts, no host reads, bitwise reproducible. Elsewhere it runs in plain torch with
    the same results.

    The auxiliary loss is the load-balancing loss of the Switch Transformer (Fedus et al., 2021, equations 4 to 6, taken
    over all ``top_k`` choices): ``E · Σ_e f_e P_e`` where ``f_e`` is the share of choices that fell on expert e and
    ``P_e`` is its mean probability. It is 1 when the load is balanced and at most E. With ``z_loss`` > 0, ``z_loss``
    times the mean squared log-sum-exp of the router's logits is added (ST-MoE, Zoph et al., 2022, equation 5).

    ``router_bias`` switches on loss-free balancing (Wang et al., 2024, arXiv 2408.15664): a bias per expert is added to
    the probabilities when choosing, but not to the weights. Call :meth:`update_router_bias` after each optimizer step.
    The biases stay in float32 when the layer is cast, because half precision would round away their small steps.

    Parameters, in the layout of the experts of Hugging Face Transformers 5:

    * ``gate.weight`` ``[E, H]``: the router.
    * ``gate_up_proj`` ``[E, 2I, H]``: for each expert the rows of the gate, then those of the up projection.
    * ``down_proj`` ``[E, H, I]``.

    Attributes:
        metrics: Tensors that describe the last call, see :meth:`forward`. The host reads none of them.

    Args:
        hidden_dim: Width of the input and output, H.
        intermediate_dim: Width inside an expert, I.
        num_experts: E.
        top_k: Experts per token, K, 1 to E.
        activation: ``"swiglu"``.
        norm_topk_prob: Whether to divide the weights of a token's experts by their sum.
        router_bias: Whether to balance the load with a bias per expert.
        bias_update_rate: Step size of :meth:`update_router_bias`, in probability.
        z_loss: Coefficient of the router's z-loss in the auxiliary loss.
        dtype: Dtype of the parameters; the default dtype if None.
        device: Device of the parameters; the default device if None.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a value is out of range, for example ``top_k > num_experts``.

    Example:
        >>> layer = PersistentTRMLP(16, 32, num_experts=4, top_k=2)
        >>> output, aux_loss = layer(torch.randn(2, 5, 16))
        >>> output.shape, aux_loss.shape
        (torch.Size([2, 5, 16]), torch.Size([]))
        >>> int(layer.metrics["tokens_per_expert"].sum())
        20
    """

    router_bias: Tensor | None
    _load: Tensor

    def __init__(
        self,
        hidden_dim: int,
        intermediate_dim: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "swiglu",
        norm_topk_prob: bool = True,
        router_bias: bool = False,
        bias_update_rate: float = 1e-3,
        z_loss: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.hidden_dim = check_at_least("hidden_dim", hidden_dim, 1)
        self.intermediate_dim = check_at_least("intermediate_dim", intermediate_dim, 1)
        self.num_experts = check_at_least("num_experts", num_experts, 1)
        self.top_k = check_at_least("top_k", top_k, 1)
        if top_k > num_experts:
            raise ValueError(f"top_k must be at most num_experts={num_experts}, got {top_k}")
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.norm_topk_prob = check_flag("norm_topk_prob", norm_topk_prob)
        check_flag("router_bias", router_bias)
        self.bias_update_rate = check_finite_number("bias_update_rate", bias_update_rate, minimum=0.0)
        self.z_loss = check_finite_number("z_loss", z_loss, minimum=0.0)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating torch dtype or None, got {dtype!r}")
        place = {"dtype": dtype, "device": device}
        self.gate = nn.Linear(hidden_dim, num_experts, bias=False, **place)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_dim, hidden_dim, **place))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_dim, intermediate_dim, **place))
        bias = torch.zeros(num_experts, dtype=torch.float32, device=device) if router_bias else None
        self.register_buffer("router_bias", bias)
        load = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.register_buffer("_load", load, persistent=False)
        self.metrics: dict[str, Tensor] = {}
        self._monitor = Monitor()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all weights as :class:`torch.nn.Linear` does, uniformly in ±1/√fan_in."""
        self.gate.reset_parameters()
        for weight in (self.gate_up_proj, self.down_proj):
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route the tokens and run their experts.

        Afterwards ``metrics`` holds ``tokens_per_expert`` (``[E]``, int64; the sum is ``top_k`` times the routed
        tokens, minus choices of probability 0), ``entropy`` (mean entropy of the routing, in nats), ``balance_loss``
        and ``z_loss`` (both detached, without coefficients).

        Args:
            hidden_states: ``[B, S, H]`` or ``[T, H]``, in the parameters' dtype unless autocast is on.
            token_mask: ``[B, S]`` or ``[T]``, bool: the tokens to route, for example the mask from ``CGGRScorer``. The
                others cost nothing, get zeros and count in no statistic.

        Returns:
            ``output``, with the shape and dtype of ``hidden_states`` (autocast's dtype if it is on), and ``aux_loss``,
            0-dim, float32 (float64 for float64 inputs): the load-balancing loss plus ``z_loss`` times the z-loss, or
            zero if no token is routed.

        Raises:
            TypeError: If ``hidden_states`` is not of a floating dtype, or ``token_mask`` is not bool.
            ValueError: If a shape, dtype or device does not match, or ``hidden_states`` holds NaN or infinities. On
                devices whose values cannot be read without waiting, the next call reports them; such tokens are not
                routed.
        """
        self._raise_if_bad(self._monitor.read(), "an earlier call")
        self._check(hidden_states, token_mask)
        x = hidden_states.reshape(-1, self.hidden_dim)
        gate_up, down = self.gate_up_proj, self.down_proj
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x, gate_up, down = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (x, gate_up, down))
        keep = None if token_mask is None else token_mask.reshape(-1)
        # The router's gradient is a product with its input, and 0 * NaN is NaN: zero the tokens that are not routed.
        logits = linear(x if keep is None else x.masked_fill(~keep[:, None], 0.0), self.gate.weight)
        route = resolve("moe_route", kind, logits.dtype)
        routing = Routing(*route(logits, self.router_bias, keep, self.top_k, self.norm_topk_prob))
        if values_are_free(x):
            self._raise_if_bad([float(routing.bad)], "hidden_states")
        else:
            self._monitor.post(routing.bad.reshape(1))
        experts = resolve("moe_experts", kind, x.dtype)
        output = experts(x, gate_up, down, routing.index, routing.weight)
        self._note(routing)
        aux_loss = routing.balance_loss
        if self.z_loss:
            aux_loss = aux_loss + self.z_loss * routing.z_loss
        return output.reshape(hidden_states.shape), aux_loss

    @torch.no_grad()
    def update_router_bias(self) -> None:
        """Move each expert's bias by ``bias_update_rate`` towards the mean load; call it after each optimizer step.

        The load counts the tokens routed by training calls since the last update, summed over all ranks if
        ``torch.distributed`` is initialised. The host reads nothing.

        Raises:
            RuntimeError: If the layer was created without ``router_bias``.
        """
        if self.router_bias is None:
            raise RuntimeError("this layer has no router bias; create it with router_bias=True")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._load)
        load = self._load.to(torch.float32)
        self.router_bias.add_((load.mean() - load).sign(), alpha=self.bias_update_rate)
        self._load.zero_()

    def extra_repr(self) -> str:
        """Sizes and options of the layer."""
        return (
            f"hidden_dim={self.hidden_dim}, intermediate_dim={self.intermediate_dim}, "
            f"num_experts={self.num_experts}, top_k={self.top_k}, activation={self.activation!r}, "
            f"norm_topk_prob={self.norm_topk_prob}, router_bias={self.router_bias is not None}"
        )

    @classmethod
    def from_hf(cls, block: nn.Module) -> Self:
        """A layer that shares the parameters of a Hugging Face block; see :func:`cggr_moe.from_hf_block`."""
        parts = read_block(block)
        with torch.device("meta"):
            layer = cls(*parts[:4], norm_topk_prob=parts.norm_topk_prob)
        layer.gate.weight = parts.gate_EH
        layer.gate_up_proj, layer.down_proj = parts.gate_up_E2IH, parts.down_EHI
        layer._load = torch.zeros(parts.num_experts, dtype=torch.int64, device=parts.gate_EH.device)
        return layer.train(parts.training)

    def to_hf(self, kind: str = "qwen3_moe") -> nn.Module:
        """A Hugging Face block that shares this layer's parameters; see :func:`cggr_moe.to_hf_block`."""
        if self.router_bias is not None:
            raise ValueError(
                "this layer has a router bias, which these Hugging Face blocks do not have; create it with "
                "router_bias=False"
            )
        sizes = (self.hidden_dim, self.intermediate_dim, self.num_experts, self.top_k, self.norm_topk_prob)
        gate = self.gate.weight
        assert isinstance(gate, nn.Parameter)
        parameters = (gate, self.gate_up_proj, self.down_proj)
        return make_block(Block(*sizes, *parameters, self.training), kind)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        bias = self.router_bias
        super()._apply(fn, recurse)
        if bias is not None and self.router_bias is not None and self.router_bias.dtype != bias.dtype:
            self.router_bias = bias.to(self.router_bias.device)
        return self

    def _note(self, routing: Routing) -> None:
        self.metrics = {
            "tokens_per_expert": routing.tokens_per_expert,
            "entropy": routing.entropy,
            "balance_loss": routing.balance_loss.detach(),
            "z_loss": routing.z_loss.detach(),
        }
        if self.training and self.router_bias is not None:
            self._load.add_(routing.tokens_per_expert)

    def _check(self, hidden_states: Tensor, token_mask: Tensor | None) -> None:
        check_float("hidden_states", hidden_states)
        shape, H = tuple(hidden_states.shape), self.hidden_dim
        if hidden_states.dim() not in (2, 3) or shape[-1] != H:
            raise ValueError(f"hidden_states must have shape [B, S, {H}] or [T, {H}], got {shape}")
        kind = hidden_states.dtype, hidden_states.device
        parameters = (self.gate.weight, self.gate_up_proj, self.down_proj)
        if any((parameter.dtype, parameter.device) != kind for parameter in parameters):
            self._check_parameters(hidden_states)
        if token_mask is not None:
            check_shape("token_mask", token_mask, shape[:-1], "one entry per token of hidden_states")
            check_same_device("token_mask", token_mask, "hidden_states", hidden_states)
            if token_mask.dtype != torch.bool:
                raise TypeError(f"token_mask must be bool, got {token_mask.dtype}; convert it with .bool()")

    def _check_parameters(self, hidden_states: Tensor) -> None:
        for name, parameter in (("gate.weight", self.gate.weight), *self.named_parameters(recurse=False)):
            check_same_device("hidden_states", hidden_states, name, parameter)
            if parameter.dtype != hidden_states.dtype and not torch.is_autocast_enabled(hidden_states.device.type):
                raise ValueError(
                    f"hidden_states must have the dtype of {name}, got {hidden_states.dtype} and {parameter.dtype}; "
                    "cast one of them or run under torch.autocast"
                )

    def _raise_if_bad(self, counts: list[float] | None, where: str) -> None:
        if counts and counts[0]:
            raise ValueError(
                f"the router logits of {int(counts[0])} token(s) have no softmax (from {where}): hidden_states or "
                "gate.weight holds NaN or infinities; look for the earlier layer that produces them"
            )


def create_persistent_tr_mlp(
    hidden_dim: int,
    intermediate_dim: int,
    num_experts: int,
    top_k: int,
    *,
    activation: str = "swiglu",
    norm_topk_prob: bool = True,
    router_bias: bool = False,
    bias_update_rate: float = 1e-3,
    z_loss: float = 0.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> PersistentTRMLP:
    """Create a token-routed MLP layer, with the arguments and errors of :class:`PersistentTRMLP`.

    Args:
        hidden_dim: Width of the input and output, H.
        intermediate_dim: Width inside an expert, I.
        num_experts: E.
        top_k: Experts per token, K, 1 to E.
        activation: ``"swiglu"``.
        norm_topk_prob: Whether to divide the weights of a token's experts by their sum.
        router_bias: Whether to balance the load with a bias per expert.
        bias_update_rate: Step size of an update of that bias, in probability.
        z_loss: Coefficient of the router's z-loss in the auxiliary loss.
        dtype: Dtype of the parameters; the default dtype if None.
        device: Device of the parameters; the default device if None.

    Returns:
        The layer: ``output, aux_loss = layer(hidden_states)``.

    Example:
        >>> layer = create_persistent_tr_mlp(16, 32, num_experts=4, top_k=2, dtype=torch.bfloat16)
        >>> layer(torch.randn(5, 16, dtype=torch.bfloat16))[0].dtype
        torch.bfloat16
    """
    return PersistentTRMLP(
        hidden_dim,
        intermediate_dim,
        num_experts,
        top_k,
        activation=activation,
        norm_topk_prob=norm_topk_prob,
        router_bias=router_bias,
        bias_update_rate=bias_update_rate,
        z_loss=z_loss,
        dtype=dtype,
        device=device,
    )
