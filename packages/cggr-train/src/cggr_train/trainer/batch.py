"""What a data collator made, as CGGRModel takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What padding-free collators say about packed documents besides position_ids, for one kind of attention each.
_ATTENTION_HINTS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})
# State-space layers know documents by nothing else.
_PACKING_HINTS = _ATTENTION_HINTS | {"seq_idx"}


# What a training forward takes besides the model's own arguments.
STEP_COLUMNS = ("reference_nll", "token_weight")


def routed_batch(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a training forward.

    Packed documents are told apart by position ids that start anew, which every padding-free collator gives; what it
    gives besides for attention is about all tokens of the batch as queries, and left out. ``seq_idx`` is passed on:
    layers that keep a state instead of keys and values are told documents apart by it.

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
    """The arguments of the model's own forward: the full loss knows no weights and no reference.

    Args:
        inputs: A batch of the Trainer.
    """
    return {name: value for name, value in inputs.items() if name not in STEP_COLUMNS}
