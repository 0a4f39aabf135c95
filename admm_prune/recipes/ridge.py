"""Choosing the ridge of a layer problem on tokens that did not take part in solving it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from admm_prune.problem import Constraint
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.schedules import Constant

GRID = (0.003, 0.01, 0.03, 0.1, 0.3)
_ROWS = 128
# One factorization for each ridge: a rough solution ranks them as a good one does.
_PROBE = ADMM(penalty=Constant(1.2), max_iterations=10)


def choose_ridge(
    weight: Tensor, gram: Tensor, validation: Tensor, constraint: Constraint, grid: Sequence[float] = GRID
) -> tuple[float, dict[float, float]]:
    """argmin over ridges of the undamped relative error on the validation tokens, solved on all the others.

    A sample of at most 128 rows at even distances stands for the layer; the problem is then to be solved on all tokens
    with the ridge found.

    Args:
        weight: W (out, in).
        gram: H (in, in) of all calibration tokens.
        validation: the part of H that comes from the validation tokens.
        constraint: a set that fits a matrix of fewer rows too, such as `Unstructured`, `RowWise`, `NofM`.
        grid: ridges, relative to diag(H).

    Returns:
        The ridge, and the validation error of each.
    """
    rows = weight[:: -(-len(weight) // _ROWS)]
    training = gram - validation
    errors = {}
    for ridge in grid:
        problem = LayerReconstruction(rows, training, constraint, ridge=ridge)
        errors[ridge] = problem.relative_error(_PROBE.solve(problem).solution, validation)
    return min(errors, key=lambda ridge: errors[ridge]), errors
