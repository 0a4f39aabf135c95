"""The benchmark of allocation and the joint steps: rows that are measured once, and ratios on the same draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from admm_prune.errors import UserError
from benchmarks import joint
from benchmarks.journal import Record


def record(method: str, steps: str, seed: int, perplexity: float, **figures: str) -> Record:
    row = dict.fromkeys(joint.COLUMNS, "") | {"dense": "6", "weights": "100", "removed": "60"} | figures
    key = {"model": "tiny", "target": "0.6", "method": method, "steps": steps, "seed": str(seed), "settings": "short"}
    return {**key, **row, "perplexity": str(perplexity)}


def test_ratios_are_to_the_method_without_steps_and_to_sparsegpt_on_the_same_draw() -> None:
    figures = {"refit_before": "0.2", "refit_after": "0.1"}
    rows = joint.rows_of(
        [
            *(record("sparsegpt", "-", seed, 10.0 + 2 * seed) for seed in range(2)),
            *(record("admm", "-", seed, 8.0 + 4 * seed) for seed in range(2)),
            *(record("admm", "--refit block", seed, 6.0 + seed, **figures) for seed in range(2)),
            record("wanda", "--refit block", 0, 5.0),
        ]
    )
    by_name = {(row["method"], row["steps"]): row for row in rows}
    refitted = by_name["admm", "--refit block"]
    assert refitted["relative"] == pytest.approx((6 / 8 + 7 / 12) / 2)
    assert refitted["ratio"] == pytest.approx((6 / 10 + 7 / 12) / 2)
    assert (refitted["perplexity"], refitted["spread"], refitted["seeds"]) == (6.5, 1.0, 2)
    assert by_name["wanda", "--refit block"]["relative"] is None
    assert by_name["wanda", "--refit block"]["ratio"] == pytest.approx(0.5)
    table = joint.text_table(rows, "head")
    assert "refit 0.20000 -> 0.10000" in table
    assert "tiny at 0.6, dense 6.000; 100 weights" in table


def test_the_rows_of_an_ablation() -> None:
    labels = [joint.label(steps) for steps in joint.chosen_steps(joint.ABLATION, ["fisher", "search"])]
    assert labels == [
        "-",
        "--allocation fisher",
        "--allocation search",
        "--coordinate attention",
        "--refit block",
        "--allocation fisher --coordinate attention --refit block",
        "--allocation search --coordinate attention --refit block",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "none,al"], "there is no row al"),
        (["--rows", "none,all"], "the rows allocation, allocation-refit, all need"),
    ],
)
def test_rows_that_cannot_be_measured_are_refused(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        joint.main([str(tmp_path / "out"), *words])
    assert message in capsys.readouterr().err


def test_a_grid_is_measured_once_and_a_run_that_was_stopped_is_resumed(
    tmp_path: Path, model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, prune, resumed = tmp_path / "out", joint.prune, []

    def interrupted(*arguments: Any, **how: Any) -> Any:
        def stop(done: int, _: int, at_work: str) -> None:
            if done == 1 and at_work.startswith("model.layers.1"):
                raise KeyboardInterrupt

        resumed.append(how["resume"])
        stops = len(resumed) == 2
        return prune(*arguments, **how, progress=stop if stops else None)

    monkeypatch.setattr(joint, "prune", interrupted)
    words = [str(out), "--model", str(model_folder), "--data", str(text_file), "--methods", "wanda", "--targets", "0.5"]
    words += ["--samples", "4", "--length", "32", "--eval-samples", "2", "--allocations", "owl", "--rows", "none,all"]
    with pytest.raises(KeyboardInterrupt):
        joint.main(words)
    joint.main(words)
    assert resumed == [False, False, True]
    rows = json.loads((out / "joint.json").read_text())["rows"]
    assert [row["steps"] for row in rows] == ["-", "--allocation owl --coordinate attention --refit block"]
    assert rows[0]["removed"] == rows[1]["removed"] == rows[0]["weights"] / 2
    assert rows[0]["seconds"] > 0
    assert rows[1]["seconds"] is None, "it was resumed"
    assert rows[1]["refit_after"] is not None
    assert {path.name for path in out.iterdir()} == {"runs.csv", "joint.json", "joint.txt"}
    monkeypatch.setattr(joint, "prune", lambda *_, **__: pytest.fail("measured again"))
    joint.main(words)


def test_a_model_that_cannot_be_pruned_leaves_no_row(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(UserError):
        joint.main([str(tmp_path / "out"), "--model", str(tmp_path / "none"), "--data", str(text_file)])
    assert not (tmp_path / "out/runs.csv").exists()
