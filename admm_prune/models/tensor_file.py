"""Safetensors files written one tensor at a time: no second copy of any, and the fingerprint comes with the bytes.

The library's own writer takes all tensors at once; here they may be brought in from elsewhere as they are written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Lazy(Mapping[str, Tensor]):
    """Tensors that are brought in when they are asked for."""

    def __init__(self, names: list[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes a safetensors file through to the disk.

    Args:
        tensors: asked for twice each, first for their shapes, then to be written.

    Returns:
        The file's sha256.

    Raises:
        OSError: it cannot be written.
    """
    shapes = {name: (tensor.dtype, tuple(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()}
    names = sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))  # so that every tensor is aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape, size = shapes[name]
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
        for name in names:
            data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
