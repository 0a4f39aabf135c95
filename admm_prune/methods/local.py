"""The solvers of layer problems by name, each with the regularization and the budget that it was published with."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from admm_prune.errors import UserError, check_at_least, unknown
from admm_prune.methods.part_checks import explained_parts
from admm_prune.methods.parts import (
    RECONSTRUCTION,
    LayerProblem,
    ProblemLike,
    SetFamily,
    SetLike,
    check_no_clash,
    declared,
    load_declared,
)
from admm_prune.methods.target import Target
from admm_prune.ops import precision
from admm_prune.point import Point
from admm_prune.problem import Problem
from admm_prune.problems.constraints import NofM, RowWise, SparseSet, Unstructured
from admm_prune.problems.layer import DEFAULT_DAMPING, DEFAULT_RIDGE
from admm_prune.result import Result
from admm_prune.solvers import reference
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.base import Solver, closed_form
from admm_prune.solvers.local_search import LocalSearch
from admm_prune.solvers.obs import SparseGPT
from admm_prune.solvers.one_shot import Magnitude, Wanda


@dataclass(frozen=True)
class Method:
    """A solver of layer problems with its settings, available by name.

    Args:
        name: on the command line.
        summary: one line for `admm-prune list`.
        make: builds the solver.
        ridge, damping: the regularization of the layer problem, see `LayerReconstruction`.
        row_wise: an unstructured budget is the same for every output row, not one for the whole matrix.
        stacks: weights that share their inputs are solved as one problem with `StackedRows`, so that the solver factors
            their Gram matrix once.
        stacks_targets: weights with different targets may be stacked too. Only for a solver whose work on a row does
            not depend on the density of the whole stack.
        problem: the objective.
        sets: a family of constraints that replaces the default.
        reads_inputs: whether the result depends on the inputs of the layer; otherwise on its weight alone.
    """

    name: str
    summary: str
    make: Callable[[], Solver]
    ridge: float = DEFAULT_RIDGE
    damping: float = DEFAULT_DAMPING
    row_wise: bool = False
    stacks: bool = False
    stacks_targets: bool = False
    problem: LayerProblem = RECONSTRUCTION
    sets: SetFamily | None = None
    reads_inputs: bool = True

    def __post_init__(self) -> None:
        check_at_least(self, ridge=0, damping=0)

    def constraint(self, target: Target) -> SparseSet:
        """The sparse set of this method for a target.

        Raises:
            UserError: the family of constraints has no such member.
        """
        default = SetFamily("row-wise", RowWise) if self.row_wise else SetFamily("unstructured", Unstructured)
        return (self.sets or default).at(target)

    @property
    def damped(self) -> bool:
        """Whether the result depends on the ridge; that of methods that only score weights does not."""
        return self.ridge > 0 or self.damping > 0

    def cell(self, target: Target) -> Literal["matrix", "row", "group", "set"]:
        """The scope of the budget; "set" where only the constraint defines it."""
        made = self.constraint(target)
        kinds: dict[type[SparseSet], Literal["matrix", "row", "group"]] = {
            Unstructured: "matrix",
            RowWise: "row",
            NofM: "group",
        }
        return kinds.get(type(made), "set")


LOCAL_METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("magnitude", "largest |w|", Magnitude, ridge=0.0, damping=0.0, reads_inputs=False),
        Method("wanda", "largest |w| ||x|| in each row", Wanda, ridge=0.0, damping=0.0, row_wise=True),
        Method(
            "sparsegpt",
            "column by column, with errors compensated by later columns",
            SparseGPT,
            ridge=0.0,
            damping=0.01,
            stacks=True,
            stacks_targets=True,
        ),
        Method("admm", "ADMM with a rising penalty, then least squares", ADMM, stacks=True, stacks_targets=True),
        Method("admm-fast", "half of admm's work, a little more error", ADMM.fast, stacks=True, stacks_targets=True),
        Method(
            "admm-best",
            "a longer ADMM, then swaps of weights, tiles or columns: several times admm's work, less error",
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

# For small layers: they reject problems for which they cannot prove optimality.
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


GIVEN = "given"


@dataclass(frozen=True, eq=False)
class Given:
    """A solver that returns given weights, computed elsewhere.

    Args:
        weight: V (out, in).

    Raises:
        ValueError: by `solve`: V has another shape than the layer, has NaN or Inf entries, or violates the constraint.
    """

    weight: Tensor

    @precision.full()
    def solve(self, problem: Problem, *, start: Point | None = None) -> Result:
        began = time.perf_counter()
        dense = problem.initial()["weight"]
        if self.weight.shape != dense.shape:
            shapes = " and ".join(" x ".join(map(str, shape)) for shape in (self.weight.shape, dense.shape))
            raise ValueError(f"solution and layer have the shapes {shapes}")
        if not bool(self.weight.isfinite().all()):
            raise ValueError("the solution has NaN or Inf entries")
        solution = Point(weight=self.weight.to(dense))
        if not problem.constraint.contains(solution):
            raise ValueError(
                f"the solution keeps more weights than the target allows: {int(solution['weight'].count_nonzero())} of "
                f"{dense.numel()} are not zero"
            )
        return closed_form(problem, solution, began, start)


def given(weight: Tensor) -> Method:
    """The method that returns a given weight (out, in), without ridge and damping."""
    return Method(GIVEN, "weights that were computed elsewhere", partial(Given, weight), ridge=0.0, damping=0.0)


def method_names() -> list[str]:
    """All names that `method_named` accepts: the built-in ones, then those declared by installed packages."""
    return [*LOCAL_METHODS, *REFERENCES, *sorted(declared("solvers"))]


def method_named(name: str) -> Method:
    """The method of this name, built in or declared by an installed package under `admm_prune.solvers`.

    Raises:
        UserError: there is no such method (the message lists the known ones), or the plug-in cannot be used.
    """
    ours = {**LOCAL_METHODS, **REFERENCES}
    check_no_clash("solvers", name, ours)
    if name in ours:
        return ours[name]
    if name not in declared("solvers"):
        raise unknown("method", name, method_names())
    loaded: Any = load_declared("solvers", name)
    if isinstance(loaded, Method):
        return replace(loaded, name=name)
    made_by: Any = loaded
    if not (inspect.isclass(loaded) and callable(getattr(loaded, "solve", None))):
        kind = f"an instance of {type(loaded).__name__}" if hasattr(loaded, "solve") else f"a {type(loaded).__name__}"
        raise UserError(
            f"the plug-in '{name}' is neither a Method nor a class with a method solve, but "
            f"{f'the class {loaded.__name__}' if inspect.isclass(loaded) else kind}"
        )
    if inspect.isabstract(loaded):
        raise UserError(f"the solver '{name}' lacks methods: {', '.join(sorted(made_by.__abstractmethods__))}")

    def make() -> Solver:
        with explained_parts(solver=loaded):
            solver: Solver = made_by()
            return solver

    try:
        make()
    except ValueError as error:
        raise UserError(f"the solver '{name}' cannot be made without arguments: {error}") from error
    return Method(name, (loaded.__doc__ or "").strip().partition("\n")[0], make)


def with_parts(method: Method, problem: ProblemLike = None, constraint: SetLike = None) -> Method:
    """The method with another objective or constraint, each a name or an object; None leaves the method's own.

    Raises:
        UserError: there is no part of that name, or it cannot be used.
    """
    if problem is not None:
        method = replace(method, problem=LayerProblem.of(problem))
    return method if constraint is None else replace(method, sets=SetFamily.of(constraint))
