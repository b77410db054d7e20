"""One model, and the passes that can be run on it."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cggr_core.routing.architectures import Architecture, describe, unwrapped
from cggr_core.routing.context_pass import Context, context_pass, ignore_head, layer_input, read_in_place_of_head
from cggr_core.routing.gradient_pass import gradient_pass
from cggr_core.routing.inputs import TokenInputs, token_inputs
from cggr_core.routing.masks import whole_rows
from cggr_core.routing.patching import replaced_forwards
from cggr_core.routing.probe import Probe, probe
from cggr_core.routing.shared import KeyValue
from cggr_core.routing.truncation import truncated
from cggr_core.selection import Selection


class Engine:
    """Plain, context and gradient passes over a Hugging Face model.

    Every pass gives the *head values*: the input of the language-model head where the head is one matrix, else the
    model's logits.

    Args:
        model: A Hugging Face language model, possibly wrapped by PEFT.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model  # its attributes depend on its class
        self._described = describe(model)
        self._probe: Probe | None = None
        self._probed: set[str] = set()

    @property
    def architecture(self) -> Architecture:
        """The description, corrected by what the first batch showed."""
        return self._described if self._probe is None else self._probe.architecture

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self._described.layers)

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        weight = getattr(self._described.head.module, "weight", None)
        if weight is not None and weight.dim() == 2:
            return weight.shape[0]
        return self.model.config.get_text_config().vocab_size

    @property
    def hidden_size(self) -> int:
        """Length of a hidden state."""
        return self.model.config.get_text_config().hidden_size

    @property
    def embedding_size(self) -> int:
        """Length of an input embedding."""
        return unwrapped(self.model).get_input_embeddings().weight.shape[1]

    def inputs(
        self,
        *,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **options: Any,
    ) -> TokenInputs:
        """A checked batch; see :func:`cggr_core.routing.inputs.token_inputs`."""
        return token_inputs(
            self.model,
            self._described,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            options=options,
        )

    def prepare(self, inputs: TokenInputs, *, routing: bool) -> None:
        """Look at the model on a few tokens of its first batch.

        Args:
            inputs: The batch.
            routing: Whether keys and values will be routed.

        Raises:
            ValueError: If they will, and this model cannot.
        """
        packed = routing and inputs.segment is not None
        wanted = {"plain"} | ({"routing"} if routing else set()) | ({"packing"} if packed else set())
        if self._probe is None or not wanted <= self._probed:
            self._probe = probe(self.model, self._described, inputs, routing=routing)
            self._probed |= wanted
            head = self._probe.architecture.head
            if self._described.head.fused and not head.fused:
                warnings.warn(
                    f"the head of {type(self.model).__name__} is not one matrix with a scale and a softcap; its own "
                    "logits are used, [tokens, vocabulary] at a time",
                    stacklevel=3,
                )
        if routing and self.architecture.obstacle is not None:
            raise ValueError(
                f"gradient='kv' and 'detached' route keys and values, and {self.architecture.obstacle}; use "
                "gradient='exact' or gradient='sequence'"
            )
        if packed and self._probe.packing_obstacle is not None:
            raise ValueError(self._probe.packing_obstacle)

    def plain(
        self, arguments: dict[str, Any], *, depth: int | None = None, hidden: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """An ordinary forward, with or without gradients as the caller has set them.

        Args:
            arguments: Of the model's forward, as its caller gave them.
            depth: Layers to run before the final norm; all by default.
            hidden: Give the head's input whatever the head is.

        Returns:
            Head values ``[B, S, ...]``, and the model's auxiliary loss if it has one.
        """
        if not (self.architecture.head.fused or hidden):
            with self._truncated(depth):
                output = self._forward(arguments)
            return output.logits, self._auxiliary_loss(output)
        seen: list[Tensor] = []
        with (
            self._truncated(depth),
            replaced_forwards({self.architecture.head.module: partial(read_in_place_of_head, seen.append)}),
        ):
            output = self._forward(arguments)
        return seen[0], self._auxiliary_loss(output)

    def logits(self, arguments: dict[str, Any], *, depth: int | None = None) -> Tensor:
        """The logits ``[B, S, V]`` of an ordinary forward through ``depth`` layers (all by default)."""
        with self._truncated(depth):
            return self._forward(arguments).logits

    @contextmanager
    def hidden_states(self, depth: int) -> Iterator[list[Tensor]]:
        """Collect the input of layer ``depth``, detached, of every pass over the model in the block."""
        seen: list[Tensor] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(layer_input(args, kwargs).detach())

        hook = self._described.layers[depth].register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield seen
        finally:
            hook.remove()

    def hidden(self, arguments: dict[str, Any], *, depth: int) -> Tensor:
        """Input of layer ``depth`` at every position ``[B, S, H]``, detached; no layer above is run, nor the head."""
        head = partial(read_in_place_of_head, ignore_head)
        with (
            self._truncated(depth),
            replaced_forwards({self.architecture.head.module: head}),
            self.hidden_states(depth) as seen,
        ):
            self._forward(arguments)
        return seen[0]

    @torch.no_grad()
    def embeddings(self, tokens: Tensor) -> Tensor:
        """Input embeddings ``[..., E]`` of token ids, without the model's scaling of them."""
        return unwrapped(self.model).get_input_embeddings()(tokens)

    def _forward(self, arguments: dict[str, Any]) -> Any:
        known_whole = arguments.get("attention_mask") is None and arguments.get("position_ids") is None
        with whole_rows() if known_whole else nullcontext():
            return self.model(**arguments, use_cache=False)

    def _truncated(self, depth: int | None) -> AbstractContextManager[None]:
        if depth is None or depth >= self.depth:
            return nullcontext()
        assert self._probe is not None, "prepare() comes first"
        return truncated(self.architecture, depth, self._probe.layer_output)

    def context(
        self, inputs: TokenInputs, *, depth: int, keep_graph: bool, head: bool, hidden: bool = False
    ) -> tuple[Context, Tensor | None]:
        """All tokens through ``depth`` layers without keeping activations.

        Args:
            inputs: The batch.
            depth: Number of layers.
            keep_graph: Keep the graph of keys and values.
            head: Whether the head values are wanted.
            hidden: Give the head's input whatever the head is.

        Returns:
            Keys and values, and the head values ``[B, S, ...]`` if wanted.
        """
        assert self._probe is not None, "prepare() comes first"
        seen: list[Tensor] = []
        own_head = head and not (self.architecture.head.fused or hidden)
        context = context_pass(
            self.model,
            self.architecture,
            inputs,
            depth=depth,
            keep_graph=keep_graph,
            read_head=None if own_head else (seen.append if head else ignore_head),
            layer_output=self._probe.layer_output,
        )
        return context, context.logits if own_head else (seen[0] if head else None)

    def gradient(
        self,
        inputs: TokenInputs,
        selection: Selection,
        context: Context,
        *,
        keep_graph: bool,
        hidden: bool = False,
        note: dict[int, KeyValue] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Kept tokens through all layers with gradients.

        Args:
            inputs: The whole batch.
            selection: The kept tokens.
            context: Of any depth; ``NO_CONTEXT`` to interleave every layer.
            keep_graph: Mode ``kv`` rather than ``detached``.
            hidden: Give the head's input whatever the head is.
            note: Where to note the kept tokens' keys and values of every layer, with their graph.

        Returns:
            Head values ``[B, K, ...]``, and the model's auxiliary loss over the kept tokens if it has one.
        """
        assert self._probe is not None, "prepare() comes first"
        seen: list[Tensor] = []
        fused = self.architecture.head.fused or hidden
        output = gradient_pass(
            self.model,
            self.architecture,
            inputs,
            selection,
            context,
            keep_graph=keep_graph,
            read_head=seen.append if fused else None,
            layer_output=self._probe.layer_output,
            note=note,
        )
        return seen[0] if fused else output.logits, self._auxiliary_loss(output)

    def _auxiliary_loss(self, output: Any) -> Tensor | None:
        loss = getattr(output, "aux_loss", None)
        if not isinstance(loss, Tensor):
            return None
        return loss * self.model.config.get_text_config().router_aux_loss_coef
