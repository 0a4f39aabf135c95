"""One table of metrics: a line that is added to it is found wherever figures are shown, without another edit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from admm_prune.models.evaluate import METRICS, RANKING
from tests.edited_package import insert, run_edited
from tests.runs.html_page import read_page

pytestmark = pytest.mark.slow  # an edited copy of the package prunes, compares and verifies in a process of its own

FIELD = """    nats: float = _metric("nats per token", "%.5f", lambda loss, text: loss.item() / text.scored_tokens, heading="nats", primary=True)
"""  # noqa: E501  # one line
SCRIPT = """
import contextlib, io, json, sys
import admm_prune
from admm_prune.cli import main

def said(*arguments):
    sys.argv = ["admm-prune", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try: main()
        except SystemExit as end: assert not end.code, (arguments, out.getvalue())
    return out.getvalue()

class Recorder:
    def start(self, settings): pass
    def log(self, figures, step): pass
    def finish(self, summary): self.summary = dict(summary)

model, data = sys.argv[1:]
common = ["--model", model, "--data", data, "--sparsity", "0.5", "--device", "cpu"]
tracker = Recorder()
admm_prune.prune(model, method="magnitude", sparsity=0.5, data=data, device="cpu", log=tracker)
json.dump({
    "run": said("run", *common, "--method", "magnitude", "--out", "pruned"),
    "eval": said("eval", "pruned"),
    "compare": said("compare", *common, "--methods", "magnitude,wanda", "--out", "compared"),
    "tracked": tracker.summary,
    "difference": json.loads(said("report", "pruned", "compared/models/wanda-50", "--out", "page.html", "--json")),
    "verified": {name: json.loads(said("verify", name, "--json")) for name in ("pruned", "compared")},
}, open("found.json", "w"))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> Path:
    """The folder of a run and of a comparison with the metric, and found.json of what was printed."""
    folder = tmp_path_factory.mktemp("edited")
    insert(folder, Path("models/evaluate.py"), FIELD, above="    bits_per_char: float = _metric(\n")
    run_edited(folder, SCRIPT, model_folder, text_file)
    return folder


@pytest.fixture
def shown(place: Path) -> dict[str, Any]:
    content = json.loads((place / "found.json").read_text())
    assert isinstance(content, dict)
    return content


def manifest_of(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "admm_prune.json").read_text())
    assert isinstance(content, dict)
    return content


def test_a_metric_is_in_the_manifests(place: Path) -> None:
    run, comparison = manifest_of(place / "pruned"), manifest_of(place / "compared")
    for figures in (run["dense"], run["pruned"], comparison["dense"], *comparison["rows"]):
        assert figures["nats"] == pytest.approx(math.log(figures["perplexity"]), rel=1e-12)


def test_a_metric_is_in_the_tables_of_the_command_line(place: Path, shown: dict[str, Any]) -> None:
    run, comparison = manifest_of(place / "pruned"), manifest_of(place / "compared")
    for command, figures in (
        ("run", (run["dense"], run["pruned"])),
        ("eval", (run["pruned"],)),
        ("compare", (comparison["dense"], *comparison["rows"])),
    ):
        headings = next(line for line in shown[command].splitlines() if "bits/char" in line).split()
        assert headings.index("perplexity") < headings.index("nats") < headings.index("bits/char")
        for one in figures:
            assert f"{one['nats']:.5f}" in shown[command]
    ratio = comparison["rows"][0]["nats"] / comparison["dense"]["nats"]
    assert f"{ratio:.2f}" in shown["compare"]


def test_a_metric_is_in_the_reports(place: Path, shown: dict[str, Any]) -> None:
    run, comparison = manifest_of(place / "pruned"), manifest_of(place / "compared")
    cards = read_page((place / "pruned/report.html").read_text()).find_all("dl")[0]
    assert "nats per token" in [title.text for title in cards.find_all("dt")]
    assert run["pruned"]["nats"] in [card.number for card in cards.find_all("dd")]
    text = (place / "compared/report.html").read_text()
    page = read_page(text)
    cells = [row.find_all("td", data_field="nats") for row in page.find_all("tr") if "data-row" in row.attributes]
    assert [cell.number for (cell,) in cells] == [row["nats"] for row in comparison["rows"]]
    assert 'id="nats-legend_1"' in text, "a primary metric has a plot"
    assert shown["difference"]["figures"]["nats per token, pruned"]["a"] == run["pruned"]["nats"]


def test_a_metric_is_tracked_and_verified(place: Path, shown: dict[str, Any]) -> None:
    run = manifest_of(place / "pruned")
    for which in ("dense", "pruned"):
        assert shown["tracked"][f"{which}/nats"] == run[which]["nats"]
    for report in shown["verified"].values():
        assert report["outcome"] == "verified"
        assert "nats" in report["checked"]
    assert "row nats" in shown["verified"]["compared"]["checked"]
    assert shown["verified"]["pruned"]["nats"] == pytest.approx(run["pruned"]["nats"], rel=1e-6)


def test_methods_are_ranked_by_perplexity() -> None:
    assert RANKING == "perplexity"
    assert list(METRICS) == ["perplexity", "bits_per_char"]
