"""The mixed-integer program of a row, through CVXPY: a check that shares no code with branch and bound."""

from __future__ import annotations

import importlib
import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from admm_prune.errors import check_at_least
from admm_prune.ops import precision
from admm_prune.point import Point
from admm_prune.problem import Problem
from admm_prune.result import Result, Status
from admm_prune.solvers.reference.rigorous import Mask
from admm_prune.solvers.reference.rows import Row, search, separate

_SLACK = 1e-5  # the box is wider than the proof asks by this much, so that a tolerance of the solver cuts nothing off

_WORST_FIRST = (Status.STALLED, Status.TIME_LIMIT)


@dataclass(frozen=True)
class MixedIntegerReference:
    """min |L^T (v - w)|^2 over v, z:  l_j z_j <= v_j <= u_j z_j,  sum_{j in group} z_j <= keep,  z binary,  Ã = L L^T.

    [l, u] = w_j -+ sqrt(UB K_jj) with the loss UB of the incumbent: (v-w)^T Ã (v-w) <= UB confines every better v to
    it. Where the box leaves 0 out, z_j = 1. Rows are scaled to UB = 1, so that the solver's absolute tolerances are
    relative ones. Only the support is taken from the solver: weights and loss are recomputed by least squares.

    Args:
        solver: a mixed-integer second-order cone solver known to CVXPY.
        time_limit: seconds for each row; passed on to SCIP only.
        max_width: the widest row accepted.

    Returns (solve):
        Status SOLVED; TIME_LIMIT where the solver reached the limit on some row; STALLED where it stopped on one before
        the limit without an optimum, as SCIP's LP does now and then at cond(A) = 1e6: the incumbent stands there if the
        solver has nothing better. No bound: the proof holds to the
        solver's tolerances, about 1e-6.

    Raises (solve):
        ImportError: CVXPY or the solver is not installed.
        TypeError: the problem is not Quadratic, or its constraint no SupportConstraint.
        ValueError: rows too wide, supports of an unknown kind, or a Hessian that is not positive definite.

    Source: ours; the model with bounds on v (big-M) is the usual one.
    """

    solver: str = "SCIP"
    time_limit: float = math.inf
    max_width: int = 32

    def __post_init__(self) -> None:
        check_at_least(self, time_limit=0, max_width=1)

    @precision.full()
    def solve(self, problem: Problem, *, start: Point | None = None) -> Result:
        began = time.perf_counter()
        cvxpy = load_cvxpy(type(self).__name__, self.solver)
        separated = separate(type(self).__name__, problem, self.max_width)
        solved = [self._solve_row(cvxpy, row, *search(row, known)) for row, known in separated.starts(start)]
        statuses = {status for _, status in solved}
        return separated.result(
            [support for support, _ in solved],
            None,
            start=start,
            status=next((status for status in _WORST_FIRST if status in statuses), Status.SOLVED),
            seconds=time.perf_counter() - began,
            notes=(f"optimal to the tolerances of {self.solver}",),
        )

    def _solve_row(self, cvxpy: Any, row: Row, incumbent: Mask, upper: float) -> tuple[Mask, Status]:
        """(support, the solver's status)."""
        if row.removals in (0, row.width) or upper == 0.0:
            return incumbent, Status.SOLVED
        target = row.target / math.sqrt(upper)
        radius = np.sqrt(row.inverse.diagonal()) * (1 + _SLACK)
        low, high = target - radius, target + radius
        v, z = cvxpy.Variable(row.width), cvxpy.Variable(row.width, boolean=True)
        groups = range(0, row.width, row.group)
        constraints = [
            v >= cvxpy.multiply(np.minimum(low, 0), z),
            v <= cvxpy.multiply(np.maximum(high, 0), z),
            *(cvxpy.sum(z[begin : begin + row.group]) <= row.keep for begin in groups),
        ]
        needed = np.flatnonzero((low > 0) | (high < 0))
        if len(needed):
            constraints.append(z[needed] == 1)
        loss = cvxpy.sum_squares(np.linalg.cholesky(row.hessian).T @ (v - target))
        program = cvxpy.Problem(cvxpy.Minimize(loss), constraints)
        limited = self.solver == "SCIP" and math.isfinite(self.time_limit)
        options = {"scip_params": {"limits/time": self.time_limit}} if limited else {}
        began = time.perf_counter()
        solved = try_solve(cvxpy, program, self.solver, **options)
        reached = limited and time.perf_counter() - began >= self.time_limit
        if solved and program.status == cvxpy.OPTIMAL:
            status = Status.SOLVED
        else:
            status = Status.TIME_LIMIT if reached else Status.STALLED
        if not solved or z.value is None:
            return incumbent, status
        support = row.completed(np.asarray(z.value) > 0.5)
        return (support if row.loss(support) < upper else incumbent), status


def load_cvxpy(owner: str, solver: str) -> Any:
    """The module cvxpy, with `solver` installed.

    Raises:
        ImportError: one of them is missing; the message says how to install it.
    """
    advice = "pip install 'admm-prune[reference]'"
    try:
        cvxpy: Any = importlib.import_module("cvxpy")
    except ImportError:
        raise ImportError(f"{owner} needs CVXPY: {advice}") from None
    if solver not in cvxpy.installed_solvers():
        raise ImportError(f"{owner} needs the solver {solver}, which CVXPY does not find: {advice}")
    return cvxpy


def try_solve(cvxpy: Any, program: Any, solver: str, **options: Any) -> bool:
    """Solves a program; False where the solver gave up. Its warnings are left out: no caller trusts its tolerances."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program.solve(solver=solver, **options)
        except cvxpy.error.SolverError:
            return False
    return True
