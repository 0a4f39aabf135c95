"""The ridge of a layer problem: given by the user, or selected on validation tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from admm_prune.errors import UserError
from admm_prune.methods.base import Ridge, RidgeTrial
from admm_prune.methods.local import Method
from admm_prune.problem import Constraint
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.schedules import Constant
from admm_prune.solvers.together import solve_all

# (ridge, damping): a ridge is relative to each H_jj, which is best where all channels matter equally; a damping is
# relative to their mean, which regularizes a few massive channels less and the many small ones more.
GRID = (*((ridge, 0.0) for ridge in (0.003, 0.03, 0.3)), *((0.0, damping) for damping in (0.003, 0.01, 0.03, 0.1)))
_ROWS = 128
# One factorization per trial: rough solutions rank the settings as well as accurate ones.
_PROBE = ADMM(penalty=Constant(1.2), max_iterations=10)


@dataclass(frozen=True)
class Damping:
    """The ridge and damping of a layer problem, the trials that selected them, best first, and their seconds."""

    ridge: float
    damping: float
    trials: tuple[RidgeTrial, ...] = ()
    seconds: float = 0.0


def parse_ridge(ridge: str | float | None) -> Ridge:
    """A ridge from user input: a number, "auto", or None.

    Raises:
        UserError: the input is neither "auto" nor a finite non-negative number.
    """
    if ridge is None or ridge == "auto":
        return "auto" if ridge else None
    try:
        value = float(ridge)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"ridge must be 'auto' or a finite number that is not negative, not {ridge}")
    return value


def settle_ridge(
    ridge: Ridge, method: Method, weight: Tensor, gram: Tensor, validation: Tensor | None, constraint: Constraint
) -> Damping:
    """The ridge and damping to use: a number replaces the ridge of the method, "auto" selects both by `choose_ridge`.

    Args:
        weight: W (out, in).
        gram: H (in, in) of all calibration tokens.
        validation: the part of H from the validation tokens; None if there are none.
        constraint: as for `choose_ridge`.

    Raises:
        UserError: "auto" without validation tokens.
    """
    if ridge == "auto":
        if validation is None:
            raise UserError("--ridge auto needs validation tokens, but there are none: give a number instead")
        began = time.perf_counter()
        trials = choose_ridge(weight, gram, validation, constraint, objective=method.problem.build)
        return Damping(trials[0].ridge, trials[0].damping, trials, time.perf_counter() - began)
    return Damping(method.ridge if ridge is None else ridge, method.damping)


def choose_ridge(
    weight: Tensor,
    gram: Tensor,
    validation: Tensor,
    constraint: Constraint,
    grid: Sequence[tuple[float, float]] = GRID,
    objective: Callable[..., LayerReconstruction] = LayerReconstruction,
) -> tuple[RidgeTrial, ...]:
    """Solves the layer problem on the tokens that are not validation tokens, once for every (ridge, damping) of a grid,
    and ranks the settings by the unregularized relative error on the validation tokens.

    At most 128 evenly spaced rows represent the layer. The layer itself is solved later, on all tokens.

    Args:
        weight: W (out, in).
        gram: H (in, in) of all calibration tokens.
        validation: the part of H from the validation tokens.
        constraint: a set that also admits matrices with fewer rows, such as `Unstructured`, `RowWise` or `NofM`.
        grid: the settings (ridge, damping) to try.
        objective: builds the problem, from the arguments of `LayerReconstruction`.

    Returns:
        All trials, best first.
    """
    rows = weight[:: -(-len(weight) // _ROWS)]
    training = gram - validation
    training.diagonal().clamp_(min=0)  # a channel used by validation tokens only leaves rounding errors
    problems = [objective(rows, training, constraint, ridge=ridge, damping=damping) for ridge, damping in grid]
    trials = [
        RidgeTrial(ridge, damping, problem.relative_error(result.solution, validation))
        for (ridge, damping), problem, result in zip(grid, problems, solve_all(_PROBE, problems), strict=True)
    ]
    return tuple(sorted(trials, key=lambda trial: trial.error))
