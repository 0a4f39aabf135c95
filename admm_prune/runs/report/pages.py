"""The HTML pages: manifests and plots rendered with the templates of `assets/reports`."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from admm_prune.data.durable import writing
from admm_prune.errors import UserError
from admm_prune.methods.target import DENSE, target_named
from admm_prune.models.archive import PACK_MANIFEST
from admm_prune.models.evaluate import METRICS, RANKING
from admm_prune.runs.card import task_rows, tasks_compared
from admm_prune.runs.claims import read_json, record_pages
from admm_prune.runs.journal.folder import MANIFEST, TIMINGS, check_apart, check_output_file
from admm_prune.runs.recipe_file import RECIPE, objects_of
from admm_prune.runs.report import content, plots
from admm_prune.runs.report.content import Manifest, Weights, overlap

REPORT = "report.html"
PLOT = "perplexity.png"
# Keys of a manifest that are shown otherwise, or too long to read.
_LONG = {"tasks", "continuation", "layers", "rows", "weights", "files", "details", "dense", "pruned", "timings"}


def write_report(folder: Path) -> Path:
    """Writes `report.html` for a folder of 'run' or 'compare', from its files alone; returns its path.

    Of a comparison also `perplexity.png`, and no page of its models, which have their own.

    Raises:
        UserError: the folder is not a finished run, is an archive, or has a file that cannot be read.
        WriteError: a file of it cannot be written.
    """
    _check_not_packed(folder)
    manifest = read_manifest(folder)
    with of_this_release(folder):
        page = _comparison(folder, manifest) if "rows" in manifest else _run(folder, read_run(folder))
    path = folder / REPORT
    with writing(path):
        path.write_text(page, encoding="utf-8")
    record_pages(folder / TIMINGS, [path, *(plot for plot in [folder / PLOT] if "rows" in manifest)])
    return path


def write_difference(first: Path, second: Path, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Writes one page on the difference of two runs; returns its figures, ready for JSON.

    Args:
        first, second: folders of runs, A and B.
        out: the page.
        overwrite: replace an earlier page there, which is refused otherwise.

    Raises:
        UserError: a folder is not a run, is an archive, or `out` was not written by us.
    """
    for folder in (first, second):
        _check_not_packed(folder)
    a, b = (read_run(folder) for folder in (first, second))
    for folder, manifest in ((first, a), (second, b)):
        if "rows" in manifest:
            raise UserError(f"{folder} is a comparison: name two of its models, such as {folder}/models/...")
    check_output_file(out, overwrite=overwrite, ours=_is_page)
    check_apart(out, first / REPORT, second / REPORT)
    with of_this_release(first, second):
        names = dict.fromkeys(layer["name"] for run in (a, b) for layer in run["layers"])
        common = overlap(Weights(first, a["layers"]), Weights(second, b["layers"]), names)
        errors, sparsities = (content.layers_of(a, b, field) for field in ("relative_error", "sparsity"))
        figures = content.figures_of(a, b)
        same_text = a["texts"]["evaluation"]["token_hash"] == b["texts"]["evaluation"]["token_hash"]
        page = _rendered(
            "difference.html.j2",
            a=a,
            b=b,
            same_text=same_text,
            figures=figures,
            ratios=plots.error_ratios(a["layers"], b["layers"]),
            layers=[(e, s, common.get(e.name)) for e, s in zip(errors, sparsities, strict=True)],
            unlike=content.unlike(a, b),
            advised=[(name, run, content.advice_of(run["layers"])) for name, run in (("A", a), ("B", b))],
        )
    with writing(out):
        out.write_text(page, encoding="utf-8")
    return {
        "figures": {change.name: {"a": change.a, "b": change.b} for change in figures},
        "same_text": same_text,
        "supports_in_common": common,
        "unlike": [name for name, _, _ in content.unlike(a, b)],
    }


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished run or comparison.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is not a finished run: it has no {MANIFEST}")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not {"settings", "texts"} & manifest.keys():  # such as that of a benchmark
        raise UserError(f"{path} is not a manifest of 'admm-prune run' or 'admm-prune compare'")
    return manifest


