"""Safetensors files written one tensor at a time, and packed files: a bit mask and the nonzero values of each weight.

The library's own writer takes all tensors at once; this one copies none, and computes the fingerprint while writing. A
packed file carries the header of the file that it was made of, so that unpacking restores that file exactly.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from admm_prune.errors import UserError
from admm_prune.ops import bits

DTYPE_NAMES = {
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
PACK_MANIFEST = "admm_prune_pack.json"
PACKED = ".packed"  # suffix of a packed file, so that no loader mistakes it for the weights
BITS, VALUES = ".bits", ".values"  # suffixes of the parts of a packed tensor
_HEADER = "header"
_LENGTH = struct.Struct("<Q")  # safetensors: the length of the header, the header as JSON, then the data
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Lazy(Mapping[str, Tensor]):
    """Tensors that are loaded on access."""

    def __init__(self, names: list[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes a safetensors file and synchronizes it to disk.

    Args:
        tensors: each is accessed twice, first for its shape, then to be written.

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
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": (end, end + size)}
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


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file, as its header has it; `start` and `stop` count from the end of the header."""

    name: str
    dtype: str
    shape: list[int]
    start: int
    stop: int

    @property
    def count(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return (self.stop - self.start) // max(1, self.count)

    def packed_bytes(self, nonzeros: int) -> int:
        """Bytes of its bits and values."""
        return nonzeros * self.itemsize + bits.packed_width(self.count)


def read_header(path: Path) -> tuple[bytes, list[Entry]]:
    """The exact header of a safetensors file, and its tensors in the order of their data.

    Raises:
        UserError: it is not a safetensors file, or truncated.
    """
    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:  # safe_open checks offsets and length
            header = file.read(_LENGTH.unpack(file.read(_LENGTH.size))[0])
    except (SafetensorError, OSError, struct.error) as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error
    return header, _entries(header)


def pack_file(source: Path, out: Path) -> list[str]:
    """Writes a safetensors file without its zeros, one tensor in memory; a tensor that would not shrink is stored
    unchanged.

    Only entries with all bits zero are left out: -0.0 is stored as a value.

    Returns:
        The names of the tensors that were packed.

    Raises:
        UserError: `source` is not a safetensors file, or packed already.
    """
    header, entries = read_header(source)
    if _HEADER in json.loads(header).get("__metadata__", {}):
        raise UserError(f"{source} is packed already")
    names = {entry.name for entry in entries}
    with safe_open(source, framework="pt") as file:
        nonzeros = {entry.name: int(_integers(file.get_tensor(entry.name)).count_nonzero()) for entry in entries}
        packed = [
            entry
            for entry in entries
            if entry.packed_bytes(nonzeros[entry.name]) < entry.stop - entry.start
            and names.isdisjoint({entry.name + BITS, entry.name + VALUES})
        ]
        parts: list[tuple[str, str, list[int], int, Entry]] = []
        for entry in entries:
            if entry in packed:
                width, count = bits.packed_width(entry.count), nonzeros[entry.name]
                parts.append((entry.name + VALUES, entry.dtype, [count], count * entry.itemsize, entry))
                parts.append((entry.name + BITS, "U8", [width], width, entry))
            else:
                parts.append((entry.name, entry.dtype, entry.shape, entry.stop - entry.start, entry))
        parts.sort(key=lambda part: -part[4].itemsize if not part[0].endswith(BITS) else -1)  # data stay aligned
        content: dict[str, Any] = {"__metadata__": {"admm_prune": "1", _HEADER: header.decode("utf-8")}}
        end = 0
        for name, dtype, shape, length, _ in parts:
            content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + length]}
            end += length
        with out.open("wb") as target:
            text = json.dumps(content).encode("utf-8")
            text += b" " * (-len(text) % _LENGTH.size)
            target.write(_LENGTH.pack(len(text)) + text)
            for name, _, _, _, entry in parts:
                flat = _integers(file.get_tensor(entry.name))
                if entry in packed:
                    flat = bits.pack(flat != 0) if name.endswith(BITS) else flat[flat != 0]
                _write(target, flat)
    return [entry.name for entry in packed]


def unpack_file(source: Path, out: Path) -> None:
    """The exact inverse of `pack_file`, with one tensor in memory.

    Raises:
        UserError: `source` is not a packed file, or its bits and values do not belong together.
    """
    packed_header, _ = read_header(source)
    metadata = json.loads(packed_header).get("__metadata__", {})
    if _HEADER not in metadata:
        raise UserError(f"{source} is not packed")
    header = metadata[_HEADER].encode("utf-8")
    with safe_open(source, framework="pt") as file, out.open("wb") as target:
        names = set(file.keys())
        target.write(_LENGTH.pack(len(header)) + header)
        for entry in _entries(header):
            if entry.name in names:
                _write(target, _integers(file.get_tensor(entry.name)))
                continue
            if not {entry.name + BITS, entry.name + VALUES} <= names:
                raise UserError(f"{source} lacks the tensor {entry.name}: it is damaged")
            mask = bits.unpack(file.get_tensor(entry.name + BITS), entry.count)
            values = _integers(file.get_tensor(entry.name + VALUES))
            if int(mask.count_nonzero()) != len(values):
                raise UserError(f"{source}: the bits and the values of {entry.name} do not belong together")
            _write(target, torch.zeros(entry.count, dtype=values.dtype).masked_scatter_(mask, values))


def unpacked_entries(source: Path) -> list[Entry]:
    """The tensors of the file that a packed file was made of.

    Raises:
        UserError: `source` is not a packed file.
    """
    metadata = json.loads(read_header(source)[0]).get("__metadata__", {})
    if _HEADER not in metadata:
        raise UserError(f"{source} is not packed")
    return _entries(metadata[_HEADER].encode("utf-8"))


def _entries(header: bytes) -> list[Entry]:
    content = json.loads(header)
    entries = [
        Entry(name, tensor["dtype"], tensor["shape"], *tensor["data_offsets"])
        for name, tensor in content.items()
        if name != "__metadata__"
    ]
    return sorted(entries, key=lambda entry: (entry.start, entry.stop))


def _integers(tensor: Tensor) -> Tensor:
    """The bit patterns of a tensor (n,), as integers of the size of its entries."""
    return tensor.contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])


def _write(target: IO[bytes], flat: Tensor) -> None:
    for chunk in flat.split(1 << 24):
        target.write(chunk.contiguous().view(torch.uint8).numpy().data)
