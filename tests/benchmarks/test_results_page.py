"""The page of results on real models, made from archived rows and published figures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import joint, literature, results_page
from benchmarks.journal import Journal
from benchmarks.real_model import PUBLISHED

FULL = "real-model-2026-11-28"


def test_the_page_is_up_to_date() -> None:
    written = results_page.PAGE.read_text(encoding="utf-8")
    assert written == results_page.page(), "run: make catalogue"


def test_the_table_of_the_readme_is_up_to_date(tmp_path: Path) -> None:
    assert results_page.summary() in results_page.README.read_text(encoding="utf-8"), "run: make catalogue"
    shutil.copytree(results_page.ROOT / results_page.ARCHIVE / FULL, tmp_path / FULL)
    with (tmp_path / FULL / "runs.csv").open("a") as file:
        settings = "64 sequences of 1024 tokens, 24 to evaluate, float32"
        file.write(f'smollm2,2:4,added,0,22.51842,1,0.5,65536,1024,24552,,,,,1000,"{settings}"\n')
    assert "| `added` |  |  |  | 22.52 (0.50) |\n" in results_page.summary(tmp_path)


def test_a_row_that_is_added_appears_with_its_ratio(tmp_path: Path) -> None:
    shutil.copytree(results_page.ROOT / results_page.ARCHIVE / FULL, tmp_path / FULL)
    rows = tmp_path / FULL / "runs.csv"
    settings = rows.read_text().splitlines()[1].split(",", 15)[15]
    with rows.open("a") as file:
        file.write(f"smollm2,0.5,added,0,15.49788,1,0.5,65536,1024,24552,,,,,1000,{settings}\n")  # half of sparsegpt's
    added = results_page.page(tmp_path)
    assert "| `added` | 15.50 (0.50) |" in added
    assert "added" not in results_page.page()
    assert "real-model-few-tokens" not in added
    assert "by more than two standard errors" in added


def test_rows_with_other_options_stand_beside_those_of_the_same_protocol(tmp_path: Path) -> None:
    shutil.copytree(results_page.ROOT / results_page.ARCHIVE / FULL, tmp_path / FULL)
    settings = "64 sequences of 1024 tokens, 24 to evaluate, float32"
    (tmp_path / "joint").mkdir()
    journal = Journal(tmp_path / "joint" / "runs.csv", joint.COLUMNS, joint.KEY)
    cases = (
        (settings, "--refit block", 20.65748), ("another", "--refit block", 20.65748),
        (settings, joint.NO_STEPS, 20.65748), (settings, "--allocation fisher", 21.95675),  # on other text
    )  # fmt: skip
    for protocol, steps, dense in cases:
        key = {"model": "smollm2", "target": "0.5", "method": "admm", "steps": steps, "seed": "0", "settings": protocol}
        figures = {"perplexity": 15.49788, "dense": dense, "blimp": 0.5, "blimp_error": 0.01}
        journal.add(key, [dict.fromkeys(joint.COLUMNS) | figures])
    page = results_page.page(tmp_path)
    assert "sparsellm has 0.703 on BLiMP and admm --refit block 0.500, with perplexities of 24.3 and 15.5" in page
    (line,) = [line for line in page.splitlines() if line.startswith("| `admm --")]
    assert line == "| `admm --refit block` | 15.50 (0.50), BLiMP 50.0 ± 1.0 % |  |  |  |"


def test_ratios_are_of_one_model_target_and_source() -> None:
    ratios = literature.ratios("OPT-125M")
    assert ratios["D2Prune"]["0.7"] == pytest.approx(160.81 / 218.29)
    assert ratios["SparseLLM"]["0.6"] == pytest.approx(56.64 / 59.46)
    assert literature.ratios("LLaMA-2-7B")["MaskLLM"] == {"2:4": pytest.approx(6.78 / 10.12)}
    assert ratios == PUBLISHED
    assert all(figure.ratio > 0 and figure.source in results_page.SOURCES for figure in literature.figures())


def test_a_figure_without_its_reference_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "perplexity.csv"
    table.write_text("model,target,method,perplexity,source,protocol\nM,0.5,Wanda,10,S,one-shot\n")
    monkeypatch.setattr(literature, "TABLE", table)
    with pytest.raises(KeyError):
        literature.figures.__wrapped__()
