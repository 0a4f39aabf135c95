"""Plots of a report as SVG, in one style."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from admm_prune.data.durable import writing
from admm_prune.models.evaluate import METRICS
from admm_prune.runs.report.content import TILES, Layer, Weights, place_of

# Okabe and Ito's palette, which is safe for colour-blind readers, with a darker yellow. In a page the n-th colour is
# the page's --series-n, which is lighter in dark mode.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8000")
MARKERS = "osD^vP*X"
INK = "#121314"  # replaced by the page's text colour: plots use it for nothing else
_MOST_LABELS = 16
WIDTH = 4.8  # inches: at this width a letter is as large on a phone as it is drawn
_GAP = 2  # pixels between the matrices of a map
_MOST_ROWS = 8.0  # inches of a map


def style(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th series; no two of the first 56 are alike."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def panels(count: int = 1, height: float = 3.4) -> tuple[Any, list[Any]]:
    """A figure with `count` panels one below the other, each `height` inches high: (figure, axes)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height * count), layout="constrained", facecolor="none")
    axes = list(figure.subplots(count, 1, squeeze=False).flat)
    for panel in axes:
        panel.set_facecolor("none")
        panel.tick_params(colors=INK)
        panel.grid(visible=True, color="#888888", alpha=0.25, linewidth=0.6)
        for name, spine in panel.spines.items():
            spine.set_color(INK)
            spine.set_visible(name in ("left", "bottom"))
        for label in (panel.xaxis.label, panel.yaxis.label, panel.title):
            label.set_color(INK)
    return figure, axes


