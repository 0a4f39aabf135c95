"""Reports: whole pages that hold every layer and every number of their manifests, made again from the files alone."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import load_file, save_file

import admm_prune
from admm_prune.errors import UserError
from admm_prune.methods.target import Target
from admm_prune.models.evaluate import Evaluation
from admm_prune.result import Convergence, Progress
from admm_prune.runs.compare import Comparison, ComparisonSettings, Row, compare
from admm_prune.runs.journal.folder import write_json
from admm_prune.runs.manifest import Phases
from admm_prune.runs.report import content, plots, write_difference, write_report
from admm_prune.settings import Settings
from tests.runs.html_page import Element, read_page

CHROMIUM = shutil.which("chromium")


def manifest_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "admm_prune.json").read_text())
    assert isinstance(found, dict)
    return found


def page_of(folder: Path) -> Element:
    return read_page((folder / "report.html").read_text())


def drawings(page: Element) -> set[str]:
    """The kinds of drawing in a page: what the ids of each begin with."""
    return {
        (found.find_all("g")[0].attributes["id"] or "").partition("-")[0] for found in page.find_all("div", role="img")
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> Path:
    """Finished runs by five kinds of method."""
    place = tmp_path_factory.mktemp("runs")
    common: dict[str, Any] = {"data": str(text_file), "device": "cpu"}
    admm_prune.prune(model_folder, method="admm", sparsity=0.7, out=place / "admm", bounds=True, **common)
    admm_prune.prune(model_folder, method="wanda", sparsity=0.5, out=place / "wanda", **common)
    admm_prune.prune(model_folder, method="magnitude", sparsity=0.5, out=place / "magnitude", **common)
    admm_prune.prune(model_folder, method="struprune", sparsity=0.4, out=place / "struprune", **common)
    admm_prune.prune(model_folder, method="sparsellm", sparsity=0.5, out=place / "sparsellm", **common)
    admm_prune.prune(model_folder, method="elsa-published", sparsity=0.5, steps=40, out=place / "trained", **common)
    return place


def test_the_page_begins_with_text_samples_and_says_how_to_repeat_and_load(runs: Path) -> None:
    for name in ("admm", "struprune"):
        manifest, page = manifest_of(runs / name), page_of(runs / name)
        headings = [heading.text for heading in page.find_all("h2")]
        assert headings[0] == "Text samples"
        samples = page.find_all("dl", **{"class": "samples"})[0].find_all("pre")
        continuation = manifest["continuation"]
        assert [sample.text for sample in samples] == [continuation[x] for x in ("prompt", "dense", "pruned")]
        assert "Repeat and load" in headings
        code = "\n".join(block.text for block in page.find_all("pre"))
        assert "admm-prune run --recipe recipe.yaml" in code
        assert (runs / name / "recipe.yaml").read_text() in code
        assert ("load_packed" in code) == (name == "admm"), "sliced matrices have no zeros"
        config = json.loads((runs / name / "config.json").read_text())
        assert ("trust_remote_code=True" in code) == ("auto_map" in config)
        times = json.loads((runs / name / "timings.json").read_text())
        assert f"Finished on {times['finished'][:10]}" in page.text
        assert times["machine"] in page.text


def test_options_beyond_the_method_are_named_below_its_name(
    runs: Path, tmp_path: Path, model_folder: Path, text_file: Path
) -> None:
    options = {"allocation": "owl", "refit": "block", "samples": 4, "eval_samples": 2}
    how: dict[str, Any] = {"method": "wanda", "sparsity": 0.5, "data": str(text_file), "device": "cpu", **options}
    admm_prune.prune(model_folder, out=tmp_path / "out", **how)
    leads = [
        [p.text for p in page_of(folder).find_all("p", **{"class": "lead"})]
        for folder in (tmp_path / "out", runs / "wanda")
    ]
    assert leads[0][0] == "With --allocation owl, --refit block."
    assert not any("With --" in text for text in leads[1])


def test_the_csv_table_has_every_layer(runs: Path) -> None:
    (link,) = (a for a in page_of(runs / "admm").find_all("a") if "download" in a.attributes)
    where = link.attributes["href"] or ""
    assert where.startswith("data:text/csv;charset=utf-8,")
    rows = list(csv.DictReader(unquote(where.partition(",")[2]).splitlines()))
    layers = manifest_of(runs / "admm")["layers"]
    assert [row["name"] for row in rows] == [layer["name"] for layer in layers]
    for row, layer in zip(rows, layers, strict=True):
        assert float(row["relative_error"]) == layer["relative_error"]
        assert float(row["bound"]) == layer["bound"]
        assert int(row["rows"]) * int(row["columns"]) == layer["shape"][0] * layer["shape"][1]


def test_points_and_areas_show_their_values_on_hover(runs: Path) -> None:
    layers, page = manifest_of(runs / "admm")["layers"], page_of(runs / "admm")
    titles = [title.text for title in page.find_all("title")[1:]]
    for layer in layers:
        block, matrix = content.place_of(layer["name"])
        assert f"block {block}, {matrix}: {layer['relative_error']:.4g}" in titles
        assert f"block {block}, {matrix}: {100 * (1 - layer['sparsity']):.2f} % of the weights left" in titles


def test_layers_without_an_error_are_last() -> None:
    layers = [{"relative_error": error, "sparsity": sparsity} for error, sparsity in
              ((None, 0.5), (0.1, 0.5), (None, 0.2), (0.3, 0.5))]  # fmt: skip
    assert [layers.index(layer) for layer in content.worst_first(layers)] == [3, 1, 2, 0]


def test_infinite_errors_are_listed_first_and_left_out_of_plots() -> None:
    layers = [{"name": f"model.layers.{i}.mlp.up_proj.weight", "relative_error": error, "sparsity": 0.5}
              for i, error in enumerate((0.1, math.inf, 0.3, None))]  # fmt: skip
    assert [layers.index(layer) for layer in content.worst_first(layers)] == [1, 2, 0, 3]
    assert plots.by_matrix(layers, "relative_error") == {"mlp.up_proj": [(0, 0.1), (2, 0.3)]}
    picture = plots.layer_errors(layers)
    assert picture is not None
    assert "inf" not in picture


def test_a_note_that_is_advised_already_is_not_repeated() -> None:
    layer = {"name": "a", "notes": ["slow", "other"], "diagnosis": [{"finding": "slow"}]}
    assert content.notes_of({"notes": ["of the run"], "layers": [layer]}) == [("of the run", 0), ("other", 1)]
    swaps = [{"name": "a", "notes": [f"{count} swaps, 0.{count} products"], "diagnosis": []} for count in (7, 15, 7)]
    assert content.notes_of({"notes": [], "layers": swaps}) == [("7 swaps, 0.7 products, for instance", 3)]
    assert content.notes_of({"notes": [], "layers": swaps[::2]}) == [("7 swaps, 0.7 products", 2)]


def test_every_layer_is_in_the_page_with_the_numbers_of_the_manifest(runs: Path) -> None:
    for name in ("admm", "wanda", "magnitude", "struprune", "sparsellm", "trained"):
        manifest, page = manifest_of(runs / name), page_of(runs / name)
        rows = {row.attributes["data-layer"]: row for row in page.find_all("tr") if "data-layer" in row.attributes}
        assert list(rows) == [layer["name"] for layer in content.worst_first(manifest["layers"])]
        fields = ["relative_error"] + ["objective", "bound"] * (name == "admm")
        fields += ["relative_error_validation"] * (name == "magnitude")
        assert ("error, validation" in page.text) == (name == "magnitude"), "the others are fitted to these tokens too"
        for layer in manifest["layers"]:
            for field in fields:
                (cell,) = rows[layer["name"]].find_all("td", data_field=field)
                assert cell.number == layer[field], (name, layer["name"], field)
        cards = [card.number for card in page.find_all("dl")[0].find_all("dd")]
        assert cards[0] == manifest["pruned"]["perplexity"]
        assert cards[2] == manifest["pruned"]["bits_per_char"]
        assert cards[3] == 100 * manifest["sparsity"]
        assert manifest["pruned"]["protocol"] in page.text
        phases = page.find_all("table", id="phases")[0].find_all("tbody")[0].find_all("tr")
        times = json.loads((runs / name / "timings.json").read_text())
        assert [row.number for row in phases] == [p["seconds"] for p in times["phases"]]
        assert cards[5] == times["seconds"]


def test_a_page_draws_what_its_method_did(runs: Path) -> None:
    assert drawings(page_of(runs / "admm")) == {"map", "errors", "convergence"}
    assert drawings(page_of(runs / "wanda")) == {"map", "errors"}
    assert drawings(page_of(runs / "sparsellm")) == {"map", "errors", "convergence", "rounds"}
    assert drawings(page_of(runs / "trained")) == {"map", "training"}
    structured = page_of(runs / "struprune")
    assert drawings(structured) == {"map", "errors"}
    units = manifest_of(runs / "struprune")["details"]
    (table,) = (t for t in structured.find_all("table") if t.find_all("th")[0].text == "sublayer")
    told = {row.find_all("th")[0].text: row.find_all("td") for row in table.find_all("tr")[1:]}
    assert {name: int(cells[1].text) for name, cells in told.items()} == units["units"]
    assert {name: int(cells[0].text) for name, cells in told.items() if int(cells[0].text)} == {
        name: count for name, count in units["removed"].items() if count
    }
    for name, said in (("struprune", "Whole units were removed"), ("admm", "the files are no smaller")):
        lead = page_of(runs / name).text
        assert said in lead
        assert "Speed was not measured" in lead, "and nothing is said of it"
        assert "faster" not in lead


def test_a_bound_lies_below_what_was_reached(runs: Path) -> None:
    for layer in manifest_of(runs / "admm")["layers"]:
        assert 0 < layer["bound"] <= layer["objective"]
        assert layer["relative_error"] <= layer["objective"], "damping only adds"
    assert "not computed (--bounds)" in page_of(runs / "wanda").text
    assert "not computed (--bounds)" not in page_of(runs / "admm").text


def test_the_doctor_speaks_in_words(runs: Path) -> None:
    layers = manifest_of(runs / "admm")["layers"]
    assert layers[0]["diagnosis"][0].keys() == {"code", "severity", "finding", "advice"}
    items = [item.text for item in page_of(runs / "admm").find_all("li")]
    kinds = content.advice_of(layers)
    assert len(items) == len(kinds)
    for item, kind in zip(items, kinds, strict=True):
        assert f"{kind.code}, {len(kind.layers)} of 14 layers" in item
        assert kind.severity == "good" or kind.advice in item


def test_a_page_is_made_again_from_the_files_alone(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "admm", tmp_path / "moved")
    before = (tmp_path / "moved/report.html").read_bytes()
    (tmp_path / "moved/report.html").unlink()
    assert write_report(tmp_path / "moved").read_bytes() == before


def test_a_history_is_thinned_to_its_last_line() -> None:
    history = [Progress(i, primal_residual=1.0 / i, support_changes=i, rho=0.5) for i in range(1, 301)]
    found = Convergence.of(history)
    assert found is not None
    assert found.iteration[-1] == 300
    assert len(found.iteration) <= 64
    assert found.primal_residual == tuple(1.0 / i for i in found.iteration)
    assert found.objective == (None,) * len(found.iteration)
    short = Convergence.of(history[:3])
    assert short is not None
    assert short.iteration == (1, 2, 3)
    assert Convergence.of([]) is None


def test_a_solve_of_several_weights_tells_its_history_once(runs: Path) -> None:
    layers = manifest_of(runs / "admm")["layers"]
    told = [content.place_of(layer["name"])[1] for layer in layers if layer["convergence"]]
    assert told == 2 * ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    columns = layers[0]["convergence"]
    assert columns["iteration"][-1] == layers[0]["iterations"]


def test_tiles_are_shares_of_what_is_left(runs: Path) -> None:
    layers = manifest_of(runs / "wanda")["layers"]
    weights = content.Weights(runs / "wanda", layers)
    tensors = load_file(runs / "wanda/model.safetensors")
    for layer in layers:
        stored, tiles = tensors[layer["name"]], weights.tiles(layer["name"])
        assert tiles is not None
        assert (tiles.height, tiles.width) == (1.0, 1.0)
        rows, columns = stored.shape
        expected = (stored != 0).double().reshape(16, rows // 16, 16, columns // 16).mean((1, 3))
        assert torch.allclose(torch.from_numpy(tiles.share).double(), expected)
    sliced = manifest_of(runs / "struprune")["layers"]
    weights = content.Weights(runs / "struprune", sliced)
    for layer in sliced:
        tiles = weights.tiles(layer["name"])
        assert tiles is not None
        assert tiles.height * tiles.width == pytest.approx(1 - layer["sparsity"], abs=1e-12)


def test_stored_transposes_are_turned(tmp_path: Path) -> None:
    wide, square = torch.zeros(4, 6), torch.eye(4)
    wide[0] = 1.0
    square[0] = 1.0
    save_file({"h.0.fc.weight": wide, "h.0.proj.weight": square}, tmp_path / "model.safetensors")
    layers = [{"name": "h.0.fc.weight", "shape": [6, 4]}, {"name": "h.0.proj.weight", "shape": [4, 4]}]
    weights = content.Weights(tmp_path, layers)
    found = weights.read("h.0.proj.weight")
    assert found is not None
    assert torch.equal(found, square.T)
    assert weights.read("h.0.other.weight") is None


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj.weight", (3, "mlp.up_proj")),
        ("transformer.h.11.attn.c_attn.weight", (11, "attn.c_attn")),
        ("layers.0.experts.7.down.weight", (0, "experts.7.down")),
        ("weight", (0, "weight")),
    ],
)
def test_a_layer_is_placed_by_its_name(name: str, place: tuple[int, str]) -> None:
    assert content.place_of(name) == place


def test_the_difference_of_two_runs(runs: Path, tmp_path: Path) -> None:
    a, b = manifest_of(runs / "wanda"), manifest_of(runs / "admm")
    figures = write_difference(runs / "wanda", runs / "admm", tmp_path / "page.html")
    page = read_page((tmp_path / "page.html").read_text())
    assert figures["figures"]["perplexity, pruned"] == {"a": a["pruned"]["perplexity"], "b": b["pruned"]["perplexity"]}
    (row,) = page.find_all("tr", data_figure="perplexity, pruned")
    assert row.find_all("td", data_field="b")[0].number == b["pruned"]["perplexity"]
    first, second = (load_file(runs / name / "model.safetensors") for name in ("wanda", "admm"))
    for one, other in zip(a["layers"], b["layers"], strict=True):
        (row,) = page.find_all("tr", data_layer=one["name"])
        assert [row.find_all("td", data_field=field)[0].number for field in "ab"] == [
            one["relative_error"],
            other["relative_error"],
        ]
        kept, also = first[one["name"]] != 0, second[one["name"]] != 0
        common = float((kept & also).sum() / (kept | also).sum())
        assert row.find_all("td", data_field="common")[0].number == pytest.approx(100 * common, rel=1e-6)
    assert {"settings.method", "settings.target.sparsity", "settings.bounds"} == set(figures["unlike"])
    assert figures["same_text"]
    assert "settings.target.sparsity" in page.text
    same = write_difference(runs / "admm", runs / "admm", tmp_path / "page.html", overwrite=True)
    assert set(same["supports_in_common"].values()) == {1.0}
    assert same["unlike"] == []
    assert "are the same in both" in (tmp_path / "page.html").read_text()


def test_what_cannot_be_reported_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a finished run"):
        write_report(tmp_path)
    foreign = Path(shutil.copytree(runs / "wanda", tmp_path / "foreign"))
    manifest = manifest_of(foreign)
    benchmark = {"rows": [{"name": "a"}], "environment": {}}
    for written, reason in (
        (benchmark, "is not a manifest of 'admm-prune run' or 'admm-prune compare'"),
        ({**manifest, **benchmark}, "is not a manifest of this release"),
        ({name: value for name, value in manifest.items() if name != "details"}, "is not a manifest of this release"),
        ({name: value for name, value in manifest.items() if name != "continuation"}, "is not a manifest of this rele"),
        ({**manifest, "layers": [{"name": "x"}]}, "is not a manifest of this release"),
        ({**manifest, "environment": {}}, "is not a manifest of this release"),
    ):
        (foreign / "admm_prune.json").write_text(json.dumps(written))
        with pytest.raises(UserError, match=reason) as refused:
            write_report(foreign)
        assert "\n" not in str(refused.value)
    (foreign / "admm_prune.json").write_text(json.dumps({**manifest, "layers": [{"name": "x"}]}))
    with pytest.raises(UserError, match="is not a manifest of this release"):
        write_difference(runs / "wanda", foreign, tmp_path / "page.html")
    (tmp_path / "mine.html").write_text("<p>my notes</p>")
    with pytest.raises(UserError, match="not written by admm-prune"):
        write_difference(runs / "wanda", runs / "admm", tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "<p>my notes</p>"
    with pytest.raises(UserError, match="there is no folder"):
        write_difference(runs / "wanda", runs / "admm", tmp_path / "none/page.html")
    (tmp_path / "admm_prune.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        write_report(tmp_path)


def test_a_comparison_shows_every_row_beside_the_tuned_dense_model(
    tmp_path: Path, model_folder: Path, text_file: Path
) -> None:
    settings = ComparisonSettings(
        run=Settings(str(model_folder), data=str(text_file), samples=8, steps=4),
        methods=("wanda", "tuned-dense"),
        targets=(Target(0.5), Target(pattern=(2, 4))),
    )
    compare(settings, tmp_path / "out")
    manifest, page = manifest_of(tmp_path / "out"), page_of(tmp_path / "out")
    rows = {row.attributes["data-row"]: row for row in page.find_all("tr") if "data-row" in row.attributes}
    assert list(rows) == [f"{row['method']} {row['target']}" for row in manifest["rows"]]
    tuned = manifest["rows"][0]["perplexity"]
    for row in manifest["rows"]:
        cells = rows[f"{row['method']} {row['target']}"]
        for field in ("perplexity", "bits_per_char", "relative_error"):
            assert cells.find_all("td", data_field=field)[0].number == row[field]
        if row["method"] == "wanda":
            assert f"{row['perplexity'] / tuned:.3f}" in [cell.text for cell in cells.find_all("td")]
        link = cells.find_all("a")[0].attributes["href"]
        assert link is not None
        assert read_page((tmp_path / "out" / link).read_text()).find_all("table", id="layers")
    with pytest.raises(UserError, match="is a comparison: name two of its models"):
        write_difference(tmp_path / "out", tmp_path / "out", tmp_path / "page.html")


DENSE = Evaluation(
    perplexity=4.0, bits_per_char=1.0, tokens=1000, characters=2000, packing="windows", length=64, truncated_tokens=0,
    protocol="a <protocol>.",
)  # fmt: skip
RECORD = {"source": "text.txt", "sequences": 10, "length": 64, "packing": "windows", "tokens": 640,
          "truncated_tokens": 0, "token_hash": 64 * "a"}  # fmt: skip
ORIGIN: dict[str, Any] = {
    "texts": {"calibration": RECORD, "evaluation": RECORD},
    "environment": {"versions": {"torch": "2"}, "python": "3.11", "cuda": None},
    "settings": {},
}


def written(folder: Path, *figures: tuple[str, str, float]) -> Path:
    """A comparison as it is left behind, of (method, target, perplexity)."""
    rows = [
        Row(
            method=method, target=target, sparsity=0.5, perplexity=value, bits_per_char=1.5, relative_error=None,
            seconds=1.0, reloaded_perplexity=value, folder=f"models/{i}",
        )
        for i, (method, target, value) in enumerate(figures)
    ]  # fmt: skip
    comparison = Comparison(model="tiny", parameters=1234567, dense=DENSE, rows=rows, manifest=ORIGIN)
    for row in rows:
        (folder / row.folder).mkdir(parents=True)
        run = {"method": row.method, "target": row.target, "layers": [], "notes": [], "details": {}, **ORIGIN}
        write_json(folder / row.folder / "admm_prune.json", run)
    write_json(folder / "admm_prune.json", comparison.as_json())
    return folder


@pytest.mark.parametrize("targets", [("50%", "70%", "2:4"), ("2:4",), ("50%",)], ids=", ".join)
def test_the_page_shows_every_row_and_names_every_method_once(tmp_path: Path, targets: tuple[str, ...]) -> None:
    write_report(written(tmp_path, *((m, t, p) for t in targets for m, p in (("magnitude", 9.0), ("<admm>", 5.0)))))
    text = (tmp_path / "report.html").read_text()
    page = read_page(text)
    rows = [row for row in page.find_all("tr") if "data-row" in row.attributes]
    best = [row.attributes["data-row"] for row in rows if "best" in (row.attributes["class"] or "")]
    assert best == [f"<admm> {target}" for target in targets], "what came from outside is escaped"
    assert len(rows) == 2 * len(targets)
    assert "a <protocol>." in page.text
    assert "1,234,567 parameters" in page.text
    legend = text[text.index('id="perplexity-legend_1"') : text.index("</svg>")]
    assert re.findall(r">([^<>\n]+)</text>", legend) == ["magnitude", "&lt;admm&gt;", "dense"]
    assert (tmp_path / "perplexity.png").stat().st_size > 10_000


def test_every_unpruned_model_is_drawn(tmp_path: Path) -> None:
    """A comparison at sparsity 0 has more of them than one baseline."""
    write_report(written(tmp_path, ("a", "0%", 5.0), ("b", "0%", 6.0), ("c", "0%", 7.0), ("d", "50%", 9.0)))
    text = (tmp_path / "report.html").read_text()
    legend = text[text.index('id="perplexity-legend_1"') : text.index("</svg>")]
    assert set(re.findall(r">([^<>\n]+)</text>", legend)) == {"a", "b", "c", "d", "dense"}


@pytest.mark.filterwarnings("error")
def test_a_model_that_broke_is_drawn_and_written_without_complaint(tmp_path: Path) -> None:
    write_report(written(tmp_path, ("a", "50%", float("inf")), ("b", "50%", float("nan")), ("c", "50%", 5.0)))
    rows = [row.text for row in page_of(tmp_path).find_all("tr") if "data-row" in row.attributes]
    assert ["not finite" in row for row in rows] == [True, True, False]


@pytest.mark.filterwarnings("error")
def test_a_run_that_broke_or_lost_nothing_is_drawn_and_written_without_complaint(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "admm", tmp_path / "run")
    manifest = manifest_of(runs / "admm")
    manifest["pruned"] |= {"perplexity": None, "bits_per_char": None}
    for layer in manifest["layers"]:
        layer |= {"relative_error": 0.0, "bound": 0.0, "convergence": None}
    manifest["layers"][0]["relative_error"] = None
    write_json(tmp_path / "run/admm_prune.json", manifest)
    (tmp_path / "run/model.safetensors").unlink()
    write_report(tmp_path / "run")
    page = page_of(tmp_path / "run")
    assert "not finite" in page.find_all("dl")[0].text
    assert drawings(page) == set()


def test_phases_measure_what_they_hold() -> None:
    phases = Phases("cpu")
    with phases("holding") as phase:
        held = torch.ones(2**24)
    assert [found.name for found in phases] == ["holding"]
    assert phase.seconds > 0
    assert 40 < phase.peak_mib < 200, "64 MiB of floats"
    del held


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_lays_the_page_out_within_its_width(runs: Path, tmp_path: Path, width: int, dark: bool) -> None:
    """In headless Chromium: nothing hangs out of the window, and the page takes the reader's colours."""
    probe = (
        "<script>addEventListener('load', () => { document.title = JSON.stringify({"
        "across: document.documentElement.scrollWidth, width: innerWidth, "
        "paper: getComputedStyle(document.body).backgroundColor, "
        "axis: getComputedStyle(document.querySelector('svg text')).fill}) })</script>"
    )
    page = (runs / "admm/report.html").read_text().replace("</body>", f"{probe}</body>")
    # A frame is as narrow as a phone, which the window of a browser cannot be.
    (tmp_path / "inner.html").write_text(page)
    assert CHROMIUM is not None
    frame = (
        f"<iframe src='inner.html' width='{width}' height='900' onload='document.title = this.contentDocument.title'>"
    )
    (tmp_path / "page.html").write_text(f"<!DOCTYPE html><title>none</title>{frame}</iframe>")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", f"file://{tmp_path / 'page.html'}",
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = re.search(r"<title>(\{.*?\})</title>", shown)
    assert found is not None, shown[:300]
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert seen["width"] == width
    assert seen["across"] <= width
    light = [sum(map(int, re.findall(r"\d+", seen[name])[:3])) > 3 * 128 for name in ("paper", "axis")]
    assert light == [not dark, dark], "dark ink on light paper, or light ink on dark"


@pytest.mark.parametrize("name", ["report.html", "timings.json"])
def test_a_page_that_cannot_be_written_is_one_line(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = Path(shutil.copytree(runs / "wanda", tmp_path / "wanda"))
    write_text = Path.write_text

    def refused(path: Path, *given: Any, **how: Any) -> int:
        if path.name == name:
            raise OSError(30, "Read-only file system")
        return write_text(path, *given, **how)

    monkeypatch.setattr(Path, "write_text", refused)
    with pytest.raises(UserError, match=rf"^cannot write to {folder}/{name}: Read-only file system$"):
        write_report(folder)
