"""Activations between blocks: on the host, and past a limit in files that are mapped into memory when they are read."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor


class Shelf:
    """Keeps tensors by name outside of the device.

    A tensor that would take what is held in memory past the limit goes into a file. Reading it maps the file, so that
    pages come in as they are used and go when the tensor is dropped; what is written to it then stays in memory.

    Args:
        limit: bytes held in memory; None for no limit.
        folder: where the files go, in a folder of their own that ends with the shelf; None for the system's place for
            temporary files.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self._limit, self._folder = limit, folder
        self._held: dict[str, Tensor] = {}
        self._filed: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._files: tempfile.TemporaryDirectory[str] | None = None

    def put(self, name: str, tensor: Tensor) -> None:
        """Keeps a tensor in place of what had its name.

        Raises:
            OSError: the file cannot be written.
        """
        self._held.pop(name, None)
        kept = tensor.detach().cpu()
        if self._limit is None or self.held_bytes + kept.nbytes <= self._limit:
            self._held[name] = kept
            return
        # Written, not mapped: a full disk is then an error, where a mapped page would end the process.
        with self._path(name).open("wb") as file:
            kept.contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)
        self._filed[name] = (kept.shape, kept.dtype)

    def get(self, name: str) -> Tensor:
        """The tensor, on the host."""
        if name in self._held:
            return self._held[name]
        shape, dtype = self._filed[name]
        stored = torch.from_file(str(self._path(name)), shared=False, size=shape.numel(), dtype=dtype)
        return stored.view(shape)

    @property
    def held_bytes(self) -> int:
        """Bytes in memory."""
        return sum(tensor.nbytes for tensor in self._held.values())

    def _path(self, name: str) -> Path:
        if self._files is None:
            self._files = tempfile.TemporaryDirectory(prefix="activations-", dir=self._folder)
        return Path(self._files.name) / name.replace("/", "-")
