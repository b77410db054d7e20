"""Attention masks for queries that are a subset of the positions, on any Hugging Face backend that takes a mask.

Models build their masks through one registry of mask builders. During a pass, each builder is replaced by one that
evaluates the same pattern for other queries: query ``i`` of row ``b`` is at ``position[b, i]``.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from cggr_core.routing.architectures import Architecture
from cggr_core.routing.patches import MaskBuilder, changed_mask_builders

MaskFunction = Callable[[Any, Any, Any, Any], Any]

# The attention implementations of :mod:`cggr_core.routing.attention`: one replaces flash attention, the other SDPA,
# which ignores softcaps. The names avoid "sdpa" and "flash", for which transformers runs its own checks.
ROUTED = "cggr_routed"
ROUTED_UNCAPPED = "cggr_routed_uncapped"
# Number of queries that justify a separate call of SDPA on a CPU.
STRETCH = 192

# To skip a plain causal or full mask, transformers reads the padding on the host.
_BUILT = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}


@dataclass(frozen=True)
class Visibility:
    """What a query may attend to besides the model's own pattern.

    Attributes:
        position: Position of every query, ``[B, Q]`` int64; ``None`` if query ``i`` is at position ``i``.
        length: Number of keys ``S``.
        padding: ``[B, S]``, false or 0 at padding; ``None`` without padding.
        segment: ``[B, S]`` int64, the packed document of every token; ``None`` without packing.
        position_ids: ``[B, S]`` int64; read only with ``segment``.
        key_gradient: ``"all"``, or ``"kept"`` if keys and values need gradients at the queries' positions only.
    """

    position: Tensor | None
    length: int
    padding: Tensor | None
    segment: Tensor | None
    position_ids: Tensor
    key_gradient: str = "all"

    def at(self, index: Tensor, *, key_gradient: str) -> "Visibility":
        """What the queries at ``index`` ``[B, Q]`` among these may attend to."""
        position = index if self.position is None else self.position.gather(1, index)
        return replace(self, position=position, key_gradient=key_gradient)

    def restrict(self, mask_function: MaskFunction) -> MaskFunction:
        """``mask_function`` over (batch, head, query, key), evaluated for the routed queries."""
        if self.segment is not None:
            mask_function = _within_segment(mask_function, self.segment, self.position_ids)
        if self.position is None:
            return mask_function
        position, inner = self.position, mask_function

        def routed(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return inner(batch, head, position[batch, query], key)

        return routed


def packed_segments(position_ids: Tensor) -> Tensor:
    """The document of every token of packed rows: a new one starts wherever positions do not increase by one.

    Args:
        position_ids: int64 ``[B, S]``.

    Returns:
        int64 ``[B, S]``, counting from 0 in every row.
    """
    previous = torch.cat([position_ids[:, :1] - 1, position_ids[:, :-1]], dim=1)
    return (position_ids - previous != 1).long().cumsum(1)


def _within_segment(mask_function: MaskFunction, segment: Tensor, position_ids: Tensor) -> MaskFunction:
    # Patterns based on distance or chunks hold within a document, so they are evaluated at positions within it.
    def packed(batch: Any, head: Any, query: Any, key: Any) -> Any:
        same = segment[batch, query] == segment[batch, key]
        return same & mask_function(batch, head, position_ids[batch, query], position_ids[batch, key])

    return packed


@dataclass(frozen=True, eq=False)
class RowMask:
    """A mask that models pass on to their layers, and that can be reduced to some of its queries.

    Attributes:
        visibility: What the queries may attend to besides the model's pattern.
        mask_function: The model's pattern.
        arguments: Further arguments of transformers' mask builders.
    """

    visibility: Visibility
    mask_function: MaskFunction
    arguments: dict[str, Any]

    @classmethod
    def __torch_function__(cls, function: Any, *others: Any) -> Any:
        """Explain the error when torch gets a mask that only the attention of a routed pass can read."""
        raise RuntimeError(
            f"{getattr(function, '__name__', function)} got the mask of a routed pass outside of it: a checkpoint "
            "inside the model recomputes an attention in the backward pass; use model.gradient_checkpointing_enable(), "
            "torch's checkpoint_wrapper or module.forward = partial(checkpoint, module.forward, use_reentrant=False), "
            "or gradient='exact'"
        )

    def at(self, index: Tensor, *, key_gradient: str) -> Any:
        """The mask of the queries at ``index`` ``[B, Q]``, in the form that the attention takes."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class UnbuiltMask(RowMask):
    """A mask whose builder runs once the queries are known.

    Attributes:
        build: The builder.
    """

    build: Callable[..., Any]

    def at(self, index: Tensor, *, key_gradient: str) -> Any:
        """The mask that the builder returns for these queries."""
        visibility = self.visibility.at(index, key_gradient=key_gradient)
        return _routed_builder(self.build, visibility)(mask_function=self.mask_function, **self.arguments)


