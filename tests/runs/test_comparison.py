"""Comparisons: what is best, what the report shows, and that a model which reloads differently is never reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from admm_prune.models.evaluate import Evaluation
from admm_prune.recipes.targets import Target
from admm_prune.runs import comparison
from admm_prune.runs.comparison import Comparison, ComparisonSettings, Row, compare
from admm_prune.runs.texts import TextSettings

DENSE = Evaluation(
    perplexity=4.0, bits_per_char=1.0, tokens=1000, characters=2000, packing="windows", length=64, truncated_tokens=0,
    protocol="a <protocol>.",
)  # fmt: skip


def row(method: str, target: str, perplexity: float) -> Row:
    return Row(
        method=method, target=target, sparsity=0.5, perplexity=perplexity, bits_per_char=1.5, relative_error=0.1,
        seconds=1.0, reloaded_perplexity=perplexity, folder=f"models/{method}",
    )  # fmt: skip


def result(*rows: Row) -> Comparison:
    return Comparison(model="tiny", parameters=1234567, dense=DENSE, rows=list(rows), manifest={})


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
