"""A context shared by several rows and run only once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cggr_core.checks import check_integers, check_same_device, check_shape, values_are_free
from cggr_core.logprobs.kept import all_tokens

if TYPE_CHECKING:
    from cggr_core.routing import Engine, TokenInputs

__all__ = ["SharedContext", "SharedRun"]


@dataclass(frozen=True)
class SharedContext:
    """The context before the rows of a batch: prompts that several completions continue.

    The rows' tokens attend to the context's keys and values, which are computed once per prompt. Results equal those of
    repeating the prompt before every row. The context's own tokens predict nothing, and nothing predicts the first
    token of a row, so the *last token of the prompt is the first of the row*.

    Attributes:
        input_ids: int64 ``[N, L]``.
        attention_mask: ``[N, L]``, 1 = token, 0 = padding; ``None`` without padding.
        rows: int64 ``[B]``, which of the N each row continues; ``None`` for ``B / N`` neighbouring rows each.

    Example:
        >>> prompts, completions = torch.randint(0, 64, (2, 6)), torch.randint(0, 64, (8, 5))
        >>> context = SharedContext(prompts[:, :-1])
        >>> input_ids = torch.cat([prompts[:, -1:].repeat_interleave(4, dim=0), completions], dim=1)
        >>> input_ids.shape
        torch.Size([8, 6])
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    rows: Tensor | None = None

    def check(self, arguments: dict[str, Any]) -> None:
        """Raise unless this context suits the rows that ``arguments`` of a forward describe.

        Raises:
            TypeError: If an attribute has a wrong type or dtype.
            ValueError: If shapes or devices do not match, or an argument cannot be combined with a context.
        """
        unwanted = sorted(name for name in arguments if name not in ("input_ids", "attention_mask"))
        if unwanted or "input_ids" not in arguments:
            raise ValueError(
                f"with a context, rows take input_ids and attention_mask only"
                f"{', got ' + ', '.join(unwanted) if unwanted else ''}; positions continue where the context ends"
            )
        input_ids = check_integers("input_ids", arguments["input_ids"])
        ids = check_integers("context.input_ids", self.input_ids)
        if ids.dim() != 2 or 0 in ids.shape:
            raise ValueError(f"context.input_ids must be [N, L] with at least one token, got shape {list(ids.shape)}")
        check_same_device("context.input_ids", ids, "input_ids", input_ids)
        if self.attention_mask is not None:
            check_shape("context.attention_mask", self.attention_mask, ids.shape, "that of context.input_ids")
            check_same_device("context.attention_mask", self.attention_mask, "input_ids", input_ids)
        batch, count = input_ids.shape[0], ids.shape[0]
        if self.rows is None:
            if batch % count:
                raise ValueError(
                    f"{batch} rows cannot be divided evenly among {count} contexts; give context.rows, the context of "
                    "each row"
                )
            return
        check_shape("context.rows", check_integers("context.rows", self.rows), (batch,), "one for each row")
        check_same_device("context.rows", self.rows, "input_ids", input_ids)
        if values_are_free(self.rows) and not bool(((self.rows >= 0) & (self.rows < count)).all()):
            raise ValueError(
                f"context.rows must be in [0, {count}), got values from {int(self.rows.min())} to "
                f"{int(self.rows.max())}"
            )

    def repeated(self, per_context: Tensor, batch_size: int) -> Tensor:
        """``per_context`` ``[N, ...]`` for each row, ``[B, ...]``."""
        if self.rows is not None:
            return per_context.index_select(0, self.rows)
        return per_context.repeat_interleave(batch_size // per_context.shape[0], dim=0)

    def of_rows(self, numbers: list[int], batch_size: int) -> SharedContext:
        """The context for only the rows ``numbers`` (ascending) of the batch; unused contexts are dropped."""
        ids = self.input_ids
        if self.rows is None:
            before = [number * ids.shape[0] // batch_size for number in numbers]
        else:
            owners = self.rows.tolist()
            before = [owners[number] for number in numbers]
        used = sorted(set(before))
        chosen = torch.tensor(used, device=ids.device)
        place = {context: number for number, context in enumerate(used)}
        rows = [place[context] for context in before]
        share = len(rows) // len(used)
        in_equal_shares = rows == [number for number in range(len(used)) for _ in range(share)]
        mask = self.attention_mask
        return SharedContext(
            ids.index_select(0, chosen),
            None if mask is None else mask.index_select(0, chosen),
            None if in_equal_shares else torch.tensor(rows, device=ids.device),
        )


class SharedRun:
    """A context and the rows that continue it, as inputs of an engine.

    Args:
        passes: The engine.
        context: The context.
        arguments: ``input_ids`` and ``attention_mask`` of the rows.
    """

    def __init__(self, passes: Engine, context: SharedContext, arguments: dict[str, Tensor]) -> None:
        self._passes = passes
        input_ids = arguments["input_ids"]
        batch_size, length = input_ids.shape[0], context.input_ids.shape[1]
        self._context = passes.inputs(input_ids=context.input_ids, attention_mask=context.attention_mask)
        self._rows = context.rows
        # Positions are those that the rows have with their contexts before them.
        mask = None
        if context.attention_mask is not None or "attention_mask" in arguments:
            masks = context.attention_mask, arguments.get("attention_mask")
            ids = context.input_ids, input_ids
            before, own = (
                torch.ones_like(tokens) if mask is None else mask.to(tokens.dtype)
                for mask, tokens in zip(masks, ids, strict=True)
            )
            mask = torch.cat([context.repeated(before, batch_size), own], dim=1)
        whole = torch.cat([context.repeated(context.input_ids, batch_size), input_ids], dim=1)
        repeated = passes.inputs(input_ids=whole, attention_mask=mask)
        self.batch = replace(
            passes.inputs(**arguments),
            position_ids=repeated.position_ids[:, length:].contiguous(),
            passes_positions=passes.architecture.takes_positions,
            segment=None,
        )

    def prepare(self, *, applies_head: bool = True) -> None:
        """Prepare the engine; see :meth:`Engine.prepare`.

        Args:
            applies_head: Whether the passes apply the model's head.

        Raises:
            ValueError: If its keys and values cannot be routed.
        """
        try:
            self._passes.prepare(self.batch, routing=True, applies_head=applies_head)
        except ValueError as error:
            raise ValueError(f"a shared context requires routed keys and values. {error}") from error

    def after_context(self, *, gradient_mode: str, precision: str | None = None) -> TokenInputs:
        """Run the context, and return the rows that continue it.

        Args:
            gradient_mode: The part of the context that gradients reach: in ``exact`` everything, in ``kv`` key and
                value projections, in ``detached`` (and without gradients) nothing.
            precision: Precision of the context's matrix products in ``kv`` and ``detached``; ``None`` for the model's
                own.
        """
        from cggr_core.routing import NO_CONTEXT, Shared
        from cggr_core.routing.sharding import shards_layers

        passes, context = self._passes, self._context
        if gradient_mode == "exact" and torch.is_grad_enabled():
            if shards_layers(passes.architecture.layers):
                # The rows' gradients reach a layer's keys and values after FSDP2 has freed its weights.
                raise ValueError(
                    "gradient_mode='exact' with a context is not possible under fully_shard; repeat the context before "
                    "every row, or use gradient_mode='kv'"
                )
            recorded: dict[int, tuple[Tensor, Tensor]] = {}
            _, auxiliary_loss = passes.gradient(
                context, all_tokens(context), NO_CONTEXT, keep_graph=False, hidden=True, note=recorded
            )
            if auxiliary_loss is not None:
                raise ValueError(
                    "gradient_mode='exact' with a context cannot compute the expert routers' balancing loss over all "
                    "tokens; set the config's output_router_logits=False, repeat the context, or use gradient_mode='kv'"
                )
        else:
            keep_graph = gradient_mode == "kv"
            recorded = passes.context(
                context, depth=passes.depth, keep_graph=keep_graph, head=False, precision=precision
            )[0].recorded
        shared = Shared(recorded, context.shape[1], self._rows, context.padding)
        return replace(self.batch, shared=shared)
