"""Several methods on one model and one text, side by side."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from admm_prune.data.durable import file_sha256
from admm_prune.errors import UserError, check_installed
from admm_prune.methods.allocation.rules import AllocationRule
from admm_prune.methods.base import OnProgress, Recipe, Runtime, Task
from admm_prune.methods.callbacks import Callback, Callbacks
from admm_prune.methods.elsa.engine import Engine
from admm_prune.methods.joint import Joint
from admm_prune.methods.parts import check_one_set, described
from admm_prune.methods.registry import RECIPES, composed, recipe_named, with_baselines
from admm_prune.methods.selection import Selection
from admm_prune.methods.struprune.struprune import configured
from admm_prune.methods.target import Target
from admm_prune.models import evaluate as evaluation
from admm_prune.models.evaluate import METRICS, Evaluation, Metrics
from admm_prune.models.loading import fingerprint, load
from admm_prune.runs import prune
from admm_prune.runs.claims import weights_sha256, with_digest
from admm_prune.runs.evaluate import evaluated_dense
from admm_prune.runs.journal.folder import MANIFEST, check_apart, finite, write_json
from admm_prune.runs.journal.journal import home_of, journal_of
from admm_prune.runs.machine import pick_device
from admm_prune.runs.manifest import Phases, TextRecord, manifest
from admm_prune.runs.report import REPORT_PACKAGES, write_report
from admm_prune.runs.report.content import best_of_target
from admm_prune.runs.results import Report
from admm_prune.runs.texts import Texts, check_data
from admm_prune.settings import Settings, TextSettings, options, recorded, recorded_names

RECORDED = recorded_names("compare") | {"methods", "targets", "baselines"}  # of the settings in the manifest
_MODELS = "models"


@dataclass(frozen=True, kw_only=True)
class Row(Metrics):
    """One pruned model: its figures, and the perplexity of the copy that was saved and loaded again."""

    method: str
    target: str
    sparsity: float
    relative_error: float | None  # mean over the pruned matrices; None where no layer problem was solved
    seconds: float
    reloaded_perplexity: float
    folder: str

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

    def is_best(self, row: Row) -> bool:
        """True where no other method reached a better perplexity at the row's target."""
        return best_of_target([finite(asdict(other)) for other in self.rows])[self.rows.index(row)]

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "parameters": self.parameters,
            "dense": asdict(self.dense),
            "rows": [row.as_json() for row in self.rows],
            **self.manifest,
        }


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """The settings of a comparison.

    Args:
        run: what all runs have in common: the settings that `compare` has options for.
        baselines: with ELSA, also compare its baselines: the dense model trained as long, masked fine-tuning,
            gradual pruning.

    Raises:
        UserError: the model has no text, a pattern is no regular expression, or `run` has another setting.
    """

    run: Settings
    methods: tuple[str, ...]
    targets: tuple[Target, ...]
    baselines: bool = True
    text: TextSettings = field(init=False)
    selection: Selection = field(init=False)
    allocation: AllocationRule | None = field(init=False)
    joint: Joint = field(init=False)

    def __post_init__(self) -> None:
        for name, declared in options(Settings).items():
            if "compare" not in declared.commands.split() and getattr(self.run, name) != declared.default:
                raise UserError(f"a comparison takes no {name}: leave it out")
        run = self.run
        object.__setattr__(self, "text", run.text(data=check_data(run.data, run.model)))
        object.__setattr__(self, "selection", Selection.of(run.targets, run.ignore, run.overrides or {}))
        object.__setattr__(self, "allocation", AllocationRule.named(run.allocation, run.allocation_passes))
        object.__setattr__(self, "joint", Joint.of(run.coordinate, run.refit))

    def recorded(self) -> dict[str, Any]:
        """As the manifest holds them, ready for JSON."""
        parts = {"problem": self.run.problem, "constraint": self.run.constraint}
        return recorded(
            self.run,
            "compare",
            model=str(self.run.model),
            text=self.text,
            selection=self.selection,
            coordinate=self.joint.coordinate,
            **{name: None if part is None else described(part) for name, part in parts.items()},
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
    resume: bool = False,
    overwrite: bool = False,
) -> Comparison:
    """Prunes the model by every method to every target, from the same text, and writes all of it to `out`.

    Where the settings name no number of calibration sequences, every method is given its own.

    Every pruned model is saved, loaded again from its folder and evaluated again: the two perplexities must be equal.

    Args:
        progress: called with (runs done, runs, name of the current one).
        callbacks: of the evaluation of the dense model and of the runs, as those of `prune`.
        resume: continue an interrupted comparison from the journal beside `out`, with the same settings.
        overwrite: replace an earlier result in `out`, which is refused otherwise.

    Raises:
        UserError: the model, a method, a target, the text or `out` cannot be used; a saved model does not give the
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
    with journal_of(out, resume=resume, overwrite=overwrite) as journal:
        opened = partial(load, device=device, trust_remote_code=run.trust_remote_code)
        loaded = opened(model_name, dtype=run.dtype)
        jobs = _jobs(recipes, targets, settings, loaded.model)
        texts = Texts(settings.text, loaded)
        tasks = [_task(settings, texts, recipe, target) for recipe, target in jobs]
        for (recipe, _), task in zip(jobs, tasks, strict=True):
            recipe.check_task(task)
        record = manifest(settings.recorded(), _records(texts, recipes), loaded.revision, device)
        weights = fingerprint(loaded)
        journal.begin({**record, "weights": weights})
        callback = Callbacks(callbacks)
        with Phases(device, callback=callback)("evaluating the dense model"):
            runtime = Runtime(journal=journal, on_progress=callback.on_progress)
            dense = evaluated_dense(loaded, texts.evaluation, runtime)
        models = journal.checkpoints(_MODELS)
        assert models is not None
        rows = [_known(saved, models) for saved in journal.finished("rows")]
        for done, (recipe, target) in enumerate(jobs):
            if done < len(rows):
                continue
            if progress is not None:
                progress(done, len(jobs), f"{recipe.name} {target.label}")
            place = models / f"{recipe.name}-{target.label.replace(':', 'of').replace('%', '')}"
            # A model without a finished row: the process ended before the row was committed.
            with journal_of(place, resume=home_of(place).is_dir(), overwrite=True) as run_journal:
                model = opened(model_name, dtype=run.dtype)
                its_record = manifest(settings.recorded(), texts.records(recipe.samples), loaded.revision, device)
                run_journal.begin({**its_record, "weights": weights})
                runtime = Runtime(journal=run_journal, on_progress=callback.on_progress)
                phases = Phases(device, callback=callback)
                report = prune.run_recipe(
                    recipe,
                    tasks[done],
                    runtime,
                    model,
                    dense,
                    its_record,
                    phases,
                    allocation=settings.allocation if recipe.prunes else None,
                    notes=texts.notes(recipe.samples),
                )
                with run_journal.output() as folder:
                    report = prune.save_run(model, report, folder, texts.evaluation, callback)
            with Phases(device, callback=callback)("evaluating the saved model"):
                saved_model = opened(str(place)).model
                again = evaluation.evaluate(saved_model, texts.evaluation, on_progress=runtime.report_progress)
            for (name, before), after in zip(vars(report.pruned).items(), vars(again).values(), strict=True):
                if repr(after) != repr(before):  # as text, where nan equals nan
                    raise UserError(
                        f"{recipe.name} {target.label}: nothing was saved: loaded again, the model has the {name} "
                        f"{after}, not {before}; report this"
                    )
            rows.append(_row(report, again, f"{_MODELS}/{place.name}"))
            journal.commit("rows", done, {"row": asdict(rows[-1]), "weights": report.manifest["weights"]})
        parameters = sum(p.numel() for p in loaded.model.parameters())
        comparison = Comparison(
            model=model_name, parameters=parameters, dense=dense.figures, rows=rows, manifest=record
        )
        with journal.output() as folder:
            shutil.copytree(models, folder / _MODELS, copy_function=_linked)
            files = {f"{row.folder}/{MANIFEST}": file_sha256(folder / row.folder / MANIFEST) for row in rows}
            write_json(folder / MANIFEST, with_digest({**comparison.as_json(), "files": files}))
            write_report(folder)
        if progress is not None:
            progress(len(jobs), len(jobs), "")
    return comparison


def _recipes(settings: ComparisonSettings) -> list[Recipe]:
    """The methods, each with those settings of training and of structured groups that it takes.

    Parts and steps of blocks are given to all methods that prune.

    Raises:
        UserError: there is no such method, no method takes one of the settings, or one does not take a part.
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
            how |= {"problem": run.problem, "constraint": run.constraint, "joint": settings.joint}
        one = composed(recipe.name, **how)
        made.append(configured(one, run.unit, run.multiple) if "unit" in recipe.options else one)
    return made


