"""Drawings that stand in a page: SVG that takes the page's colours, by matplotlib."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

# Okabe and Ito's palette, told apart also by the colour-blind, its yellow darkened for paper. In a page the n-th is the
# page's own --series-n, which is lighter on a dark ground.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8000")
MARKERS = "osD^vP*X"
INK = "#121314"  # stands for the page's own text colour: no drawing has it otherwise
_MOST_LABELS = 16
WIDTH = 4.8  # inches: at this width a letter is as large on a phone as it is drawn


def style(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th series; no two of the first 56 are alike."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def panels(count: int = 1, height: float = 3.4) -> tuple[Any, list[Any]]:
    """A figure with so many panels one below the other, each of this height in inches: (figure, axes)."""
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
    """One legend below the panels, every label once, in columns that fit; none of more than can be told apart."""
    found: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not 0 < len(found) <= _MOST_LABELS:
        return
    longest = max(map(len, found))
    columns = max(1, min(columns, len(found), 60 // (longest + 6)))
    figure.legend(
        found.values(),
        found.keys(),
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


def svg(figure: Any, name: str) -> str:
    """The drawing as an SVG element, the same text for the same drawing.

    Letters stay letters, which can be searched and scaled. What is drawn in `INK` or one of `COLOURS` takes the
    colour that the page gives it, light or dark.

    Args:
        name: unique in the page; ids begin with it.
    """
    from matplotlib import rc_context

    text = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>\s*", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'\bid="', f'id="{name}-', drawn)
    drawn = re.sub(r'(url\(|href=")#', rf"\1#{name}-", drawn)
    for i, colour in enumerate(COLOURS):
        drawn = drawn.replace(colour, f"var(--series-{i})")
    return drawn.replace(INK, "currentColor")
