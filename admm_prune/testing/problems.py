"""The requirements on every problem, by its capabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from admm_prune.point import Point
from admm_prune.problem import (
    Blockwise,
    Constraint,
    Coordinated,
    Differentiable,
    Minimizable,
    Problem,
    Proximable,
    Quadratic,
    Refittable,
    Stochastic,
    SupportConstraint,
    fits,
)
from admm_prune.testing.drawing import for_all, st
from admm_prune.testing.instances import check_quadratic
from admm_prune.testing.results import (
    Case,
    equal,
    lower_neighbour,
    precision,
    random_like,
    rms,
    same_bits,
    same_form,
    slope,
)
from admm_prune.testing.sampling import check_curvature, check_sampled_losses
from admm_prune.testing.supports import check_held_out

_DIRECTIONS = 6


def assert_problem_conforms(
    make_problem: Callable[[int], Problem],
    *,
    other_held_out: Callable[[int], Problem] | None = None,
    examples: int = 10,
) -> None:
    """Checks a problem from its values alone, for every capability of `admm_prune.problem` that it has.

    Problem: `value` is a finite number, the same for the same point; `initial` is finite and no call changes it; no
    call changes its arguments; `curvature` is positive, finite, and within a factor of 10 of half the mean diagonal of
    the Hessian of `value` over the tensors of the initial point; the constraint takes the initial point; a problem made
    again from the same seed has the same values.
    Quadratic: f(V) = tr(V A V^T) - 2 tr(V G^T) + f(0) at random V; A is symmetric positive definite; f has no slope at
    the minimizer; the curvature is the mean diagonal of A, by second differences of f: f'' / 2.
    Proximable: no point found has a smaller f(x) + rho curvature |x - v|^2 than prox(v, rho): not v, nor the dense
    weights, nor the prox at other rho, nor nearby points; where f is smooth, that sum has no slope there.
    Differentiable: the value is f's, the gradient equals central differences.
    Stochastic: a draw is bitwise repeatable; its gradient equals the central differences of its loss; the mean loss
    over 48 draws differs between two points as `value` does, within five standard errors and 2 % (build a problem whose
    value is taken on validation data with the training data in their place).
    Refittable: refit vanishes off the mask; no direction on the mask lowers f; a larger mask is not worse.
    Minimizable: the minimum lies in the constraint, and no point found is lower: not the initial point, nor its
    projection, nor nearby points.
    Blockwise: each block is a problem; where its points are named as ours, its values differ as ours do.
    Coordinated: joining a block's own part changes nothing; another one does; the validation loss is finite.
    With `other_held_out`: `validation_loss` depends on the held-out data, and nothing else does.

    Args:
        make_problem: from a seed, a small problem (up to some hundred weights, best in float64); the same for the same
            seed.
        other_held_out: builds from a seed the same problem with other held-out data, for problems with held-out data
            for `validation_loss`.
        examples: how many seeds.

    Raises:
        AssertionError: a requirement is violated.
    """
    for_all(st.integers(0, 9999), lambda seed: _check_problem(make_problem, other_held_out, seed), examples)


def _check_problem(
    make_problem: Callable[[int], Problem], other_held_out: Callable[[int], Problem] | None, seed: int
) -> None:
    problem = make_problem(seed)
    case = Case(type(problem).__name__, f"seed {seed}")
    _check_members(case, problem)
    dense = problem.initial()
    before = dense.clone()
    case.require(dense.is_finite() and dense.numel() > 0, "begin at a finite point")
    curvature = problem.curvature
    case.require(math.isfinite(curvature) and curvature > 0, "have a positive finite curvature", f"it is {curvature}")
    case.require(isinstance(problem.constraint, Constraint), "have a Constraint")
    with case.guard("have a constraint that its initial point can be projected to"):
        start = problem.constraint.project(dense)
        case.require(same_form(start, dense), "have a constraint that keeps the form of its points")
    points = [dense, random_like(dense, seed + 1, rms(dense)), start]
    values = [_value(case, problem, x) for x in points]
    rebuilt = make_problem(seed)
    case.require([rebuilt.value(x) for x in points] == values, "be the same problem when made again from the same seed")
    _check_capabilities(case, problem, points, seed)
    if other_held_out is not None:
        check_held_out(case, problem, other_held_out(seed), points, seed)
    case.require(same_bits(problem.initial(), before), "not change its initial point by any call")
    case.require([problem.value(x) for x in points] == values, "not change its values by any call")


def _check_members(case: Case, problem: object) -> None:
    lacks = [name for name in ("constraint", "curvature", "initial", "value") if not hasattr(problem, name)]
    case.require(not lacks, "have the members of a Problem", f"it lacks {', '.join(lacks)}")


def _check_capabilities(case: Case, problem: Problem, points: list[Point], seed: int) -> None:
    smooth = fits(problem, Quadratic) or fits(problem, Differentiable)
    if fits(problem, Quadratic):
        check_quadratic(case.narrow("as a Quadratic"), problem, seed)
    else:
        check_curvature(case, problem, seed)
    if fits(problem, Differentiable):
        _check_gradients(case.narrow("as a Differentiable"), problem, points, seed)
    if fits(problem, Stochastic):
        _check_samples(case.narrow("as a Stochastic"), problem, points, seed)
    if fits(problem, Proximable):
        for rho in (1e-2, 1.0, 30.0):
            _check_prox(case.narrow(f"as a Proximable, rho = {rho}"), problem, points[1], rho, smooth=smooth, seed=seed)
    if fits(problem, Refittable):
        _check_refit(case.narrow("as a Refittable"), problem, points[1], smooth=smooth, seed=seed)
    if fits(problem, Minimizable):
        _check_minimum(case.narrow("as a Minimizable"), problem, points, seed)
    if fits(problem, Blockwise):
        _check_blocks(case.narrow("as a Blockwise"), problem, points, seed)
    if fits(problem, Coordinated):
        _check_coordinated(case.narrow("as a Coordinated"), problem, points)


def _repeated(case: Case, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call, which must be repeatable and must not modify its arguments."""
    before = [x.clone() if isinstance(x, Point) else x for x in arguments]
    with case.guard(f"answer {what}"):
        first, second = call(*arguments), call(*arguments)
    case.require(equal(first, second), f"return the same when {what} is called again")
    for old, new in zip(before, arguments, strict=True):
        case.require(not isinstance(new, Point) or same_bits(new, old), f"not modify the arguments of {what}")
    return first