@dataclass(frozen=True, eq=False)
class RoutedMask(RowMask):
    """A mask given by a few numbers, which models pass to the attention function as they do flex attention's."""

    def at(self, index: Tensor, *, key_gradient: str) -> "RoutedMask":
        """The mask of the queries at ``index``."""
        return replace(self, visibility=self.visibility.at(index, key_gradient=key_gradient))

    @cached_property
    def pattern(self) -> tuple[bool, int | None]:
        """Whether the model's pattern is plain causal or a sliding window, and the window's length."""
        return causal_window(self.mask_function)

    @cached_property
    def position(self) -> Tensor:
        """Position of every query, int64 ``[B, Q]``."""
        if self.visibility.position is not None:
            return self.visibility.position
        like = self.visibility.position_ids
        return torch.arange(self.visibility.length, device=like.device).expand(like.shape[0], -1)

    @cached_property
    def segment(self) -> Tensor | None:
        """Document of every key, int64 ``[B, S]``, -1 at padding; ``None`` for one document without padding."""
        segment = self.visibility.segment
        if self.visibility.padding is None:
            return segment
        segment = torch.zeros_like(self.visibility.position_ids) if segment is None else segment
        return segment.masked_fill(~self.visibility.padding.bool(), -1)

    @cached_property
    def dense(self) -> Tensor:
        """The boolean mask ``[B, 1, Q, S]`` for SDPA."""
        return _routed_builder(sdpa_mask, self.visibility)(mask_function=self.mask_function, **self.arguments)

    @cached_property
    def stretches(self) -> list[tuple[slice, slice]]:
        """Stretches of queries, and the keys that some query of each may see; reads positions, so for the CPU only."""
        everything, window = self.position, self.pattern[1]
        size = max(STRETCH, -(-everything.shape[1] // 4))
        found = []
        for start in range(0, everything.shape[1], size):
            position = everything[:, start : start + size]
            first = 0 if window is None else max(0, int(position.min()) - window + 1)
            found.append((slice(start, start + size), slice(first, int(position.max()) + 1)))
        return found

    @cached_property
    def _added(self) -> dict[torch.dtype, Tensor]:
        return {}

    def added(self, dtype: torch.dtype) -> Tensor:
        """The mask ``[B, 1, Q, S]`` as numbers added to the scores; SDPA would convert a boolean one in every call."""
        if dtype not in self._added:
            zeros = torch.zeros(self.dense.shape, dtype=dtype, device=self.dense.device)
            self._added[dtype] = zeros.masked_fill_(~self.dense, -torch.inf)
        return self._added[dtype]


def causal_window(mask_function: MaskFunction) -> tuple[bool, int | None]:
    """Recognise plain causal and sliding-window patterns among transformers' mask functions.

    Args:
        mask_function: Of (batch, head, query, key).

    Returns:
        Whether it is one of the two, and the largest number of keys that a query sees (``None`` without a window).
    """
    if mask_function is causal_mask_function:
        return True, None
    if not inspect.isfunction(mask_function) or mask_function.__module__ != "transformers.masking_utils":
        return False, None
    variables = inspect.getclosurevars(mask_function).nonlocals
    if mask_function.__qualname__.startswith("sliding_window_overlay."):
        return False, int(variables["sliding_window"])
    if not mask_function.__qualname__.startswith("and_masks."):
        return False, None
    overlay, *rest = variables["mask_functions"]
    window = causal_window(overlay)[1]
    return window is not None and rest == [causal_mask_function], window


def routed_masks(
    visibility: Visibility,
    *,
    architecture: Architecture | None = None,
    own_documents: bool = False,
    taken_apart: bool = False,
) -> AbstractContextManager[None]:
    """Within the block, make a model's mask builders build masks for the queries of a pass.

    Args:
        visibility: What the queries may attend to.
        architecture: Of the model; ``None`` for every model.
        own_documents: Whether the documents of packed rows are those of the position ids that the model itself passes
            to the builders in a forward without a cache, rather than the visibility's.
        taken_apart: Whether layers run on only some of the queries; see
            :class:`~cggr_core.routing.layer_rows.LayerRows`.
    """
    if own_documents:
        visibility = replace(visibility, segment=None)

    def change(name: str, build: MaskBuilder) -> MaskBuilder:
        if name in (ROUTED, ROUTED_UNCAPPED):
            return _numeric_builder(visibility)
        if taken_apart and name == "flex_attention":  # its block masks cannot be sliced
            return _unbuilt(visibility, build)
        # Flash attention takes no mask; passes that need one do not use it.
        return build if name.startswith("flash") else _routed_builder(build, visibility)

    return changed_mask_builders(change, architecture=architecture)


def _unbuilt(visibility: Visibility, build: Callable[..., Any]) -> Callable[..., UnbuiltMask]:
    def build_later(*, mask_function: MaskFunction, **arguments: Any) -> UnbuiltMask:
        return UnbuiltMask(visibility, mask_function, arguments, build)

    return build_later


def _numeric_builder(visibility: Visibility) -> Callable[..., RoutedMask]:
    def build(*, mask_function: MaskFunction, **arguments: Any) -> RoutedMask:
        return RoutedMask(visibility, mask_function, arguments)

    return build


def _routed_builder(build: Callable[..., Any], visibility: Visibility) -> Callable[..., Any]:
    def build_routed(*, mask_function: MaskFunction, **arguments: Any) -> Any:
        position = visibility.position
        arguments.update(
            q_length=visibility.length if position is None else position.shape[1],
            kv_length=visibility.length,
            q_offset=0,
            kv_offset=0,
            attention_mask=None if visibility.padding is None else visibility.padding.bool(),
            **_BUILT,  # the conditions for skipping a mask assume consecutive queries
        )
        return build(mask_function=visibility.restrict(mask_function), **arguments)

    return build_routed


def whole_rows(architecture: Architecture | None = None) -> AbstractContextManager[None]:
    """Let SDPA skip the mask when plain causal attention needs none, for rows of one document without padding.

    transformers skips such masks after reading the positions on the host. While a CUDA graph is recorded it cannot read
    them and builds a dense mask, which rules out SDPA's fastest kernels. Callers must already know that the rows are
    whole.

    Args:
        architecture: Of the model whose rows they are; ``None`` for every model.
    """
    return changed_mask_builders(_without_needless_masks, architecture=architecture, documents=_one_document)


def _one_document(position_ids: Tensor) -> None:
    """Rows that are not packed."""


def unseen_masks() -> AbstractContextManager[None]:
    """Always build SDPA's mask, of any model: to skip it, transformers would have to read the padding on the host."""
    return changed_mask_builders(_always_built, architecture=None, documents=packed_segments)


def _always_built(name: str, build: MaskBuilder) -> MaskBuilder:
    return _built_mask if build is sdpa_mask else build


def _built_mask(**arguments: Any) -> Tensor | None:
    return sdpa_mask(**{**arguments, **_BUILT})


def _without_needless_masks(name: str, build: MaskBuilder) -> MaskBuilder:
    return _mask_where_needed if build is sdpa_mask else build


def _mask_where_needed(
    *,
    mask_function: MaskFunction,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **arguments: Any,
) -> Tensor | None:
    # Models that add a bias to the mask (ALiBi) need it built and disallow skipping it.
    causal, window = causal_window(mask_function)
    plain = allow_is_causal_skip and causal and attention_mask is None and q_length == kv_length
    if plain and (window is None or kv_length <= window):
        return None
    return sdpa_mask(
        mask_function=mask_function,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **arguments,
    )
