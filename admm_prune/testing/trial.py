"""One solver under test: solving, refusing, and leaving the problem alone."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problem import Problem, Quadratic
from admm_prune.result import Result
from admm_prune.solvers.base import Solver
from admm_prune.testing.results import Case, named, shares_memory


@dataclass
class Trial:
    """Solves with one solver, and keeps count of what it solved and what it refused.

    Args:
        fills: the solver keeps the full count.
        refusals: what it may raise to refuse a problem.
    """

    solver: Solver
    fills: bool
    refusals: tuple[type[Exception], ...]
    solved: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return named(self.solver)

    def solve(self, case: Case, problem: Problem, start: Point | None = None) -> Result | None:
        """The result; None where the solver refuses as it should.

        Raises:
            AssertionError: it refuses without naming both sides, raises anything else, or changes the problem.
        """
        before = _contents(problem)
        try:
            result = self.solver.solve(problem, start=start)
        except self.refusals as refusal:
            message = str(refusal)
            its = {type(problem).__name__, type(problem.constraint).__name__}
            named = any(name in message for name in _names(self.solver)) and any(name in message for name in its)
            case.promise(
                named,
                "solve the problem, or refuse it in words that name the solver and the problem or its constraint",
                f"it raised {type(refusal).__name__}: {message}",
            )
            self.refused[case.input] = message
            return None
        except Exception as error:
            kind = type(error).__name__
            raise AssertionError(
                f"{case.owner} on {case.input} must solve, or refuse with a TypeError; it raised {kind}: {error}"
            ) from error
        after = _contents(problem)
        changed = [name for name, x in before.items() if not _same(x, after.get(name))]
        case.promise(not changed, "leave the problem as it was", f"it changed {', '.join(changed)}")
        own = Point({name: x for name, x in _tensors(problem).items() if x.is_floating_point()})
        returned: object = result  # whatever a third party's solver returns
        aliased = isinstance(returned, Result) and (
            shares_memory(returned.solution, own) or (start is not None and shares_memory(returned.solution, start))
        )
        case.promise(not aliased, "return memory of its own, not a tensor of the problem or of the start")
        if start is None and case.input not in self.solved:
            self.solved.append(case.input)
        return result


def _names(solver: object) -> set[str]:
    """The names of a solver's class and of the solvers that it is made of."""
    names = {type(solver).__name__}
    if is_dataclass(solver):
        inner = (getattr(solver, part.name) for part in fields(solver))
        names.update(name for part in inner if hasattr(part, "solve") for name in _names(part))
    return names


def _tensors(problem: Problem) -> dict[str, Tensor]:
    """All that a problem shows, and the tensors that it keeps to itself."""
    contents: dict[str, Any] = {f"initial {name}": x for name, x in problem.initial().items()}
    if isinstance(problem, Quadratic):
        contents |= {name: getattr(problem, name) for name in ("hessian", "linear", "minimizer")}
    return contents | {name: x for name, x in vars(problem).items() if isinstance(x, Tensor)}


def _contents(problem: Problem) -> dict[str, Tensor | float]:
    """Copies of the tensors of a problem, its curvature and its value at one point."""
    copies = {name: x.clone() for name, x in _tensors(problem).items()}
    return {**copies, "curvature": problem.curvature, "value": problem.value(problem.initial().map(lambda x: 0.5 * x))}


def _same(a: Tensor | float, b: Tensor | float | None) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    return a == b
