"""Gap and performance profiles of the solvers over the collection.

    python -m collection.profiles OUT [--tolerance 0.05]

OUT receives `gap.csv` and `performance.csv` (one column for each solver) and `profiles.png`. The problems are those
that had a long search, or whose gap is at most 1 %: of the others the best value known may be a solver's own.

- gap profile: the fraction of the problems that a solver solves to value / best known - 1 <= t, against t;
- performance profile: with the cost of a solver that comes within the tolerance of the best known value, and infinite
  cost otherwise, the fraction of the problems on which it takes at most t times the least cost of any, against t. Costs
  are products H W^T of the layer's shape, by CPU time.

Source: Dolan and Moré, Benchmarking optimization software with performance profiles, 2002.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.journal import Journal, number, write_csv
from benchmarks.plots import colours
from collection import long_search, record
from collection.solve import COLUMNS, KEY, RUNS

Costs = dict[str, dict[str, float]]  # by problem and solver
_SETTLED = 0.01
GAPS = (0.0, 1e-4, 1e-3, 3e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
RATIOS = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0, 300.0, 1000.0)


def gaps(runs: Path = RUNS, table: Path = record.TABLE, log: Path = long_search.LOG) -> Costs:
    """value / best known - 1 by problem and solver, where the best value has another source.

    These are the problems of the log of long searches, and those with a gap of at most 1 %. Infinite where a solver
    refuses a problem or fails.
    """
    searched = {run["id"] for run in Journal(log, long_search.COLUMNS, long_search.KEY).records}
    rows = {name: row for name, row in record.records(table).items() if row["value"]}
    settled = {name for name, row in rows.items() if row["gap"] and float(row["gap"]) <= _SETTLED}
    best = {name: float(row["value"]) for name, row in rows.items() if name in searched | settled}
    found: Costs = {}
    for run in Journal(runs, COLUMNS, KEY).records:
        if run["id"] in best:
            value = number(run["value"])
            least = best[run["id"]]
            gap = math.inf if value is None else max(0.0, value / least - 1) if least > 0 else 0.0
            found.setdefault(run["id"], {})[run["solver"]] = gap
    return found


def costs(runs: Path = RUNS) -> Costs:
    """Products H W^T by problem and solver, where they were measured."""
    found: Costs = {}
    for run in Journal(runs, COLUMNS, KEY).records:
        cost = number(run["cost"])
        if cost is not None:
            found.setdefault(run["id"], {})[run["solver"]] = cost
    return found


def profile(ratios: Costs, solvers: Sequence[str], points: Sequence[float]) -> dict[str, list[float]]:
    """For each solver, the fraction of the problems with a ratio of at most each point; missing ratios are infinite."""
    total = max(1, len(ratios))
    return {
        solver: [sum(row.get(solver, math.inf) <= point for row in ratios.values()) / total for point in points]
        for solver in solvers
    }


def solved_by_all(gap: Costs) -> list[str]:
    """The problems with a finite gap of every solver that was run on at least half of them."""
    counts = Counter(solver for row in gap.values() for solver in row)
    usual = [solver for solver, count in counts.items() if 2 * count >= len(gap)]
    return [problem for problem, row in gap.items() if all(math.isfinite(row.get(s, math.inf)) for s in usual)]


def performance_ratios(gap: Costs, cost: Costs, tolerance: float) -> Costs:
    """Cost / least cost of any solver within the tolerance, for problems that at least one solves."""
    found: Costs = {}
    for problem, row in gap.items():
        paid = {s: cost[problem][s] for s, g in row.items() if g <= tolerance and s in cost.get(problem, {})}
        if paid:
            least = min(paid.values())
            found[problem] = {solver: value / least for solver, value in paid.items()}
    return found


def solvers_of(ratios: Costs) -> list[str]:
    return list(dict.fromkeys(solver for row in ratios.values() for solver in row))


def write(out: Path, tolerance: float) -> None:
    """The tables and the chart."""
    out.mkdir(parents=True, exist_ok=True)
    gap = gaps()
    solvers = solvers_of(gap)
    curves = {
        "gap": (GAPS, profile(gap, solvers, GAPS)),
        "performance": (RATIOS, profile(performance_ratios(gap, costs(), tolerance), solvers, RATIOS)),
    }
    for name, (points, lines) in curves.items():
        rows = [{"at_most": point, **{s: line[i] for s, line in lines.items()}} for i, point in enumerate(points)]
        write_csv(out / f"{name}.csv", rows)
    _plot(out / "profiles.png", curves, tolerance)


def _plot(
    path: Path, curves: Mapping[str, tuple[Sequence[float], Mapping[str, Sequence[float]]]], tolerance: float
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    titles = {
        "gap": "value / best known - 1",
        "performance": f"cost / least cost of a solver within {100 * tolerance:g} % of the best known value",
    }
    for panel, (name, (points, lines)) in zip(figure.subplots(1, 2), curves.items(), strict=True):
        colour = colours(list(lines))
        for solver, line in lines.items():
            panel.step([max(p, 1e-5) for p in points], line, where="post", label=solver, color=colour[solver])
        panel.set(xscale="log", xlabel=titles[name], ylim=(0, 1.02), ylabel="fraction of the problems")
        panel.grid(visible=True, color="0.92")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.05)
    given = parser.parse_args(arguments)
    write(given.out, given.tolerance)
    print(f"written: {given.out}")


if __name__ == "__main__":
    main()
