"""The versions of other packages covered by the tests, and the verdict on those installed."""

import re
from typing import NamedTuple


class Range(NamedTuple):
    """Range of minor versions, inclusive.

    Attributes:
        oldest: The oldest tested version, which is the oldest supported one.
        newest: The newest tested version.
    """

    oldest: str
    newest: str


# A test compares the bounds with the packages' requirements and constraints.txt. CI's newest set, which installs the
# latest releases, shows when a newer version passes and should be added here.
TESTED = {
    "torch": Range("2.11", "2.14"),
    "transformers": Range("5.17", "5.24"),
    "trl": Range("1.16", "1.16"),
    "peft": Range("0.21", "0.21"),
    "accelerate": Range("1.15", "1.15"),
}


def verdict(package: str, version: str) -> str:
    """The verdict on a version of a package.

    Args:
        package: Name of the distribution.
        version: Its version.

    Returns:
        ``"tested"``; ``"older than ..."`` or ``"newer than ..."`` with the tested range; or an empty string for a
        package whose version does not matter here.

    Example:
        >>> verdict("transformers", "5.23.1")
        'tested'
        >>> verdict("transformers", "5.16.0")
        'older than the tested versions (5.17 to 5.24)'
        >>> verdict("rich", "15.0.0")
        ''
    """
    tested = TESTED.get(package)
    if tested is None:
        return ""
    span = tested.oldest if tested.oldest == tested.newest else f"{tested.oldest} to {tested.newest}"
    if _major_minor(version) < _major_minor(tested.oldest):
        return f"older than the tested versions ({span})"
    if _major_minor(version) > _major_minor(tested.newest):
        return f"newer than the tested versions ({span})"
    return "tested"


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
