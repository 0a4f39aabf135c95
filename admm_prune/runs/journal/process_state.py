"""State of one process: a lock on a folder, which ends with it, and its random generators, as JSON values."""

from __future__ import annotations

import base64
import fcntl
import os
import random
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from admm_prune.errors import UserError


class FolderLock:
    """Held from its creation to the end of the block; the kernel releases it when the process dies.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = os.fstat(self._file).st_nlink == 0  # it was deleted by a run that just ended
        except BlockingIOError:
            gone = False
            holder = os.pread(self._file, 32, 0).decode(errors="replace").strip()
            os.close(self._file)
            raise UserError(
                f"another run is active in {path.parent} (process {holder}): wait for it, or choose another output"
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


def random_state() -> dict[str, Any]:
    """The state of torch's generators, on the CPU and on every CUDA device in use, of Python's and of numpy's."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002  # the global one
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": _text(torch.get_rng_state()),
        "cuda": [_text(state) for state in cuda],
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Restores all generators to a `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"]:
        torch.cuda.set_rng_state_all([_tensor(text) for text in state["cuda"]])


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