def legend(figure: Any, *axes: Any, columns: int = 3) -> None:
    """One legend below the panels, every label once, in columns that fit; none if there are too many series to
    distinguish."""
    handles: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if not 0 < len(handles) <= _MOST_LABELS:
        return
    longest = max(map(len, handles))
    columns = max(1, min(columns, len(handles), 60 // (longest + 6)))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        labelcolor=INK,
        fontsize=9,
    )


def logarithmic(panel: Any) -> None:
    """A logarithmic y axis whose marks are plain numbers, also where it spans less than a power of ten."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    panel.set_yscale("log")
    low, high = panel.get_ylim()
    subs = (1, 2, 5) if high < 1e3 * low else (1,)
    panel.yaxis.set_major_locator(LogLocator(subs=subs) if high > 10 * low else MaxNLocator(7))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())


def whole_numbers(panel: Any) -> None:
    """Marks of the x axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def svg(figure: Any, name: str, titles: Mapping[str, Sequence[str]] | None = None) -> str:
    """The drawing as an SVG element, the same text for the same drawing.

    Text stays text, which can be searched and scaled. `INK` and `COLOURS` are replaced by the colours of the page,
    light or dark.

    Args:
        name: unique in the page; ids begin with it.
        titles: what a browser shows on hovering over the points of a line, or over a patch, by the `gid` of either.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    text = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})  # savefig would draw the figure twice
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>\s*", "", drawn, flags=re.DOTALL)
    for group, texts in (titles or {}).items():
        drawn = _titled(drawn, group, texts)
    drawn = re.sub(r'\bid="', f'id="{name}-', drawn)
    drawn = re.sub(r'(url\(|href=")#', rf"\1#{name}-", drawn)
    for i, colour in enumerate(COLOURS):
        drawn = drawn.replace(colour, f"var(--series-{i})")
    return drawn.replace(INK, "currentColor")


def _titled(drawn: str, group: str, texts: Sequence[str]) -> str:
    """The drawing with a <title> for every point of a line, or for the path of a patch."""
    begin = drawn.index(f'<g id="{group}">')
    end = drawn.index("\n   </g>", begin)
    shape = re.compile(r"<use [^>]*/>" if "<use " in drawn[begin:end] else r"<path (?:[^>]*)/>")
    shapes = shape.findall(drawn[begin:end])
    if len(shapes) != len(texts):  # a point outside the axes is not drawn
        return drawn
    remaining = iter(texts)
    titled = shape.sub(lambda match: f"<g><title>{escape(next(remaining))}</title>{match[0]}</g>", drawn[begin:end])
    return drawn[:begin] + titled + drawn[end:]


def by_matrix(layers: Iterable[Layer], field: str) -> dict[str, list[tuple[int, float]]]:
    """For every matrix of a block the points (block, number), where the field holds a finite number."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for layer in layers:
        block, matrix = place_of(layer["name"])
        points = curves.setdefault(matrix, [])
        if layer.get(field) is not None and math.isfinite(layer[field]):
            points.append((block, layer[field]))
    return {matrix: sorted(points) for matrix, points in curves.items()}


def sparsity_map(layers: Sequence[Layer], weights: Weights) -> str | None:
    """A map of the remaining weights: one row per block, one column per matrix, tiles for its parts."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    matrices = list(by_matrix(layers, "sparsity"))
    blocks = sorted({place_of(layer["name"])[0] for layer in layers})
    cell = TILES + _GAP
    titles: dict[str, list[str]] = {}
    areas: list[tuple[int, int, str]] = []
    picture = np.full((cell * len(blocks) - _GAP, cell * len(matrices) - _GAP), np.nan)
    for layer in layers:
        tiles = weights.tiles(layer["name"])
        if tiles is None:
            continue
        block, matrix = place_of(layer["name"])
        top, left = cell * blocks.index(block), cell * matrices.index(matrix)
        gid = f"area-{len(areas)}"
        areas.append((left, top, gid))
        titles[gid] = [f"block {block}, {matrix}: {100 * (1 - layer['sparsity']):.2f} % of the weights left"]
        rows, columns = (max(1, round(TILES * part)) for part in (tiles.height, tiles.width))
        down, across = tiles.share.shape
        picture[top : top + rows, left : left + columns] = tiles.share[
            np.arange(rows)[:, None] * down // rows, np.arange(columns)[None] * across // columns
        ]
    if np.isnan(picture).all():
        return None
    figure, (axes,) = panels(height=min(_MOST_ROWS, 1.3 + 0.42 * len(blocks)))
    axes.grid(visible=False)
    colours = colormaps["viridis"].with_extremes(bad=(0.5, 0.5, 0.5, 0.2))
    most = max(0.1, math.ceil(10 * float(np.nanmax(picture))) / 10)
    image = axes.imshow(picture, cmap=colours, vmin=0, vmax=most, interpolation="nearest", aspect="auto")
    for x, y, gid in areas:  # invisible: they carry the titles
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), TILES, TILES, facecolor="white", alpha=0.0, linewidth=0, gid=gid))
    centres = [cell * i + (TILES - 1) / 2 for i in range(max(len(blocks), len(matrices)))]
    every = -(-len(matrices) // 16)
    labels = [name.partition(".")[2] or name for name in matrices[::every]]
    axes.set_xticks(centres[: len(matrices) : every], labels, rotation=30, ha="right")
    every = -(-len(blocks) // 16)
    axes.set_yticks(centres[: len(blocks) : every], [str(block) for block in blocks[::every]])
    axes.set_ylabel("block")
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label("share left", color=INK)
    bar.ax.tick_params(colors=INK)
    bar.outline.set_visible(False)
    bar.ax.set_facecolor("none")
    return svg(figure, "map", titles)


def layer_errors(layers: Sequence[Layer]) -> str | None:
    """The relative error of every layer over the blocks, with the proven bound below it where there is one."""
    errors, bounds = by_matrix(layers, "relative_error"), by_matrix(layers, "bound")
    if not any(value > 0 for points in errors.values() for _, value in points):
        return None
    figure, (axes,) = panels()
    titles: dict[str, list[str]] = {}
    for i, (matrix, points) in enumerate(errors.items()):
        if points:
            _line(axes, i, matrix, points)
            titles[f"line-{i}"] = [f"block {block}, {matrix}: {value:.4g}" for block, value in points if value > 0]
        if bounds[matrix]:
            axes.plot(*zip(*bounds[matrix], strict=True), linestyle="none", color=style(i)["color"], marker="_")
    if any(bounds.values()):
        axes.plot([], [], linestyle="none", color=INK, marker="_", label="lower bound")
    return _over_blocks(figure, axes, "relative error (log scale)", "errors", titles)


def sparsities(layers: Sequence[Layer]) -> str:
    """The percentage of every matrix that is zero, over the blocks."""
    figure, (axes,) = panels()
    titles: dict[str, list[str]] = {}
    for i, (matrix, points) in enumerate(by_matrix(layers, "sparsity").items()):
        percent = [(block, 100 * value) for block, value in points]
        _line(axes, i, matrix, percent)
        titles[f"line-{i}"] = [f"block {block}, {matrix}: {value:.2f} %" for block, value in percent]
    return _over_blocks(figure, axes, "zeros, %", "allocation", titles, log=False)


def error_ratios(before: Sequence[Layer], after: Sequence[Layer]) -> str | None:
    """The error of every layer of one run, divided by that of another run."""
    first = {layer["name"]: layer["relative_error"] for layer in before}
    ratios = [
        {"name": layer["name"], "ratio": layer["relative_error"] / first[layer["name"]]}
        for layer in after
        if first.get(layer["name"]) and layer["relative_error"]
    ]
    if not ratios:
        return None
    figure, (axes,) = panels()
    for i, (matrix, points) in enumerate(by_matrix(ratios, "ratio").items()):
        _line(axes, i, matrix, points)
    axes.axhline(1.0, color=INK, linewidth=0.8)
    return _over_blocks(figure, axes, "error of B / of A (log)", "ratios")


def errors_by_method(runs: Sequence[Mapping[str, Any]]) -> str | None:
    """The mean error of every block: one line per method, one panel per target."""
    means: dict[str, dict[str, dict[int, list[float]]]] = {}
    for run in (run for run in runs if run["target"] != "0%"):
        for points in by_matrix(run["layers"], "relative_error").values():
            for block, value in points:
                means.setdefault(run["target"], {}).setdefault(run["method"], {}).setdefault(block, []).append(value)
    if not means:
        return None
    methods = list(dict.fromkeys(run["method"] for run in runs if run["target"] != "0%"))  # as in `over_targets`
    figure, axes = panels(len(means), height=2.6)
    for panel, (target, lines) in zip(axes, means.items(), strict=True):
        for method, blocks in lines.items():
            x = sorted(blocks)
            y = [sum(blocks[block]) / len(blocks[block]) for block in x]
            panel.plot(x, y, label=method, linewidth=1.2, markersize=5, **style(methods.index(method)))
        panel.set_title(f"pruned: {target}", fontsize=10)
        panel.set_ylabel("mean error")
        whole_numbers(panel)
        if any(value > 0 for lines in panel.get_lines() for value in lines.get_ydata()):
            logarithmic(panel)
    axes[-1].set_xlabel("block")
    legend(figure, *axes)
    return svg(figure, "methods")


def convergence(layers: Sequence[Layer]) -> str | None:
    """Residual and change of the support over the iterations: the median of the solves of a kind, and their range."""
    solves: dict[str, list[tuple[Mapping[str, Any], int]]] = {}
    for layer in layers:
        columns = layer.get("convergence")
        if columns:
            entries = layer["shape"][0] * layer["shape"][1]
            solves.setdefault(place_of(layer["name"])[1], []).append((columns, entries))
    residuals = {name: [_curve(columns, "primal_residual") for columns, _ in those] for name, those in solves.items()}
    changes = {
        name: [_curve(columns, "support_changes", 100.0 / entries) for columns, entries in those]
        for name, those in solves.items()
    }
    drawn = [
        (what, curves, log)
        for what, curves, log in (("|x − z| / |z| (log)", residuals, True), ("support change, %", changes, False))
        if any(curve for several in curves.values() for curve in several)
    ]
    if not drawn:
        return None
    figure, axes = panels(len(drawn), height=2.8)
    for panel, (what, curves, log) in zip(axes, drawn, strict=True):
        for i, (name, several) in enumerate(curves.items()):
            _band(panel, several, name, COLOURS[i % len(COLOURS)], positive=log)
        panel.set_ylabel(what)
        whole_numbers(panel)
        if log:
            logarithmic(panel)
    axes[-1].set_xlabel("iteration")
    legend(figure, *axes)
    return svg(figure, "convergence")


def training(details: Mapping[str, Any]) -> str | None:
    """The loss of a recipe that trains, its stages, and the residuals of its dual updates."""
    curve = details.get("training", {}).get("loss", [])
    duals = details.get("training", {}).get("dual_updates", [])
    if not curve:
        return None
    figure, axes = panels(2 if duals else 1, height=2.8)
    axes[0].plot(
        [p["step"] for p in curve], [p["loss"] for p in curve], label="training loss", linewidth=1.2, **style(0)
    )
    stages = details.get("stages", [])
    for i, stage in enumerate(stages):
        axes[0].axvline(stage["step"], color=INK, linewidth=0.7, linestyle=":", label="" if i else "projection")
    measured = [stage for stage in stages if stage.get("held_out_loss") is not None]
    if measured:
        x, y = [stage["step"] for stage in measured], [stage["held_out_loss"] for stage in measured]
        axes[0].plot(x, y, linestyle="none", label="held-out loss, just projected", **style(1))
    axes[0].set_ylabel("loss")
    if duals:
        for i, (field, label) in enumerate((("primal_residual", "|x − z| / |x|"), ("churn", "new in the support"))):
            points = [(dual["step"], dual[field]) for dual in duals if dual[field]]
            if points:
                axes[1].plot(*zip(*points, strict=True), label=label, linewidth=1.2, color=COLOURS[i + 2])
        axes[1].set_ylabel("log scale")
        if axes[1].get_lines():
            logarithmic(axes[1])
    for panel in axes:
        panel.set_xlim(0, curve[-1]["step"] * 1.02)
    axes[-1].set_xlabel("step")
    legend(figure, *axes, columns=2)
    return svg(figure, "training")


def rounds(networks: Sequence[Mapping[str, Any]]) -> str | None:
    """The loss of every network in each round of alternating minimization, relative to its first."""
    curves = [list(enumerate(network["rounds"], 1)) for network in networks if network.get("rounds")]
    curves = [[(x, y / curve[0][1]) for x, y in curve] for curve in curves if all(y for _, y in curve)]
    if not curves:
        return None
    figure, (axes,) = panels(height=2.8)
    _band(axes, [dict(curve) for curve in curves], "feed-forward networks", COLOURS[0], marker="o")
    axes.axhline(1.0, color=INK, linewidth=0.8)
    axes.set_xlabel("round")
    axes.set_ylabel("loss / first round's")
    whole_numbers(axes)
    return svg(figure, "rounds")


def over_targets(comparison: Mapping[str, Any], metric: str, png: Path | None = None) -> str | None:
    """A metric over the targets, a line for each method; the optional PNG has a white background."""
    rows = [row for row in comparison["rows"] if row[metric] is not None]
    flat = [row for row in rows if row["target"] == "0%"]  # unpruned models: a horizontal line, like the dense model
    targets = [t for t in dict.fromkeys(row["target"] for row in comparison["rows"]) if t != "0%"]
    figure, (axes,) = panels(height=4.2)
    for i, method in enumerate(dict.fromkeys(row["method"] for row in comparison["rows"] if row not in flat)):
        figures = {row["target"]: row[metric] for row in rows if row["method"] == method}
        # Patterns are not on the axis of sparsities: lines connect the sparsities only.
        joined = [j for j, target in enumerate(targets) if ":" not in target and target in figures]
        axes.plot(joined, [figures[targets[j]] for j in joined], label=method, **style(i))
        alone = [j for j, target in enumerate(targets) if ":" in target and target in figures]
        axes.plot(alone, [figures[targets[j]] for j in alone], linestyle="none", **style(i))
    if comparison["dense"][metric] is not None:
        axes.axhline(comparison["dense"][metric], color=INK, linestyle="--", label="dense")
    for i, row in enumerate(flat):
        axes.axhline(row[metric], color=INK, linestyle=(":", "-.")[i % 2], label=row["method"])
    logarithmic(axes)
    axes.set_xticks(range(len(targets)), targets)
    axes.set_xlim(-0.3, max(len(targets), 1) - 0.7)
    axes.set_xlabel("pruned")
    axes.set_ylabel(f"{METRICS[metric].name} (log scale)")
    legend(figure, axes)
    if png is not None:
        with writing(png):
            figure.savefig(png, dpi=144, facecolor="white")
    return svg(figure, metric)


def _line(axes: Any, i: int, matrix: str, points: Sequence[tuple[int, float]]) -> None:
    """The i-th matrix over the blocks; its `gid` is f"line-{i}"."""
    axes.plot(*zip(*points, strict=True), label=matrix, linewidth=1.2, markersize=5, gid=f"line-{i}", **style(i))


def _over_blocks(
    figure: Any,
    axes: Any,
    what: str,
    name: str,
    titles: Mapping[str, Sequence[str]] | None = None,
    *,
    log: bool = True,
) -> str:
    axes.set_xlabel("block")
    axes.set_ylabel(what)
    whole_numbers(axes)
    if log:
        logarithmic(axes)
    legend(figure, axes)
    return svg(figure, name, titles)


def _curve(columns: Mapping[str, Any], field: str, scale: float = 1.0) -> dict[int, float]:
    """{iteration: number} of a history, where it was measured."""
    pairs = zip(columns["iteration"], columns[field], strict=True)
    return {iteration: value * scale for iteration, value in pairs if value is not None}


def _band(
    axes: Any,
    curves: Sequence[Mapping[int, float]],
    label: str,
    colour: str,
    *,
    marker: str = "",
    positive: bool = False,
) -> None:
    """The median of some curves over those that are still running, and from the lowest to the highest of them."""
    points: dict[int, list[float]] = {}
    for curve in curves:
        for x, y in curve.items():
            if y > 0 or not positive:
                points.setdefault(x, []).append(y)
    if not points:
        return
    measured = sorted(points)
    middle = [float(np.median(points[x])) for x in measured]
    axes.plot(measured, middle, label=label, color=colour, marker=marker, linewidth=1.4)
    if len(curves) > 1:
        low, high = [min(points[x]) for x in measured], [max(points[x]) for x in measured]
        axes.fill_between(measured, low, high, color=colour, alpha=0.18, linewidth=0)
