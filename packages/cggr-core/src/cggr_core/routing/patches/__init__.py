"""Every change to an object of transformers or torch, in one place, each with its scope in its docstring.

All of them nest and are always undone. Two models may run in two threads: changes to a model affect only that model,
and whatever models share is changed once, at import, by code that checks its calling context. A single model must not
run in two threads at a time.
"""

from cggr_core.routing.patches.attention import (
    MaskBuilder,
    attention_implementation,
    changed_mask_builders,
    documents_found_by,
    register_attention,
)
from cggr_core.routing.patches.checkpointing import (
    recomputes_with_torch,
    uses_checkpointing,
    without_checkpoint_wrappers,
    without_checkpointing,
    without_random_states,
)
from cggr_core.routing.patches.modules import (
    forward_replaced_by,
    left_gathered,
    own_parameters,
    replaced_forwards,
    replaced_parameters,
    without_hooks,
)
from cggr_core.routing.patches.trials import (
    attention_of_any_mask,
    evaluation_mode,
    grown_parameters,
    is_noise_rate,
    nothing_left,
    smaller_vocabulary,
    without_dropout,
)

__all__ = [
    "MaskBuilder",
    "attention_implementation",
    "attention_of_any_mask",
    "changed_mask_builders",
    "documents_found_by",
    "evaluation_mode",
    "forward_replaced_by",
    "grown_parameters",
    "is_noise_rate",
    "left_gathered",
    "nothing_left",
    "own_parameters",
    "recomputes_with_torch",
    "register_attention",
    "replaced_forwards",
    "replaced_parameters",
    "smaller_vocabulary",
    "uses_checkpointing",
    "without_checkpoint_wrappers",
    "without_checkpointing",
    "without_dropout",
    "without_hooks",
    "without_random_states",
]
