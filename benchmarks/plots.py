"""The leaderboard's figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import Row

_MARKERS = "osD^vP*X"


def plot_cost(rows: Sequence[Row], path: Path, error: str = "ratio") -> None:
    """Error relative to the ALPS preset against cost: one panel a layer, a colour a solver, a marker a pattern.

    Args:
        error: "ratio", or "ratio_holdout" for the held-out Gram.
    """
    from matplotlib.lines import Line2D

    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure, panels = _grid(len(layers))
    colour = colours(solvers)
    for panel, layer in zip(panels, layers, strict=False):
        for row in rows:
            if row["layer"] == layer and row[error] and row["cost"]:
                marker = _MARKERS[patterns.index(row["pattern"]) % len(_MARKERS)]
                panel.plot(row["cost"], row[error], marker, color=colour[row["solver"]], markersize=5, alpha=0.8)
        panel.axhline(1.0, color="0.5", linewidth=0.8)
        _logarithmic(panel, layer)
    entries = [Line2D([], [], color=colour[name], marker="o", linestyle="", label=name) for name in solvers]
    entries += [
        Line2D([], [], color="0.3", marker=_MARKERS[i % len(_MARKERS)], linestyle="", label=name)
        for i, name in enumerate(patterns)
    ]
    figure.supylabel("error / ALPS preset" + (", held out" if error.endswith("holdout") else ""))
    _finish(figure, entries, path)


def plot_curves(curves: Sequence[Row], yardsticks: dict[tuple[str, str], float], path: Path) -> None:
    """The least error so far against cost: one panel a layer and pattern, one line an iterative solver.

    Args:
        curves: points with layer, pattern, solver, cost and relative_error, in order.
        yardsticks: the ALPS preset's final error by (layer, pattern).
    """
    from matplotlib.lines import Line2D

    solvers = list(dict.fromkeys(point["solver"] for point in curves))
    places = [place for place in dict.fromkeys((p["layer"], p["pattern"]) for p in curves) if place in yardsticks]
    figure, panels = _grid(len(places))
    colour = colours(solvers)
    for panel, place in zip(panels, places, strict=False):
        for solver in solvers:
            points = [p for p in curves if (p["layer"], p["pattern"], p["solver"]) == (*place, solver)]
            best, ratios = math.inf, []
            for point in points:
                best = min(best, point["relative_error"])
                ratios.append(best / yardsticks[place])
            panel.plot([p["cost"] for p in points], ratios, color=colour[solver], linewidth=1.2)
        panel.axhline(1.0, color="0.5", linewidth=0.8)
        _logarithmic(panel, f"{place[0]}, {place[1]}")
    figure.supylabel("least error so far / ALPS preset's")
    _finish(figure, [Line2D([], [], color=colour[name], label=name) for name in solvers], path)


def _grid(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(count, 4) or 1
    rows = math.ceil(count / columns) or 1
    figure = Figure(figsize=(3.6 * columns + 2.2, 2.9 * rows + 0.6), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, panels


def _logarithmic(panel: Any, title: str) -> None:
    """Axes with plain numbers on them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panel.set_title(title, fontsize=8)
    panel.set(xscale="log", yscale="log")
    low, high = panel.get_ylim()
    fine = (1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 5.0, 7.0, 8.0, 9.0, 9.5)
    for axis, steps in ((panel.xaxis, (1.0, 3.0)), (panel.yaxis, fine if high < 2.5 * low else (1.0, 2.0, 5.0))):
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.tick_params(labelsize=7)
    panel.grid(visible=True, color="0.92")


def colours(names: Sequence[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    wheel = colormaps["tab20"].colors  # type: ignore[attr-defined]  # a listed map has colours
    return {name: wheel[(2 * i + (2 * i >= len(wheel))) % len(wheel)] for i, name in enumerate(names)}


def _finish(figure: Any, entries: list[Any], path: Path) -> None:
    figure.supxlabel("cost in products H Wᵀ of the layer's shape")
    figure.legend(handles=entries, loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=130)
