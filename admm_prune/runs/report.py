"""The report of a comparison: one self-contained HTML page, and its plot as a file of its own."""

from __future__ import annotations

from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any

# Okabe and Ito's palette: told apart also by the colour-blind.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_MARKERS = "osD^vP*"


def write_report(comparison: dict[str, Any], best: list[bool], folder: Path) -> None:
    """Writes `report.html` and `perplexity.png`.

    Args:
        comparison: the content of its manifest.
        best: of each row, whether it is to stand out.
    """
    import jinja2

    template = files("admm_prune").joinpath("assets/comparison.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    svg = _plot(comparison, folder / "perplexity.png")
    page = environment.from_string(template).render(**comparison, best=best, plot=svg)
    (folder / "report.html").write_text(page, encoding="utf-8")


def _plot(comparison: dict[str, Any], png: Path) -> str:
    """Perplexity over the targets, a line for each method; returns the SVG and writes the PNG."""
    from matplotlib.figure import Figure

    rows = comparison["rows"]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for i, method in enumerate(methods):
        figures = {row["target"]: row["perplexity"] for row in rows if row["method"] == method}
        style: dict[str, Any] = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
        # A pattern is no point on the axis of sparsities: lines join the sparsities only.
        joined = [j for j, target in enumerate(targets) if ":" not in target and target in figures]
        axes.plot(joined, [figures[targets[j]] for j in joined], label=method, **style)
        alone = [j for j, target in enumerate(targets) if ":" in target and target in figures]
        axes.plot(alone, [figures[targets[j]] for j in alone], linestyle="none", **style)
    axes.axhline(comparison["dense"]["perplexity"], color="0.4", linestyle="--", label="dense")
    _set_scale(axes)
    axes.set_xticks(range(len(targets)), targets)
    axes.set_xlim(-0.3, len(targets) - 0.7)
    axes.set_xlabel("pruned")
    axes.set_ylabel("perplexity (log scale)")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(png, dpi=144)
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _set_scale(axes: Any) -> None:
    """A logarithmic axis whose marks are plain numbers, also where it spans less than a power of ten."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(7))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
