"""Comparisons: what is best, what the report shows, and that a model which reloads differently is never reported."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from admm_prune.models.evaluate import Evaluation
from admm_prune.recipes.targets import Target
from admm_prune.runs import comparison
from admm_prune.runs.comparison import Comparison, ComparisonSettings, Row, compare
from admm_prune.runs.report import write_report
from admm_prune.runs.texts import TextSettings

DENSE = Evaluation(
    perplexity=4.0, bits_per_char=1.0, tokens=1000, characters=2000, packing="windows", length=64, truncated_tokens=0,
    protocol="a <protocol>.",
)  # fmt: skip
RECORD = {"source": "text.txt", "sequences": 10, "length": 64, "packing": "windows", "tokens": 640,
          "truncated_tokens": 0, "token_hash": 64 * "a"}  # fmt: skip


def row(method: str, target: str, perplexity: float) -> Row:
    return Row(
        method=method, target=target, sparsity=0.5, perplexity=perplexity, bits_per_char=1.5, relative_error=0.1,
        seconds=1.0, reloaded_perplexity=perplexity, folder=f"models/{method}",
    )  # fmt: skip


def result(*rows: Row) -> Comparison:
    manifest: dict[str, Any] = {
        "texts": {"calibration": RECORD, "evaluation": RECORD},
        "environment": {"versions": {"torch": "2"}, "python": "3.11"},
    }
    return Comparison(model="tiny", parameters=1234567, dense=DENSE, rows=list(rows), manifest=manifest)


def test_the_best_is_the_lowest_of_its_target() -> None:
    nan, inf = float("nan"), float("inf")
    rows = [
        row("a", "50%", 5.0),
        row("b", "50%", nan),
        row("c", "50%", 6.0),
        row("a", "2:4", inf),
        row("b", "2:4", inf),
    ]
    assert [result(*rows).is_best(r) for r in rows] == [True, False, False, False, False]
    tied = [row("a", "50%", 5.0), row("b", "50%", 5.0)]
    assert [result(*tied).is_best(r) for r in tied] == [True, True]


@pytest.mark.parametrize("targets", [("50%", "70%", "2:4"), ("2:4",), ("50%",)], ids=", ".join)
def test_the_page_shows_every_row_and_names_every_method_once(tmp_path: Path, targets: tuple[str, ...]) -> None:
    rows = [row(method, target, p) for target in targets for method, p in (("magnitude", 9.0), ("<admm>", 5.0))]
    content = result(*rows)
    write_report(content.as_json(), [content.is_best(r) for r in rows], tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count('<tr class="best') == len(targets)
    assert page.count("<td>magnitude</td>") == len(targets)
    assert page.count("<td>&lt;admm&gt;</td>") == len(targets), "what came from outside is escaped"
    assert "a &lt;protocol&gt;." in page
    assert "1,234,567 parameters" in page
    legend = page[page.index('id="legend_1"') : page.index("</svg>")]
    assert re.findall(r"<!-- (.*?) -->", legend) == ["magnitude", "&lt;admm&gt;", "dense"]
    assert not re.findall(r"(?:src|href)=\"(?!#)", page), "the page fetches nothing"
    assert (tmp_path / "perplexity.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("error")
def test_a_model_that_broke_is_drawn_and_written_without_complaint(tmp_path: Path) -> None:
    content = result(row("a", "50%", float("inf")), row("b", "50%", float("nan")), row("c", "50%", 5.0))
    write_report(content.as_json(), [False, False, True], tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<td>inf</td>" in page
    assert "<td>nan</td>" in page


def test_a_model_that_reloads_to_other_figures_is_a_defect_and_leaves_nothing(
    tmp_path: Path, model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, calls = comparison.evaluation.evaluate, []

    def drifting(*arguments: Any) -> Evaluation:
        calls.append(arguments)
        figures = evaluate(*arguments)
        return replace(figures, perplexity=figures.perplexity + 1e-9 * len(calls))

    monkeypatch.setattr(comparison.evaluation, "evaluate", drifting)
    settings = ComparisonSettings(
        model=str(model_folder),
        methods=("magnitude",),
        targets=(Target(sparsity=0.5),),
        text=TextSettings(data=str(text_file)),
    )
    with pytest.raises(RuntimeError, match="magnitude 50%: saved and loaded"):
        compare(settings, tmp_path / "out")
    assert not list(tmp_path.iterdir())
