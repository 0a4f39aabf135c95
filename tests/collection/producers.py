"""Small problems, and simple producers of solutions and certificates, for the tests of the checker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collection.checker import Array, Problem, cells, load_problems
from collection.files import write_problem

SETS: Mapping[str, Mapping[str, Any]] = {
    "row": {"kind": "row", "keep": 2},
    "rows": {"kind": "row", "keep": [1, 3]},
    "unstructured": {"kind": "unstructured", "keep": 4},
    "2of4": {"kind": "N:M", "keep": 1, "of": 2},
    "block": {"kind": "block", "height": 2, "width": 2, "keep": 1},
    "group": {"kind": "group", "width": 1, "keep": 2},
}


def hostile(seed: int, out: int, width: int, *, stack: bool = False) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """W (out, width) and H: correlated, badly scaled, close to singular, with zeros and dead inputs, by the seed."""
    draw = np.random.default_rng(seed)
    weight = draw.standard_normal((out, width)) * 10.0 ** draw.integers(-3, 4, (out, 1))
    weight *= draw.random((out, width)) > 0.1
    hessians = []
    for _ in range(out if stack else 1):
        tokens = int(draw.integers(1, 3 * width))
        inputs = draw.standard_normal((tokens, width)) @ draw.standard_normal((width, width))
        inputs += draw.integers(0, 20) * draw.standard_normal((tokens, 1))  # one strong common direction
        inputs *= 10.0 ** draw.integers(-2, 3, width) if draw.random() < 0.5 else 1.0
        if draw.random() < 0.3:
            inputs[:, 0] = 0
        gram = inputs.T @ inputs
        ridge = (0.0, 1e-6, 0.01, 0.1)[int(draw.integers(4))]
        hessians.append(gram + ridge * np.eye(width) * np.trace(gram) / width)
    hessian = np.stack(hessians) if stack else hessians[0]
    return weight.astype(np.float32), hessian.astype(np.float32)


def problem(folder: Path, seed: int, name: str, *, out: int = 2, width: int = 4, stack: bool = False) -> Problem:
    """A hostile problem with one of SETS, read from its file `problem.safetensors`."""
    write_problem(
        folder / "problem.safetensors", "tiny", *hostile(seed, out, width, stack=stack), {name: SETS[name]}, {}
    )
    return load_problems(folder / "problem.safetensors")[f"tiny/{name}"]


def multipliers(hessian: Array, draw: np.random.Generator) -> Array:
    """A diagonal that can be taken off H: a part of its least eigenvalue in Jacobi-scaled coordinates."""
    scale = np.sqrt(np.maximum(np.diagonal(hessian), 1e-30))
    least = max(0.0, float(np.linalg.eigvalsh(hessian / scale / scale[:, None])[0]))
    uneven = 1 if draw.random() < 0.5 else draw.random(len(scale))
    return draw.choice((1.0, 1 - 1e-7, 0.9)) * least * scale**2 * uneven


def refit(problem: Problem, mask: NDArray[np.bool_]) -> Array:
    """Least squares on the support of every row."""
    weight = np.zeros_like(problem.weight)
    for i, (kept, w) in enumerate(zip(mask, problem.weight, strict=True)):
        h = problem.hessian_of(i)
        inside, outside = np.flatnonzero(kept), np.flatnonzero(~kept)
        weight[i, inside] = w[inside]
        if len(inside):
            weight[i, inside] += np.linalg.pinv(h[np.ix_(inside, inside)]) @ h[np.ix_(inside, outside)] @ w[outside]
    return weight


def solution(problem: Problem) -> Array:
    """The largest |w_j| sqrt(H_jj) within the budgets, with least squares; in the set, and close to the optimum."""
    mask = np.zeros(problem.weight.shape, dtype=bool)
    for _ in range(mask.size):
        best, place = -1.0, None
        for i, j in np.argwhere(~mask):
            trial = mask.copy()
            trial[i, j] = True
            table, keep = cells(trial.astype(float), problem.set)
            score = abs(problem.weight[i, j]) * np.sqrt(problem.hessian_of(i)[j, j])
            if ((table > 0).sum(axis=1) <= keep).all() and score > best:
                best, place = score, (i, j)
        if place is None:
            break
        mask[place] = True
    return refit(problem, mask)


def dual(problem: Problem, draw: np.random.Generator) -> dict[str, NDArray[Any]]:
    """A dual certificate: multipliers of the least eigenvalue, and a shift towards a good sparse point."""
    out, _ = problem.weight.shape
    count = out if problem.is_stack else 1
    shift = (solution(problem) - problem.weight) * draw.choice((0.0, 0.3, 0.7, 1.0))
    return {
        "diagonal": np.stack([multipliers(problem.hessian_of(i), draw) for i in range(count)]),
        "diagonal_of_row": np.arange(out, dtype=np.int32) if problem.is_stack else np.zeros(out, dtype=np.int32),
        "shift": shift.astype(draw.choice((np.float32, np.float64))),
    }


def block(problem: Problem, draw: np.random.Generator) -> dict[str, NDArray[Any]]:
    """A block certificate: a part of the blocks of H on the diagonal, and a shift towards a good sparse point."""
    width = problem.weight.shape[1]
    group = problem.set.get("of", problem.set.get("width", 1))
    size = int(draw.choice([size for size in (1, 2, 4) if size % group == 0 and width % size == 0]))
    groups = draw.permutation(np.arange(width).reshape(-1, group))
    columns = groups.reshape(-1, size)
    hessian = problem.hessian
    within = np.zeros_like(hessian)
    within[columns[:, :, None], columns[:, None, :]] = hessian[columns[:, :, None], columns[:, None, :]]
    try:
        root = np.linalg.cholesky(within)
        scaled = np.linalg.solve(root, np.linalg.solve(root, hessian).T)
        least = float(np.linalg.eigvalsh((scaled + scaled.T) / 2)[0])
    except np.linalg.LinAlgError:
        least = 0.0
    part = draw.choice((1.0, 1 - 1e-7, 0.9)) * max(0.0, least)
    blocks = (part * within)[columns[:, :, None], columns[:, None, :]]
    shift = (solution(problem) - problem.weight) * draw.choice((0.0, 0.3, 0.7, 1.0))
    return {"columns": columns.astype(np.int32), "blocks": blocks, "shift": shift.astype(np.float64)}


def tree(problem: Problem, draw: np.random.Generator, depth: int = 3) -> dict[str, NDArray[Any]]:
    """A tree certificate: splits on random entries down to a depth, and least squares where a leaf decides all."""
    out, width = problem.weight.shape
    keep = np.broadcast_to(np.asarray(problem.set["keep"]), (out,))
    leaves: list[NDArray[np.int8]] = []
    row_of: list[int] = []
    shifts: list[Array] = []

    def grow(row: int, signs: NDArray[np.int8], left: int) -> None:
        if (signs > 0).sum() > keep[row] or (signs < 0).sum() > width - keep[row]:
            return
        if left == 0 or (signs != 0).all():
            order = np.argsort(-np.abs(problem.weight[row]) - 1e9 * signs, kind="stable")
            mask = np.zeros((out, width), dtype=bool)
            mask[row, order[: keep[row]]] = True
            leaves.append(signs)
            row_of.append(row)
            shifts.append((refit(problem, mask) - problem.weight)[row] * (1.0 if (signs != 0).all() else 0.7))
            return
        entry = draw.choice(np.flatnonzero(signs == 0))
        for sign in (1, -1):
            child = signs.copy()
            child[entry] = sign
            grow(row, child, left - 1)

    for row in range(out):
        grow(row, np.zeros(width, dtype=np.int8), depth)
    return {
        "leaves": np.stack(leaves),
        "row_of_leaf": np.array(row_of, dtype=np.int32),
        "diagonal": np.stack([multipliers(problem.hessian_of(i), draw) for i in range(out)]),
        "diagonal_of_leaf": np.array(row_of, dtype=np.int32),
        "shift": np.stack(shifts),
    }
