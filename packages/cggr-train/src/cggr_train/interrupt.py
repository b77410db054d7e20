"""Stops cleanly on the first Ctrl-C and immediately on the second."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)
"""Sent when the terminal closes; Windows lacks it."""
SIGNALS = tuple(number for number in (signal.SIGINT, signal.SIGTERM, HANGUP) if number is not None)
SHOW_CURSOR = b"\x1b[?25h"


class StopRequest:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a request that the training loop reads between two steps.

    ``torchrun`` forwards a Ctrl-C as SIGTERM to processes that already got it from the terminal. If a launcher started
    this process (``launched``), a SIGTERM therefore never counts as a second request.

    After the first signal the default handlers are restored, so a second one ends the process immediately, even inside
    a long tensor operation. Checkpoints are renamed into place when complete, so nothing saved is lost. Outside the
    main thread, where Python allows no handlers, signals are unchanged.

    A closed terminal sends SIGHUP more than once, so a second one does not end the process, and under ``nohup`` the
    first is ignored too. ``on_hangup`` is called with it, since output has nowhere to go any more.

    Example:
        >>> with StopRequest() as stop:
        ...     stop.requested
        False
    """

    def __init__(
        self, *, launched: bool = False, quiet: bool = False, on_hangup: Callable[[], None] = lambda: None
    ) -> None:
        self._launched, self._quiet, self._on_hangup = launched, quiet, on_hangup
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal was received."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """The exit status for this signal by shell convention: 129 for SIGHUP, 130 for SIGINT, 143 for SIGTERM."""
        return 128 + (self.received or 0)

    def __enter__(self) -> StopRequest:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number == HANGUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the former handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        for known in self._previous:
            ignored = known == HANGUP or (self._launched and known == signal.SIGTERM)
            signal.signal(known, signal.SIG_IGN if ignored else signal.SIG_DFL)
        if number == HANGUP:
            self._on_hangup()
        if self._quiet or number == HANGUP:
            return
        # os.write, since a handler may interrupt a print; it restores the cursor, since a second signal gives the
        # progress display no chance to
        cursor = SHOW_CURSOR if sys.stderr.isatty() else b""
        with contextlib.suppress(OSError):  # the reader is gone
            os.write(2, b"\nstopping after this step and saving; press Ctrl-C again to stop at once\n" + cursor)
