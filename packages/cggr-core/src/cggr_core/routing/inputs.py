"""One batch of model inputs."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cggr_core.checks import check_float, check_integers, check_same_device
from cggr_core.routing.architectures import Architecture, default_position_ids, unwrapped
from cggr_core.routing.masks import Visibility, packed_segments
from cggr_core.routing.shared import Shared
from cggr_core.routing.unread import check_read

_PER_TOKEN = ("input_ids", "inputs_embeds", "token_type_ids")


@dataclass(frozen=True)
class TokenInputs:
    """Inputs of a forward over ``[B, S]`` tokens.

    Attributes:
        per_token: Tensors ``[B, S, ...]``.
        position_ids: int64 ``[B, S]``, known even if the caller did not pass them.
        padding: The attention mask ``[B, S]``, or ``None``.
        segment: Packed document of every token ``[B, S]``, or ``None``.
        passes_positions: Whether ``position_ids`` are passed to the model, rather than created by it.
        passes_padding: Whether the attention mask is passed to the model itself, not only to the mask builders.
        shared: The shared tokens before every row, run separately, or ``None``.
        quiet: Arguments that switch off outputs that only the gradient pass should return (expert routers' logits).
        options: Everything else, passed on unchanged.
    """

    per_token: dict[str, Tensor]
    position_ids: Tensor
    padding: Tensor | None
    segment: Tensor | None
    passes_positions: bool
    passes_padding: bool
    quiet: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    shared: Shared | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, S)``."""
        batch, length = self.position_ids.shape
        return batch, length

    @property
    def form(self) -> frozenset[str]:
        """Features of the batch: models take different code paths with padding, with position ids, and so on."""
        present = {"padding": self.padding, "segment": self.segment, "position_ids": self.passes_positions or None}
        given = {**self.per_token, **present, **self.options}
        return frozenset(name for name, value in given.items() if value is not None)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a forward over the rows."""
        arguments: dict[str, Any] = dict(self.per_token)
        if self.passes_positions:
            arguments["position_ids"] = self.position_ids
        padding = self._whole_padding
        if padding is not None and self.passes_padding:
            arguments["attention_mask"] = padding
        return {**arguments, **self.options}

    def visibility(self, index: Tensor | None = None, *, key_gradient: str = "all") -> Visibility:
        """The mask of the queries at ``index``."""
        if self.shared is None:
            return Visibility(index, self.shape[1], self.padding, self.segment, self.position_ids, key_gradient)
        length = self.shared.length + self.shape[1]
        places = torch.arange(length, device=self.position_ids.device).expand(self.shape[0], -1)
        position = places[:, self.shared.length :] if index is None else index + self.shared.length
        return Visibility(position, length, self._whole_padding, None, places, key_gradient)

    @property
    def _whole_padding(self) -> Tensor | None:
        """The attention mask of the shared tokens and the rows, or ``None``."""
        if self.shared is None:
            return self.padding
        parts = []
        for padding, length in ((self._shared_padding, self.shared.length), (self.padding, self.shape[1])):
            parts.append(self.position_ids.new_ones(self.shape[0], length) if padding is None else padding.long())
        return None if self._shared_padding is None and self.padding is None else torch.cat(parts, dim=1)

    @property
    def _shared_padding(self) -> Tensor | None:
        if self.shared is None or self.shared.padding is None:
            return None
        return self.shared.spread(self.shared.padding, self.shape[0])


def token_inputs(
    model: nn.Module,
    architecture: Architecture,
    *,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None = None,
    options: dict[str, Any] | None = None,
) -> TokenInputs:
    """Check a batch and make its defaults explicit.

    Args:
        model: The model that the inputs are for.
        architecture: Its description.
        input_ids: int64 ``[B, S]``, or ``None`` with ``inputs_embeds``.
        inputs_embeds: ``[B, S, H]``, or ``None`` with ``input_ids``.
        attention_mask: ``[B, S]``, 1 = token, 0 = padding; or ``[B, 1, S, S]``, the keys that each query sees, for
            passes over whole rows only; or ``None``.
        position_ids: int64 ``[B, S]`` or ``[1, S]``, or ``None``. Without an attention mask, positions that
            restart mark packed documents, as in transformers. With several kinds of positions, ``[3, B, S]``,
            or ``[4, B, S]`` with the text's first.
        token_type_ids: int64 ``[B, S]``, or ``None``.
        options: Other arguments of the model's forward.

    Returns:
        The inputs.

    Raises:
        TypeError: If an input is not a tensor, or has the wrong dtype.
        ValueError: If shapes or devices do not match, or there are no tokens.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    like = _checked_tokens(input_ids, inputs_embeds)
    shape = tuple(like.shape[:2])
    given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids}
    per_token = {name: tensor for name in _PER_TOKEN if (tensor := given[name]) is not None}
    beside = {"token_type_ids": token_type_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    for name, tensor in beside.items():
        if tensor is None:
            continue
        if name != "attention_mask":
            check_integers(name, tensor)
        elif not isinstance(tensor, Tensor):
            raise TypeError(f"attention_mask must be a tensor, got {type(tensor).__name__}")
        check_same_device(name, tensor, "the input", like)
        if name == "token_type_ids" and tuple(tensor.shape[:2]) != shape:
            raise ValueError(f"{name} must have shape {list(shape)} like the input tokens, got {list(tensor.shape)}")
    options = dict(options or {})
    given_options = [name for name, value in options.items() if value is not None]
    if given_options:
        check_read(model, given_options)
    if attention_mask is not None and tuple(attention_mask.shape) != shape:
        _check_mask_of_queries(attention_mask, shape)
        options["attention_mask"], attention_mask = attention_mask, None
    if position_ids is not None and position_ids.dim() == 3:
        options["position_ids"], position_ids = position_ids, _text_positions(position_ids, shape)
    segment, own_positions = None, position_ids is None
    if position_ids is None:
        position_ids = default_position_ids(model, architecture, input_ids, like, attention_mask)
    else:
        if tuple(position_ids.shape) not in (shape, (1, shape[1])):
            raise ValueError(f"position_ids must have shape {list(shape)}, got {list(position_ids.shape)}")
        position_ids = position_ids.expand(shape)
        if attention_mask is None and "attention_mask" not in options:
            segment = packed_segments(position_ids)
    # With router logits on, balancing losses like Mixtral's would expect those of all S tokens in every pass. An
    # argument overrides the config, as in the model.
    configured = getattr(unwrapped(model).config.get_text_config(), "output_router_logits", False)
    asked = options.get("output_router_logits")
    balancing = bool(configured if asked is None else asked)
    return TokenInputs(
        per_token=per_token,
        position_ids=position_ids,
        padding=attention_mask,
        segment=segment,
        passes_positions=not own_positions and architecture.takes_positions,
        passes_padding=not balancing,
        quiet={"output_router_logits": False} if balancing else {},
        options=options,
    )


def _check_mask_of_queries(mask: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless a mask that is not ``[B, S]`` gives the keys that each query sees."""
    batch, length = shape
    if mask.dim() not in (3, 4) or mask.shape[0] not in (1, batch) or tuple(mask.shape[-2:]) != (length, length):
        raise ValueError(
            f"attention_mask must have shape {list(shape)} like the input tokens (1 = token, 0 = padding), or "
            f"[{batch}, 1, {length}, {length}], got {list(mask.shape)}"
        )


def _text_positions(position_ids: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The text positions among several kinds, as vision-language models take them; ``None`` if not included."""
    kinds, *rest = position_ids.shape
    if tuple(rest) not in (shape, (1, shape[1])):
        raise ValueError(
            f"position_ids must have shape {list(shape)}, or {[3, *shape]} for several kinds of positions, got "
            f"{list(position_ids.shape)}"
        )
    return position_ids[0] if kinds == 4 else None


def _checked_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Whichever of the two was given."""
    if input_ids is not None:
        name, like, form = "input_ids", check_integers("input_ids", input_ids), "[B, S]"
        if like.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"input_ids must be torch.int64 or torch.int32, got {like.dtype}; use input_ids.long()")
    else:
        assert inputs_embeds is not None  # exactly one is given
        name, like, form = "inputs_embeds", check_float("inputs_embeds", inputs_embeds), "[B, S, H]"
    if like.dim() != form.count(",") + 1 or 0 in like.shape:
        raise ValueError(f"{name} must be {form} with at least one token, got shape {list(like.shape)}")
    return like


def other_positions(index: Tensor, length: int) -> Tensor:
    """The positions of each row that are not in ``index``, ascending.

    Args:
        index: Distinct positions ``[B, K]``.
        length: Number of positions ``S``.

    Returns:
        int64 ``[B, S - K]``.
    """
    taken = torch.zeros(index.shape[0], length, dtype=torch.int8, device=index.device).scatter_(1, index, 1)
    return taken.argsort(dim=1, stable=True)[:, : length - index.shape[1]]
