"""Gives some problems a long search, to learn how far the records are from what time alone can find.

    python -m collection.long_search [--problems PATTERN] [--seconds 300] [--seed 0]

By turns ADMM with penalties drawn at random, improved by swaps, and the best point with some entries of each row
exchanged at random, from which swaps go on; of each row the better result is kept where that leaves all budgets as they
are. Where supports are made of tiles, this holds for tiles and strips of tiles. Rows that share a budget then exchange
entries, and exact exchanges within rows end the search. Solutions are offered to the records, and the values before and
after are rows of `long_search.csv`. The time is CPU time of each problem. Without a pattern the problems are six of
several models and sets.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problem import StripConstraint
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.base import Solver
from admm_prune.solvers.exchange_search import ExchangeSearch
from admm_prune.solvers.local_search import LocalSearch
from admm_prune.solvers.refit import Refit
from admm_prune.solvers.schedules import LogSpaced
from benchmarks.journal import Journal
from collection import build, record
from collection.checker import Problem
from collection.files import write_solution
from collection.sets import constraint_of

LOG = build.FOLDER / "long_search.csv"
KEY = ("id", "seconds", "seed", "date")
COLUMNS = ("before", "after", "lowered_by", "restarts", "kicks")
PROBLEMS = (
    "embedded.2.k_proj/row-50",
    "embedded.2.v_proj/2of4",
    "smollm2-135m.15.k_proj/unstructured-70",
    "smollm2-135m.15.v_proj/row-70",
    "stories260k.2.q_proj/block4x4-50",
    "stories260k.2.o_proj/columns-50",
)
_KICKS = 3  # for each restart
_MOST_EXCHANGED = 6  # entries of a row, or tiles of a strip
_SWAPS = LocalSearch(rounds=48, candidates=16, refits=8, patience=6)
_EXACT = ExchangeSearch(rounds=256, candidates=None, transfers=16)
_TRANSFERS = ExchangeSearch(rounds=256, transfers=16)


@dataclass
class Search:
    """The best point, and how it was reached."""

    weight: Tensor
    value: float
    restarts: int = 0
    kicks: int = 0


def random_admm(draw: np.random.Generator) -> ADMM:
    """ADMM whose penalty rises between two random values over a random number of iterations."""
    over = int(draw.choice((32, 60, 120, 240)))
    start, stop = 10 ** draw.uniform(-2, -0.5), 10 ** draw.uniform(-0.3, 0.4)
    penalty = LogSpaced(start, stop, over=over, every=int(draw.integers(1, 6)))
    relaxation = float(draw.uniform(1, 1.5))
    return ADMM(penalty=penalty, relaxation=relaxation, fast_until=0, max_iterations=over, refit_iterations=10)


def exchanged(weight: Tensor, tile: tuple[int, int], group: int, draw: np.random.Generator) -> Tensor:
    """A point with the support of V (out, in) but for some kept tiles of each strip, each for one of its group."""
    height, width = tile
    tiles = weight.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    kept_tiles = (tiles != 0).any(3).any(1)
    strips, count = kept_tiles.shape
    for _ in range(int(draw.integers(1, _MOST_EXCHANGED + 1))):
        order = torch.from_numpy(draw.random((strips, count)))
        start = torch.from_numpy(draw.integers(0, count // group, strips)) * group
        within = (torch.arange(count) >= start[:, None]) & (torch.arange(count) < start[:, None] + group)
        kept, free = within & kept_tiles, within & ~kept_tiles
        both = kept.any(1) & free.any(1)
        drop, add = (torch.where(mask, order, -1.0).argmax(1) for mask in (kept, free))
        rows = both.nonzero()[:, 0]
        kept_tiles[rows, drop[rows]] = False
        kept_tiles[rows, add[rows]] = True
    support = kept_tiles.repeat_interleave(height, 0).repeat_interleave(width, 1)
    smallest = weight.abs().max() * 1e-6
    return torch.where(support, torch.where(weight == 0, smallest, weight), 0.0)


def search(problem: Problem, seconds: float, seed: int) -> Search:
    """The best point within the CPU seconds, and at least one restart; begun without the record."""
    draw = np.random.default_rng(seed)
    constraint = constraint_of(problem.set, problem.weight.shape)
    weight, hessian = (torch.from_numpy(x.copy()) for x in (problem.weight, problem.hessian))
    layer = LayerReconstruction(weight, hessian, constraint, ridge=0.0)
    assert isinstance(constraint, StripConstraint), "as all sets of the collection"
    (strips,) = constraint.strips(problem.weight.shape) or ()
    tile = (strips.height, strips.width)
    swaps: Solver = _SWAPS if tile == (1, 1) else replace(_EXACT, transfers=0)
    several = strips.span is None and strips.rows > strips.height  # strips with one budget
    group = (strips.span or weight.shape[1]) // strips.width
    best = Search(torch.zeros_like(weight), float(_losses(torch.zeros_like(weight), layer).sum()))

    def offer(candidate: Tensor) -> None:
        """Strip by strip where any points of the set may be mixed, or these two, with the same counts in every row."""
        losses, others = (_losses(x, layer).view(-1, tile[0]).sum(1) for x in (best.weight, candidate))
        counts = [(x != 0).sum(1) for x in (best.weight, candidate)]
        if strips.span is not None or torch.equal(*counts):
            better = (others < losses).repeat_interleave(tile[0])
            candidate = torch.where(better[:, None], candidate, best.weight)
            others = torch.minimum(losses, others)
        if float(others.sum()) < best.value:
            best.weight, best.value = candidate, float(others.sum())

    ends = time.process_time() + seconds
    for kick in _turns():
        if kick:
            start = Point(weight=exchanged(best.weight, tile, group, draw))
            best.kicks += 1
        else:
            start = random_admm(draw).solve(layer).solution
            best.restarts += 1
        offer(swaps.solve(layer, start=start).solution["weight"])
        if several:
            offer(_TRANSFERS.solve(layer, start=Point(weight=best.weight)).solution["weight"])
        if time.process_time() > ends:
            break
    final = _EXACT.solve(layer, start=Point(weight=best.weight))
    offer(Refit(exact=True).solve(layer, start=final.solution).solution["weight"])
    return best


def _turns() -> Iterator[bool]:
    while True:
        yield False
        yield from [True] * _KICKS


def _losses(weight: Tensor, layer: LayerReconstruction) -> Tensor:
    away = weight - layer.minimizer
    return ((away @ layer.hessian) * away).sum(1)


def run(problem: Problem, seconds: float, seed: int) -> dict[str, object]:
    """Searches without the record, offers what is found, and returns the row of the log."""
    row = record.records().get(problem.id)
    before = float(row["value"]) if row and row["value"] else None
    began, date = time.process_time(), datetime.date.today().isoformat()
    found = search(problem, seconds, seed)
    spent = time.process_time() - began
    command = f"python -m collection.long_search --problems {problem.id} --seconds {seconds:g} --seed {seed}"
    notes = {"solver": "long_search", "settings": command, "seconds": f"{spent:.3g}", "date": date}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "solution.safetensors"
        after = write_solution(path, problem, found.weight.numpy(), notes).upper
        record.offer(problem.id, path)
    lowered = None if before is None else 1 - after / before
    return {
        "id": problem.id,
        "seconds": f"{seconds:g}",
        "seed": str(seed),
        "date": date,
        "before": before,
        "after": after,
        "lowered_by": lowered,
        "restarts": found.restarts,
        "kicks": found.kicks,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", help="a pattern of their ids")
    parser.add_argument("--seconds", type=float, default=300.0, help="of CPU time, for each problem")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = PROBLEMS if given.problems is None else (given.problems,)
    for problem in (problem for pattern in chosen for problem in build.built(None, pattern)):
        if problem.is_stack:
            continue
        row = run(problem, given.seconds, given.seed)
        with record.locked(LOG):
            Journal(LOG, COLUMNS, KEY).add({name: str(row[name]) for name in KEY}, [row])
        print(*(f"{name}={value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
