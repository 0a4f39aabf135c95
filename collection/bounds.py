"""Proves bounds of the problems of a subset, and offers their certificates to the records.

    python -m collection.bounds [--subset small] [--problems PATTERN] [--rounds 6] [--iterations 40] [--minutes 30]

The multipliers are those of `admm_prune.solvers.reference.dual`; in the certificate the shift is rounded to float16,
which changes the bound in second order only, and the checker proves the bound of what is stored. A problem that has a
record with the same settings is left out, so that the same command continues where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch

from admm_prune.errors import UserError
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers.reference.cells import Cells
from admm_prune.solvers.reference.dual import dual_bound, maximized
from collection import build, checker, record
from collection.checker import Array, Problem
from collection.files import write_certificate
from collection.sets import constraint_of

SOLVER = "dual_bound"


def multipliers(problem: Problem, rounds: int, iterations: int) -> dict[str, Array] | None:
    """`diagonal`, `diagonal_of_row` and `shift` of a dual certificate; None where nothing is proved."""
    if problem.is_stack:
        return _of_stack(problem, rounds, iterations)
    matrices = (torch.from_numpy(x.copy()) for x in (problem.weight, problem.hessian))
    layer = LayerReconstruction(*matrices, constraint_of(problem.set, problem.weight.shape), ridge=0.0)
    found = dual_bound(layer, rounds=rounds, iterations=iterations)
    return None if found is None else dict(found.tensors())


def _of_stack(problem: Problem, rounds: int, iterations: int) -> dict[str, Array]:
    """All rows at once, each with its own diagonal, in coordinates where every Hessian has a unit diagonal."""
    scale = np.sqrt(np.diagonal(problem.hessian, axis1=1, axis2=2))
    hessian = torch.from_numpy(problem.hessian / scale[:, :, None] / scale[:, None, :])
    target = torch.from_numpy((problem.weight * scale)[:, None, :])
    count = len(scale)
    keep = np.broadcast_to(np.asarray(problem.set["keep"]), (count,)).tolist()
    cells = Cells.per_row(problem.weight.shape, keep)
    found = maximized(hessian, target, cells, device="cpu", rounds=rounds, iterations=iterations)
    return {
        "diagonal": found.diagonal.numpy() * scale**2,
        "diagonal_of_row": np.arange(count, dtype=np.int32),
        "shift": found.shift[:, 0].numpy() / scale,
    }


def prove(problem: Problem, rounds: int, iterations: int) -> str:
    """Finds, stores and offers a certificate; a line about it.

    Raises:
        CheckError: what is stored proves nothing.
    """
    began = time.process_time()
    tensors = multipliers(problem, rounds, iterations)
    if tensors is None:
        return f"{problem.id}: no bound"
    below = np.nextafter(tensors["diagonal"].astype(np.float32), np.float32(0))
    stored = {**tensors, "diagonal": below, "diagonal_of_row": tensors["diagonal_of_row"].astype(np.int32)}
    stored["shift"] = tensors["shift"].astype(np.float16)
    seconds, date = f"{time.process_time() - began:.3g}", datetime.date.today().isoformat()
    notes = {"solver": SOLVER, "settings": _settings(rounds, iterations), "seconds": seconds, "date": date}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "certificate.safetensors"
        write_certificate(path, problem, "dual", stored, notes)
        return record.offer(problem.id, None, path)[0]


def _settings(rounds: int, iterations: int) -> str:
    return f"rounds={rounds}, iterations={iterations}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subset", choices=build.SUBSETS)
    parser.add_argument("--problems", default="*", help="a pattern of their ids")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=30.0, help="no proof is started after them")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60 * given.minutes
    missing = 0
    for identity in build.problem_ids(given.subset):
        known = record.records().get(identity, {})
        done = known.get("bound") and known.get("bound_settings") == _settings(given.rounds, given.iterations)
        if done or not fnmatch(identity, given.problems):
            continue
        if time.monotonic() > deadline:
            missing += 1
            continue
        try:
            print(prove(build.load(identity), given.rounds, given.iterations), flush=True)
        except (UserError, checker.CheckError) as error:
            print(error, file=sys.stderr)
    print(f"{missing} proofs are left" if missing else "all proofs are done")


if __name__ == "__main__":
    main()
