"""The errors that a user can do something about; the ``cggr`` command shows them without a traceback."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where and what to do. Exit code 2."""


class RunError(RuntimeError):
    """A run could not go on, through no fault of what was given. Exit code 1."""


class SaveError(RunError):
    """A checkpoint could not be written; what was there before is untouched."""


class DivergedError(RunError):
    """The loss is no longer a finite number; the last good checkpoint is untouched."""
