"""The reference of gradient routing: an ordinary forward with gradients stopped by autograd itself."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache


class _StoppingCache(Cache):
    """Hands keys and values on, those of other tokens as constants."""

    is_compileable = False

    def __init__(self, kept: Tensor) -> None:
        super().__init__(layers=[])
        self._kept = kept[:, None, :, None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return tuple(torch.where(self._kept, part, part.detach()) for part in (key_states, value_states))


def reference_loss(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    kept: Tensor,
    coefficients: Tensor,
    targets: Tensor,
    *,
    gradient: str,
    **inputs: Any,
) -> tuple[Tensor, Tensor]:
    """Loss with the gradients of a mode, by an autograd graph over all tokens.

    Args:
        model: The model.
        layers: Its layers; each sees ``where(kept, h, h.detach())``.
        kept: bool ``[B, S]``.
        coefficients: ``[B, S]``, the weight of every token's nll, 0 where not kept.
        targets: int64 ``[B, S]``, aligned.
        gradient: ``"exact"``, ``"kv"`` or ``"detached"``.
        **inputs: Of the model.

    Returns:
        The loss and the logits ``[B, S, V]``.
    """

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = torch.where(kept[:, :, None], hidden, hidden.detach())
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    hooks = []
    if gradient != "exact":
        hooks = [layer.register_forward_pre_hook(stop, with_kwargs=True) for layer in layers]
    cache: dict[str, Any] = {"use_cache": False}
    if gradient == "detached":
        takers = (model.forward, model.base_model.forward)
        names = {name for forward in takers for name in inspect.signature(forward).parameters}
        name = "cache" if "cache" in names else "past_key_values"
        cache = {name: _StoppingCache(kept), "use_cache": True}
    try:
        logits = model(**inputs, **cache).logits
    finally:
        for hook in hooks:
            hook.remove()
    nll = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return (nll * coefficients).sum(), logits


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient, zeros where there is none; then cleared."""
    found = {
        name: (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())
        for name, parameter in module.named_parameters()
    }
    module.zero_grad(set_to_none=True)
    return found


def relative_error(value: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of two sets of gradients over the norm of the expected one."""
    assert value.keys() == expected.keys()
    difference = sum(float((value[name] - expected[name]).double().square().sum()) for name in expected)
    size = sum(float(expected[name].double().square().sum()) for name in expected)
    return (difference / size) ** 0.5
