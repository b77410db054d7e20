"""Scores: one number per token, made from its statistics."""

import math

from torch import Tensor

from cggr_core.checks import check_choice, check_float, check_same_device, check_shape
from cggr_core.difficulty import NEED_TARGETS
from cggr_core.settings import SCORINGS
from cggr_core.statistics import TokenStatistics

__all__ = ["fields_for", "score"]

_FIELDS_OF = {
    "entropy": ("entropy",),
    "margin": ("margin",),
    "loss": ("nll",),
    "combined": ("entropy", "margin", "nll"),
    "gradnorm": ("gradnorm",),
    "excess": ("nll",),
}


def fields_for(scoring: str, has_targets: bool = True) -> frozenset[str]:
    """The statistics that a scoring needs.

    Args:
        scoring: One of :data:`~cggr_core.settings.SCORINGS`.
        has_targets: Whether targets are available; without them ``combined`` omits the nll.

    Returns:
        Field names of :class:`TokenStatistics`.

    Raises:
        ValueError: If the scoring is unknown, or needs targets and there are none.

    Example:
        >>> sorted(fields_for("combined", has_targets=False))
        ['entropy', 'margin']
    """
    fields = frozenset(_FIELDS_OF[check_choice("scoring", scoring, SCORINGS)])
    if has_targets:
        return fields
    if scoring == "combined":
        return fields - NEED_TARGETS
    if fields & NEED_TARGETS:
        raise ValueError(
            f"scoring={scoring!r} needs targets, but none were given; pass targets, or use 'entropy', 'margin' or "
            "'combined', which do not need them"
        )
    return fields


def score(statistics: TokenStatistics, *, scoring: str, reference_nll: Tensor | None = None) -> Tensor:
    """Compute one number per token; higher means more worth learning from.

    ========== ===========================================================================
    scoring    score
    ========== ===========================================================================
    entropy    entropy
    margin     1 - margin
    loss       nll
    combined   entropy / ln V + (1 - margin) + nll / ln V (without targets the first two)
    gradnorm   gradnorm, the best of these for weighted sampling
    excess     nll - reference_nll (Mindermann et al. 2022; Lin et al. 2024, *Rho-1*)
    ========== ===========================================================================

    Args:
        statistics: From :func:`token_statistics`, with the fields of :func:`fields_for`.
        scoring: One of :data:`~cggr_core.settings.SCORINGS`.
        reference_nll: For ``excess``: a reference model's nll of each token, in nats, shape of the statistics.

    Returns:
        float32, shape of the statistics; meaningless at ignored positions.

    Raises:
        ValueError: If the scoring is unknown or a statistic or ``reference_nll`` that it needs is missing.

    Example:
        >>> import torch
        >>> from cggr_core import token_statistics
        >>> statistics = token_statistics(torch.tensor([[4.0, 0.0], [1.0, 0.0]]))
        >>> bool(score(statistics, scoring="entropy").diff() > 0)
        True
    """
    check_choice("scoring", scoring, SCORINGS)
    if reference_nll is not None and scoring != "excess":
        raise ValueError(f"reference_nll is used only by scoring='excess', got scoring={scoring!r}")

    def field(name: str) -> Tensor:
        value: Tensor | None = getattr(statistics, name)
        if value is None:
            raise ValueError(
                f"scoring={scoring!r} needs the statistic {name!r}, which was not computed; pass "
                f"fields=fields_for({scoring!r}) (or None) and targets to token_statistics"
            )
        return value

    log_v = math.log(max(2, statistics.vocab_size))
    if scoring == "entropy":
        result = field("entropy")
    elif scoring == "margin":
        result = 1.0 - field("margin")
    elif scoring == "loss":
        result = field("nll")
    elif scoring == "combined":
        result = field("entropy") / log_v + (1.0 - field("margin"))
        if statistics.nll is not None:
            result = result + statistics.nll / log_v
    elif scoring == "gradnorm":
        result = field("gradnorm")
    else:
        nll = field("nll")
        if reference_nll is None:
            raise ValueError("scoring='excess' needs reference_nll: a reference model's nll of each token, in nats")
        check_float("reference_nll", reference_nll)
        check_shape("reference_nll", reference_nll, nll.shape, "one per token")
        check_same_device("reference_nll", reference_nll, "statistics", nll)
        result = nll - reference_nll.detach()
    return result.float()
