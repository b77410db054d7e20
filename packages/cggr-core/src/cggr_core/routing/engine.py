"""A model and the passes that can be run on it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cggr_core.routing.agreement import comparable, difference, verification_interval
from cggr_core.routing.architectures import Architecture, unwrapped
from cggr_core.routing.context_pass import Context, context_pass, head_at, head_read_by, ignore_head, layer_input
from cggr_core.routing.findings import Findings
from cggr_core.routing.gradient_pass import gradient_pass
from cggr_core.routing.inputs import TokenInputs, token_inputs
from cggr_core.routing.loss_agreement import auxiliary_loss
from cggr_core.routing.loss_arguments import LossArguments, loss_arguments, taken_apart
from cggr_core.routing.masks import packed_segments, unseen_masks, whole_rows
from cggr_core.routing.outputs import ReusableOutputs
from cggr_core.routing.patches import documents_found_by, nothing_left, recomputes_with_torch, without_random_states
from cggr_core.routing.precision import LowPrecision
from cggr_core.routing.sharding import GatheredWeights
from cggr_core.routing.shared import KeyValue
from cggr_core.routing.truncation import truncated
from cggr_core.selection import Selection


class Engine:
    """Plain, context and gradient passes over a Hugging Face model.

    Every pass returns the *head values*: the input of the language-model head if it is one matrix, else the model's
    logits.

    Args:
        model: A Hugging Face language model, possibly wrapped by PEFT.
    """

    def __init__(self, model: nn.Module) -> None:
        self._findings = Findings(model)
        self._verified_every = verification_interval()
        self._gradient_passes = 0
        self._capturable = False
        self._forget()

    def _forget(self) -> None:
        """Discard what was made for the layers of an earlier structure."""
        self._low_precision: LowPrecision | None = None
        self._outputs: ReusableOutputs | None = None
        self._gathered = GatheredWeights(self._findings.description.layers)

    def follow(self, model: nn.Module | None = None) -> bool:
        """Examine the model again if it has changed; see :meth:`cggr_core.routing.findings.Findings.follow`."""
        changed = self._findings.follow(model)
        if changed:
            self._forget()
        return changed

    def __getstate__(self) -> dict[str, Any]:
        # The findings hold functions made for the model; a copy is probed again.
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"])

    @property
    def model(self) -> Any:
        """The model; its attributes depend on its class."""
        return self._findings.model

    @property
    def architecture(self) -> Architecture:
        """The description, corrected by what the first batch showed."""
        return self._findings.architecture

    @property
    def seen(self) -> tuple[int, int]:
        """Changes whenever earlier findings about the model may no longer hold."""
        return self._findings.version

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self._findings.description.layers)

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return self._findings.vocab_size

    @property
    def hidden_size(self) -> int:
        """Length of a hidden state."""
        return getattr(self.model.config.get_text_config(), "hidden_size", self.embedding_size)

    @property
    def embedding_size(self) -> int:
        """Length of an input embedding."""
        return unwrapped(self.model).get_input_embeddings().weight.shape[1]

    @property
    def embeddings_count(self) -> int:
        """Rows of the input embeddings."""
        return unwrapped(self.model).get_input_embeddings().weight.shape[0]

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
        self.follow()
        return token_inputs(
            self.model,
            self._findings.description,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            options=options,
        )

    def loss_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward that only the model's loss would read."""
        return loss_arguments(self.model, arguments)

    def taken_apart(
        self, arguments: dict[str, Any], *, num_items: Tensor | float | None, ignore_index: int
    ) -> LossArguments:
        """Separate a forward's arguments from its loss's; see :func:`cggr_core.routing.loss_arguments.taken_apart`."""
        return taken_apart(self.model, arguments, num_items=num_items, ignore_index=ignore_index)

    def check_reads(self, name: str, inputs: TokenInputs) -> None:
        """Check how the model's loss reads an argument; see :meth:`cggr_core.routing.findings.Findings.check_reads`."""
        self._findings.check_reads(name, inputs)

    def check_own_loss(self, inputs: TokenInputs, labels: Tensor, *, ignore_index: int) -> None:
        """Check the model's own loss on a batch; see :meth:`cggr_core.routing.findings.Findings.check_own_loss`."""
        self._findings.check_own_loss(inputs, labels, ignore_index=ignore_index)

    def prepare(self, inputs: TokenInputs, *, routing: bool, own_loss: bool = False, applies_head: bool = True) -> None:
        """Probe the model on a batch if it is new; see :meth:`cggr_core.routing.findings.Findings.prepare`."""
        self._findings.prepare(inputs, routing=routing, own_loss=own_loss, applies_head=applies_head)

    def plain(
        self,
        arguments: dict[str, Any],
        *,
        depth: int | None = None,
        hidden: bool = False,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """An ordinary forward, under the caller's gradient mode.

        Args:
            arguments: Of the model's forward, as the caller passed them.
            depth: Layers to run before the final norm; all by default.
            hidden: Return the head's input even if the head is not one matrix.
            positions: int64 ``[B, K]``, the tokens whose head values are needed; all by default.

        Returns:
            Head values ``[B, S, ...]`` or ``[B, K, ...]``, and the model's auxiliary loss if it has one.
        """
        seen: list[Tensor] = []
        own_head = not (self.architecture.head.fused or hidden)
        if not own_head:
            head = head_read_by(self.architecture, seen.append)
        else:
            head = nullcontext() if positions is None else head_at(self.architecture, positions)
        with self._truncated(depth), head:
            output = self._forward(arguments)
        if own_head:
            return output.logits, auxiliary_loss(self.model, output)
        values = seen[0]
        if positions is not None:
            values = values.gather(1, positions[:, :, None].expand(-1, -1, values.shape[2]))
        return values, auxiliary_loss(self.model, output)

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

        hook = self._findings.description.layers[depth].register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield seen
        finally:
            hook.remove()

    def hidden(self, arguments: dict[str, Any], *, depth: int) -> Tensor:
        """Input of layer ``depth`` at every position ``[B, S, H]``, detached; no layer above is run, nor the head."""
        with (
            self._truncated(depth),
            head_read_by(self.architecture, ignore_head),
            self.hidden_states(depth) as seen,
        ):
            self._forward(arguments)
        return seen[0]

    @torch.no_grad()
    def embeddings(self, tokens: Tensor) -> Tensor:
        """Input embeddings ``[..., E]`` of token ids, before any scaling by the model."""
        return unwrapped(self.model).get_input_embeddings()(tokens)

    @contextmanager
    def capturable(self) -> Iterator[None]:
        """Restrict the passes of the block to what a CUDA graph can capture.

        transformers skips a mask if the host finds no padding in it; here it is always built. Checkpointed layers are
        recomputed without restoring the random state, which lives on the host.
        """
        self._capturable = True
        try:
            with documents_found_by(packed_segments):
                yield
        finally:
            self._capturable = False

    @property
    def keeps_random_states(self) -> bool:
        """Whether layers are checkpointed in a way that :meth:`capturable` cannot change for ordinary passes."""
        architecture = self.architecture
        switched = (m for m in architecture.checkpointing if m.__dict__.get("gradient_checkpointing") is True)
        return bool(architecture.checkpoint_wrappers) or not all(map(recomputes_with_torch, switched))

    def _forward(self, arguments: dict[str, Any]) -> Any:
        given = any(arguments.get(name) is not None for name in ("attention_mask", "position_ids"))
        known_whole = not (self._findings.description.cache_at_layers or given)
        around = unseen_masks() if self._capturable else nullcontext()
        states = without_random_states(self.architecture) if self._capturable else nullcontext()
        with whole_rows(self.architecture) if known_whole else around, states:
            return self.model(**arguments, use_cache=False)

    def _truncated(self, depth: int | None) -> AbstractContextManager[None]:
        if depth is None or depth >= self.depth:
            return nullcontext()
        return truncated(self.architecture, depth, self._findings.layer_output)

    def step(self) -> AbstractContextManager[None]:
        """Context of a step in which a gradient pass follows a context pass: weights are gathered once for both."""
        return self._gathered.step()

    def context(
        self,
        inputs: TokenInputs,
        *,
        depth: int,
        keep_graph: bool,
        head: bool,
        hidden: bool = False,
        precision: str | None = None,
        hold_outputs: bool = False,
    ) -> tuple[Context, Tensor | None]:
        """All tokens through ``depth`` layers without keeping activations.

        Args:
            inputs: The batch.
            depth: Number of layers.
            keep_graph: Keep the graph of keys and values.
            head: Whether to return the head values.
            hidden: Return the head's input even if the head is not one matrix.
            precision: One of :data:`~cggr_core.settings.CONTEXT_PRECISIONS` for the layers' products; ``None`` for
                the model's own.
            hold_outputs: Hold the outputs of linear layers, so that a gradient pass does not compute them again.

        Returns:
            Keys and values, and the head values ``[B, S, ...]`` if requested.

        Raises:
            ValueError: If outputs cannot be reused.
        """
        seen: list[Tensor] = []
        own_head = head and not (self.architecture.head.fused or hidden)
        with self._gathered.context_pass():
            context = context_pass(
                self.model,
                self.architecture,
                inputs,
                depth=depth,
                keep_graph=keep_graph,
                read_head=None if own_head else (seen.append if head else ignore_head),
                layer_output=self._findings.layer_output,
                precision=None if precision is None else self._in_low_precision().everywhere(),
                outputs=self._reusable_outputs().of_a_pass(depth) if hold_outputs else None,
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
        precision: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Kept tokens through all layers with gradients.

        Args:
            inputs: The whole batch.
            selection: The kept tokens.
            context: Of any depth; ``NO_CONTEXT`` to interleave every layer.
            keep_graph: Mode ``kv`` rather than ``detached``.
            hidden: Return the head's input even if the head is not one matrix.
            note: Where to record the kept tokens' keys and values of every layer, with their graph.
            precision: As for :meth:`context`, of the other tokens that this pass computes.

        Returns:
            Head values ``[B, K, ...]``, and the model's auxiliary loss over the kept tokens if it has one.
        """
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
            note=note,
            precision=None if precision is None else self._in_low_precision().at,
            preserve_rng_state=not self._capturable,
        )
        self._gathered.after_gradient_pass()
        self._verify(inputs, selection, context)
        return seen[0] if fused else output.logits, auxiliary_loss(self.model, output)

    def _in_low_precision(self) -> LowPrecision:
        if self._low_precision is None:
            self._low_precision = LowPrecision(self._findings.description.layers)
        return self._low_precision

    def _reusable_outputs(self) -> ReusableOutputs:
        if self._outputs is None:
            self._outputs = ReusableOutputs(self.model, self._findings.description)
        return self._outputs

    def _verify(self, inputs: TokenInputs, selection: Selection, context: Context) -> None:
        """Compare with a plain forward if ``CGGR_VERIFY`` requests it."""
        due = self._verified_every is not None and self._gradient_passes % self._verified_every == 0
        self._gradient_passes += 1
        if not due or inputs.shared is not None:  # the inputs do not contain the shared context
            return
        with (
            nothing_left(self.model, inputs.position_ids.device),
            comparable(self.model, self.architecture, inputs) as expected,
        ):
            apart = difference(
                self.model,
                self.architecture,
                inputs,
                selection,
                expected,
                depth=context.depth,
                layer_output=self._findings.layer_output,
            )
        if apart is not None:
            raise RuntimeError(
                f"CGGR_VERIFY: in routed pass {self._gradient_passes}, {type(unwrapped(self.model)).__name__} computes "
                f"different values for kept tokens than a plain forward ({apart}); use gradient='exact', and report "
                "the model"
            )
