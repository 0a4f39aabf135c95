"""The sets of the collection as constraints of the package."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from admm_prune.problems.constraints import Blocks, Groups, NofM, RowWise, SparseSet, StackedRows, Unstructured


def constraint_of(given: Mapping[str, Any], shape: tuple[int, int]) -> SparseSet:
    """The sparse set of matrices of a shape, with the counts of a problem's `set`."""
    match given["kind"]:
        case "row" if isinstance(given["keep"], list):
            return StackedRows(tuple((1, RowWise(0.5, keep)) for keep in given["keep"]))
        case "row":
            return RowWise(1 - given["keep"] / shape[1], given["keep"])
        case "unstructured":
            return Unstructured(1 - given["keep"] / math.prod(shape), given["keep"])
        case "N:M":
            return NofM(given["keep"], given["of"])
        case "block":
            tiles = math.prod(shape) // (given["height"] * given["width"])
            return Blocks(1 - given["keep"] / tiles, given["height"], given["width"], given["keep"])
        case _:
            groups = shape[1] // given["width"]
            return Groups(1 - given["keep"] / groups, given["width"], given["keep"])
