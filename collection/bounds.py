"""Proves bounds of the problems of a subset, and offers their certificates to the records.

    python -m collection.bounds [--subset small] [--problems PATTERN] [--kind block] [--width 32] [--rounds 5]
                                [--iterations 20] [--minutes 30] [--again]

Layers get the multipliers of `block_bound`, or of `dual_bound` with `--kind dual`; stacks of rows the trees of
`prove_rows`, whose solutions are offered too. In the certificate of a layer the shift is rounded to float16, which
changes the bound in second order only, and the checker proves the bound from what is stored. A problem whose record has
the same settings, or a stronger kind, is left out, so that the same command continues where it stopped; proofs that did
not become the record are repeated. `--again` repeats all proofs, to reproduce a record.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers.reference import block_bound, dual_bound, prove_rows
from collection import build, checker, record
from collection.checker import Array, Problem
from collection.files import write_certificate, write_solution
from collection.sets import constraint_of

ROW_GAP = 0.0095  # stays below 1 % when the multipliers are rounded
_ROUNDED = 1e-6  # of the diagonal of H: more than the rounding of the blocks to float32


@dataclass(frozen=True)
class Effort:
    """The effort for a layer: options of the command."""

    kind: str
    width: int
    rounds: int
    iterations: int


def prove(problem: Problem, effort: Effort) -> str:
    """Finds, stores and offers a certificate, and for a stack of rows also the solution that it proves optimal.

    Returns:
        One line about the outcome.

    Raises:
        CheckError: the stored data prove nothing.
    """
    began = time.process_time()
    found = _of_stack(problem) if problem.is_stack else _of_layer(problem, effort)
    if found is None:
        return f"{problem.id}: no bound"
    kind, weight, tensors = found
    solver, settings = _by(problem, effort)
    seconds, date = f"{time.process_time() - began:.3g}", datetime.date.today().isoformat()
    notes = {"solver": solver, "settings": settings, "seconds": seconds, "date": date}
    with tempfile.TemporaryDirectory() as folder:
        solution, certificate = (Path(folder) / f"{name}.safetensors" for name in ("solution", "certificate"))
        write_certificate(certificate, problem, kind, tensors, notes)
        if weight is not None:
            write_solution(solution, problem, weight, notes)
        return "; ".join(record.offer(problem.id, None if weight is None else solution, certificate))


def _by(problem: Problem, effort: Effort) -> tuple[str, str]:
    """The solver that proves a bound, and the command that finds it again."""
    command = f"python -m collection.bounds --problems {problem.id}"
    if problem.is_stack:
        return "prove_rows", f"{command} --again"
    options = f"--rounds {effort.rounds} --iterations {effort.iterations} --again"
    if effort.kind == "dual":
        return "dual_bound", f"{command} --kind dual {options}"
    return "block_bound", f"{command} --width {effort.width} {options}"


def _of_layer(problem: Problem, effort: Effort) -> tuple[str, None, dict[str, Any]] | None:
    weight, hessian = (torch.from_numpy(x.copy()) for x in (problem.weight, problem.hessian))
    layer = LayerReconstruction(weight, hessian, constraint_of(problem.set, problem.weight.shape), ridge=0.0)
    if effort.kind == "block":
        blocked = block_bound(layer, width=effort.width, rounds=effort.rounds, iterations=effort.iterations)
        if blocked is None:
            return None
        size = blocked.columns.shape[1]
        room = _ROUNDED * np.diagonal(problem.hessian)[blocked.columns][:, :, None] * np.eye(size)
        blocks = (blocked.blocks - room).astype(np.float32)
        columns = blocked.columns.astype(np.int32)
        return "block", None, {"columns": columns, "blocks": blocks, "shift": blocked.shift.astype(np.float16)}
    found = dual_bound(layer, rounds=effort.rounds, iterations=effort.iterations)
    if found is None:
        return None
    tensors: dict[str, Any] = {
        "diagonal": _below(found.diagonal),
        "diagonal_of_row": found.diagonal_of_row.astype(np.int32),
        "shift": found.shift.astype(np.float16),
    }
    return "dual", None, tensors


def _below(diagonal: Array) -> NDArray[np.float32]:
    """In float32, and not above."""
    return np.nextafter(diagonal.astype(np.float32), np.float32(0))


def _of_stack(problem: Problem) -> tuple[str, Array, dict[str, Any]]:
    """The tree of every row, and the best solutions found on the way."""
    keep = np.broadcast_to(np.asarray(problem.set["keep"]), (len(problem.weight),)).tolist()
    found = prove_rows(torch.from_numpy(problem.hessian), torch.from_numpy(problem.weight), keep, gap=ROW_GAP)
    row_of = found.row_of_leaf.astype(np.int32)
    tree: dict[str, Any] = {"leaves": found.leaves, "row_of_leaf": row_of, "diagonal_of_leaf": row_of}
    return "tree", found.weight, {**tree, "diagonal": _below(found.diagonal), "shift": found.shift.astype(np.float32)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subset", choices=build.SUBSETS)
    parser.add_argument("--problems", default="*", help="a pattern of their ids")
    parser.add_argument("--kind", choices=("block", "dual"), default="block", help="of the certificates of layers")
    parser.add_argument("--width", type=int, default=32, help="columns of a block, at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=30.0, help="after which no proof is started")
    parser.add_argument("--again", action="store_true", help="repeat proofs that have a record with the same settings")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    effort = Effort(given.kind, given.width, given.rounds, given.iterations)
    deadline = time.monotonic() + 60 * given.minutes
    missing = 0
    for problem in build.built(given.subset, given.problems):
        known = record.records().get(problem.id, {})
        solver, settings = _by(problem, effort)
        recorded = solver in known.get("bound_solver", "") and settings in known.get("bound_settings", "")
        recorded |= solver == "dual_bound" and known.get("bound_solver") == "block_bound"
        if recorded and not given.again:
            continue
        if time.monotonic() > deadline:
            missing += 1
            continue
        try:
            print(prove(problem, effort), flush=True)
        except checker.CheckError as error:
            print(error, file=sys.stderr)
    print(f"{missing} proofs are left" if missing else "all proofs are done")


if __name__ == "__main__":
    main()
