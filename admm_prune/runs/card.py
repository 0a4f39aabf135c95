"""The model card of a pruned model: the README.md in its folder, which the Hugging Face Hub displays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from admm_prune.data.hub import expanded, is_repository
from admm_prune.data.sources import EMBEDDED, PYTHON_OBJECT, SHORT_NAMES, is_file_name
from admm_prune.models.evaluate import METRICS
from admm_prune.runs.recipe_file import MODULE, objects_of

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from admm_prune.runs.results import Report

CARD = "README.md"
PLACE = "PATH_OR_REPO_ID"  # in the snippets; `push_to_hub` puts the repository in its place
_LICENSE = ("license", "license_name", "license_link", "language")  # what a derived model has from its base


def card_of(report: Report, recipe: str | None) -> str:
    """The text of the model card. Equal runs have equal cards.

    Args:
        recipe: the content of `recipe.yaml`; None for a model of a comparison.
    """
    from huggingface_hub import ModelCard

    body = "\n".join(_body(report, recipe))
    return str(ModelCard(f"---\n{_metadata(report).to_yaml()}\n---\n\n{body}"))


def _metadata(report: Report) -> ModelCardData:
    from huggingface_hub import ModelCardData

    settings = report.manifest["settings"]
    model, revision = settings["model"], report.manifest["model_revision"]
    dataset = None if report.text_use == "measurement" else _dataset(settings["text"]["data"])[0]
    kind = "structured-pruning" if report.details.get("units") else "sparse"
    return ModelCardData(
        base_model=None if revision is None else model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruning", kind, "admm-prune", report.method],
        datasets=None if dataset is None else [dataset],
        model_name=f"{_short(model)}-{report.method}-{report.label}",
        eval_results=list(_results(report)),
        **_inherited(model, revision),
    )


def _inherited(model: str, revision: str | None) -> dict[str, Any]:
    """The license and language of the dense model, from its own card, if it has one."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    path: Any
    if model == EMBEDDED:
        path = files("admm_prune").joinpath(f"assets/{EMBEDDED}/{CARD}")
    elif revision is not None:
        cached = try_to_load_from_cache(model, CARD, revision=revision)
        path = Path(cached) if isinstance(cached, str) else None
    else:
        path = expanded(model) / CARD
    with suppress(Exception):  # somebody else's file: none, or metadata that cannot be read
        data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
        return {name: value for name in _LICENSE if (value := data.get(name)) is not None}
    return {}


def _results(report: Report) -> Iterator[EvalResult]:
    """The finite metrics and task results, for the model index."""
    from huggingface_hub import EvalResult

    common: dict[str, Any] = {"task_type": "text-generation", "task_name": "Text Generation"}
    repository, config = _dataset(_evaluated_on(report))
    source = report.manifest["texts"]["evaluation"]["source"]
    dataset: dict[str, Any] = {
        "dataset_type": repository or "text",
        "dataset_name": repository or _short(source),
        "dataset_config": config,
    }
    for name, metric in METRICS.items():
        value = getattr(report.pruned, name)
        if math.isfinite(value):
            figures: dict[str, Any] = {"metric_type": name, "metric_name": metric.name, "metric_value": _digits(value)}
            yield EvalResult(**common, **dataset, **figures)
    for task, label, value, _ in task_rows(report.tasks):
        if math.isfinite(value):
            yield EvalResult(
                **common, dataset_type=task, dataset_name=task, metric_type=label, metric_value=_digits(value)
            )


def task_rows(tasks: dict[str, Any] | None) -> Iterator[tuple[str, str, float, float | None]]:
    """Results of lm-evaluation-harness as (task, metric, value, standard error), such as ("piqa", "acc", 0.7, 0.01)."""
    for task, row in (tasks or {"results": {}})["results"].items():
        for key, value in row.items():
            metric, _, variant = key.partition(",")
            if metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            error = row.get(f"{metric}_stderr,{variant}")
            label = metric if variant in ("", "none") else f"{metric} ({variant})"
            yield task, label, float(value), error if isinstance(error, int | float) else None


def tasks_compared(
    models: Sequence[dict[str, Any] | None],
) -> list[tuple[str, str, list[tuple[float, float | None] | None]]]:
    """Results of several models as (task, metric, (value, standard error) of each model); None where one has none."""
    results = [{(task, label): (value, error) for task, label, value, error in task_rows(model)} for model in models]
    keys = dict.fromkeys(key for of_model in results for key in of_model)
    return [(*key, [of_model.get(key) for of_model in results]) for key in keys]


