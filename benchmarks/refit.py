"""The exact refit of every matrix of a model for a given mask: time, residuals, and the ratio to a one-shot solve.

    python -m benchmarks.refit OUT --model embedded --data embedded [--samples 16] [--length 512] [--sparsity 0.5]
        [--mask wanda|random] [--ridge 0.03] [--blocks 30]

All matrices are those of the dense model, on its own inputs. Every row of every matrix is refitted and counts in the
figures: `residual` is the largest residual of a row, recomputed by NumPy from the weights in float64, and `above` the
number of rows whose residual is above 1e-6; `stored` and `stored_above` are the same for weights rounded to float32.
The one-shot solve is SparseGPT. Times are CPU times of one thread. The floor is the time of the operations of the
factorizations alone, sum |S|^3 / 3, at the rate of a product of two float32 matrices of order 1024.

OUT/rows.csv has one row for each matrix, written as soon as it is measured; the same command continues where it
stopped, and writes OUT/refit.txt.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from admm_prune.models.capture import BlockStream
from admm_prune.models.loading import load
from admm_prune.models.structure import decoder_blocks
from admm_prune.ops.exact_refit import TOLERANCE, exact_refit
from admm_prune.point import Point
from admm_prune.problems.constraints import RowWise
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.runs.texts import Texts
from admm_prune.settings import TextSettings
from admm_prune.solvers.obs import SparseGPT
from admm_prune.solvers.one_shot import Wanda
from benchmarks.journal import Journal
from benchmarks.machine import headline, machine

COLUMNS = (
    *("out", "in", "seconds", "one_shot_seconds", "floor_seconds"),
    *("residual", "above", "stored", "stored_above", "singular"),
)


def problems(
    chosen: argparse.Namespace, sparse_set: RowWise, done: set[str]
) -> Iterator[tuple[str, LayerReconstruction]]:
    """The layer problems of a model, by the name of the weight; blocks that are done are passed by."""
    loaded = load(chosen.model, dtype="float32")
    text = TextSettings(data=chosen.data, samples=chosen.samples, length=chosen.length, eval_samples=1)
    blocks = decoder_blocks(loaded.model)
    stream = BlockStream(loaded.model, blocks, Texts(text, loaded).calibration(), "cpu")
    for index, block in enumerate(blocks[: chosen.blocks]):
        missing = {view.name for view in block.weights} - done
        for shared in stream.collect(index, missing) if missing else ():
            for view in shared.weights:
                gram = shared.statistics.gram
                yield view.name, LayerReconstruction(view.read(), gram, sparse_set, ridge=chosen.ridge)
        stream.advance(index)


def refitted(problem: LayerReconstruction, sparse_set: RowWise, mask: str, speed: float) -> dict[str, Any]:
    began = time.process_time()
    SparseGPT().solve(problem)
    one_shot = time.process_time() - began
    if mask == "random":
        scores = torch.rand(problem.weight.shape, generator=torch.Generator().manual_seed(0))
        support = sparse_set.select(Point(weight=scores))["weight"]
    else:
        support = Wanda().solve(problem).solution["weight"] != 0
    hessian, minimizer = problem.hessian, problem.minimizer
    began = time.process_time()
    solved = exact_refit(hessian, minimizer, support)
    seconds = time.process_time() - began
    exact, stored = (residuals(hessian, minimizer, v, support) for v in (solved.weight, solved.weight.float()))
    return {
        "out": len(minimizer),
        "in": len(hessian),
        "seconds": seconds,
        "one_shot_seconds": one_shot,
        "floor_seconds": float((support.sum(1).double() ** 3 / 3).sum()) / speed,
        "residual": float(exact.max()),
        "above": int((exact > TOLERANCE).sum()),
        "stored": float(stored.max()),
        "stored_above": int((stored > TOLERANCE).sum()),
        "singular": solved.minimum_norm,
    }


def residuals(hessian: Tensor, minimizer: Tensor, weight: Tensor, support: Tensor) -> np.ndarray[Any, Any]:
    """|(A (v - w))_S| / |(A w)_S| of every row (out,), where A has a unit diagonal, in float64, by NumPy alone."""
    a, w, v, s = (x.double().numpy() for x in (hessian, minimizer, weight, support))
    scale = np.sqrt(np.diag(a))
    a, w, v = a / scale / scale[:, None], w * scale, v * scale
    above, below = (np.linalg.norm(x @ a * s, axis=1) for x in (v - w, w))
    return np.divide(above, below, out=np.zeros_like(above), where=above > 0)


def product_speed() -> float:
    """Operations a second of a product of two float32 matrices of 1024, 2 n^3 of them."""
    a = torch.rand(1024, 1024, generator=torch.Generator().manual_seed(0))
    a @ a
    began = time.process_time()
    for _ in range(3):
        a @ a
    return 3 * 2 * 1024**3 / (time.process_time() - began)


def report(journal: Journal) -> str:
    """Every shape of matrix, and all of them."""
    kinds: dict[tuple[int, int], list[dict[str, float]]] = {}
    for record in journal.records:
        row = {name: float(record[name]) for name in COLUMNS}
        kinds.setdefault((int(row["out"]), int(row["in"])), []).append(row)
    title = f"{'shape':>12}{'matrices':>9}{'rows':>8}{'refit s':>9}{'one-shot s':>11}{'floor s':>9}"
    lines = [title + f"{'residual':>10}{'above':>6}{'stored':>9}{'above':>6}{'singular':>9}"]
    every = {f"{out} x {width}": rows for (out, width), rows in sorted(kinds.items())}
    for shape, rows in [*every.items(), ("all", [row for some in kinds.values() for row in some])]:
        total = {name: sum(row[name] for row in rows) for name in COLUMNS}
        largest = {name: max(row[name] for row in rows) for name in ("residual", "stored")}
        lines.append(
            f"{shape:>12}{len(rows):>9}{total['out']:>8.0f}"
            f"{total['seconds']:>9.1f}{total['one_shot_seconds']:>11.1f}{total['floor_seconds']:>9.1f}"
            f"{largest['residual']:>10.1e}{total['above']:>6.0f}{largest['stored']:>9.1e}{total['stored_above']:>6.0f}"
            f"{total['singular']:>9.0f}"
        )
    lines.append(f"{total['seconds'] / total['one_shot_seconds']:.1f} times the one-shot solve")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--mask", choices=("wanda", "random"), default="wanda")
    parser.add_argument("--ridge", type=float, default=0.03)
    parser.add_argument("--blocks", type=int, help="the first ones; all by default")
    parser.add_argument("--date", help="to put in the report; today by default")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    speed = product_speed()
    chosen.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(chosen.out / "rows.csv", COLUMNS, key=("weight",))
    sparse_set = RowWise(chosen.sparsity)
    for name, problem in problems(chosen, sparse_set, {record["weight"] for record in journal.records}):
        journal.add({"weight": name}, [refitted(problem, sparse_set, chosen.mask, speed)])
    head = (
        f"{headline(machine(chosen.date))}\n{chosen.samples} sequences of {chosen.length} tokens, the {chosen.mask} "
        f"mask with {chosen.sparsity:.0%} of every row pruned, ridge {chosen.ridge:g}; seconds of the processor"
    )
    text = f"{head}\n\n{report(journal)}"
    (chosen.out / "refit.txt").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
