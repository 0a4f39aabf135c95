"""Exact references and lower bounds for small problems: what every other solver is checked against."""

from __future__ import annotations

from admm_prune.solvers.reference.bounds import Bound, lower_bound
from admm_prune.solvers.reference.branch_and_bound import BranchAndBound
from admm_prune.solvers.reference.brute_force import BruteForce, BruteForceGroups
from admm_prune.solvers.reference.cvxpy_models import MixedIntegerReference
from admm_prune.solvers.reference.n_of_m import GroupExact
from admm_prune.solvers.reference.perspective import perspective_bound

__all__ = [
    "Bound",
    "BranchAndBound",
    "BruteForce",
    "BruteForceGroups",
    "GroupExact",
    "MixedIntegerReference",
    "lower_bound",
    "perspective_bound",
]
