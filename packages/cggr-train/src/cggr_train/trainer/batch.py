"""Turns a batch from a data collator into the arguments of CGGRModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Other ways in which padding-free collators describe packed documents, each for one attention backend.
_ATTENTION_HINTS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})
# State-space layers have no other way to tell documents apart.
_PACKING_HINTS = _ATTENTION_HINTS | {"seq_idx"}


# Arguments of a training forward that the model itself does not have.
STEP_COLUMNS = ("reference_nll", "token_weight")


def routed_batch(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a training forward.

    Packed documents are recognised by position ids that restart, which every padding-free collator provides. Its other
    attention arguments assume that every token of the batch is a query, so they are dropped. ``seq_idx`` is passed on:
    state-space layers use it to separate documents.

    Args:
        inputs: A batch of the Trainer, labels included.

    Raises:
        ValueError: If documents are packed without position ids.
    """
    hints = _PACKING_HINTS & inputs.keys()
    if hints and inputs.get("position_ids") is None:
        raise ValueError(
            f"the batch has {', '.join(sorted(hints))} but no position_ids; let the data collator return "
            "position_ids (which restart with every packed document)"
        )
    return {name: value for name, value in inputs.items() if name not in _ATTENTION_HINTS}


def evaluation_batch(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the model's own forward; the full loss uses no weights and no reference.

    Args:
        inputs: A batch of the Trainer.
    """
    return {name: value for name, value in inputs.items() if name not in STEP_COLUMNS}
