"""Writes the three kinds of files that `checker` reads: problems, solutions and certificates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from collection import checker
from collection.checker import Array, Bound, Problem, Value


def write_problem(
    path: Path,
    layer: str,
    weight: NDArray[np.float32],
    hessian: NDArray[np.float32],
    sets: Mapping[str, Mapping[str, Any]],
    metadata: Mapping[str, str],
) -> None:
    """Writes a layer with its sparse sets.

    Args:
        weight: W (out, in).
        hessian: H (in, in), or (out, in, in) for a stack of rows; the upper triangle is stored.
        sets: by name; the problems have the ids '<layer>/<name>'.
        metadata: origin and protocol.
    """
    upper = np.triu_indices(weight.shape[1])
    fits = hessian.shape[-2:] == (weight.shape[1],) * 2 and np.array_equal(hessian, np.swapaxes(hessian, -1, -2))
    packed = {"hessian_upper": hessian[..., upper[0], upper[1]]} if fits else {"hessian": hessian}
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in {"weight": weight, **packed}.items()}
    stated = {**metadata, "id": layer, "sets": json.dumps(sets, sort_keys=True)}
    _write(path, tensors, {"format": checker.FORMATS["problem"], **stated})


def write_solution(path: Path, problem: Problem, weight: Array, metadata: Mapping[str, str]) -> Value:
    """Writes V as the bits of its mask and its non-zero values in float32, with the objective of what is stored.

    Args:
        metadata: solver, settings, seconds, date.
    """
    rounded = weight.astype(np.float32)
    reached = checker.value(problem, rounded.astype(np.float64))
    mask = rounded.ravel() != 0
    values = rounded.ravel()[mask]
    # Tensors must not be empty.
    tensors = {"mask": np.packbits(mask), "values": values} if len(values) else {"weight": rounded}
    stated = {**metadata, "value": checker.safe_claim(reached.upper, "value")}
    _write(path, tensors, {**_names(problem), **stated, "format": checker.FORMATS["solution"]})
    return reached


def write_certificate(
    path: Path, problem: Problem, kind: str, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]
) -> Bound:
    """Writes the data of a certificate, with the bound that they prove.

    Args:
        kind: "dual", "tree" or "block"; `checker.dual_bound`, `tree_bound` and `block_bound` describe the tensors.
        metadata: solver, settings, seconds, date.

    Raises:
        CheckError: the data prove nothing; no file is written.
    """
    content = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    proved = checker.bound_of(problem, kind, content, path)
    claim = {"bound": checker.safe_claim(proved.value, "bound")}
    _write(
        path, content, {**metadata, **_names(problem), **claim, "kind": kind, "format": checker.FORMATS["certificate"]}
    )
    return proved


def _names(problem: Problem) -> dict[str, str]:
    return {"id": problem.id, "problem": problem.fingerprint}


def _write(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Writes a file atomically, so that an interrupted run leaves no partial file."""
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), temporary, dict(metadata))
    temporary.replace(path)
