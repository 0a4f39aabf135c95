"""Exact references and lower bounds for small problems, against which all other solvers are checked."""

from __future__ import annotations

from admm_prune.solvers.reference.block_dual import BlockCertificate, block_bound
from admm_prune.solvers.reference.bounds import Bound, lower_bound, perspective_bound
from admm_prune.solvers.reference.branch_and_bound import BranchAndBound
from admm_prune.solvers.reference.brute_force import BruteForce, BruteForceGroups, GroupExact
from admm_prune.solvers.reference.cvxpy_models import MixedIntegerReference
from admm_prune.solvers.reference.dual import DualCertificate, dual_bound
from admm_prune.solvers.reference.trees import TreeCertificate, prove_rows

__all__ = [
    "BlockCertificate",
    "Bound",
    "BranchAndBound",
    "BruteForce",
    "BruteForceGroups",
    "DualCertificate",
    "GroupExact",
    "MixedIntegerReference",
    "TreeCertificate",
    "block_bound",
    "dual_bound",
    "lower_bound",
    "perspective_bound",
    "prove_rows",
]
