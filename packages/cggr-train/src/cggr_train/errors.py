"""The error that a user can repair: bad files, bad options, a full disk."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where and what to do.

    The ``cggr`` command prints the message without a traceback and ends with exit code 2.
    """


class SaveError(RuntimeError):
    """A checkpoint could not be written; what was there before is untouched.

    The ``cggr`` command prints the message without a traceback and ends with exit code 1.
    """


class DivergedError(RuntimeError):
    """The loss is no longer a finite number; the last good checkpoint is untouched.

    The ``cggr`` command prints the message without a traceback and ends with exit code 1.
    """
