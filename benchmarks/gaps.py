"""The distance of ADMM from the proved optimum, over many small rows.

    python -m benchmarks.gaps OUT [--rows 200] [--width 32] [--families spectral,wishart] [--time-limit 30]

Each row has its own Hessian and weights, and keeps half of its entries. Branch and bound proves the optimum of each;
the gap of a method is its objective relative to that, minus 1. Families: `spectral`, a spectrum log-spaced over 1e6 in
a random basis, no ridge; `wishart`, correlated inputs of uneven channels, ridge 0.01. Everything is in float64. ADMM is
compared with variants that may close its gap: an exact refit, 1-swaps, kicks, and a much lower initial penalty.

OUT receives gaps.csv, gaps.txt, gaps.json and gaps.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from admm_prune.point import Point
from admm_prune.problems.constraints import RowWise
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers.admm import ADMM
from admm_prune.solvers.base import Solver
from admm_prune.solvers.obs import SparseGPT
from admm_prune.solvers.reference import BranchAndBound
from admm_prune.solvers.reference.rigorous import Mask
from admm_prune.solvers.reference.rows import Row, search, separate, swap_gains
from admm_prune.solvers.refit import Refit
from admm_prune.solvers.schedules import LogSpaced
from benchmarks.journal import write_csv
from benchmarks.machine import headline, machine

FAMILIES = ("spectral", "wishart")
CONDITION, RIDGE = 1e6, 0.01
SOLVERS: Mapping[str, Callable[[], Solver]] = {
    "sparsegpt, polished": lambda: Refit(SparseGPT()),
    "alps": ADMM.alps,
    "admm fast": ADMM.fast,
    "admm": ADMM,
    "admm best": ADMM.best,
    "admm patient": lambda: ADMM(penalty=LogSpaced(1e-6, 1.0, over=300), max_iterations=300),
}
KICKS = 50
PLOTTED = ("admm", "admm best", "admm patient", "admm best, swaps", "admm best, swaps, kicks")
QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
SHARES = (1e-9, 0.01, 0.05)
_LEAST_GAIN = 1e-10  # of a swap, relative to the loss


@dataclass(frozen=True)
class Gap:
    """What one method reached on one row; the same columns as gaps.csv."""

    family: str
    row: int
    method: str
    objective: float
    optimum: float
    gap: float
    proved: bool
    seconds: float


def drawn(family: str, width: int, seed: int) -> LayerReconstruction:
    """One row of a family, float64, to keep half of its entries.

    Raises:
        ValueError: no such family.
    """
    generator = np.random.default_rng([FAMILIES.index(family), width, seed])
    basis, _ = np.linalg.qr(generator.standard_normal((width, width)))
    if family == "spectral":
        gram, ridge = (basis * np.logspace(0, -np.log10(CONDITION), width)) @ basis.T, 0.0
    else:
        spectrum = np.arange(1, width + 1) ** -1.1
        mixing = basis * np.sqrt(spectrum / spectrum.mean() * 0.98 + 0.02)
        gain = np.exp(0.35 * generator.standard_normal(width))
        inputs = generator.standard_normal((8 * width, width)) @ mixing.T * gain
        gram, ridge = inputs.T @ inputs, RIDGE
    weight = torch.from_numpy(generator.standard_normal((1, width)))
    return LayerReconstruction(weight, torch.from_numpy((gram + gram.T) / 2), RowWise(0.5), ridge=ridge)


def gaps_of_row(family: str, width: int, seed: int, time_limit: float) -> Iterator[Gap]:
    """Every method on one row, and the proof itself as the method "proof"."""
    problem = drawn(family, width, seed)
    proof = BranchAndBound(time_limit=time_limit, max_width=max(64, width)).solve(problem)
    row = separate("gaps", problem).rows[0]
    floor = problem.value(Point(weight=problem.minimizer))
    optimum = proof.objective

    def gap(method: str, objective: float, seconds: float) -> Gap:
        gained = objective / optimum - 1 if optimum > 0 else 0.0
        return Gap(family, seed, method, objective, optimum, gained, proof.status.name == "SOLVED", seconds)

    yield gap("proof", optimum, proof.seconds)
    began = time.perf_counter()
    loss = search(row)[1]
    yield gap("greedy, swaps", floor + loss, time.perf_counter() - began)
    for name, make in SOLVERS.items():
        result = make().solve(problem)
        yield gap(name, result.objective, result.seconds)
        if not name.startswith("admm"):
            continue
        support = row.completed(_mask(result.solution["weight"]))
        for improvement, improve in IMPROVEMENTS.items():
            began = time.perf_counter()
            loss = improve(row, support)
            yield gap(f"{name}, {improvement}", floor + loss, result.seconds + time.perf_counter() - began)


def swapped(row: Row, support: Mask) -> float:
    """The loss of the local minimum for 1-swaps that steepest descent reaches from a support."""
    support, loss = support.copy(), row.loss(support)
    while True:
        inside, outside = np.flatnonzero(support), np.flatnonzero(~support)
        gains = swap_gains(row.hessian, row.target, inside, outside)
        i, j = np.unravel_index(int(np.argmax(gains)), gains.shape)
        support[inside[i]], support[outside[j]] = False, True
        value = row.loss(support)
        if not value < loss * (1 - _LEAST_GAIN):
            return loss
        loss = value


# From a support to the loss of a better one, each with its exact refit; kicks start from greedy elimination too.
IMPROVEMENTS: Mapping[str, Callable[[Row, Mask], float]] = {
    "refit": lambda row, support: row.loss(support),
    "swaps": swapped,
    "swaps, kicks": lambda row, support: search(row, (support,), KICKS)[1],
}


def summary(gaps: Sequence[Gap]) -> str:
    """A table of quantiles and shares for each family; only rows whose optimum is proved count."""
    lines = []
    wide = max(len(gap.method) for gap in gaps)
    for family in dict.fromkeys(gap.family for gap in gaps):
        mine = [gap for gap in gaps if gap.family == family]
        proofs = [gap for gap in mine if gap.method == "proof"]
        proved = sum(gap.proved for gap in proofs)
        times = sorted(gap.seconds for gap in proofs)
        lines.append(
            f"{family}: {proved} of {len(proofs)} optima proved, in {statistics.median(times):.3f} s median, "
            f"{times[-1]:.2f} s at most"
        )
        titles = [*(f"q{100 * q:g}" if q < 1 else "max" for q in QUANTILES), "optimal", "in 1 %", "in 5 %", "ms"]
        lines.append(f"{'gap to the optimum':{wide}}" + "".join(f"{title:>10}" for title in titles))
        for method in dict.fromkeys(gap.method for gap in mine if gap.method != "proof"):
            solved = [gap for gap in mine if gap.method == method and gap.proved]
            if not solved:
                continue
            values = np.array([gap.gap for gap in solved])
            quantiles = "".join(f"{100 * max(0.0, q):>9.2f}%" for q in np.quantile(values, QUANTILES))
            shares = "".join(f"{100 * float((values <= share + 1e-9).mean()):>9.1f}%" for share in SHARES)
            spent = 1e3 * statistics.median(gap.seconds for gap in solved)
            lines.append(f"{method:{wide}}{quantiles}{shares}{spent:>10.2f}")
        lines.append("")
    return "\n".join(lines)


def plot(gaps: Sequence[Gap], path: Path) -> None:
    """Histograms of some methods' gaps, one panel a family and method; the first bar holds all that is below 0.01 %."""
    from matplotlib.figure import Figure

    families = list(dict.fromkeys(gap.family for gap in gaps))
    edges = np.logspace(-4, 1, 26)
    figure = Figure(figsize=(2.3 * len(PLOTTED) + 1, 2.2 * len(families) + 0.6), layout="constrained")
    panels = figure.subplots(len(families), len(PLOTTED), squeeze=False, sharex=True, sharey=True)
    for line, family in zip(panels, families, strict=True):
        for panel, method in zip(line, PLOTTED, strict=True):
            values = [gap.gap for gap in gaps if (gap.family, gap.method) == (family, method) and gap.proved]
            panel.hist(np.clip(values, edges[0], edges[-1]), bins=edges)
            panel.axvline(0.05, color="0.5", linewidth=0.8)
            panel.set_xscale("log")
            panel.set_title(f"{family}\n{method}", fontsize=7)
            panel.tick_params(labelsize=7)
    figure.supxlabel("objective / proven optimum - 1; the line is at 5 %", fontsize=9)
    figure.supylabel("rows", fontsize=9)
    figure.savefig(path, dpi=130)