@contextmanager
def of_this_release(*folders: Path) -> Generator[None]:
    """Context in which the content of the manifests of these folders is used.

    Raises:
        UserError: a field is missing or of another type, as in a manifest of another release.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        named = " or ".join(str(folder / MANIFEST) for folder in folders)
        raise UserError(f"{named} is not a manifest of this release ({type(error).__name__}: {error})") from error


def read_run(folder: Path) -> Manifest:
    """The manifest of a run, and its times under "timings", as far as they were kept."""
    manifest, path = read_manifest(folder), folder / TIMINGS
    times = read_json(path) if path.exists() else {}
    if not isinstance(times, dict):
        raise UserError(f"{path} is not a JSON object")
    manifest["timings"] = {"seconds": None, "layers": {}, "phases": [], "finished": None, "machine": None} | times
    return manifest


def _check_not_packed(folder: Path) -> None:
    """Raises UserError for an archive: it has no weights to draw, and its files are those that were packed."""
    if (folder / PACK_MANIFEST).is_file():
        raise UserError(f"{folder} is an archive: restore it with 'admm-prune unpack {folder} OUT' and report on that")


def _is_page(path: Path) -> bool:
    """True for a page that we wrote."""
    with suppress(OSError):  # a link to nothing
        return b'name="generator" content="admm-prune"' in path.read_bytes()[:2000]
    return False


def _run(folder: Path, run: Manifest) -> str:
    layers, details = run["layers"], run["details"]
    for layer in layers:
        layer["place"] = content.place_of(layer["name"])
        layer["seconds"] = run["timings"]["layers"].get(layer["name"])
    recipe = folder / RECIPE
    return _rendered(
        "run.html.j2",
        run=run,
        label=content.label_of(run["target"], run["sparsity"], run["settings"]["selection"]),
        options=content.options_of(run["settings"]),
        layers=content.worst_first(layers),
        csv=f"data:text/csv;charset=utf-8,{quote(content.as_csv(layers))}",
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        objects=objects_of(run["settings"]) if recipe.is_file() else {},
        remote_code=_needs_code(folder),
        tasks=list(task_rows(run.get("tasks"))),
        device="CPU" if run["environment"]["device"] == "cpu" else run["environment"]["cuda"],
        mean_error=content.mean_error([layer["relative_error"] for layer in layers]),
        findings=content.advice_of(layers),
        notes=content.notes_of(run),
        map=plots.sparsity_map(layers, Weights(folder, layers)),
        errors=plots.layer_errors(layers),
        validated=any(layer.get("relative_error_validation") is not None for layer in layers),
        bounded=any(layer["bound"] is not None for layer in layers),
        own_targets=_own_targets(run),
        allocated=details.get("allocation"),
        sparsities=plots.sparsities(layers) if "allocation" in details else None,
        allocation=content.allocation_of(details),
        convergence=plots.convergence(layers),
        training=plots.training(details),
        rounds=plots.rounds(details.get("feed_forward", ())),
        total_seconds=sum(phase["seconds"] for phase in run["timings"]["phases"]) or 1.0,
        manifest=_short(run),
    )


def _own_targets(run: Manifest) -> dict[str, str | None]:
    """The target of every layer that has one of its own, None of the others; empty where none has."""
    contents = run["settings"].get("targets") or [run["settings"]["target"]]
    targets = {name: target for content in contents for name, target in content["layers"]}
    targets |= run["details"].get("allocation", {}).get("targets", {})
    return {layer["name"]: _short_target(targets.get(layer["name"])) for layer in run["layers"]} if targets else {}


def _short_target(text: str | None) -> str | None:
    """A target with its fraction to four digits."""
    if text is None or text == DENSE:
        return text
    target = target_named(text)
    return str(target) if target.pattern else f"{target.fraction:.4g}"


def _comparison(folder: Path, comparison: Manifest) -> str:
    runs = [read_run(folder / row["folder"]) for row in comparison["rows"]]
    for run in runs:
        run["findings"] = content.advice_of(run["layers"])
    rows = comparison["rows"]
    tuned = [row for row in rows if row["method"] == "tuned-dense" and row[RANKING]]
    return _rendered(
        "comparison.html.j2",
        comparison=comparison,
        runs=runs,
        tuned=tuned[0] if tuned else None,
        tasks=tasks_compared([comparison["tasks"], *(row["tasks"] for row in rows)]),
        structured=list(dict.fromkeys(run["method"] for run in runs if run["details"].get("units"))),
        best=[
            is_best and row["target"] != "0%"  # no comparison for what prunes nothing
            for is_best, row in zip(content.best_of_target(rows), rows, strict=True)
        ],
        memory=[
            None
            if row["seconds"] is None
            else next((p["peak_mib"] for p in run["timings"]["phases"] if p["name"] == "pruning"), None)
            for row, run in zip(rows, runs, strict=True)
        ],
        plots=[
            (metric.name, plots.over_targets(comparison, name, folder / PLOT if name == RANKING else None))
            for name, metric in METRICS.items()
            if metric.primary
        ],
        ranking=METRICS[RANKING],
        errors=plots.errors_by_method(runs),
        manifest=_short(comparison),
    )


def _needs_code(folder: Path) -> bool:
    """Whether the model needs `trust_remote_code` to be loaded."""
    config = folder / "config.json"
    content = read_json(config) if config.is_file() else {}
    return isinstance(content, dict) and "auto_map" in content


def _short(manifest: Manifest) -> str:
    return json.dumps({key: value for key, value in manifest.items() if key not in _LONG}, indent=2)


@cache
def _environment() -> Any:
    import jinja2

    templates = files("admm_prune").joinpath("assets/reports")

    def load(name: str) -> str:
        return templates.joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(load),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["exact"] = repr
    return environment


def _rendered(template: str, **values: Any) -> str:
    from jinja2 import UndefinedError

    try:
        return str(_environment().get_template(template).render(**values, metrics=METRICS))
    except UndefinedError as error:  # of a field that a manifest does not have
        raise LookupError(str(error)) from error
