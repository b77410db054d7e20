"""How many slots hold the kept tokens of a row: numbers of which few repeat, so that shapes do."""

import math

__all__ = ["slots_for", "slots_in_buckets", "slots_in_steps"]


def slots_for(ratio: float, length: int) -> int:
    """Slots that hold ``ratio`` of ``length`` tokens: the ceiling, at least 1 where there is a token.

    Example:
        >>> slots_for(0.25, 10)
        3
    """
    # 0.07 * 100 is 7.000000000000001: the small step back keeps the ceiling at 7.
    return max(min(1, length), min(length, math.ceil(ratio * length - 1e-9)))


def slots_in_steps(count: int, length: int) -> int:
    """Slots for ``count`` tokens of ``length``, rounded up so that shapes repeat.

    To multiples of 8 up to 128, of 16 up to 256, of 32 up to 512, and of 64 from there on: by an eighth, or 8.

    Example:
        >>> slots_in_steps(5, 1000), slots_in_steps(200, 1000), slots_in_steps(200, 204)
        (8, 208, 204)
    """
    step = min(64, max(8, 2 ** (count.bit_length() - 4)))
    return min(length, -(-count // step) * step)


def slots_in_buckets(count: int, length: int) -> int:
    """Slots for ``count`` tokens of ``length`` in few shapes: rounded up by at most a quarter, or 16.

    To multiples of 16 up to 128, of 32 up to 256, of 64 up to 512, and so on.

    Example:
        >>> slots_in_buckets(5, 1000), slots_in_buckets(200, 1000), slots_in_buckets(200, 204)
        (16, 224, 204)
    """
    step = max(16, 2 ** (count.bit_length() - 3))
    return min(length, -(-count // step) * step)
