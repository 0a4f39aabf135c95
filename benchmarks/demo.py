"""The table and the chart of `make demo`, from the folder that it wrote.

    make demo
    python -m benchmarks.demo demo

It archives the rows in `benchmarks/results/demo.json`, and writes from them the tables of `README.md` and of
`docs/methods/index.md`, and `docs/assets/demo-light.svg` and `demo-dark.svg`. Without a folder, it writes tables and
charts again from the archived rows.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from admm_prune.runs.journal.folder import MANIFEST
from benchmarks.machine import headline, machine

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = ROOT / "benchmarks/results/demo.json"
PAGES = tuple(ROOT / name for name in ("README.md", "docs/methods/index.md"))
CHARTS = ROOT / "docs/assets"
BEST = "admm"  # in bold
HEAD = "| method | pruned | perplexity | bits per character | layer error |\n|---|---|---|---|---|\n"
_TABLE = re.compile(re.escape(HEAD) + r"(?:\|.*\n)*")
_COLUMNS = ("method", "target", "perplexity", "bits_per_char", "relative_error")
# Colours that remain distinct to colour-blind readers (Okabe and Ito, 2008), brighter on a dark page.
_COLOURS = {
    "light": ("#8c8c8c", "#e69f00", "#0072b2", "#d55e00"),
    "dark": ("#9e9e9e", "#f0b840", "#56b4e9", "#ff8c4a"),
}
_WIDTH = 0.2  # between methods, in units of the distance between targets
_INK = {"light": "#24292f", "dark": "#d0d7de"}


def archived(folder: Path) -> dict[str, Any]:
    """The figures of a comparison, with the machine and the settings."""
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    rows = [{name: row[name] for name in _COLUMNS} for row in content["rows"]]
    dense = {name: content["dense"][name] for name in ("perplexity", "bits_per_char")}
    return {"command": "make demo", "machine": headline(machine()), "dense": dense, "rows": rows}


def table(content: dict[str, Any]) -> str:
    """The rows in Markdown, as the README has them."""
    lines = [("dense", "", content["dense"]["perplexity"], content["dense"]["bits_per_char"], None)]
    lines += [tuple(row[name] for name in _COLUMNS) for row in content["rows"]]
    text = HEAD
    for method, target, perplexity, bits, error in lines:
        name = f"**{method}**" if method == BEST else method
        layer = "" if error is None else f"{error:.4f}"
        text += f"| {name} | {str(target).replace('%', ' %')} | {perplexity:.3f} | {bits:.4f} | {layer} |\n"
    return text


def chart(content: dict[str, Any], path: Path, theme: str) -> None:
    """Perplexity by target, methods side by side, on a logarithmic axis; transparent, for a light or a dark page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    rows, ink = content["rows"], _INK[theme]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    style = {"svg.hashsalt": "demo", "svg.fonttype": "path", "font.size": 11.0}
    with mpl.rc_context(style | dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        panel = figure.subplots()
        methods = list(dict.fromkeys(row["method"] for row in rows))
        for number, (method, colour) in enumerate(zip(methods, _COLOURS[theme], strict=True)):
            values = [row["perplexity"] for row in rows if row["method"] == method]
            places = [index + _WIDTH * (number - (len(methods) - 1) / 2) for index in range(len(targets))]
            panel.plot(places, values, "o", color=colour, label=method, markersize=8)
            for place, value in zip(places, values, strict=True):
                above = (0, 6)
                panel.annotate(f"{value:.1f}", (place, value), above, textcoords="offset points", ha="center", size=9)
        dense = content["dense"]["perplexity"]
        panel.axhline(dense, color=ink, linewidth=1, linestyle="--", label=f"dense ({dense:.1f})")
        panel.set_yscale("log")
        panel.set_yticks([12, 20, 50, 100, 150], labels=["12", "20", "50", "100", "150"])
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_xticks(range(len(targets)), labels=targets)
        panel.set(xlabel="pruned", ylabel="perplexity", xlim=(-0.5, len(targets) - 0.5), ylim=(10, 200))
        panel.spines[["top", "right"]].set_visible(False)
        for spine in panel.spines.values():
            spine.set_color(ink)
        panel.grid(axis="y", color=ink, alpha=0.15)
        figure.legend(
            *panel.get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, columnspacing=1
        )
        figure.savefig(path, transparent=True, metadata={"Date": None})


def write(content: dict[str, Any]) -> None:
    """Tables and charts."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        replaced, count = _TABLE.subn(table(content), text)
        assert count == 1, f"{page} has {count} tables of the demo"
        page.write_text(replaced, encoding="utf-8")
    CHARTS.mkdir(exist_ok=True)
    for theme in _INK:
        chart(content, CHARTS / f"demo-{theme}.svg", theme)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    folder = parser.parse_args(words).folder
    if folder is not None:
        ARCHIVE.write_text(json.dumps(archived(folder), indent=1) + "\n", encoding="utf-8")
    write(json.loads(ARCHIVE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
