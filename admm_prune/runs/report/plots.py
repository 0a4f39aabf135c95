"""The drawings of the reports, each from what a manifest holds; None where it holds nothing to draw."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from admm_prune.runs.report import drawing
from admm_prune.runs.report.content import TILES, Layer, Weights
from admm_prune.runs.report.drawing import INK

_GAP = 2  # pixels between the matrices of a map
_MOST_ROWS = 8.0  # inches of a map


def place_of(name: str) -> tuple[int, str]:
    """(the number of the block, the matrix within it): (3, "mlp.up_proj") of "model.layers.3.mlp.up_proj.weight"."""
    found = re.fullmatch(r"(?:.*?\.)?(\d+)\.(.+)", name)
    block, rest = (int(found[1]), found[2]) if found else (0, name)
    return block, rest.removesuffix(".weight")


def by_matrix(layers: Iterable[Layer], field: str) -> dict[str, list[tuple[int, float]]]:
    """For every matrix of a block the points (block, number), where the field holds a finite number."""
    found: dict[str, list[tuple[int, float]]] = {}
    for layer in layers:
        block, matrix = place_of(layer["name"])
        points = found.setdefault(matrix, [])
        if layer.get(field) is not None:
            points.append((block, layer[field]))
    return {matrix: sorted(points) for matrix, points in found.items()}


def sparsity_map(layers: Sequence[Layer], weights: Weights) -> str | None:
    """A tile of colour for every part of every matrix: how much of it is left. Blocks go down, matrices across."""
    from matplotlib import colormaps

    matrices = list(by_matrix(layers, "sparsity"))
    blocks = sorted({place_of(layer["name"])[0] for layer in layers})
    cell = TILES + _GAP
    picture = np.full((cell * len(blocks) - _GAP, cell * len(matrices) - _GAP), np.nan)
    for layer in layers:
        tiles = weights.tiles(layer["name"])
        if tiles is None:
            continue
        block, matrix = place_of(layer["name"])
        top, left = cell * blocks.index(block), cell * matrices.index(matrix)
        rows, columns = (max(1, round(TILES * part)) for part in (tiles.height, tiles.width))
        down, across = tiles.share.shape
        picture[top : top + rows, left : left + columns] = tiles.share[
            np.arange(rows)[:, None] * down // rows, np.arange(columns)[None] * across // columns
        ]
    if np.isnan(picture).all():
        return None
    figure, (axes,) = drawing.panels(height=min(_MOST_ROWS, 1.3 + 0.42 * len(blocks)))
    axes.grid(visible=False)
    colours = colormaps["cividis"].with_extremes(bad=(0.5, 0.5, 0.5, 0.2))
    most = max(0.1, math.ceil(10 * float(np.nanmax(picture))) / 10)
    image = axes.imshow(picture, cmap=colours, vmin=0, vmax=most, interpolation="nearest", aspect="auto")
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
    return drawing.svg(figure, "map")


def layer_errors(layers: Sequence[Layer]) -> str | None:
    """The relative error of every layer over the blocks, with the proven bound below it where there is one."""
    errors, bounds = by_matrix(layers, "relative_error"), by_matrix(layers, "bound")
    if not any(value > 0 for points in errors.values() for _, value in points):
        return None
    figure, (axes,) = drawing.panels()
    for i, (matrix, points) in enumerate(errors.items()):
        look = drawing.style(i)
        if points:
            axes.plot(*zip(*points, strict=True), label=matrix, linewidth=1.2, markersize=5, **look)
        if bounds[matrix]:
            axes.plot(*zip(*bounds[matrix], strict=True), linestyle="none", color=look["color"], marker="_")
    if any(bounds.values()):
        axes.plot([], [], linestyle="none", color=INK, marker="_", label="lower bound")
    return _over_blocks(figure, axes, "relative error (log scale)", "errors")


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
    figure, (axes,) = drawing.panels()
    for i, (matrix, points) in enumerate(by_matrix(ratios, "ratio").items()):
        axes.plot(*zip(*points, strict=True), label=matrix, linewidth=1.2, markersize=5, **drawing.style(i))
    axes.axhline(1.0, color=INK, linewidth=0.8)
    return _over_blocks(figure, axes, "error of B / of A (log)", "ratios")


def errors_by_method(runs: Sequence[Mapping[str, Any]]) -> str | None:
    """The mean error of every block, a line a method, a panel a target."""
    means: dict[str, dict[str, dict[int, list[float]]]] = {}
    for run in (run for run in runs if run["target"] != "0%"):
        for points in by_matrix(run["layers"], "relative_error").values():
            for block, value in points:
                means.setdefault(run["target"], {}).setdefault(run["method"], {}).setdefault(block, []).append(value)
    if not means:
        return None
    methods = list(dict.fromkeys(run["method"] for run in runs if run["target"] != "0%"))  # as in `perplexities`
    figure, axes = drawing.panels(len(means), height=2.6)
    for panel, (target, lines) in zip(axes, means.items(), strict=True):
        for method, blocks in lines.items():
            x = sorted(blocks)
            y = [sum(blocks[block]) / len(blocks[block]) for block in x]
            panel.plot(x, y, label=method, linewidth=1.2, markersize=5, **drawing.style(methods.index(method)))
        panel.set_title(f"pruned: {target}", fontsize=10)
        panel.set_ylabel("mean error")
        drawing.whole_numbers(panel)
        if any(value > 0 for lines in panel.get_lines() for value in lines.get_ydata()):
            drawing.logarithmic(panel)
    axes[-1].set_xlabel("block")
    drawing.legend(figure, *axes)
    return drawing.svg(figure, "methods")


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
        for what, curves, log in (
            ("|x − z| / |z| (log)", residuals, True),
            ("support change, %", changes, False),
        )
        if any(curve for several in curves.values() for curve in several)
    ]
    if not drawn:
        return None
    figure, axes = drawing.panels(len(drawn), height=2.8)
    for panel, (what, curves, log) in zip(axes, drawn, strict=True):
        for i, (name, several) in enumerate(curves.items()):
            _band(panel, several, name, drawing.COLOURS[i % len(drawing.COLOURS)], positive=log)
        panel.set_ylabel(what)
        drawing.whole_numbers(panel)
        if log:
            drawing.logarithmic(panel)
    axes[-1].set_xlabel("iteration")
    drawing.legend(figure, *axes)
    return drawing.svg(figure, "convergence")


def training(details: Mapping[str, Any]) -> str | None:
    """The loss of a recipe that trains, its stages, and the residuals of its dual updates."""
    curve = details.get("training", {}).get("loss", [])
    duals = details.get("training", {}).get("dual_updates", [])
    if not curve:
        return None
    figure, axes = drawing.panels(2 if duals else 1, height=2.8)
    axes[0].plot(
        [p["step"] for p in curve], [p["loss"] for p in curve], label="training loss", linewidth=1.2, **drawing.style(0)
    )
    stages = details.get("stages", [])
    for i, stage in enumerate(stages):
        axes[0].axvline(stage["step"], color=INK, linewidth=0.7, linestyle=":", label="" if i else "projection")
    judged = [stage for stage in stages if stage.get("held_out_loss") is not None]
    if judged:
        x, y = [stage["step"] for stage in judged], [stage["held_out_loss"] for stage in judged]
        axes[0].plot(x, y, linestyle="none", label="held-out loss, just projected", **drawing.style(1))
    axes[0].set_ylabel("loss")
    if duals:
        for i, (field, label) in enumerate((("primal_residual", "|x − z| / |x|"), ("churn", "new in the support"))):
            points = [(dual["step"], dual[field]) for dual in duals if dual[field]]
            if points:
                axes[1].plot(*zip(*points, strict=True), label=label, linewidth=1.2, color=drawing.COLOURS[i + 2])
        axes[1].set_ylabel("log scale")
        if axes[1].get_lines():
            drawing.logarithmic(axes[1])
    for panel in axes:
        panel.set_xlim(0, curve[-1]["step"] * 1.02)
    axes[-1].set_xlabel("step")
    drawing.legend(figure, *axes, columns=2)
    return drawing.svg(figure, "training")


def rounds(networks: Sequence[Mapping[str, Any]]) -> str | None:
    """What every network lost in each round of alternating, relative to its first."""
    curves = [list(enumerate(found["rounds"], 1)) for found in networks if found.get("rounds")]
    curves = [[(x, y / curve[0][1]) for x, y in curve] for curve in curves if all(y for _, y in curve)]
    if not curves:
        return None
    figure, (axes,) = drawing.panels(height=2.8)
    _band(axes, [dict(curve) for curve in curves], "feed-forward networks", drawing.COLOURS[0], marker="o")
    axes.axhline(1.0, color=INK, linewidth=0.8)
    axes.set_xlabel("round")
    axes.set_ylabel("loss / first round's")
    drawing.whole_numbers(axes)
    return drawing.svg(figure, "rounds")


def perplexities(comparison: Mapping[str, Any], png: Path | None = None) -> str | None:
    """Perplexity over the targets, a line for each method; the PNG, where asked for, is drawn on white."""
    rows = [row for row in comparison["rows"] if row["perplexity"] is not None]
    flat = [row for row in rows if row["target"] == "0%"]  # what prunes nothing: a level, as the dense model is
    targets = [t for t in dict.fromkeys(row["target"] for row in comparison["rows"]) if t != "0%"]
    figure, (axes,) = drawing.panels(height=4.2)
    for i, method in enumerate(dict.fromkeys(row["method"] for row in comparison["rows"] if row not in flat)):
        figures = {row["target"]: row["perplexity"] for row in rows if row["method"] == method}
        # A pattern is no point on the axis of sparsities: lines join the sparsities only.
        joined = [j for j, target in enumerate(targets) if ":" not in target and target in figures]
        axes.plot(joined, [figures[targets[j]] for j in joined], label=method, **drawing.style(i))
        alone = [j for j, target in enumerate(targets) if ":" in target and target in figures]
        axes.plot(alone, [figures[targets[j]] for j in alone], linestyle="none", **drawing.style(i))
    if comparison["dense"]["perplexity"] is not None:
        axes.axhline(comparison["dense"]["perplexity"], color=INK, linestyle="--", label="dense")
    for row, line in zip(flat, (":", "-."), strict=False):
        axes.axhline(row["perplexity"], color=INK, linestyle=line, label=row["method"])
    drawing.logarithmic(axes)
    axes.set_xticks(range(len(targets)), targets)
    axes.set_xlim(-0.3, max(len(targets), 1) - 0.7)
    axes.set_xlabel("pruned")
    axes.set_ylabel("perplexity (log scale)")
    drawing.legend(figure, axes)
    if png is not None:
        figure.savefig(png, dpi=144, facecolor="white")
    return drawing.svg(figure, "perplexities")


def _over_blocks(figure: Any, axes: Any, what: str, name: str) -> str:
    axes.set_xlabel("block")
    axes.set_ylabel(what)
    drawing.whole_numbers(axes)
    drawing.logarithmic(axes)
    drawing.legend(figure, axes)
    return drawing.svg(figure, name)


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
