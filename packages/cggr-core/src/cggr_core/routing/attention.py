"""Attention of routed queries through the op ``routed_attention``, if a kernel for it is installed.

A dense mask makes SDPA read a ``[B, Q, S]`` tensor in every layer and excludes its fastest kernels. The mask nearly
always means "causal by position, within a window, within a document", which the op takes as numbers. It is registered
with transformers as a separate attention implementation; other masks are made dense and go to SDPA.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cggr_core.backends import resolve
from cggr_core.checks import values_are_free
from cggr_core.head import autocast_active
from cggr_core.routed_attention import routed_attention_reference
from cggr_core.routing.architectures import unwrapped
from cggr_core.routing.masks import ROUTED, ROUTED_UNCAPPED, RoutedMask
from cggr_core.routing.patches import register_attention

_OP = "routed_attention"
# Attention sinks and biases of some models.
_NOT_IN_NUMBERS = ("s_aux", "position_bias")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: RoutedMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """A layer's attention, ``[B, H, Q, D]`` each to ``[B, Q, H, D]``, with the signature that transformers expects."""
    mask = attention_mask
    if not isinstance(mask, RoutedMask):
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **options)
    in_numbers, window = mask.pattern
    plain = key.shape == value.shape and all(options.get(name) is None for name in _NOT_IN_NUMBERS)
    if autocast_active(query.device.type) and query.dtype != torch.float64:
        # As autocast does for SDPA: rotary embedding leaves queries and keys in float32, while values keep the
        # projection's dtype.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (part.to(dtype) for part in (query, key, value))
    attend = resolve(_OP, query.device.type, query.dtype)
    if attend is not routed_attention_reference and in_numbers and plain and dropout == 0.0:
        heads_last = (part.transpose(1, 2) for part in (query, key, value))
        key_gradient = mask.visibility.key_gradient
        return attend(*heads_last, mask.position, mask.segment, window, softcap, scaling, key_gradient), None
    if softcap is not None:
        raise ValueError(
            f"{type(module).__name__} caps its attention scores and has dropout, sinks, a bias or a mask that routed "
            "attention does not support; load the model with attn_implementation='eager'"
        )
    if query.device.type == "cpu" and plain:
        in_stretches = in_numbers and dropout == 0.0 and values_are_free(mask.position)
        return _attend_on_cpu(query, key, value, mask, dropout, scaling, in_stretches=in_stretches), None
    return sdpa_attention_forward(module, query, key, value, mask.dense, dropout=dropout, scaling=scaling, **options)


def _attend_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: RoutedMask,
    dropout: float,
    scaling: float | None,
    *,
    in_stretches: bool,
) -> Tensor:
    # An additive mask, so that SDPA need not convert a boolean one in every layer; grouped keys are not repeated.
    added = mask.added(query.dtype)
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    # SDPA computes scores for every key it gets, masked or not, so each stretch of queries gets only the keys that some
    # of them see.
    stretches = mask.stretches if in_stretches else [(slice(None), slice(None))]
    outputs = [
        scaled_dot_product_attention(
            query[:, :, own], key[:, :, seen], value[:, :, seen], attn_mask=added[:, :, own, seen], **options
        )
        for own, seen in stretches
    ]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output.transpose(1, 2).contiguous()


def _attend_uncapped(*args: Any, softcap: float | None = None, **options: Any) -> tuple[Tensor, None]:
    """As SDPA does: without the softcap."""
    return _attend(*args, **options)


def implementation(model: nn.Module, device_type: str) -> Callable[[str], str]:
    """How to choose the attention implementation of a pass whose queries are routed.

    Args:
        model: The model.
        device_type: Of its inputs.

    Returns:
        A function that maps the model's attention implementation to the one to use: the op if it has a kernel and the
        model's attention is SDPA's, flash attention's or flex attention's (whose kernel for few queries does not
        compile with such masks); SDPA with a mask made once for all layers, on a CPU; else, for flash attention, which
        takes no mask, SDPA (eager attention where scores are capped).
    """
    # Without this flag, a model's attention handles the mask in its own way.
    takes_any = bool(getattr(unwrapped(model), "_supports_attention_backend", False))
    config = unwrapped(model).config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    kernel = takes_any and resolve(_OP, device_type) is not routed_attention_reference

    def choose(name: str) -> str:
        if name == "sdpa" and (kernel or (takes_any and device_type == "cpu")):
            return ROUTED_UNCAPPED
        if kernel and name == "flex_attention":
            return ROUTED
        if name is None or "flash" not in name:
            return name
        if kernel:
            return ROUTED
        return "eager" if capped else "sdpa"

    return choose


# Outside of a routed pass, masks are SDPA's.
register_attention(ROUTED, _attend, sdpa_mask)
register_attention(ROUTED_UNCAPPED, _attend_uncapped, sdpa_mask)