def _mask(weight: Tensor) -> Mask:
    return np.asarray(weight.reshape(-1).numpy() != 0)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=200, help="of each family")
    parser.add_argument("--width", type=int, default=32, help="entries of a row; half of them are kept")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds of branch and bound, for each row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--date", help="to put in the report; today by default")
    chosen = parser.parse_args(arguments)
    families = [name.strip() for name in chosen.families.split(",")]
    if unknown := set(families) - set(FAMILIES):
        parser.error(f"no family {sorted(unknown)[0]}: choose from {', '.join(FAMILIES)}")
    torch.set_num_threads(chosen.threads)
    gaps: list[Gap] = []
    for family in families:
        for seed in range(chosen.rows):
            gaps += gaps_of_row(family, chosen.width, seed, chosen.time_limit)
            print(f"\r{family}: {seed + 1} of {chosen.rows} rows", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    facts: dict[str, Any] = machine(chosen.date)
    facts["command"] = f"python -m benchmarks.gaps OUT --rows {chosen.rows} --width {chosen.width}"
    chosen.out.mkdir(parents=True, exist_ok=True)
    write_csv(chosen.out / "gaps.csv", [vars(gap) for gap in gaps])
    (chosen.out / "gaps.json").write_text(json.dumps({"machine": facts}, indent=1) + "\n", encoding="utf-8")
    text = f"{headline(facts)}\n{chosen.rows} rows of {chosen.width} entries, half of them kept\n\n{summary(gaps)}"
    (chosen.out / "gaps.txt").write_text(text, encoding="utf-8")
    plot(gaps, chosen.out / "gaps.png")
    print(text, end="")


if __name__ == "__main__":
    main()
