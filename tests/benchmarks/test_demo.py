"""The table and the chart of `make demo`, which the README and the docs show, from its archived rows."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks import demo


@pytest.fixture
def content() -> dict[str, object]:
    return json.loads(demo.ARCHIVE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", demo.PAGES, ids=lambda page: page.name)
def test_the_tables_are_those_of_the_archive(page: Path, content: dict[str, object]) -> None:
    assert demo.table(content) in page.read_text(encoding="utf-8"), "run: python -m benchmarks.demo"


def test_charts_are_complete(tmp_path: Path, content: dict[str, object]) -> None:
    """As many points as rows, and no background, so that it can stand on a light or a dark page."""
    assert isinstance(content["rows"], list)
    for theme, colours in demo._COLOURS.items():
        demo.chart(content, tmp_path / "chart.svg", theme)
        for chart in (tmp_path / "chart.svg", demo.CHARTS / f"demo-{theme}.svg"):
            text = chart.read_text(encoding="utf-8")
            ET.fromstring(text)
            # A marker is drawn once for a point and once for the legend, with its colour in the style of both.
            points = [text.count(f'fill: {colour}; stroke: {colour}"/>') for colour in colours]
            assert points == [len(content["rows"]) // len(colours) + 1] * len(colours)
            assert "fill: #ffffff" not in text


def test_a_comparison_is_archived(tmp_path: Path, content: dict[str, object]) -> None:
    row = {"method": "wanda", "target": "2:4", "perplexity": 9.0, "bits_per_char": 1.5, "relative_error": None}
    dense = {"perplexity": 8.0, "bits_per_char": 1.25, "tokens": 4}
    (tmp_path / demo.MANIFEST).write_text(json.dumps({"dense": dense, "rows": [{**row, "seconds": 1.0}]}))
    archived = demo.archived(tmp_path)
    assert archived["rows"] == [row]
    assert demo.table(archived) == demo.HEAD + (
        "| dense |  | 8.000 | 1.2500 |  |\n| wanda | 2:4 | 9.000 | 1.5000 |  |\n"
    )
    assert set(archived) == set(content)
