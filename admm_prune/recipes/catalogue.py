"""The solvers by name, each with the damping and the budget it is published with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points

from admm_prune.errors import UserError
from admm_prune.problems.constraints import NofM, RowWise, SparseSet, Unstructured
from admm_prune.problems.layer import DEFAULT_RIDGE
from admm_prune.solvers import reference
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.base import Solver
from admm_prune.solvers.closed_form import Magnitude, Wanda
from admm_prune.solvers.local_search import LocalSearch
from admm_prune.solvers.obs import SparseGPT


@dataclass(frozen=True)
class Method:
    """A solver of layer problems, ready to use by name.

    Args:
        make: builds the solver.
        ridge, damping: of the `LayerReconstruction` it is given.
        row_wise: an unstructured budget is spread evenly over the output rows, not over the whole layer.
    """

    name: str
    summary: str
    make: Callable[[], Solver]
    ridge: float = 0.0
    damping: float = 0.0
    row_wise: bool = False

    def constraint(self, target: Target) -> SparseSet:
        """The sparse set that this method aims at for a target."""
        if target.pattern is not None:
            return NofM(*target.pattern)
        assert target.sparsity is not None
        return RowWise(target.sparsity) if self.row_wise else Unstructured(target.sparsity)


@dataclass(frozen=True)
class Target:
    """How much is to go: a sparsity, or N kept of every M."""

    sparsity: float | None = None
    pattern: tuple[int, int] | None = None

    @property
    def label(self) -> str:
        """ "50%", "2:4"."""
        return f"{self.pattern[0]}:{self.pattern[1]}" if self.pattern else f"{100 * (self.sparsity or 0.0):g}%"


LOCAL_METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("magnitude", "largest |w|", Magnitude),
        Method("wanda", "largest |w| ||x|| in each row", Wanda, row_wise=True),
        Method("sparsegpt", "column by column, errors spread over the columns to come", SparseGPT, damping=0.01),
        Method("admm", "ADMM with a rising penalty, then least squares", ADMM, ridge=DEFAULT_RIDGE),
        Method("admm-fast", "half of admm's work, a little more error", ADMM.fast, ridge=DEFAULT_RIDGE),
        Method(
            "admm-best",
            "a longer ADMM, then swaps of single weights: several times admm's work, a little less error",
            lambda: LocalSearch(ADMM.best()),
            ridge=DEFAULT_RIDGE,
        ),
        Method("alps", "ADMM with ALPS's controller and damping", ADMM.alps, damping=0.01),
        Method("admm-gradual", "ADMM with a fixed penalty and a cubic sparsity ramp", ADMM.gradual, ridge=0.1),
    )
}

# For small layers: they refuse what they cannot prove.
REFERENCES: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("brute-force", "every support tried", reference.BruteForce, ridge=DEFAULT_RIDGE, row_wise=True),
        Method(
            "branch-and-bound",
            "proved optimum of each row, or the open bound after a minute",
            lambda: reference.BranchAndBound(time_limit=60.0),
            ridge=DEFAULT_RIDGE,
            row_wise=True,
        ),
        Method(
            "mixed-integer",
            "mixed-integer program by CVXPY and SCIP",
            lambda: reference.MixedIntegerReference(time_limit=60.0),
            ridge=DEFAULT_RIDGE,
            row_wise=True,
        ),
        Method("group-exact", "every N:M group optimal given the rest", reference.GroupExact, ridge=DEFAULT_RIDGE),
    )
}


def method_named(name: str) -> Method:
    """The method of this name, ours or one that an installed package declares under `admm_prune.solvers`.

    Raises:
        UserError: no such method; the message lists those there are.
    """
    ours = {**LOCAL_METHODS, **REFERENCES}
    if name in ours:
        return ours[name]
    plugins = {point.name: point for point in entry_points(group="admm_prune.solvers")}
    if name in plugins:
        loaded = plugins[name].load()
        return loaded if isinstance(loaded, Method) else Method(name, loaded.__doc__ or "", loaded, ridge=DEFAULT_RIDGE)
    known = ", ".join([*ours, *sorted(plugins)])
    raise UserError(f"unknown method '{name}': choose one of {known}")


def parse_target(sparsity: str | float | None, pattern: str | None) -> Target:
    """One target from the words of a user.

    Raises:
        UserError: neither or both are given; not a number from 0 to 1; not N:M with 1 <= N <= M.
    """
    if (sparsity is None) == (pattern is None):
        raise UserError("give either a sparsity such as 0.7 or a pattern such as 2:4")
    return _sparsity(sparsity) if sparsity is not None else _pattern(str(pattern))


def parse_targets(sparsity: str | None, pattern: str | None) -> list[Target]:
    """Targets from comma-separated lists: sparsities first, then patterns.

    Raises:
        UserError: both lists are empty, or an item is wrong.
    """
    targets = [_sparsity(item) for item in (sparsity or "").split(",") if item.strip()]
    targets += [_pattern(item) for item in (pattern or "").split(",") if item.strip()]
    if not targets:
        raise UserError("give sparsities such as 0.5,0.7 or patterns such as 2:4")
    return targets


def _sparsity(text: str | float) -> Target:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"sparsity must be a number from 0 to 1, not '{text}'") from None
    if not 0.0 <= value <= 1.0:
        raise UserError(f"sparsity must lie between 0 and 1, not {text}")
    return Target(sparsity=value)


def _pattern(text: str) -> Target:
    kept, colon, group = text.strip().partition(":")
    if not (colon and kept.isdecimal() and group.isdecimal()):
        raise UserError(f"pattern must be N:M, N kept of every M such as 2:4, not '{text}'")
    n, m = int(kept), int(group)
    if not 1 <= n <= m:
        raise UserError(f"pattern {text} must keep from 1 to {m} of every {m}: N kept of every M, such as 2:4")
    return Target(pattern=(n, m))