def _jobs(
    recipes: Sequence[Recipe], targets: Sequence[Target], settings: ComparisonSettings, model: nn.Module
) -> list[tuple[Recipe, Target]]:
    """Every recipe with every target, checked; methods that prune nothing have a single row."""
    applied = [settings.selection.applied(model, target) for target in targets]
    jobs: list[tuple[Recipe, Target]] = [(r, Target(sparsity=0.0)) for r in recipes if not r.prunes]
    jobs += [(recipe, target) for target in applied for recipe in recipes if recipe.prunes]
    for recipe, target in jobs:
        recipe.check(model, target)
        if settings.allocation is not None and recipe.prunes:
            settings.allocation.check(recipe, model, target)
    return jobs


def _task(settings: ComparisonSettings, texts: Texts, recipe: Recipe, target: Target) -> Task:
    bounds = settings.run.bounds and recipe.prunes
    return Task(target=target, calibration=texts.calibration(recipe.samples), seed=settings.text.seed, bounds=bounds)


def _known(record: dict[str, Any], models: Path) -> Row:
    """A row that an earlier process finished.

    Raises:
        UserError: its model is not what was written then.
    """
    row = Row(**record["row"])
    place = models / Path(row.folder).name
    if not place.is_dir() or weights_sha256(place) != record["weights"]:
        raise UserError(f"{place} is damaged or gone: delete {models.parents[1]} to start over")
    return row


def _linked(source: str, destination: str) -> None:
    """Links a file, so that both the journal and the output have it at any time."""
    try:
        Path(destination).hardlink_to(source)
    except OSError:  # a file system without links
        shutil.copyfile(source, destination)


def _records(texts: Texts, recipes: list[Recipe]) -> dict[str, TextRecord]:
    """The texts of all recipes, by their role, with the recipe's name if the calibration texts differ."""
    records = {recipe.name: texts.records(recipe.samples) for recipe in recipes}
    users: dict[TextRecord, list[str]] = {}
    for name, record in records.items():
        users.setdefault(record["calibration"], []).append(name)
    first = records[recipes[0].name]
    if len(users) == 1:
        return first
    calibrations = {f"calibration of {', '.join(names)}": record for record, names in users.items()}
    return {**calibrations, "evaluation": first["evaluation"]}


def _row(report: Report, again: Evaluation, folder: str) -> Row:
    metrics: dict[str, Any] = {name: getattr(report.pruned, name) for name in METRICS}
    return Row(
        method=report.method,
        target=report.target,
        sparsity=report.sparsity,
        **metrics,
        relative_error=report.mean_relative_error,
        seconds=report.seconds,
        reloaded_perplexity=again.perplexity,
        folder=folder,
    )
