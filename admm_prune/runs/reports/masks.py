"""Where the weights that are left are: read from the safetensors files of a folder, a matrix at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from admm_prune.errors import UserError

Layer = Mapping[str, Any]  # of a manifest
TILES = 16


@dataclass(frozen=True)
class Tiles:
    """The share of weights that are left in tiles of one matrix.

    Attributes:
        share: (tiles down, tiles across), 0 to 1, at most 16 either way.
        height, width: of the stored matrix, as parts of the dense one: below 1 where rows or columns are gone.
    """

    share: np.ndarray[Any, Any]
    height: float
    width: float


class Weights:
    """The matrices of a saved model by the names of its layers, as (out, in)."""

    def __init__(self, folder: Path, layers: Iterable[Layer]) -> None:
        self._layers = {layer["name"]: layer for layer in layers}
        self._file: dict[str, Path] = {}
        self._transposed = False
        for path in sorted(folder.glob("*.safetensors")):
            with _opened(path) as file:
                for name in set(file.keys()) & set(self._layers):
                    self._file[name] = path
                    rows, columns = file.get_slice(name).get_shape()
                    dense = self._layers[name]["shape"]
                    # All of a model's matrices are stored alike; a square one does not tell how.
                    self._transposed |= [columns, rows] == dense != [rows, columns]

    def read(self, name: str) -> Tensor | None:
        """None where the files hold no such matrix, which may be under another name."""
        path = self._file.get(name)
        if path is None:
            return None
        with _opened(path) as file:
            stored: Tensor = file.get_tensor(name)
        return stored.T if self._transposed else stored

    def tiles(self, name: str) -> Tiles | None:
        weight = self.read(name)
        if weight is None:
            return None
        rows, columns = weight.shape
        left = [(band != 0).float().mean(0) for band in weight.tensor_split(min(TILES, rows))]
        share = torch.stack([torch.stack([c.mean() for c in band.tensor_split(min(TILES, columns))]) for band in left])
        dense = self._layers[name]["shape"]
        return Tiles(share.numpy(), rows / dense[0], columns / dense[1])


def overlap(a: Weights, b: Weights, names: Iterable[str]) -> dict[str, float]:
    """|A and B| / |A or B| of the supports, for every matrix that both hold in one shape; 1 where both are empty."""
    found = {}
    for name in names:
        first, second = a.read(name), b.read(name)
        if first is None or second is None or first.shape != second.shape:
            continue
        kept, other = first != 0, second != 0
        union = int((kept | other).sum())
        found[name] = int((kept & other).sum()) / union if union else 1.0
    return found


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
