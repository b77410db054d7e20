"""Errors that a user can fix; the ``cggr`` command shows them without a traceback."""


class InputError(ValueError):
    """Invalid input; the message says what, where and what to do. Exit code 2."""


class RunError(RuntimeError):
    """A run failed although its input was valid. Exit code 1."""


class SaveError(RunError):
    """A checkpoint could not be written; earlier ones are unchanged."""


class DivergedError(RunError):
    """The loss is no longer finite; the last good checkpoint is unchanged."""
