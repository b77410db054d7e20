"""Any loss on routed gradients: log-probabilities, entropies and hidden states of the tokens that a loss uses."""

from cggr_core.logprobs.keeping import keep_nonzero, keep_random, keep_tokens, keep_top_entropy
from cggr_core.logprobs.linear import linear_logprobs
from cggr_core.logprobs.results import RoutedHidden, TokenLogprobs
from cggr_core.logprobs.routed import routed_hidden, routed_logprobs
from cggr_core.logprobs.shared_context import SharedContext, SharedRun

__all__ = [
    "RoutedHidden",
    "SharedContext",
    "SharedRun",
    "TokenLogprobs",
    "keep_nonzero",
    "keep_random",
    "keep_tokens",
    "keep_top_entropy",
    "linear_logprobs",
    "routed_hidden",
    "routed_logprobs",
]
