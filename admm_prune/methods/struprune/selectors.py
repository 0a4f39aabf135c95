"""Selection of the modules to prune, by class, name or pattern, and of the structured groups to keep."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from admm_prune.errors import UserError
from admm_prune.methods.target import DENSE, Target, target_named
from admm_prune.models.structure import WeightView, decoder_blocks
from admm_prune.ops import group_compensation, precision
from admm_prune.point import Point
from admm_prune.problem import Quadratic, SupportConstraint
from admm_prune.problems.structured_groups import GroupReconstruction
from admm_prune.result import Result
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.base import Solver
from admm_prune.solvers.group_obs import GroupMask, GroupOBS

_REGULAR = "re:"
Selector = Literal["obs", "obs-one-shot", "admm", "mask", "mask-interactions"]
_OBS = GroupOBS(batch=None)


@dataclass(frozen=True)
class Selection:
    """Patterns for weights. A pattern is one of

        "Linear", "LlamaMLP"           a class: of the weight's module, or of one around it, up to the decoder block,
        "model.layers.0.mlp.up_proj"   the name of a module or of its parameter,
        "re:.*down_proj"               a regular expression that the name of the module begins with, as `re.match` does.

    Attributes:
        targets: a weight is pruned if it matches one of them; all where there are none.
        ignore: a weight that matches one of them is not pruned.
        overrides: (pattern, "0.5" or "2:4" or "dense"): targets that replace the run's; of several matches, the last
            counts.
    """

    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    overrides: tuple[tuple[str, str], ...] = field(default=())

    @classmethod
    def of(
        cls, targets: str | Sequence[str] = (), ignore: str | Sequence[str] = (), overrides: Mapping[str, object] = {}
    ) -> Selection:
        """From user input: one pattern or several; {pattern: 0.5} or {pattern: "2:4"}.

        Raises:
            UserError: a pattern is no regular expression, or an override no target.
        """
        given = tuple((pattern, str(target).strip()) for pattern, target in overrides.items())
        made = cls(_several(targets), _several(ignore), given)
        for pattern in (*made.targets, *made.ignore, *overrides):
            _check(pattern)
        for _, target in given:
            if target != DENSE:
                target_named(target)
        return made

    def __bool__(self) -> bool:
        return bool(self.targets or self.ignore or self.overrides)

    def applied(self, model: nn.Module, target: Target) -> Target:
        """The target, including those of the weights whose target differs.

        Raises:
            UserError: a pattern matches no weight, or nothing is left to prune.
        """
        if not self:
            return target
        blocks = decoder_blocks(model)
        views = {view.name: (view, block.name) for block in blocks for view in block.weights}
        fits = {
            pattern: {name for name, (view, block) in views.items() if _fits(pattern, view, block, model)}
            for pattern in (*self.targets, *self.ignore, *(pattern for pattern, _ in self.overrides))
        }
        for pattern, names in fits.items():
            if not names:
                raise UserError(f"nothing in {type(model).__name__}'s blocks fits '{pattern}': see the names of layers")
        chosen = set().union(*(fits[pattern] for pattern in self.targets)) if self.targets else set(views)
        chosen -= set().union(*(fits[pattern] for pattern in self.ignore))
        overrides = {name: text for pattern, text in self.overrides for name in fits[pattern]}
        chosen -= {name for name, text in overrides.items() if text == DENSE}
        if not chosen:
            raise UserError("nothing is left to prune: targets, ignore and overrides leave out every weight")
        layers = {name: overrides.get(name) if name in chosen else DENSE for name in views}
        return replace(target, layers=tuple((name, text) for name, text in layers.items() if text is not None))


def _several(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _check(pattern: str) -> None:
    if not pattern.removeprefix(_REGULAR).strip():
        raise UserError("an empty pattern: give the class of a module, a name, or re: and a regular expression")
    try:
        re.compile(pattern.removeprefix(_REGULAR) if pattern.startswith(_REGULAR) else "")
    except re.error as error:
        raise UserError(f"'{pattern}' is no regular expression: {error}") from error


def _fits(pattern: str, view: WeightView, block: str, model: nn.Module) -> bool:
    module = view.name.removesuffix(f".{view.attribute}")
    if pattern.startswith(_REGULAR):
        return re.match(pattern.removeprefix(_REGULAR), module) is not None
    if pattern in (view.name, view.parameter_name, module):
        return True
    place = view.parameter_name
    while len(place := place.rpartition(".")[0]) >= len(block):
        if pattern == type(model.get_submodule(place)).__name__:
            return True
    return False


class SeededADMM:
    """ADMM that starts from the groups of structured OBS, and is never worse than those."""

    @precision.full()
    def solve(self, problem: Quadratic, *, start: Point | None = None) -> Result:
        seed = _OBS.solve(problem, start=start)
        return ADMM().solve(problem, start=seed.solution)


SELECTORS: Mapping[Selector, Callable[[], Solver]] = {
    "obs": lambda: _OBS,
    "obs-one-shot": lambda: GroupOBS(batch=0),
    "admm": SeededADMM,
    "mask": GroupMask,
    "mask-interactions": lambda: GroupMask(interactions=True),
}


@precision.full()
def losses(problem: GroupReconstruction, width: int, selector: Selector, compensate: bool) -> Tensor:
    """The loss when k = 0..n groups are removed in the selector's order: (n + 1,), float64, on the CPU.

    The loss of removing all groups is included: the whole energy of the output.
    """
    count = problem.minimizer.shape[1] // width
    if compensate:
        batch = count if selector == "obs-one-shot" else _OBS.size(count)
        rises = group_compensation.eliminate(problem.hessian, problem.minimizer, width, count, batch).losses
    else:
        scores = group_compensation.interactions(problem.hessian, problem.minimizer, width).diagonal()
        rises = scores.sort().values.cumsum(0)
    return torch.cat([rises.new_zeros(1), rises]).cpu()


@precision.full()
def solve(problem: GroupReconstruction, selector: Selector, compensate: bool) -> tuple[Result, Tensor]:
    """The groups that the selector keeps: with the least-squares weights on them, or with the dense weights.

    Returns:
        The result, and a boolean mask (in,) of the columns kept.
    """
    result = SELECTORS[selector]().solve(problem)
    assert isinstance(problem.constraint, SupportConstraint)
    mask = problem.constraint.select(result.solution.map(torch.abs))  # of full size, also where weights kept are zero
    dense = problem.initial()
    solution = problem.refit(mask) if compensate else dense.map(lambda w, m: w.where(m, 0), mask)
    return replace(result, solution=solution, objective=problem.value(solution), state=None), mask["weight"][0]
