"""The comparison of several methods on one model and one text."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from admm_prune.data.durable import file_sha256
from admm_prune.errors import UserError, check_installed
from admm_prune.methods.base import OnProgress, Recipe, Runtime, Task
from admm_prune.methods.callbacks import Callback, Callbacks
from admm_prune.methods.elsa.engine import Engine
from admm_prune.methods.parts import check_one_set
from admm_prune.methods.registry import RECIPES, composed, recipe_named, with_baselines
from admm_prune.methods.struprune.struprune import configured
from admm_prune.methods.target import Target
from admm_prune.models import evaluate as evaluation
from admm_prune.models.evaluate import METRICS, Evaluation, Metrics
from admm_prune.models.loading import LoadedModel, fingerprint, load
from admm_prune.runs import prune
from admm_prune.runs.claims import weights_sha256, with_digest
from admm_prune.runs.evaluate import Tasks, Validation, evaluated_dense
from admm_prune.runs.journal.folder import MANIFEST, check_apart, finite, write_json
from admm_prune.runs.journal.journal import is_unfinished, journal_of
from admm_prune.runs.machine import pick_device
from admm_prune.runs.manifest import Phases, TextRecord, manifest
from admm_prune.runs.report import REPORT_PACKAGES, write_report
from admm_prune.runs.report.content import best_of_target
from admm_prune.runs.resolved import (
    SharedSettings,
    check_supported,
    described_parts,
    named_texts,
    recorded_tasks,
    tasks_of,
)
from admm_prune.runs.results import Report
from admm_prune.runs.texts import Texts, log_notes
from admm_prune.settings import Settings, TextSettings, options, recorded, recorded_names

RECORDED = recorded_names("compare") | {"methods", "targets", "baselines"}  # of the settings in the manifest
_MODELS = "models"


@dataclass(frozen=True, kw_only=True)
class Row(Metrics):
    """The figures of one pruned model, and its perplexity after it was saved and loaded again."""

    method: str
    target: str
    sparsity: float
    relative_error: float | None  # mean over the pruned matrices; None where no layer problem was solved
    seconds: float | None  # of the allocation and of pruning; None where an interrupted run was resumed
    reloaded_perplexity: float
    folder: str
    tasks: dict[str, Any] | None = None  # as `Report.tasks`

    def as_json(self) -> dict[str, Any]:
        """Its fields in the order of the table."""
        return {name: getattr(self, name) for name in ("method", "target", "sparsity", *METRICS)} | asdict(self)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    model: str
    parameters: int
    dense: Evaluation
    rows: list[Row]
    manifest: dict[str, Any]
    tasks: dict[str, Any] | None = None  # of the dense model, as `Report.tasks`

    def is_best(self, row: Row) -> bool:
        """Whether no other method reached a better perplexity at the target of the row."""
        return best_of_target([finite(asdict(other)) for other in self.rows])[self.rows.index(row)]

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "parameters": self.parameters,
            "dense": asdict(self.dense),
            "tasks": self.tasks,
            "rows": [row.as_json() for row in self.rows],
            **self.manifest,
        }


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """The settings of a comparison.

    Args:
        run: the settings that all runs share; only those for which `compare` has options, and texts may be objects. Its
            `resume` and `overwrite` are those of the comparison.
        methods: the names of the methods.
        targets: every method prunes to each of them.
        baselines: if ELSA is among the methods, also compare its baselines: the dense model trained for as long, masked
            fine-tuning, and gradual pruning.

    Attributes:
        text: the settings of the texts, which name them.
        passed: the texts that were passed as objects, by their role.
        shared: the settings of pruning, parsed.

    Raises:
        UserError: no text is given for the model, the model is a module, a setting cannot be used, or `run` has one
            that `compare` does not support.
    """

    run: Settings
    methods: tuple[str, ...]
    targets: tuple[Target, ...]
    baselines: bool = True
    text: TextSettings = field(init=False)
    passed: dict[str, Any] = field(init=False)
    shared: SharedSettings = field(init=False)
    tasks: Tasks | None = field(init=False)

    def __post_init__(self) -> None:
        check_supported(self.run, "compare", "a comparison")
        if not isinstance(self.run.model, str | Path):
            raise UserError("a comparison loads the model for every run: give its folder or Hub id, not a module")
        text, passed = named_texts(self.run)
        parsed = {
            "text": text, "passed": passed, "shared": SharedSettings.of(self.run), "tasks": tasks_of(self.run)
        }  # fmt: skip
        for name, value in parsed.items():
            object.__setattr__(self, name, value)

    def recorded(self) -> dict[str, Any]:
        """The settings for the manifest, as JSON values."""
        return recorded(
            self.run,
            "compare",
            model=str(self.run.model),
            text=self.text,
            selection=self.shared.selection,
            coordinate=self.shared.joint.coordinate,
            ridge=self.shared.ridge,
            **recorded_tasks(self.run, self.tasks),
            **described_parts(self.run, ("problem", "constraint")),
            methods=self.methods,
            targets=[asdict(target) for target in self.targets],
            baselines=self.baselines,
        )


def compare(
    settings: ComparisonSettings,
    out: Path,
    progress: OnProgress | None = None,
    *,
    callbacks: Callback | Sequence[Callback] = (),
) -> Comparison:
    """Prunes the model by every method to every target, on the same text, and writes models and report to `out`.

    Without a number of calibration sequences in the settings, every method uses its default. Every pruned model is
    saved, loaded from its folder and evaluated again; the two perplexities must be equal.

    Args:
        out: the output folder.
        progress: called with (runs done, all runs, name of the current run).
        callbacks: for the evaluation of the dense model and for the runs, as in `prune`.

    Raises:
        UserError: the model, a method, a target, the text or `out` cannot be used, or a saved model does not have the
            figures that it had in memory.
    """
    check_installed(*REPORT_PACKAGES)
    run, model_name = settings.run, str(settings.run.model)
    recipes = _recipes(settings)
    # Targets are distinguished by their labels in the report and the folder names.
    targets = list({target.label: target for target in settings.targets}.values())
    if not targets:
        raise UserError("give at least one sparsity or pattern")
    for target in targets:
        check_one_set(run.constraint, str(target) if target.pattern else None)
    check_apart(out, run.model, run.data, run.eval_data)
    device = pick_device(run.device)
    with journal_of(out, resume=run.resume, overwrite=run.overwrite) as journal:
        opened = partial(load, device=device, trust_remote_code=run.trust_remote_code)
        loaded = opened(model_name, dtype=run.dtype)
        parameters = sum(p.numel() for p in loaded.model.parameters())
        jobs = _jobs(recipes, targets, settings, loaded.model)
        log_notes(loaded)
        texts = Texts(settings.text, loaded, settings.passed)
        pruning_tasks = _pruning_tasks(settings, texts, jobs)
        record = manifest(settings.recorded(), _records(texts, recipes), loaded.revision, device)
        weights = fingerprint(loaded)
        journal.begin({**record, "weights": weights})
        callback = Callbacks(callbacks)
        with Phases(device, callback=callback)("evaluating the dense model"):
            runtime = Runtime(journal=journal, on_progress=callback.on_progress)
            dense = evaluated_dense(loaded, texts.evaluation, runtime)
        dense_on_tasks = None
        if settings.tasks is not None:
            tasks = settings.tasks
            with Phases(device, callback=callback)("evaluating the dense model on the tasks"):
                dense_on_tasks = journal.once("tasks", partial(tasks.evaluate, loaded, seed=run.seed))
        runs = _Runs(settings, texts, opened, loaded.revision, weights, dense, device, callback)
        texts.release_model()
        del loaded  # every run loads its own copy
        models = journal.checkpoints(_MODELS)
        assert models is not None
        rows = [_known(saved, models) for saved in journal.finished("rows")]
        for done, (recipe, target) in enumerate(jobs[len(rows) :], start=len(rows)):
            if progress is not None:
                progress(done, len(jobs), f"{recipe.name} {target.label}")
            place = models / f"{recipe.name}-{target.label.replace(':', 'of').replace('%', '')}"
            report, seconds = runs.pruned(recipe, pruning_tasks[done], place)
            again = runs.evaluated_again(report, place)
            rows.append(_row(report, again, seconds, f"{_MODELS}/{place.name}"))
            journal.commit("rows", done, {"row": asdict(rows[-1]), "weights": report.manifest["weights"]})
        comparison = Comparison(
            model=model_name,
            parameters=parameters,
            dense=dense.figures,
            tasks=dense_on_tasks,
            rows=rows,
            manifest=record,
        )
        with journal.output() as folder:
            shutil.copytree(models, folder / _MODELS, copy_function=_linked)
            files = {f"{row.folder}/{MANIFEST}": file_sha256(folder / row.folder / MANIFEST) for row in rows}
            write_json(folder / MANIFEST, with_digest({**comparison.as_json(), "files": files}))
            write_report(folder)
        if progress is not None:
            progress(len(jobs), len(jobs), "")
    return comparison


@dataclass(frozen=True)
class _Runs:
    """What the runs of a comparison share.

    Attributes:
        opened: loads a model from a name or folder.
        revision: of the dense model.
        weights: the fingerprint of the dense model.
        dense: the evaluation of the dense model.
    """

    settings: ComparisonSettings
    texts: Texts
    opened: Callable[..., LoadedModel]
    revision: str | None
    weights: Any
    dense: Validation
    device: str
    callback: Callbacks

    def pruned(self, recipe: Recipe, task: Task, place: Path) -> tuple[Report, float | None]:
        """Prunes a copy of the model and writes it to a folder, or resumes an interrupted run there.

        Returns:
            The report without the model, and the seconds, which are None if another process did a part of the work.
        """
        settings, texts = self.settings, self.texts
        # A folder without a finished row: the process ended before the row was committed.
        with journal_of(place, resume=is_unfinished(place), overwrite=True) as journal:
            model = self.opened(str(settings.run.model), dtype=settings.run.dtype)
            record = manifest(settings.recorded(), texts.records(recipe.samples), self.revision, self.device)
            journal.begin({**record, "weights": self.weights})
            continues = journal.continues
            report = prune.run_recipe(
                recipe,
                task,
                Runtime(journal=journal, on_progress=self.callback.on_progress),
                model,
                self.dense,
                record,
                Phases(self.device, callback=self.callback),
                tasks=settings.tasks,
                allocation=settings.shared.allocation if recipe.prunes else None,
                notes=texts.notes(recipe.samples),
            )
            with journal.output() as folder:
                written = prune.save_run(model, report, folder, texts.evaluation, self.callback)
        return replace(written, model=None), None if continues else written.seconds

    def evaluated_again(self, report: Report, place: Path) -> Evaluation:
        """Evaluates the saved model.

        Raises:
            UserError: it does not have the figures that the model had in memory.
        """
        with Phases(self.device, callback=self.callback)("evaluating the saved model"):
            saved_model = self.opened(str(place)).model
            on_progress = Runtime(on_progress=self.callback.on_progress).report_progress
            again = evaluation.evaluate(saved_model, self.texts.evaluation, on_progress=on_progress)
        for (name, before), after in zip(vars(report.pruned).items(), vars(again).values(), strict=True):
            if repr(after) != repr(before):  # as text, where nan equals nan
                raise UserError(
                    f"{report.method} {report.target}: nothing was saved: loaded again, the model has the {name} "
                    f"{after}, not {before}; report this"
                )
        return again


def _recipes(settings: ComparisonSettings) -> list[Recipe]:
    """The methods of a comparison, each with the settings of training and of structured groups that it supports.

    The parts and the joint steps are passed to all methods that prune.

    Raises:
        UserError: there is no method, or one does not exist or does not support a part; or no method supports one of
            the settings.
    """
    run = settings.run
    names = with_baselines(settings.methods) if settings.baselines else list(dict.fromkeys(settings.methods))
    if not names:
        raise UserError("give at least one method, such as --methods wanda,admm")
    recipes = [recipe_named(name) for name in names]
    declared, used = options(Settings), {name for recipe in recipes for name in recipe.options}
    for name in {name: None for recipe in RECIPES.values() for name in recipe.options}:
        if name not in used and getattr(run, name) != declared[name].default:
            takers = ", ".join(recipe.name for recipe in RECIPES.values() if name in recipe.options)
            raise UserError(f"no method of this comparison takes --{name.replace('_', '-')}: it is for {takers}")
    made: list[Recipe] = []
    for recipe in recipes:
        how: dict[str, Any] = {}
        if "steps" in recipe.options:
            how = {"steps": run.steps, "distillation": run.distillation, "engine": Engine.of(run)}
        if recipe.prunes:
            how |= {"problem": run.problem, "constraint": run.constraint, "joint": settings.shared.joint}
        one = composed(recipe.name, **how)
        made.append(configured(one, run.unit, run.multiple) if "unit" in recipe.options else one)
    return made


def _jobs(
    recipes: Sequence[Recipe], targets: Sequence[Target], settings: ComparisonSettings, model: nn.Module
) -> list[tuple[Recipe, Target]]:
    """Every recipe with every target, checked; a baseline that prunes nothing has a single run."""
    applied = [settings.shared.selection.applied(model, target) for target in targets]
    jobs: list[tuple[Recipe, Target]] = [(r, Target(sparsity=0.0)) for r in recipes if not r.prunes]
    jobs += [(recipe, target) for target in applied for recipe in recipes if recipe.prunes]
    for recipe, target in jobs:
        recipe.check(model, target)
        if settings.shared.allocation is not None and recipe.prunes:
            settings.shared.allocation.check(recipe, model, target)
    return jobs


def _pruning_tasks(settings: ComparisonSettings, texts: Texts, jobs: Sequence[tuple[Recipe, Target]]) -> list[Task]:
    """The task of every run, checked; the ridge is for the methods that support it.

    Raises:
        UserError: no method supports the ridge, or one does not support the bounds; or a text cannot be used.
    """
    tasks: list[Task] = []
    obstacles: list[str] = []
    for recipe, target in jobs:
        task = Task(
            target=target,
            calibration=texts.calibration(recipe.samples),
            seed=settings.text.seed,
            ridge=settings.shared.ridge if recipe.prunes else None,
            bounds=settings.run.bounds and recipe.prunes,
        )
        obstacle = recipe.ridge_obstacle(task)
        if obstacle is not None:
            obstacles.append(obstacle)
            task = replace(task, ridge=None)
        recipe.check_task(task)
        if settings.shared.allocation is not None and recipe.prunes:
            settings.shared.allocation.check_task(task)
        tasks.append(task)
    if obstacles and all(task.ridge is None for task in tasks):
        raise UserError(obstacles[0])
    return tasks


def _known(record: dict[str, Any], models: Path) -> Row:
    """A row that an interrupted comparison has committed.

    Raises:
        UserError: its model has been changed or deleted since.
    """
    row = Row(**record["row"])
    place = models / Path(row.folder).name
    if not place.is_dir() or weights_sha256(place) != record["weights"]:
        raise UserError(f"{place} is damaged or gone: delete {models.parents[1]} to start over")
    return row


def _linked(source: str, destination: str) -> None:
    """Links a file, so that the journal and the output share it; copies it if the file system has no links."""
    try:
        Path(destination).hardlink_to(source)
    except OSError:
        shutil.copyfile(source, destination)


def _records(texts: Texts, recipes: list[Recipe]) -> dict[str, TextRecord]:
    """The records of all texts by role; by role and recipe if the recipes use different calibration texts."""
    records = {recipe.name: texts.records(recipe.samples) for recipe in recipes}
    users: dict[TextRecord, list[str]] = {}
    for name, record in records.items():
        users.setdefault(record["calibration"], []).append(name)
    first = records[recipes[0].name]
    if len(users) == 1:
        return first
    calibrations = {f"calibration of {', '.join(names)}": record for record, names in users.items()}
    return {**calibrations, "evaluation": first["evaluation"]}


def _row(report: Report, again: Evaluation, seconds: float | None, folder: str) -> Row:
    metrics: dict[str, Any] = {name: getattr(report.pruned, name) for name in METRICS}
    return Row(
        method=report.method,
        target=report.target,
        sparsity=report.sparsity,
        **metrics,
        relative_error=report.mean_relative_error,
        seconds=seconds,
        reloaded_perplexity=again.perplexity,
        tasks=report.tasks,
        folder=folder,
    )
