"""What is known of a model, and the batches on which it is examined again."""

import warnings
from typing import Any

from torch import Tensor, nn

from cggr_core.checks import check_not_compiled
from cggr_core.routing.agreement import verification_interval
from cggr_core.routing.architectures import Architecture, describe, unwrapped
from cggr_core.routing.batch_loss import check_loss_of_batch
from cggr_core.routing.context_pass import LayerOutput
from cggr_core.routing.heads import head_rows
from cggr_core.routing.inputs import TokenInputs
from cggr_core.routing.labelled_tokens import IGNORED
from cggr_core.routing.loads import count_loads
from cggr_core.routing.loss_agreement import check_reads
from cggr_core.routing.patches import nothing_left
from cggr_core.routing.probe import Probe, probe, probe_whole_rows
from cggr_core.routing.rare_tokens import probe_rare_tokens
from cggr_core.routing.sharding import shards_layers
from cggr_core.routing.structure import Settings, structure


class Findings:
    """The description of a model and the results of its checks, kept up to date with the model and its batches.

    Args:
        model: A Hugging Face language model, possibly wrapped by PEFT.

    Attributes:
        model: The model.
        description: Its description, before any check.
    """

    description: Architecture

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model  # its attributes depend on its class
        self._looks = self._own_losses = 0
        self._verified_every = verification_interval()
        self._settings: Settings | None = None
        self._look()

    def _look(self) -> None:
        """Describe the model as it is now and discard earlier checks."""
        self._looks += 1
        self._may_be_compiled = True
        self.description = describe(self.model)
        self._structure = structure(self.model)
        if self._settings is None:
            self._settings = Settings(self.model)
        else:
            self._settings.look_at(self.model)
        self._probe: Probe | None = None
        self._probed: set[str] = set()
        self._routed = 0
        self._probed_lengths: dict[frozenset[str], int] = {}  # of the longest rows, by the batch's features
        self._loss_sizes: dict[frozenset[str], tuple[int, int]] = {}  # of the largest batches whose loss was checked
        self._loads = count_loads(self.model)
        self._loads_seen = self._loads.count

    def follow(self, model: nn.Module | None = None) -> bool:
        """Examine the model again if it has changed; called once per step, before the passes.

        After a model has been wrapped, users resize embeddings, replace heads and layers, add adapters and change
        settings.

        Args:
            model: The model from now on; ``None`` for the same one.

        Returns:
            Whether it has changed.
        """
        if model is not None:
            self.model = model
        assert self._settings is not None  # set by the first look
        # If the model is sharded, all ranks must look in the same step, and a setting may change on one rank alone.
        if structure(self.model) == self._structure and (
            not self._settings.changed() or shards_layers(self.description.layers)
        ):
            return False
        self._look()
        return True

    @property
    def architecture(self) -> Architecture:
        """The description, corrected by what the first batch showed."""
        return self.description if self._probe is None else self._probe.architecture

    @property
    def layer_output(self) -> LayerOutput:
        """Wraps a hidden state the way the model's layers return it; known from the first :meth:`prepare` on."""
        assert self._probe is not None, "prepare() comes first"
        return self._probe.layer_output

    @property
    def version(self) -> tuple[int, int]:
        """Changes whenever earlier findings may no longer hold."""
        return self._looks, self._loads.count

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return head_rows(unwrapped(self.model))

    def prepare(self, inputs: TokenInputs, *, routing: bool, own_loss: bool = False, applies_head: bool = True) -> None:
        """Probe the model on its first batch, after weights were loaded, and on batches that are new in some way.

        A batch is new if its rows are longer than before, or if it is the first with padding, position ids or some
        other input. A model with code of others, of which a batch may show nothing, is also compared on tokens that the
        first batch does not hold, and again on batches 2, 4, 8 and so on.

        Args:
            inputs: The batch.
            routing: Whether keys and values will be routed.
            own_loss: Whether the step's loss replaces the model's own; the two are then compared.
            applies_head: Whether the passes apply the model's head; if it then needs the logits of all tokens, a
                warning says so.

        Raises:
            ValueError: If keys and values cannot be routed in this model or batch, if the model's own loss differs, or
                if parts of the model were compiled.
        """
        if self._may_be_compiled:
            check_not_compiled(self.model, self.description.layers)
            self._may_be_compiled = False
        packed = routing and inputs.segment is not None
        wanted = {"plain"} | ({"routing"} if routing else set()) | ({"packing"} if packed else set())
        wanted |= {"own_loss"} if own_loss else set()
        of_queries = inputs.options.get("attention_mask")
        if routing and of_queries is not None:
            raise ValueError(
                f"attention_mask must be {list(inputs.shape)} (1 = token, 0 = padding) for gradient='kv' and "
                f"'detached', got {list(of_queries.shape)}, which cannot be reduced to the kept queries; use "
                "gradient='exact' or gradient='sequence'"
            )
        length, form = inputs.shape[1], inputs.form
        longer = length > self._probed_lengths.get(form, 0)
        sharded = shards_layers(self.description.layers)
        self._routed += routing
        # A batch may show nothing of what code of others does.
        again = routing and self.description.own_code and self._routed.bit_count() == 1
        loaded = self._loads.count != self._loads_seen
        if self._probe is None or not wanted <= self._probed or loaded:
            self._looks += 1
            with nothing_left(self.model, inputs.position_ids.device):
                self._probe = probe(self.model, self.description, inputs, routing=routing, own_loss=own_loss)
            self._probed |= wanted if self._probe.saw_loss else wanted - {"own_loss"}
            if routing:
                self._probed_lengths[form] = max(self._probed_lengths.get(form, 0), length)
            self._loads_seen = self._loads.count
            head = self._probe.architecture.head
            if applies_head and not head.fused:
                warnings.warn(
                    f"the head of {type(unwrapped(self.model)).__name__} is more than one matrix with a scale and a "
                    "softcap (it may have hooks or adapters); its own logits are used, as one [tokens, vocabulary] "
                    "tensor",
                    stacklevel=4,
                )
        elif routing and (longer or again) and not sharded:
            # (Ranks that shard layers must all look in the same step, and their batches differ.)
            with nothing_left(self.model, inputs.position_ids.device):
                self._probe = probe_whole_rows(self.model, self._probe, inputs)
            self._probed_lengths[form] = max(self._probed_lengths.get(form, 0), length)
        if again and self._routed == 1 and self.architecture.obstacle is None and "input_ids" in inputs.per_token:
            with nothing_left(self.model, inputs.position_ids.device):
                self._probe = probe_rare_tokens(self.model, self._probe, inputs, sharded=sharded)
        if routing and self.architecture.obstacle is not None:
            raise ValueError(
                f"gradient='kv' and 'detached' route keys and values, but {self.architecture.obstacle}; use "
                "gradient='exact' or gradient='sequence'"
            )
        if packed and self._probe.packing_obstacle is not None:
            raise ValueError(self._probe.packing_obstacle)

    def check_reads(self, name: str, inputs: TokenInputs) -> None:
        """Raise unless the model's own loss reads an argument as a step does; checked on the first such batch."""
        assert self._probe is not None, "prepare() comes first"
        if name not in self._probed and (self._probe.has_loss or name == "shift_labels"):
            with nothing_left(self.model, inputs.position_ids.device):
                check_reads(name, self.model, self.architecture, inputs)
            self._probed.add(name)

    def check_own_loss(self, inputs: TokenInputs, labels: Tensor, *, ignore_index: int) -> None:
        """Check the model's own loss against that of a routed step, on batches that are new in some way.

        A batch is new if it has more rows, longer rows, or an input that no earlier batch had. ``CGGR_VERIFY=n`` checks
        every n-th batch.

        Args:
            inputs: The batch; :meth:`prepare` has compared the loss with cross-entropy on a few of its tokens.
            labels: int64 ``[B, S]``.
            ignore_index: The label that is not counted.

        Raises:
            ValueError: If the two losses differ.
        """
        if self._probe is None or not self._probe.has_loss:
            return
        form, (rows, length) = inputs.form, inputs.shape
        known = self._loss_sizes.get(form)
        due = self._verified_every is not None and self._own_losses % self._verified_every == 0
        self._own_losses += 1
        if known is not None and not due:
            rows, length = max(rows, known[0]), max(length, known[1])
            # If the model is sharded, all ranks must look in the same step, and their batches differ.
            if (rows, length) == known or shards_layers(self.description.layers):
                return
        outside = (labels == ignore_index) | (labels < 0) | (labels >= self.vocab_size)
        with nothing_left(self.model, inputs.position_ids.device):
            check_loss_of_batch(
                self.model, self.architecture, inputs, labels.masked_fill(outside, IGNORED), self._probe.layer_output
            )
        self._loss_sizes[form] = (rows, length) if known is None else (max(rows, known[0]), max(length, known[1]))