def _body(report: Report, recipe: str | None) -> Iterator[str]:
    settings, texts = report.manifest["settings"], report.manifest["texts"]
    model, structured = settings["model"], bool(report.details.get("units"))
    base = model if report.manifest["model_revision"] is None else f"[{model}](https://huggingface.co/{model})"
    base = base if is_repository(model) else model if model.endswith(MODULE) else f"{_short(model)} (a local model)"
    yield f"# {_short(model)}, pruned to {report.label} by {report.method}\n"
    what = "removed with their rows or columns, which makes the model smaller" if structured else "zero"
    yield (
        f"{base}, pruned with [admm-prune](https://pypi.org/project/admm-prune/) {_version(report)}. "
        f"{100 * report.sparsity:.2f} % of the {report.block_weights:,} weights in the matrices of the decoder blocks "
        f"are {what}; embeddings, norms and biases are not pruned."
    )
    if not structured:
        yield (
            "The zeros are stored in dense tensors: as loaded by `from_pretrained`, the model is neither smaller nor "
            "faster."
        )
    yield from ("\n## Results\n", "| metric | dense | pruned | pruned / dense |", "|---|---|---|---|")
    for name, metric in METRICS.items():
        dense, pruned = getattr(report.dense, name), getattr(report.pruned, name)
        yield f"| {metric.name} | {metric.format % dense} | {metric.format % pruned} | {pruned / dense:.3f} |"
    evaluation = texts["evaluation"]
    errors = [report.dense.perplexity_error, report.pruned.perplexity_error]
    if None not in errors:
        dense, pruned = (f"{error:.2g}" for error in errors)
        yield f"\nStandard error of the perplexity, between sequences: {dense} dense, {pruned} pruned."
    text = _text(_evaluated_on(report), evaluation["source"])
    yield (f"\nProtocol: {report.pruned.protocol} Text: {text}; sha256 of its tokens: `{evaluation['token_hash']}`.")
    if report.tasks is not None:
        limit = report.tasks["limit"]
        yield f"\nTasks of lm-evaluation-harness {report.tasks['lm_eval']}, the pruned model" + (
            f", at most {limit} questions of each (not comparable):\n" if limit is not None else ":\n"
        )
        yield from ("| task | metric | shots | value | standard error |", "|---|---|---|---|---|")
        for task, label, value, error in task_rows(report.tasks):
            shots = report.tasks["shots"].get(task, "")
            yield f"| {task} | {label} | {shots} | {value:.4f} | {'' if error is None else f'{error:.4f}'} |"
    yield from ("\n## Notes\n", *(f"- {note}" for note in dict.fromkeys(report.notes))) if report.notes else ()
    yield from _loading(report, structured)
    yield from _provenance(report, recipe)


def _loading(report: Report, structured: bool) -> Iterator[str]:
    remote = ", trust_remote_code=True" if getattr(getattr(report.model, "config", None), "auto_map", None) else ""
    yield f"""
## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{PLACE}"{remote})
tokenizer = AutoTokenizer.from_pretrained("{PLACE}")
```"""
    if not structured:
        yield f"""
With packed layers, which keep only the weights that are not zero, from a folder on disk, or from an archive that
`admm-prune pack` made of it:

```python
from huggingface_hub import snapshot_download
from admm_prune import load_packed

model = load_packed(snapshot_download("{PLACE}"))  # or the path of a folder
```"""


def _provenance(report: Report, recipe: str | None) -> Iterator[str]:
    calibration, data = report.manifest["texts"]["calibration"], report.manifest["settings"]["text"]["data"]
    used = {
        "calibration": "calibrated on",
        "training": "trained on",
        "measurement": "it needs no text; the errors of its layers were measured on",
    }
    yield (
        f"\n## How it was made\n\nMethod: `{report.method}`, target {report.target}; {used[report.text_use]} "
        f"{calibration['sequences']} sequences of up to {calibration['length']} tokens ({calibration['tokens']:,} "
        f"tokens) of {_text(data, calibration['source'])}."
    )
    if recipe is None:
        yield "It is one model of a comparison, whose settings are in `admm_prune.json`."
    else:
        yield f"""The settings, in `recipe.yaml`:

```yaml
{recipe.rstrip()}
```
"""
        objects = objects_of(report.manifest["settings"])
        if objects:
            yield (
                f"The run cannot be repeated from `recipe.yaml` alone: {', '.join(objects)} "
                f"{'was an object' if len(objects) == 1 else 'were objects'} in Python."
            )
        else:
            command = "admm-prune run --recipe recipe.yaml --out repeated"
            yield f"To repeat the run, from a copy of this repository: `{command}`."
    yield (
        "`report.html` shows the layers. `admm-prune verify FOLDER` recomputes the figures from the files; "
        "`admm_prune.json` has the versions of all packages and the fingerprints of the files."
    )


def _evaluated_on(report: Report) -> str:
    """The name of the evaluation text in the settings."""
    text = report.manifest["settings"]["text"]
    return str(text["eval_data"] or text["data"])


def _text(name: str, source: str) -> str:
    """A description of a text, without the folders of a path.

    Args:
        name: of the text in the settings.
        source: of the text in its record, which also names the part that was read.
    """
    repository, config = _dataset(name)
    if repository is not None:
        part = source.partition(" ")[2]
        link = f"[{repository}](https://huggingface.co/datasets/{repository})"
        return " ".join([link, *([f"({config})"] if config else []), *([part] if part else [])])
    named = {EMBEDDED: "the text that comes with admm-prune", PYTHON_OBJECT: "a text that was passed from Python"}
    return named.get(name, f"`{_short(source)}`")


def _dataset(name: str) -> tuple[str | None, str | None]:
    """(Hub id, config) of a text; (None, None) for a local one."""
    repository, _, config = SHORT_NAMES.get(name, name).partition(":")
    local = name in (EMBEDDED, PYTHON_OBJECT) or is_file_name(name) or expanded(name).exists()
    return (None, None) if local or not is_repository(repository) else (repository, config or None)


def _short(name: str) -> str:
    """The last component of a path or an id; the class of a module."""
    return Path(name).name.removesuffix(MODULE) or name


def _version(report: Report) -> str:
    return str(report.manifest["environment"]["versions"]["admm-prune"])


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