def _value(case: Case, problem: Problem, x: Point) -> float:
    value = _repeated(case, "value", problem.value, x)
    case.require(isinstance(value, float) and math.isfinite(value), "have a finite float as value", f"it is {value!r}")
    return float(value)


def _check_gradients(case: Case, problem: Differentiable, points: list[Point], seed: int) -> None:
    for k, x in enumerate(points):
        value, gradient = _repeated(case, "value_and_gradient", problem.value_and_gradient, x)
        # Where residuals are small differences, a value is rounded like the terms that cancel in it.
        size = max(abs(value), abs(problem.value(x)), problem.curvature * float(x.norm()) ** 2)
        close = 100 * precision(x) * size
        case.require(abs(value - problem.value(x)) <= close, "give the value that `value` gives", f"{value}")
        _check_gradient(case, problem.value, x, gradient, problem.curvature, seed + k)


def _check_samples(case: Case, problem: Stochastic, points: list[Point], seed: int) -> None:
    for draw in (0, 1, 7):
        subcase = case.narrow(f"draw {draw}")
        _, gradient = _repeated(subcase, "sample_gradient", problem.sample_gradient, points[1], draw)

        def loss(x: Point, draw: int = draw) -> float:
            return problem.sample_gradient(x, draw)[0]

        _check_gradient(subcase, loss, points[1], gradient, problem.curvature, seed + draw)
    check_sampled_losses(case, problem, points)


def _check_gradient(
    case: Case, value: Callable[[Point], float], x: Point, gradient: Point, curvature: float, seed: int
) -> None:
    case.require(same_form(gradient, x), "give a gradient of the form of the point")
    case.require(not any(g.requires_grad for g in gradient.values()), "return a gradient without a graph")
    strength = max(gradient.norm(), curvature * x.norm())  # the gradient vanishes at the minimum, its rounding does not
    for k in range(_DIRECTIONS):
        d = random_like(x, seed + 100 * k + 1)
        difference, predicted = slope(value, x, d), gradient.dot(d)
        allowed = difference.rounding + 10 * precision(x) ** 0.5 * float(strength * d.norm())
        case.require(
            abs(difference.value - predicted) <= allowed,
            "give a gradient that equals central differences of its value",
            f"along a random direction the difference is {difference.value}, the gradient says {predicted}",
        )


def _check_prox(case: Case, problem: Proximable, v: Point, rho: float, *, smooth: bool, seed: int) -> None:
    weight = rho * problem.curvature

    def penalized(y: Point) -> float:
        return problem.value(y) + weight * float((y - v).norm()) ** 2

    x = _repeated(case, "prox", problem.prox, v, rho)
    case.require(same_form(x, v) and x.is_finite(), "have a finite prox of the form of its argument")
    at_prox = penalized(x)
    rivals = {"v itself": v, "the dense weights": problem.initial()}
    for factor in (0.5, 0.8, 1.25, 2.0):
        other = problem.prox(v, factor * rho)
        rivals[f"prox at {factor} rho"] = other
        rivals[f"a tenth of the way to prox at {factor} rho"] = x + 0.1 * (other - x)
        rivals[f"a tenth of the way beyond it, from prox at {factor} rho"] = x - 0.1 * (other - x)
    for name, y in rivals.items():
        at_rival = penalized(y)
        case.require(
            at_prox <= at_rival + 1000 * precision(x) * max(abs(at_prox), abs(at_rival)),
            "minimize value(x) + rho * curvature * |x - v|^2 by its prox",
            f"{name} gives {at_rival}, prox {at_prox}",
        )
    directions = [random_like(x, seed + 100 * k + 2) for k in range(_DIRECTIONS)]
    strength = problem.curvature * (1 + rho) * float(v.norm() + x.norm())
    lower = lower_neighbour(penalized, x, directions, smooth=smooth, strength=strength)
    case.require(lower is None, "minimize value(x) + rho * curvature * |x - v|^2 by its prox", lower or "")


