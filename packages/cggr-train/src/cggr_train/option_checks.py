"""Checks of option values, before anything is read or written; every message names the option."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from cggr_train.errors import InputError

if TYPE_CHECKING:
    from cggr_train.learner import Routing

LARGEST_SEED = 2**63 - 1
"""The largest seed that torch's generators accept."""


def check_number(option: str, value: float, *, least: float | None = None, above: float | None = None) -> None:
    """Refuse a number that is not finite or too small.

    Args:
        option: Name of the option.
        value: The value given.
        least: Smallest number that is accepted.
        above: Exclusive lower bound.

    Raises:
        InputError: If it is not accepted.

    Example:
        >>> check_number("--clip", 1.0, least=0)
    """
    if not math.isfinite(value):
        raise InputError(f"{option} must be a finite number, got {value}")
    if least is not None and value < least:
        raise InputError(f"{option} must be at least {least:g}, got {value}")
    if above is not None and value <= above:
        wanted = "positive" if above == 0 else f"above {above:g}"
        raise InputError(f"{option} must be {wanted}, got {value}")


def check_seed(value: int) -> None:
    """Refuse a seed that generators do not accept.

    Raises:
        InputError: If it is not accepted.
    """
    if not 0 <= value <= LARGEST_SEED:
        raise InputError(f"--seed must be from 0 to {LARGEST_SEED}, got {value}")


def check_routing(routing: Routing, *, labelled: bool = False) -> None:
    """Refuse routing settings that are invalid for every model.

    Settings that depend on the model or on each other are checked when the model is wrapped.

    Args:
        routing: The settings.
        labelled: Whether only some tokens of the text are supervised.

    Raises:
        InputError: With the nearest name, if one is close.

    Example:
        >>> from cggr_train.learner import Routing
        >>> check_routing(Routing(selection="stratifed"))
        Traceback (most recent call last):
        cggr_train.errors.InputError: --selection must be one of ... got 'stratifed'; did you mean 'stratified'?
    """
    from cggr_core.checks import check_choice, check_ratio
    from cggr_core.settings import (
        GRADIENT_MODES,
        KEY_VALUE_MODES,
        MODEL_SELECTIONS,
        ROUTERS,
        SCORINGS,
        SELECTIONS,
        check_context_precision,
    )

    if routing.scoring == "excess":
        raise InputError(
            "--scoring excess needs a reference model, which the command does not support in training; give another "
            "score (cggr inspect --reference shows this one)"
        )
    if routing.selection == "supervised" and not labelled:
        raise InputError(
            "--selection supervised keeps the tokens with a label, but in plain text every token has one; give another "
            "selection, or name the key of the answers with --answer"
        )
    try:
        check_choice("--gradient", routing.gradient, GRADIENT_MODES)
        check_choice("--selection", routing.selection, MODEL_SELECTIONS if labelled else SELECTIONS)
        check_choice("--scoring", routing.scoring, [name for name in SCORINGS if name != "excess"])
        if routing.router is not None:
            check_choice("--router", routing.router, ROUTERS)
        check_ratio("--ratio", routing.ratio)
        check_context_precision(routing.context_precision, "--gradient", routing.gradient)
    except ValueError as error:
        raise InputError(str(error)) from error
    if routing.router_depth is not None:
        check_number("--router-depth", routing.router_depth, least=1)
    check_number("--ratio-warmup-steps", routing.ratio_warmup_steps, least=0)
    check_number("--context-margin", routing.context_margin, least=0)
    if routing.context_margin and (routing.selection != "supervised" or routing.gradient not in KEY_VALUE_MODES):
        raise InputError(
            f"--context-margin {routing.context_margin} requires --selection supervised and --gradient kv or detached, "
            f"but they are {routing.selection} and {routing.gradient}; leave it out"
        )


UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(option: str, text: str) -> int:
    """A number of bytes with its unit.

    Raises:
        InputError: If it is not.

    Example:
        >>> parse_bytes("--memory-limit", "1.5GB"), parse_bytes("--memory-limit", "2 GiB")
        (1500000000, 2147483648)
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    if found is not None and found[2].upper() in UNITS and found[1].count(".") <= 1 and found[1] != ".":
        number = float(found[1]) * UNITS[found[2].upper()]
        if number >= 1:
            return round(number)
    raise InputError(f"{option} must be bytes with a unit, such as 24GB or 24GiB, got {text!r}")
