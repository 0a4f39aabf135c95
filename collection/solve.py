"""Runs solvers over a subset of the collection, and offers every solution to the records.

    python -m collection.solve [--subset small] [--problems PATTERN] [--solvers a,b] [--minutes 30] [--again]

Each run is a row of `runs.csv`, with the settings of the solver, from which the profiles are drawn. The same command
continues where it stopped; `--again` repeats runs, to reproduce a record. All solvers use H as it is stored, with its
ridge, and no ridge of their own. `cost` is CPU time in units of products H W^T of the layer's shape, measured next to
the solve; it is empty for stacks, whose rows are solved one by one.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from admm_prune.data.layer_file import LayerFile
from admm_prune.methods.local import method_named
from admm_prune.problems.constraints import RowWise, SparseSet
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers import reference
from admm_prune.solvers.base import Solver
from admm_prune.solvers.local_search import LocalSearch
from benchmarks.configurations import CONFIGURATIONS
from benchmarks.journal import Journal
from benchmarks.measuring import FAILURES, Product
from collection import build, checker, record
from collection.checker import Array, Problem
from collection.files import write_solution
from collection.sets import constraint_of

RUNS = build.FOLDER / "runs.csv"
KEY = ("id", "solver", "settings")
COLUMNS = ("status", "value", "relative_error", "cpu_seconds", "cost", "date", "notes")
DEFAULT = ("magnitude", "wanda", "sparsegpt", "sparsegpt-polished", "alps", "admm-fast", "admm", "admm-best", "swaps")
_ROW_SECONDS = 2.0  # of branch and bound, for one row

EXTRA: Mapping[str, Callable[[], Solver]] = {
    "swaps": LocalSearch,
    "branch-and-bound": lambda: reference.BranchAndBound(time_limit=_ROW_SECONDS),
}


def solver_named(name: str) -> Solver:
    """A solver of the leaderboard, of this module, or of an installed package that declares it.

    Raises:
        UserError: there is none.
    """
    if name in EXTRA:
        return EXTRA[name]()
    return (CONFIGURATIONS[name] if name in CONFIGURATIONS else method_named(name)).make()


def solve(problem: Problem, name: str) -> tuple[Array, float, str]:
    """(V, CPU seconds, notes) of a solver.

    Raises:
        one of FAILURES: the solver rejects the problem.
    """
    solver, constraint = solver_named(name), constraint_of(problem.set, problem.weight.shape)
    dtype = torch.float64 if name in EXTRA else torch.float32
    if not problem.is_stack:
        layer = _layer(problem.weight, problem.hessian, constraint, dtype)
        began = time.process_time()
        result = solver.solve(layer)
        spent = time.process_time() - began
        return result.solution["weight"].double().numpy(), spent, "; ".join(result.notes)
    weight, began = np.zeros_like(problem.weight), time.process_time()
    keeps = np.broadcast_to(np.asarray(problem.set["keep"]), (len(weight),))
    for i, keep in enumerate(keeps):
        one = RowWise(1 - keep / weight.shape[1], int(keep))
        layer = _layer(problem.weight[i : i + 1], problem.hessian[i], one, dtype)
        weight[i] = solver.solve(layer).solution["weight"].double().numpy()
    return weight, time.process_time() - began, ""


def _layer(weight: Array, hessian: Array, constraint: SparseSet, dtype: torch.dtype) -> LayerReconstruction:
    w, h = (torch.from_numpy(x.copy()).to(dtype) for x in (weight, hessian))
    return LayerReconstruction(w, h, constraint, ridge=0.0)


def command(problem: str, name: str) -> str:
    """The command that reproduces a solution, which is recorded as its settings."""
    return f"python -m collection.solve --problems {problem} --solvers {name} --again"


def run(problem: Problem, name: str) -> dict[str, Any]:
    """Solves a problem, offers the solution and returns the row of the journal."""
    date = datetime.date.today().isoformat()
    row: dict[str, Any] = {**dict.fromkeys(COLUMNS), "date": date}
    try:
        weight, seconds, notes = solve(problem, name)
    except (*FAILURES, NotImplementedError) as error:
        return {**row, "status": "refused", "notes": " ".join(str(error).split())}
    described = {"solver": name, "settings": command(problem.id, name), "seconds": f"{seconds:.3g}", "date": date}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "solution.safetensors"
        reached = write_solution(path, problem, weight, described)
        try:
            record.offer(problem.id, path)
        except checker.CheckError as error:
            return {**row, "status": "rejected", "notes": str(error).replace(str(path), "its solution")}
    row |= {"status": "solved", "value": f"{reached.upper:.10g}", "cpu_seconds": seconds, "notes": notes}
    row["relative_error"] = reached.upper / (checker.energy(problem) or 1.0)
    if not problem.is_stack:
        w, h = (torch.from_numpy(x).float() for x in (problem.weight, problem.hessian))
        product = Product(LayerFile(w, h))
        row["cost"] = seconds / max(float(np.median([lap.cpu for lap in product.sample()])), 1e-9)
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subset", choices=build.SUBSETS)
    parser.add_argument("--problems", default="*", help="a pattern of their ids, such as 'stories260k.*/row-50'")
    parser.add_argument("--solvers", help=f"default: {','.join(DEFAULT)}; stacks of rows also branch-and-bound")
    parser.add_argument("--minutes", type=float, default=30.0, help="after which no run is started")
    parser.add_argument("--again", action="store_true", help="repeat runs that have a row in runs.csv; the row stays")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60 * given.minutes
    journal = Journal(RUNS, COLUMNS, KEY)
    missing = 0
    for problem in build.built(given.subset, given.problems):
        names = given.solvers.split(",") if given.solvers else [*DEFAULT]
        if problem.is_stack and not given.solvers:
            names.append("branch-and-bound")
        for name in names:
            key = {"id": problem.id, "solver": name, "settings": repr(solver_named(name))}
            known = bool(journal.find(key))
            if known and not given.again:
                continue
            if time.monotonic() > deadline:
                missing += 1
                continue
            row = run(problem, name)
            if not known:
                with record.locked(RUNS):
                    journal.add(key, [row])
            print(problem.id, name, row["status"], row["relative_error"], flush=True)
    print(f"{missing} runs are left" if missing else "all runs are done")


if __name__ == "__main__":
    main()
