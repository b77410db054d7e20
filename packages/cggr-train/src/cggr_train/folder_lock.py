"""Locks the folder of a run or a study, so that only one process writes to it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from cggr_train.errors import InputError

if TYPE_CHECKING:
    from filelock import BaseFileLock

FILE_NAME = ".lock"


class FolderLock:
    """Holds a folder from :meth:`take` to the end of the ``with`` block.

    The operating system releases the lock when the process ends for any reason, so a kill leaves nothing to clean up.
    The lock file stays; a folder that was created for the lock and is still empty at the end is removed.

    Args:
        folder: The folder; made by :meth:`take` if missing.

    Example:
        >>> import pathlib, tempfile
        >>> with FolderLock(pathlib.Path(tempfile.mkdtemp(), "run")) as lock:
        ...     lock.take()
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: list[Path] = []
        self._lock: BaseFileLock | None = None

    def __enter__(self) -> FolderLock:
        """Return the lock, not taken yet."""
        return self

    def take(self) -> None:
        """Take the folder.

        Raises:
            InputError: If it cannot be made or written, or another process holds it.
        """
        from filelock import FileLock, Timeout

        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / FILE_NAME, timeout=0)
            lock.acquire()
        except Timeout as error:
            raise InputError(
                f"another process is writing to {self.folder}; wait until it ends, or give another --out"
            ) from error
        except OSError as error:
            self._remove_folders()
            raise InputError(f"the folder {self.folder} cannot be written: {error.strerror or error}") from error
        self._lock = lock

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the folder."""
        if self._lock is None:
            return
        if self._made and [path.name for path in self.folder.iterdir()] == [FILE_NAME]:
            (self.folder / FILE_NAME).unlink()
        self._lock.release()
        self._remove_folders()

    def _remove_folders(self) -> None:
        with contextlib.suppress(OSError):  # not empty, so it is in use
            for path in self._made:
                path.rmdir()