def _check_refit(case: Case, problem: Refittable, x: Point, *, smooth: bool, seed: int) -> None:
    scores = random_like(x, seed + 3).map(torch.abs)
    masks = {f"a random mask of {p:.0%}": scores.map(lambda s, p=p: s < s.flatten().quantile(p)) for p in (0.3, 0.7)}
    masks["an empty mask"] = x.map(lambda v: torch.zeros_like(v, dtype=torch.bool))
    masks["a full mask"] = x.map(lambda v: torch.ones_like(v, dtype=torch.bool))
    if isinstance(problem.constraint, SupportConstraint):
        masks["a support of its constraint"] = problem.constraint.select(scores)
    values = {}
    for name, mask in masks.items():
        subcase = case.narrow(name)
        fitted = _repeated(subcase, "refit", problem.refit, mask)
        subcase.require(
            same_form(fitted, x) and fitted.is_finite(), "refit to a finite point of the form of its points"
        )
        off = fitted.map(lambda v, inside: v.masked_fill(inside, 0), mask).count_nonzero()
        subcase.require(off == 0, "refit to a point that vanishes off the mask", f"{off} entries do not")
        values[name] = problem.value(fitted)
        if not mask.count_nonzero():
            continue
        directions = [
            random_like(x, seed + 100 * k + 4).map(lambda d, inside: d * inside, mask) for k in range(_DIRECTIONS)
        ]
        strength = problem.curvature * float(fitted.norm() + problem.initial().norm())
        lower = lower_neighbour(problem.value, fitted, directions, smooth=smooth, strength=strength)
        subcase.require(lower is None, "refit to the minimum on the mask", lower or "")
    order = ["an empty mask", "a random mask of 30%", "a random mask of 70%", "a full mask"]
    for small, large in pairwise(order):
        slack = 1000 * precision(x) * abs(values["an empty mask"])
        case.require(values[large] <= values[small] + slack, f"be no worse refitted on {large} than on {small}")


def _check_minimum(case: Case, problem: Minimizable, points: list[Point], seed: int) -> None:
    best = _repeated(case, "minimize", problem.minimize)
    case.require(same_form(best, points[0]) and best.is_finite(), "have a finite minimum of the form of its points")
    case.require(problem.constraint.contains(best), "have a minimum that lies in its constraint")
    lowest = problem.value(best)
    near = [best + 10.0 ** -(k % 3 + 1) * random_like(best, seed + k, rms(best)) for k in range(_DIRECTIONS)]
    for rival in (points[0], *map(problem.constraint.project, (*points, *near))):
        at_rival = problem.value(rival)
        slack = 1000 * precision(best) * max(abs(lowest), abs(at_rival))
        case.require(lowest <= at_rival + slack, "give its minimum", f"it gives {lowest}, {at_rival} is reached")


def _check_coordinated(case: Case, problem: Coordinated, points: list[Point]) -> None:
    x, other = points[0], points[1]
    validation_loss = _repeated(case, "validation_loss", problem.validation_loss, x)
    case.require(
        isinstance(validation_loss, float) and math.isfinite(validation_loss),
        "return a finite float from `validation_loss`",
        f"{validation_loss!r}",
    )
    for name in problem.order:
        subcase = case.narrow(f"block {name}")
        block = problem.block(name, x)
        part = _repeated(subcase, "part", problem.part, x, name)
        subcase.require(same_form(part, block.initial()), "have a part of the form of the block's points")
        foreign = problem.joined(x, name, block, problem.part(other, name))
        subcase.require(same_form(foreign, x) and not same_bits(foreign, x), "join a solution of the block")
        again = problem.part(foreign, name)
        subcase.require(same_bits(again, problem.part(other, name)), "return as part what it joined")


def _check_blocks(case: Case, problem: Blockwise, points: list[Point], seed: int) -> None:
    order = problem.order
    case.require(len(order) > 0 and len(set(order)) == len(order), "name each block once", f"{order}")
    x, other = points[0], points[1]
    for name in order:
        subcase = case.narrow(f"block {name}")
        with subcase.guard("give each block as a problem"):
            block = problem.block(name, x)
            _check_members(subcase, block)
            mine = block.initial()
            change = block.value(mine)
        subcase.require(math.isfinite(change), "have blocks of finite value", f"{change}")
        if fits(block, Minimizable):
            _check_minimum(subcase, block, [mine, random_like(mine, seed, rms(mine))], seed)
        if mine.keys() <= x.keys() and all(mine[key].shape == x[key].shape for key in mine):
            moved = Point({key: other[key] for key in mine})
            change = block.value(moved) - block.value(Point({key: x[key] for key in mine}))
            whole = problem.value(Point({**x, **moved})) - problem.value(x)
            close = 1000 * precision(x) * max(abs(problem.value(x)), abs(whole), abs(change))
            subcase.require(
                abs(change - whole) <= close, "have blocks whose values differ as its own do", f"{change}, {whole}"
            )
