"""The lower bounds of the exact references compared with the optimum in 80 digits, over random ill-posed problems.

    python -m benchmarks.exact_bounds --count 20000

Prints, for every source of bounds, how many bounds it gave, how many of them exceed the optimum (0 is correct), and
their ratio to the optimum, which reveals bounds that are trivially small. The exit status is 1 if a bound exceeds the
optimum.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

import mpmath
import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problems.constraints import Blocks, Groups, NofM, RowWise, SparseSet, StackedRows, Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers.reference import (
    BranchAndBound,
    BruteForce,
    BruteForceGroups,
    dual_bound,
    lower_bound,
    perspective_bound,
)

DIGITS = 80
_LEVELS = (0.0, 0.1, 0.5, 0.9, 0.99, 0.999999, 1.0)

Matrix = list[list[Any]]  # of mpf
Number = Any  # mpf, which has no types


@dataclass(frozen=True)
class Case:
    """A problem, and what it is made of."""

    problem: LayerReconstruction
    label: str


def cases(seed: int, count: int) -> Iterator[Case]:
    """Random problems; numbers that are refused at the start are drawn again."""
    number = 0
    while count:
        draw = np.random.default_rng((seed, number))
        number += 1
        try:
            yield drawn(draw)
        except ValueError:
            continue
        count -= 1


def drawn(draw: Generator) -> Case:
    """One problem: ill-conditioned, rank-deficient, tied, with zeros, scaled by 1e-15 to 1e15, in either precision."""
    rows, width = int(draw.integers(1, 4)), int(draw.integers(1, 7))
    inputs = str(draw.choice(["tokens", "few", "spectral", "twins", "ties", "dead", "uneven", "orthogonal"]))
    weights = str(draw.choice(["normal", "uneven", "ties", "zeros", "zero row", "zero column", "zero"], p=WEIGHTS))
    dtype = torch.float32 if draw.random() < 0.5 else torch.float64
    x, w = drawn_inputs(draw, inputs, width), drawn_weights(draw, weights, (rows, width))
    x, w = x * 10.0 ** draw.integers(-7, 8), w * 10.0 ** draw.integers(-15, 16)
    gram = torch.from_numpy(x.T @ x).to(dtype)
    gram = (gram + gram.T) / 2
    constraint = drawn_set(draw, rows, width)
    options: dict[str, Any] = {
        "ridge": float(draw.choice([0.0, 1e-8, 0.03, 1e3])),
        "damping": float(draw.choice([0.0, 0.0, 0.01])),
    }
    weight = torch.from_numpy(w).to(dtype if draw.random() < 0.8 else torch.float32)
    if draw.random() < 0.15:
        dense = x + 10.0 ** draw.integers(-6, 1) * draw.standard_normal(x.shape) * np.abs(x).max()
        options["cross_gram"] = torch.from_numpy(dense.T @ x).to(dtype)
        options["target_energy"] = float(np.square(dense @ weight.double().numpy().T).sum())
    target = "own" if len(options) == 2 else "another"
    label = (
        f"ridge {options['ridge']}, damping {options['damping']}, "
        f"{inputs}, {weights}, {constraint}, {rows}x{width}, {dtype}, {target} target"
    )
    problem = LayerReconstruction(weight, gram, constraint, **options)
    if not bool(torch.isfinite(problem.hessian).all()) or not bool(torch.isfinite(problem.minimizer).all()):
        raise ValueError("out of the range of its dtype")
    return Case(problem, label)


WEIGHTS = (0.35, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05)


def drawn_inputs(draw: Generator, kind: str, width: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    tokens = width + int(draw.integers(0, 20))
    x = draw.standard_normal((max(1, width // 2) if kind == "few" else tokens, width))
    if kind == "spectral":
        q, _ = np.linalg.qr(draw.standard_normal((width, width)))
        x = np.logspace(0, -draw.uniform(0, 8), width)[:, None] * q
    elif kind == "twins":
        x = x[:, np.arange(width) // 2] + 10.0 ** draw.integers(-10, -2) * draw.standard_normal(x.shape)
    elif kind == "ties":
        x = np.rint(x)
    elif kind == "dead":
        x[:, draw.random(width) < 0.4] = 0
    elif kind == "uneven":
        x = x * 10.0 ** draw.uniform(-6, 6, width)
    elif kind == "orthogonal":
        x = np.eye(width)
    return x


def drawn_weights(draw: Generator, kind: str, shape: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    w = draw.standard_normal(shape)
    if kind == "uneven":
        w = w * 10.0 ** draw.uniform(-6, 6, shape)
    elif kind == "ties":
        w = np.sign(w)
    elif kind == "zeros":
        w = w * (draw.random(shape) < 0.5)
    elif kind == "zero row":
        w[0] = 0
    elif kind == "zero column":
        w[:, 0] = 0
    elif kind == "zero":
        w[:] = 0
    return w


def drawn_set(draw: Generator, rows: int, width: int) -> SparseSet:
    kinds = ["row", "matrix", "groups", "tiles"] + ["pattern"] * (width % 2 == 0) + ["stacked"] * (rows > 1)
    kind = str(draw.choice(kinds))
    sparsity = float(draw.choice([0.0, 0.3, 0.5, 0.5, 0.7, 1.0]))
    if kind == "pattern":
        group = int(draw.choice([m for m in (2, 4, 6) if width % m == 0]))
        return NofM(int(draw.integers(1, group)), group)
    if kind == "groups":
        return Groups(sparsity, 2 if width % 2 == 0 and draw.random() < 0.5 else 1)
    if kind == "tiles":
        return Blocks(sparsity, 2 if rows == 2 else 1, int(draw.choice([w for w in (1, 2, 3) if width % w == 0])))
    if kind == "stacked":
        return StackedRows(((1, RowWise(sparsity)), (rows - 1, RowWise(0.5))))
    return RowWise(sparsity) if kind == "row" else Unstructured(sparsity)


def optimum(problem: LayerReconstruction) -> Number | None:
    """min f over the set in 80 digits, from the tensors as they are stored; None where f has no minimum on a support.

    For the layer's own target the least on a support S of a row is w_R A_RR w_R - g A_SS^-1 g with g = A_SR w_R, for
    another one -g A_SS^-1 g with g = G_S, G = Y^T X + W D: the corner that is left when S is eliminated.
    """
    mpmath.mp.dps = DIGITS
    a = exact(problem.hessian)
    if problem.target_energy is None:
        constant, rows, dense_target = mpmath.mpf(0), exact(problem.weight), True
    else:
        (rows, constant), dense_target = exact_linear(problem, a), False
    least = [Losses(a, row, dense_target) for row in rows]
    try:
        return constant + best(problem.constraint, least, len(rows), len(a))
    except ArithmeticError:
        return None


class Losses:
    """The least value of a row on each support, computed when it is asked for."""

    def __init__(self, hessian: Matrix, row: list[Any], dense_target: bool) -> None:
        self._hessian, self._row, self._dense_target = hessian, row, dense_target
        self._known: dict[tuple[int, ...], Any] = {}

    def __getitem__(self, support: tuple[int, ...]) -> Number:
        if support not in self._known:
            self._known[support] = self._least(support)
        return self._known[support]

    def of_size(self, size: int) -> Number:
        return min(self[s] for s in combinations(range(len(self._row)), size))

    def _least(self, support: tuple[int, ...]) -> Number:
        if not self._dense_target:
            return corner(self._hessian, [self._row[i] for i in support], support)
        gone = [j for j in range(len(self._row)) if j not in support and self._row[j] != 0]
        pull = [mpmath.fsum(self._row[j] * row[j] for j in gone) for row in self._hessian]
        whole = mpmath.fsum(self._row[j] * pull[j] for j in gone)
        return whole + corner(self._hessian, [pull[i] for i in support], support)


def exact(x: Tensor) -> Matrix:
    return [[mpmath.mpf(entry) for entry in row] for row in x.double().tolist()]


def exact_linear(problem: LayerReconstruction, a: Matrix) -> tuple[Matrix, Number]:
    """(G, c) of another target."""
    assert problem.cross_gram is not None
    w = exact(problem.weight)
    width = len(a)
    cross, dead = exact(problem.cross_gram), problem.dead.tolist()
    h = problem.gram.diagonal().tolist()
    # As the problem defines it: what is on the diagonal of A beyond that of H, rounded to their dtype; all, where dead.
    gaps = (problem.hessian.diagonal() - problem.gram.diagonal()).tolist()
    anchor = [a[j][j] if dead[j] else mpmath.mpf(gaps[j]) for j in range(len(h))]
    g = [
        [
            (0 if dead[j] else mpmath.fsum(row[k] * cross[k][j] for k in range(width))) + row[j] * anchor[j]
            for j in range(width)
        ]
        for row in w
    ]
    constant = mpmath.mpf(problem.target_energy) + mpmath.fsum(
        x * x * d for row in w for x, d in zip(row, anchor, strict=True)
    )
    return g, constant


def corner(a: Matrix, g: list[Any], support: tuple[int, ...]) -> Number:
    """-g A_SS^-1 g by elimination.

    Raises:
        ArithmeticError: A_SS is not positive definite.
    """
    rows = [[*(a[i][j] for j in support), x] for i, x in zip(support, g, strict=True)]
    left = mpmath.mpf(0)
    for k, top in enumerate(rows):
        if top[k] <= 0:
            raise ArithmeticError("not positive definite")
        for row in rows[k + 1 :]:
            factor = row[k] / top[k]
            for j in range(k + 1, len(top)):
                row[j] -= factor * top[j]
        left -= top[-1] * top[-1] / top[k]
    return left


def best(constraint: SparseSet, least: list[Losses], rows: int, width: int) -> Number:
    """The least sum over rows of what admissible supports give."""
    if isinstance(constraint, Groups):
        keep = constraint.budget(width)
        sets = combinations(range(width // constraint.width), keep)
        columns = [tuple(g * constraint.width + i for g in chosen for i in range(constraint.width)) for chosen in sets]
        return min(mpmath.fsum(row[s] for row in least) for s in columns)
    if isinstance(constraint, Blocks):
        return best_tiles(constraint, least, rows, width)
    score = Point(weight=torch.arange(1.0, rows * width + 1).view(rows, width))
    support = constraint.select(score)["weight"]
    if isinstance(constraint, Unstructured):
        totals: dict[int, Any] = {0: mpmath.mpf(0)}
        for row in least:
            by_size = [row.of_size(size) for size in range(width + 1)]
            after: dict[int, Any] = {}
            for (used, so_far), (size, value) in ((t, b) for t in totals.items() for b in enumerate(by_size)):
                after[used + size] = min(after.get(used + size, mpmath.inf), so_far + value)
            totals = after
        return totals[int(support.sum())]
    group = constraint.m if isinstance(constraint, NofM) else width
    total = mpmath.mpf(0)
    for row, counts in zip(least, support.view(rows, -1, group).sum(2).tolist(), strict=True):
        cells = [list(combinations(range(c * group, (c + 1) * group), n)) for c, n in enumerate(counts)]
        total += min(row[tuple(j for part in parts for j in part)] for parts in product(*cells))
    return total


def best_tiles(constraint: Blocks, least: list[Losses], rows: int, width: int) -> Number:
    """The least sum over rows of the supports that keep as many tiles of the matrix as there may be."""
    height, across = constraint.height, constraint.width
    tiles = [(i, j) for i in range(0, rows, height) for j in range(0, width, across)]
    keep = constraint.keep if constraint.keep is not None else round((1 - constraint.sparsity) * len(tiles))
    found = mpmath.inf
    for chosen in combinations(tiles, keep):
        supports = [
            tuple(c for i, j in chosen if i <= r < i + height for c in range(j, j + across)) for r in range(rows)
        ]
        found = min(found, mpmath.fsum(row[s] for row, s in zip(least, supports, strict=True)))
    return found


SOURCES: dict[str, Callable[[LayerReconstruction], float | None]] = {
    "BruteForce": lambda problem: BruteForce().solve(problem).bound,
    "BranchAndBound": lambda problem: BranchAndBound().solve(problem).bound,
    "lower_bound": lambda problem: None if (bound := lower_bound(problem)) is None else bound.value,
    "dual_bound": lambda problem: None if (bound := dual_bound(problem)) is None else bound.bound.value,
    "BruteForceGroups": lambda problem: BruteForceGroups().solve(problem).bound,
    "perspective_bound": lambda problem: None if (bound := perspective_bound(problem)) is None else bound.value,
}


SLOW = ("dual_bound", "perspective_bound")


@dataclass
class Tally:
    """The counts for one source of bounds."""

    given: int = 0
    none: int = 0
    refused: int = 0
    above: list[str] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    zero: int = 0  # of the bounds: the optimum is the floor itself

    def as_json(self) -> dict[str, Any]:
        points = np.quantile(self.ratios, (0.0, 0.01, 0.05, 0.25, 0.5)).tolist() if self.ratios else []
        shares = {f"at least {level:g}": int(np.sum(np.array(self.ratios) >= level)) for level in _LEVELS[1:-1]}
        return {
            "bounds": self.given,
            "above the optimum": len(self.above),
            "none": self.none,
            "does not take the problem": self.refused,
            "optimum is the floor": self.zero,
            "share of the optimum": {"least, 1 %, 5 %, 25 %, 50 %": points, **shares},
        }


def check(case: Case, number: int, tallies: dict[str, Tally], perspective_every: int) -> None:
    """All bounds of one problem against its optimum."""
    problem = case.problem
    least = optimum(problem)
    floor = problem.value(Point(weight=problem.minimizer))
    for name, source in SOURCES.items():
        grouped = isinstance(problem.constraint, Groups)
        if name != "dual_bound" and (name == "BruteForceGroups") != grouped:
            continue
        if name in SLOW and (not perspective_every or number % perspective_every):
            continue
        tally = tallies[name]
        try:
            bound = source(problem)
        except ValueError:
            tally.refused += 1
            continue
        if bound is None:
            tally.none += 1
            continue
        tally.given += 1
        if least is None or not math.isfinite(bound) or mpmath.mpf(bound) > least:
            tally.above.append(f"{number}: {case.label}: bound {bound!r}, optimum {mpmath.nstr(least, 20)}")
        elif least - floor <= abs(least) * mpmath.mpf(10) ** -13:
            tally.zero += 1
        else:
            tally.ratios.append(float((bound - mpmath.mpf(floor)) / (least - floor)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--perspective-every", type=int, default=50, help="the perspective relaxations are slower; 0 for never"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tallies = {name: Tally() for name in SOURCES}
    began = time.perf_counter()
    for number, case in enumerate(cases(options.seed, options.count)):
        check(case, number, tallies, options.perspective_every)
        if number % 500 == 499:
            wrong = sum(len(tally.above) for tally in tallies.values())
            print(f"{number + 1} problems, {wrong} bounds above, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    for name, tally in tallies.items():
        print(json.dumps({name: tally.as_json()}))
        for line in tally.above[:20]:
            print(f"ABOVE {name} {line}")
    return int(any(tally.above for tally in tallies.values()))


if __name__ == "__main__":
    raise SystemExit(main())
