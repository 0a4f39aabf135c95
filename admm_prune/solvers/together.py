"""Problems of one shape solved in batches: when a batch is faster, and its size.

A step on a small matrix is dominated by call overhead, and a GPU is mostly idle during the factorization of one small
Hessian; the experts of a mixture are many of these. On the CPU small problems are faster in batches
(`benchmarks.batches`), larger ones only overflow the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.ops import backend
from admm_prune.problem import Constraint, Quadratic, fits
from admm_prune.result import Result
from admm_prune.solvers.base import Iterative, Solver

MOST_BYTES, MOST_BYTES_ON_CPU = 1 << 32, 1 << 25  # of a batch, beyond the problems themselves
_LARGEST_ON_CPU = 1 << 15  # entries of a matrix, or of its Hessian


@dataclass(frozen=True)
class Shape:
    """The common properties of the problems of a batch: (out, in), the dtype they are solved in, the device, the sparse
    set."""

    rows: int
    width: int
    dtype: torch.dtype
    device: torch.device
    constraint: Constraint

    @classmethod
    def of(cls, problem: Quadratic) -> Shape:
        x = problem.minimizer
        return cls(x.shape[0], x.shape[1], x.dtype, x.device, problem.constraint)

    @property
    def bytes(self) -> int:
        """Bytes of a problem in a batch: z, d, x, the minimizer, scores and masks, and its factored Hessian."""
        return self.dtype.itemsize * (6 * self.rows * self.width + 5 * self.width**2)

    @property
    def most(self) -> int:
        """Problems at once."""
        on_device = backend.on_device(self.device)
        if not on_device and max(self.rows, self.width) * self.width > _LARGEST_ON_CPU:
            return 1
        return max(1, (MOST_BYTES if on_device else MOST_BYTES_ON_CPU) // self.bytes)


def batches(solver: Solver, shapes: Sequence[Shape]) -> list[list[int]]:
    """The problems to solve together, by their positions: batches of one shape, none larger than its `most`."""
    if not (isinstance(solver, Iterative) and solver.batched):
        return [[position] for position in range(len(shapes))]
    groups: list[list[int]] = []
    for position, shape in enumerate(shapes):
        group = next((b for b in reversed(groups) if shapes[b[0]] == shape and len(b) < shape.most), None)
        if group is None:
            groups.append([position])
        else:
            group.append(position)
    return groups


def solve_all(solver: Solver, problems: Sequence[Any]) -> list[Result]:
    """The results of `solver.solve` on each problem, in batches where that is faster.

    Bitwise equal on the CPU; on a GPU products of several matrices may round differently from those of one.

    Raises:
        ValueError, LinAlgError: the error of the first problem that cannot be solved.
    """
    alike = [p for p in problems if fits(p, Quadratic)]
    if len(alike) < len(problems) or len(problems) < 2:
        return [solver.solve(problem) for problem in problems]
    results: dict[int, Result] = {}
    for batch in batches(solver, [Shape.of(problem) for problem in alike]):
        results |= zip(batch, solve_batch(solver, [alike[i] for i in batch]), strict=True)
    return [results[i] for i in range(len(problems))]


def solve_batch(
    solver: Solver, problems: Sequence[Any], within: Sequence[AbstractContextManager[None]] = ()
) -> list[Result]:
    """As `solve_all`, of one of its batches.

    Args:
        within: optional contexts, one per problem, entered while it is solved alone.
    """
    if len(problems) > 1 and isinstance(solver, Iterative):
        # An error of a single problem is raised when it is solved alone; and problems too large for memory together may
        # fit one by one.
        with suppress(ValueError, LinAlgError, torch.OutOfMemoryError):
            return solver.solve_all(problems)
    results: list[Result] = []
    for problem, around in zip_longest(problems, within, fillvalue=nullcontext()):
        with around:
            results.append(solver.solve(problem))
    return results
