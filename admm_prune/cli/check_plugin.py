"""admm-prune check-plugin: the conformance kit on a solver, an objective or a sparse set of another package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from admm_prune.cli import common

if TYPE_CHECKING:
    from admm_prune.methods.parts import Kind

_SHAPES = ((3, 4), (6, 16))  # every support of the first is tried
_FIRST = 48  # of 64 tokens, whose weights are computed alone too


def check_plugin(
    name: Annotated[str, typer.Argument(help="Name of an installed plug-in, or MODULE:ATTRIBUTE.")],
    kind: Annotated[
        str | None,
        typer.Option(help="solver, problem or constraint; default: as declared, or as its class says."),
    ] = None,
    sparsity: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sparsity at which a constraint is checked.")] = 0.5,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Matrix OUTxIN on which a constraint is checked, repeatable. Default: 3x4 and 6x16."),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Number of random instances.")] = 15,
    json: common.Json = False,
) -> None:
    r"""Check a plug-in with the conformance kit, which needs admm-prune\[testing].

    Exit status 0: it conforms; 1: it violates a requirement, which is printed; 2: wrong input.

    Example: admm-prune check-plugin row_mixture:RowMixture
    """
    from admm_prune.errors import UserError

    shapes = _SHAPES if shape is None else tuple(map(_shape_of, shape))
    part, checked_kind = _resolved(name, kind)
    check = {"solvers": _check_solver, "problems": _check_problem, "constraints": _check_constraint}[checked_kind]
    violation, details = None, {}
    try:
        details = check(part, Trial(sparsity, shapes, examples))
    except UserError:
        raise
    except AssertionError as error:
        violation = " ".join(str(error).split())
    except Exception as error:  # whatever the code of another package raises
        violation = f"it failed: {type(error).__name__}: {' '.join(str(error).split())}"
    if json:
        content = {"name": name, "kind": checked_kind, "conforms": violation is None, "violation": violation}
        common.emit(content | details)
    elif violation is None:
        print(f"{name} conforms: {'; '.join(f'{key}: {value}' for key, value in details.items())}")
    else:
        print(f"{name} does not conform: {violation}")
    if violation is not None:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Trial:
    """What a part is checked on: a sparsity and matrices (out, in) for a constraint, a number of random instances."""

    sparsity: float
    shapes: tuple[tuple[int, int], ...]
    examples: int


def _shape_of(text: str) -> tuple[int, int]:
    from admm_prune.errors import UserError

    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise UserError(f"--shape is OUTxIN, such as 6x16, not '{text}'")
    return int(rows), int(columns)


def _resolved(name: str, requested: str | None) -> tuple[Any, Kind]:
    """The part, by its name or as the object itself, and its kind.

    Raises:
        UserError: there is none, or its kind is unclear.
    """
    from admm_prune.errors import UserError
    from admm_prune.methods.parts import Kind, declared

    kinds: tuple[Kind, ...] = get_args(Kind)
    of: dict[str, Kind] = {kind.removesuffix("s"): kind for kind in kinds}
    if requested is not None and requested not in of:
        raise UserError(f"kind must be solver, problem or constraint, not '{requested}'")
    if ":" in name:
        part = _imported(name)
        return part, of[requested] if requested is not None else _kind_of(name, part)
    named: list[Kind] = [
        kind for kind in kinds if name in declared(kind) and (requested is None or kind == of[requested])
    ]
    if len(named) > 1:
        raise UserError(f"'{name}' is declared as several kinds: choose one with --kind")
    if not named:
        others = sorted({other for kind in kinds for other in declared(kind)})
        known = f"the installed ones are {', '.join(others)}" if others else "no package declares any"
        raise UserError(f"there is no plug-in '{name}': {known}; an object is named as MODULE:ATTRIBUTE")
    return name, named[0]


def _imported(name: str) -> Any:
    from admm_prune.errors import UserError

    module, _, attribute = name.partition(":")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        part: Any = import_module(module)
        for step in attribute.split("."):
            part = getattr(part, step)
    except Exception as error:  # importing another package may raise anything
        raise UserError(f"{name} cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}") from error
    finally:
        sys.path.remove(folder)
    return part


def _kind_of(name: str, part: Any) -> Kind:
    from admm_prune.errors import UserError
    from admm_prune.problems.constraints import SparseSet
    from admm_prune.problems.layer import LayerReconstruction

    if isinstance(part, SparseSet) or (isinstance(part, type) and issubclass(part, SparseSet)):
        return "constraints"
    if isinstance(part, type) and issubclass(part, LayerReconstruction):
        return "problems"
    if hasattr(part, "solve") or hasattr(part, "make"):
        return "solvers"
    if isinstance(part, type) and hasattr(part, "initial") and hasattr(part, "value"):
        raise UserError(
            f"{name} is no LayerReconstruction: check it in Python, by admm_prune.testing.assert_problem_conforms"
        )
    raise UserError(f"{name} is no solver, LayerReconstruction or SparseSet: say which it is to be with --kind")


def _check_solver(part: Any, trial: Trial) -> dict[str, Any]:
    from admm_prune.methods.local import method_named

    solver = method_named(part).make() if isinstance(part, str) else _built(part)
    conformance = _kit().assert_solver_conforms(solver, examples=trial.examples)
    return {"solved": len(conformance.solved), "refused": len(conformance.refused)}


def _check_problem(part: Any, trial: Trial) -> dict[str, Any]:
    import torch

    from admm_prune.errors import UserError
    from admm_prune.methods.parts import LayerProblem
    from admm_prune.problems.constraints import Unstructured
    from admm_prune.statistics import GramAccumulator

    problem, kit = LayerProblem.of(part), _kit()
    from admm_prune.testing.instances import correlated_inputs, random_weight

    def make(seed: int) -> Any:
        inputs, gram = correlated_inputs(64, 8, seed), GramAccumulator(8)
        weight = random_weight(4, 8, seed)
        try:
            weights = problem.trial_weights(inputs, weight)
            gram.add(inputs, weights)
            first = problem.trial_weights(inputs[:_FIRST], weight)
            posed = problem.posed(weight, gram.gram, Unstructured(0.5), ridge=0.01, damping=0.0)
        except UserError as error:
            raise AssertionError(str(error)) from error
        if weights is not None and first is not None:
            same = torch.allclose(weights[:_FIRST].double(), first.double(), rtol=1e-5)
            assert same, "token_weights: the weight of a token depends on which other tokens are in the call"
        return posed

    kit.assert_problem_conforms(make, examples=trial.examples)
    return {"instances": trial.examples}


def _check_constraint(part: Any, trial: Trial) -> dict[str, Any]:
    import torch

    from admm_prune.errors import UserError
    from admm_prune.methods.part_checks import explained_parts
    from admm_prune.methods.parts import SetFamily
    from admm_prune.methods.target import Target
    from admm_prune.point import Point

    constraint, kit = SetFamily.of(part).at(Target(trial.sparsity)), _kit()
    for rows, columns in trial.shapes:
        with explained_parts(constraint=type(constraint)):
            try:
                constraint.project(Point(weight=torch.ones(rows, columns)))
            except ValueError as error:
                kind = type(constraint).__name__
                raise UserError(
                    f"the constraint {kind} refuses a matrix of {rows} x {columns} ({error}): give shapes that it "
                    "admits with --shape"
                ) from error
        kit.assert_constraint_conforms(constraint, shape=(rows, columns), examples=trial.examples)
    return {"sparsity": trial.sparsity, "shapes": " and ".join(f"{r} x {c}" for r, c in trial.shapes)}


def _built(part: Any) -> Any:
    """A solver: the object itself, made by a class, or made by a `Method`."""
    from admm_prune.errors import UserError

    make: Callable[[], Any] | None = part if isinstance(part, type) else getattr(part, "make", None)
    try:
        return part if make is None else make()
    except TypeError as error:
        raise UserError(f"the solver is not built without arguments: {error}") from error


def _kit() -> Any:
    """The conformance kit.

    Raises:
        UserError: hypothesis is not installed.
    """
    from admm_prune.errors import UserError

    try:
        from admm_prune import testing
    except ImportError as error:
        raise UserError(str(error)) from error
    return testing
