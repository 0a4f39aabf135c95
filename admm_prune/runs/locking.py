"""A lock on a folder that ends with the process that holds it, however that ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from admm_prune.errors import UserError


class FolderLock:
    """Held from its making to the end of the block; the kernel gives it back when the process dies.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = os.fstat(self._file).st_nlink == 0  # it was taken from under a run that just ended
        except BlockingIOError:
            gone = False
            holder = os.pread(self._file, 32, 0).decode(errors="replace").strip()
            os.close(self._file)
            raise UserError(
                f"another run is at work in {path.parent} (process {holder}): wait for it, or choose another output"
            ) from None
        if gone:
            os.close(self._file)
            raise UserError(f"another run has just ended in {path.parent}: try again")
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
