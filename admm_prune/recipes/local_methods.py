"""The solvers of layer problems by name, each with the damping and the budget it is published with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from admm_prune.errors import UserError
from admm_prune.problems.constraints import NofM, RowWise, SparseSet, Unstructured
from admm_prune.problems.layer import DEFAULT_DAMPING, DEFAULT_RIDGE, LayerReconstruction
from admm_prune.recipes.targets import Target
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
        stacks: weights that share their inputs are solved as one, each within its own budget, because the solver
            factors their Gram and knows `StackedRows`.
        stacks_targets: so are copies of one weight with different targets, because nothing that the solver does depends
            on how dense the stack is as a whole.
    """

    name: str
    summary: str
    make: Callable[[], Solver]
    ridge: float = DEFAULT_RIDGE
    damping: float = DEFAULT_DAMPING
    row_wise: bool = False
    stacks: bool = False
    stacks_targets: bool = False

    @property
    def objective(self) -> Callable[..., LayerReconstruction]:
        """What builds the layer problem."""
        return LayerReconstruction

    def constraint(self, target: Target) -> SparseSet:
        """The sparse set that this method aims at for a target."""
        if target.pattern is not None:
            return NofM(*target.pattern)
        assert target.sparsity is not None
        return RowWise(target.sparsity) if self.row_wise else Unstructured(target.sparsity)


LOCAL_METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("magnitude", "largest |w|", Magnitude, ridge=0.0, damping=0.0),
        Method("wanda", "largest |w| ||x|| in each row", Wanda, ridge=0.0, damping=0.0, row_wise=True),
        Method(
            "sparsegpt",
            "column by column, errors spread over the columns to come",
            SparseGPT,
            ridge=0.0,
            damping=0.01,
            stacks=True,
            stacks_targets=True,
        ),
        Method(
            "admm",
            "ADMM with a rising penalty, then least squares",
            ADMM,
            stacks=True,
            stacks_targets=True,
        ),
        Method(
            "admm-fast",
            "half of admm's work, a little more error",
            ADMM.fast,
            stacks=True,
            stacks_targets=True,
        ),
        Method(
            "admm-best",
            "a longer ADMM, then swaps of single weights: several times admm's work, a little less error",
            lambda: LocalSearch(ADMM.best()),
            stacks=True,
        ),
        Method("alps", "ADMM with ALPS's controller and damping", ADMM.alps, ridge=0.0, damping=0.01, stacks=True),
        Method(
            "admm-gradual",
            "ADMM with a fixed penalty and a cubic sparsity ramp",
            ADMM.gradual,
            ridge=0.1,
            damping=0.0,
            stacks=True,
            stacks_targets=True,
        ),
    )
}

# For small layers: they refuse what they cannot prove.
REFERENCES: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("brute-force", "every support tried", reference.BruteForce, row_wise=True),
        Method(
            "branch-and-bound",
            "proved optimum of each row, or the open bound after a minute",
            lambda: reference.BranchAndBound(time_limit=60.0),
            row_wise=True,
        ),
        Method(
            "mixed-integer",
            "mixed-integer program by CVXPY and SCIP",
            lambda: reference.MixedIntegerReference(time_limit=60.0),
            row_wise=True,
        ),
        Method("group-exact", "every N:M group optimal given the rest", reference.GroupExact),
    )
}


def method_names() -> list[str]:
    """All names that `method_named` knows: ours, then those of installed packages."""
    return [*LOCAL_METHODS, *REFERENCES, *sorted(_plugins())]


def method_named(name: str) -> Method:
    """The method of this name, ours or one that an installed package declares under `admm_prune.solvers`.

    Raises:
        UserError: no such method; the message lists those there are.
    """
    ours = {**LOCAL_METHODS, **REFERENCES}
    if name in ours:
        return ours[name]
    plugins = _plugins()
    if name in plugins:
        loaded = plugins[name].load()
        return loaded if isinstance(loaded, Method) else Method(name, loaded.__doc__ or "", loaded)
    raise UserError(f"unknown method '{name}': choose one of {', '.join(method_names())}")


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group="admm_prune.solvers")}
