"""The versions of other packages that the tests run on, and what to think of the ones that are installed."""

import re
from typing import NamedTuple


class Range(NamedTuple):
    """Minor versions, both ends included.

    Attributes:
        oldest: The oldest that is tested, which is the oldest that is supported.
        newest: The newest that the tests have run on.
    """

    oldest: str
    newest: str


# The ends are held to the requirements of the packages and to constraints.txt by a test; CI's newest set, which takes
# whatever was released last, says when a newer version has passed and belongs here.
TESTED = {
    "torch": Range("2.11", "2.14"),
    "transformers": Range("5.17", "5.24"),
    "trl": Range("1.16", "1.16"),
    "peft": Range("0.21", "0.21"),
    "accelerate": Range("1.15", "1.15"),
}


def verdict(package: str, version: str) -> str:
    """What is known of a version of a package.

    Args:
        package: Name of the distribution.
        version: Its version.

    Returns:
        ``"tested"``; ``"older than ..."`` or ``"newer than ..."`` with the tested range; or an empty string for a
        package whose versions make no difference here.

    Example:
        >>> verdict("transformers", "5.23.1")
        'tested'
        >>> verdict("transformers", "5.16.0")
        'older than what is tested (5.17 to 5.24)'
        >>> verdict("rich", "15.0.0")
        ''
    """
    tested = TESTED.get(package)
    if tested is None:
        return ""
    span = tested.oldest if tested.oldest == tested.newest else f"{tested.oldest} to {tested.newest}"
    if _major_minor(version) < _major_minor(tested.oldest):
        return f"older than what is tested ({span})"
    if _major_minor(version) > _major_minor(tested.newest):
        return f"newer than what is tested ({span})"
    return "tested"


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
