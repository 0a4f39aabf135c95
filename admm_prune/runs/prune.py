"""One run: a model, a method and a target in; a pruned model, its figures and its folder out.

Whether a model is taken from disk block by block, or loaded as a whole.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from admm_prune.data.hub import expanded
from admm_prune.data.sequences import Sequences
from admm_prune.errors import UserError, check_installed
from admm_prune.methods.allocation.rules import AllocationRule
from admm_prune.methods.base import NOTHING, LayerReport, OnRecord, Recipe, Runtime, Task
from admm_prune.methods.callbacks import Callback, Callbacks, Tracker
from admm_prune.methods.elsa.engine import Engine
from admm_prune.methods.joint import Joint
from admm_prune.methods.parts import check_one_set, described, target_of
from admm_prune.methods.registry import DEFAULT, composed
from admm_prune.methods.ridge import parse_ridge
from admm_prune.methods.selection import Selection
from admm_prune.methods.struprune.struprune import configured
from admm_prune.methods.target import Target, parse_target
from admm_prune.models.adapters import check_no_adapters
from admm_prune.models.checkpoint import weight_bytes
from admm_prune.models.evaluate import sparsity
from admm_prune.models.loading import LoadedModel, fingerprint, from_module, is_gguf, load, open_on_disk, save
from admm_prune.models.parallel import World
from admm_prune.models.reloading import check_reloaded
from admm_prune.models.structure import Block, decoder_blocks, notes_on
from admm_prune.runs import machine
from admm_prune.runs.card import CARD, card_of
from admm_prune.runs.claims import files_sha256, weights_sha256, with_digest
from admm_prune.runs.evaluate import Tasks, Validation, evaluated, evaluated_dense, task_names
from admm_prune.runs.journal.folder import MANIFEST, TIMINGS, check_apart, write_json
from admm_prune.runs.journal.journal import shared_journal
from admm_prune.runs.machine import free_bytes, pick_device, return_freed_memory
from admm_prune.runs.manifest import Phases, manifest
from admm_prune.runs.recipe_file import RECIPE, content_of
from admm_prune.runs.recipe_file import written as written_recipe
from admm_prune.runs.report import REPORT_PACKAGES, write_report
from admm_prune.runs.results import Report
from admm_prune.runs.signature import takes
from admm_prune.runs.texts import Texts, check_data, passed_from_python
from admm_prune.runs.trackers import figures_of, followed, tracker_of
from admm_prune.settings import Settings, Stream, recorded

_LOG = logging.getLogger(__name__)
_COMFORT = 0.5  # fraction of the free memory that weights may take: statistics and activations need the rest
_PRUNED_BEFORE = 0.01  # zeros among the weights of a model, beyond which it is no dense one
_COMPARED = 64  # tokens on which a model and its saved folder are compared
_PARTS = ("solver", "problem", "constraint")
_TASKS_IN_MEMORY = "tasks need the whole model in memory: evaluate them afterwards, with 'admm-prune eval --tasks'"
_ROOM = 1.25  # free memory needed for a second copy of a model, relative to its weights


def decide(stream: Stream, model: object, recipe: Recipe, written: bool, free: int, tasks: Tasks | None = None) -> bool:
    """Whether to stream.

    Args:
        stream: what the user says; "auto" streams a folder whose weights would not fit comfortably.
        model: a name, a folder, or a module.
        written: the result goes to a folder.
        free: bytes of memory where the weights would go.
        tasks: on which the pruned model is evaluated.

    Raises:
        UserError: `stream` is True and the method or the model cannot be streamed.
    """
    if stream not in ("auto", True, False):
        raise UserError(f"stream must be auto, True or False, not {stream!r}")
    why = _why_in_memory(model, written, tasks) or recipe.streaming_obstacle()
    if stream is True and why is not None:
        raise UserError(f"cannot stream: {why}")
    if stream != "auto":
        return stream
    return why is None and weight_bytes(expanded(str(model))) > _COMFORT * free


def recipe_of(settings: Settings) -> Recipe:
    """The method of a run with its parts.

    Raises:
        UserError: there is no such method or part, or the method does not take what is given.
    """
    check_one_set(settings.constraint, settings.pattern)
    names = ("steps", "distillation", *_PARTS)
    how: dict[str, Any] = {name: getattr(settings, name) for name in names}
    joint = Joint.of(settings.coordinate, settings.refit)
    recipe = composed(settings.method, **how, engine=Engine.of(settings), joint=joint)
    return configured(recipe, settings.unit, settings.multiple)


def check_settings(settings: Settings) -> None:
    """Refuses settings with which no model can be pruned; reads neither a model nor a text.

    Raises:
        UserError: as `prune`.
    """
    recipe_of(settings)
    Selection.of(settings.targets, settings.ignore, settings.overrides or {})
    AllocationRule.named(settings.allocation, settings.allocation_passes)
    parse_ridge(settings.ridge)
    _target(settings)


def shards_weights(settings: Settings, recipe: Recipe, world: World) -> bool:
    """Whether no process is to hold the whole model, as where several processes train one that can stay on disk."""
    if world.size == 1 or recipe.stages != "training" or settings.stream != "auto":
        return False
    return _why_in_memory(settings.model, settings.out is not None, settings.tasks) is None


def default_activation_bytes() -> int:
    """A quarter of what is free on the host, where activations live whatever the device."""
    return free_bytes("cpu") // 4


def _why_in_memory(model: object, written: bool, tasks: object) -> str | None:
    """Why the whole model must be in memory; None where it can stay on disk."""
    if tasks:
        return _TASKS_IN_MEMORY
    if not isinstance(model, str | Path):
        return "the model is in memory already: give its folder"
    if is_gguf(file := expanded(model)) and file.is_file():
        return "a GGUF file is dequantized as a whole"
    if not written:
        return "the pruned model must be written to a folder: give --out"
    return None


@takes(Settings)
def prune(settings: Settings) -> Report:
    """Prunes a language model and reports the loss of quality.

    In a process group of torch's all processes call this alike: they share the work, and the first one writes.

    Args:
        {options}

    Raises:
        UserError: something in the arguments cannot be used; the message is one line.
    """
    # 1. Resolve the settings, so that errors in them show before anything is read.
    model, out, stream = settings.model, settings.out, settings.stream
    if out is not None:
        check_installed(*REPORT_PACKAGES)
    if settings.tokenizer is not None and isinstance(model, str | Path):
        raise UserError(
            f"tokenizer is for a model that is passed as a module; {model} has its own: leave tokenizer out"
        )
    method, parts = settings.method, {name: getattr(settings, name) for name in _PARTS}
    recipe = recipe_of(settings)
    selection = Selection.of(settings.targets, settings.ignore, settings.overrides or {})
    target = _target(settings)
    allocation = AllocationRule.named(settings.allocation, settings.allocation_passes)
    ridge = parse_ridge(settings.ridge)
    passed, (source, eval_source) = passed_from_python(settings.data, settings.eval_data)
    text = settings.text(data=check_data(source, model), eval_data=eval_source)
    if settings.resume and out is None:
        raise UserError("only a run with --out can be resumed: its journal is beside that folder")
    if out is not None:
        check_apart(Path(out), model, settings.data, settings.eval_data)
    device, world = pick_device(settings.device), World.current()
    tasks = _tasks(settings, world)
    tracker = tracker_of(settings.log, None if out is None else Path(out))
    callback = Callbacks(settings.callbacks, settings.progress)
    with (
        nullcontext()
        if out is None
        else shared_journal(Path(out), world, resume=settings.resume, overwrite=settings.overwrite) as journal
    ):
        # 2. Open the model: block by block where its weights would not fit.
        if stream == "auto" and journal is not None and journal.resumed:  # another run has freed or taken memory since
            stream = bool(journal.begun_with("stream"))
        streams = world.broadcast_from_rank0(
            lambda: decide(stream, model, recipe, out is not None, free_bytes(device), tasks)
        )
        phases = Phases(device, callback=callback)
        with phases("opening the model"):
            loaded = _opened(settings, device, on_disk=streams or shards_weights(settings, recipe, world))
        target = selection.applied(loaded.model, target)
        recipe.check(loaded.model, target)
        if allocation is not None:
            allocation.check(recipe, loaded.model, target, offloaded=loaded.offloading.is_offloaded, world=world)
        # 3. Read the text; from here on the run can be described completely.
        with phases("reading the text"):
            texts = Texts(text, loaded, passed)
        resolved = recorded(
            settings,
            model=loaded.source,
            method=method or (DEFAULT if settings.solver is None else None),
            target=target,
            text=text,
            ridge=ridge,
            stream=streams,
            selection=selection,
            coordinate=Joint.of(settings.coordinate, settings.refit).coordinate,
            tasks=() if tasks is None else tasks.names,
            task_folder=None if settings.task_folder is None else str(settings.task_folder),
            **{name: None if part is None else described(part) for name, part in parts.items()},
        )
        place = loaded.offloading.device(loaded.model)
        record = manifest(resolved, texts.records(recipe.samples), loaded.revision, place)
        if journal is not None:
            journal.begin(lambda: {**record, "weights": fingerprint(loaded)})
        calibration, evaluation = texts.calibration(recipe.samples), texts.evaluation
        notes = texts.notes(recipe.samples)
        del texts
        task = Task(target=target, calibration=calibration, seed=settings.seed, ridge=ridge, bounds=settings.bounds)
        recipe.check_task(task)
        activation_bytes = settings.activation_bytes
        if loaded.offloading.is_offloaded:
            activation_bytes = default_activation_bytes() if activation_bytes is None else activation_bytes
            return_freed_memory()
        tracker = tracker if world.rank == 0 else None  # several processes are one run
        runtime = Runtime(
            offloading=loaded.offloading,
            world=world,
            journal=journal or NOTHING,
            on_progress=callback.on_progress,
            on_record=_recorders(tracker, callback),
            activation_bytes=activation_bytes,
        )
        with followed(tracker, record["settings"]) as summary:
            # 4. Evaluate the dense model.
            with phases("evaluating the dense model"):
                dense = evaluated_dense(loaded, evaluation, runtime)
            # 5. Prune, and evaluate the pruned model.
            report = run_recipe(recipe, task, runtime, loaded, dense, record, phases, tasks, allocation, notes)
            # 6. Write model, manifest and report.
            if journal is not None:
                written = journal.output(
                    lambda folder: _as_written(save_run(loaded, report, folder, evaluation, callback))
                )
                report = replace(report, out=journal.out, **written)
            summary |= figures_of(report.as_json())
    for note in dict.fromkeys(report.notes):
        _LOG.info("note: %s", note)
    return report


def run_recipe(
    recipe: Recipe,
    task: Task,
    runtime: Runtime,
    loaded: LoadedModel,
    dense: Validation,
    record: dict[str, Any],
    phases: Phases | None = None,
    tasks: Tasks | None = None,
    allocation: AllocationRule | None = None,
    notes: tuple[str, ...] = (),
) -> Report:
    """Prunes a loaded model, in place where the recipe does so, and evaluates the result.

    Args:
        dense: evaluation of the dense model.
        record: the manifest of the run.
        phases: before; None for none.
        tasks: on which the pruned model is evaluated too.
        allocation: gives every matrix a target of its own; None for the task's.
        notes: on the run, beside those of the method.
    """
    notes += (*loaded.notes, *_notes_on_zeros(loaded))
    phases = Phases(loaded.offloading.device(loaded.model)) if phases is None else phases
    label, details = task.target.label, {}
    if allocation is not None:
        with phases("allocating the budget"):
            allocated = allocation.applied(loaded.model, task, runtime)
        task, details = replace(task, target=allocated.target), {"allocation": allocated.details}
    with phases("pruning") as pruning:
        outcome = recipe.prune(loaded.model, task, runtime)
    model: Any = loaded.model if outcome.model is None else outcome.model
    with phases("evaluating the pruned model"):
        pruned = evaluated(replace(loaded, model=model), dense.text, runtime)
    on_tasks = None
    if tasks is not None:
        evaluate = partial(tasks.evaluate, replace(loaded, model=model), seed=task.seed)
        with phases("evaluating the tasks"):
            on_tasks = runtime.journal.once("tasks", evaluate)
    if "allocation" in details:
        details["allocation"] = details["allocation"] | _removed(details["allocation"], outcome.layers)
    block_weights = sum(layer.shape[0] * layer.shape[1] for layer in outcome.layers)
    return Report(
        method=recipe.name,
        target=label,
        budget=recipe.budget if allocation is None else "model",
        text_use=recipe.text_use if allocation is None else allocation.text_use(recipe),
        block_weights=block_weights,
        sparsity=1.0 - sum(layer.nonzeros for layer in outcome.layers) / block_weights,
        dense=dense.figures,
        pruned=pruned.figures,
        tasks=on_tasks,
        layers=outcome.layers,
        seconds=pruning.seconds,
        notes=(*outcome.notes, *_notes_on_bounds(outcome.layers, task), *notes, *notes_on(model)),
        details={**outcome.details, **details},
        continuation=dense.beside(pruned),
        manifest=record,
        model=model,
        phases=tuple(phases),
    )


def _notes_on_bounds(layers: Sequence[LayerReport], task: Task) -> tuple[str, ...]:
    """A note where not every pruned matrix has a bound, where bounds were requested."""
    pruned = [layer for layer in layers if task.target.at(layer.name) is not None]
    without = [layer.name for layer in pruned if layer.bound is None]
    if not task.bounds or not without:
        return ()
    which = f"{len(without)} of {len(pruned)} pruned matrices, such as {without[0]}"
    return (f"no lower bound of {which}: not solved as a layer alone, or none is proved for its set or its inputs",)


def _notes_on_zeros(loaded: LoadedModel) -> tuple[str, ...]:
    """A note where the model was pruned before, by the zeros in its first, middle and last block."""
    zeros = sparsity(_three_blocks(loaded))
    if zeros <= _PRUNED_BEFORE:
        return ()
    part = f"{zeros:.1%} of the weights in its first, middle and last block are zero"
    return (f"the model was pruned before: {part}; 'dense' stands for the model as it was given",)


def _three_blocks(loaded: LoadedModel) -> Iterator[Block]:
    """The first, the middle and the last block, each in memory until the next is taken."""
    blocks = decoder_blocks(loaded.model)
    for index in sorted({0, len(blocks) // 2, len(blocks) - 1}):
        with loaded.offloading.block(index):
            yield blocks[index]


def _removed(allocated: Mapping[str, Any], layers: Sequence[LayerReport]) -> dict[str, int]:
    """The weights that the matrices of an allocation have lost, as counted: sets of rows or groups round a target."""
    zeros = {layer.name: layer.shape[0] * layer.shape[1] - layer.nonzeros for layer in layers}
    return {"removed": sum(zeros[name] for name in allocated["targets"])}


def save_run(
    loaded: LoadedModel, report: Report, folder: Path, text: Sequences, callback: Callback | None = None
) -> Report:
    """Writes the model as a plain `save_pretrained` folder; beside it the manifest, with fingerprints, and the report.

    The folder is loaded again and compared with the model before anything is said of it: by `from_pretrained` where the
    memory that is free holds the weights once more, else one block at a time.

    Args:
        text: its first sequence is what the two are compared on.
        callback: as for `Phases`.

    Returns:
        The report as written.

    Raises:
        UserError: it cannot be loaded again, or is another model.
    """
    assert report.model is not None
    pruned, settings = replace(loaded, model=report.model), report.manifest["settings"]
    device = loaded.offloading.device(report.model)
    phases = Phases(device, report.phases, callback)
    with phases("writing the model"):
        save(pruned, folder, {"method": report.method, "target": report.target, "sparsity": report.sparsity})
    with phases("loading the folder again"):
        check_reloaded(
            pruned,
            folder,
            text.rows[0].ids[:_COMPARED],
            whole=not loaded.offloading.is_offloaded and _ROOM * weight_bytes(folder) <= free_bytes(device),
            trust_remote_code=settings.get("trust_remote_code", False),
        )
    recipe = None
    if "target" in settings:  # a comparison is none of many runs
        recipe = written_recipe(content_of(settings))
        (folder / RECIPE).write_text(recipe, encoding="utf-8")
    (folder / CARD).write_text(card_of(report, recipe), encoding="utf-8")
    with phases("hashing the files"):
        weights = weights_sha256(folder)
        hashes = {"weights": weights, "files": files_sha256(folder, leave_out=weights)}
    written = replace(report, manifest={**report.manifest, **hashes}, phases=tuple(phases))
    finished = datetime.now(UTC).isoformat(timespec="minutes")
    times = {**written.timings(), "finished": finished, "machine": machine.described()}
    write_json(folder / TIMINGS, with_digest(times))
    write_json(folder / MANIFEST, with_digest(written.as_json()))
    write_report(folder)
    return written


def _recorders(tracker: Tracker | None, callback: Callback) -> OnRecord:
    """Passes figures to a tracker and a callback."""

    def record(figures: dict[str, float], step: int) -> None:
        if tracker is not None:
            tracker.log(figures, step)
        callback.on_figures(figures, step)

    return record


def _as_written(report: Report) -> dict[str, Any]:
    """What writing adds to a report."""
    return {"manifest": report.manifest, "phases": report.phases}


def _tasks(settings: Settings, world: World) -> Tasks | None:
    names = task_names(settings.tasks)
    if not names:
        if isinstance(settings.tasks, str) or settings.tasks:  # empty, or blanks and commas alone
            raise UserError("name at least one task, such as piqa,arc_easy")
        unused = [name for name in ("task_folder", "shots", "task_limit") if getattr(settings, name) is not None]
        if unused:
            raise UserError(f"{unused[0]} is of tasks: name them with tasks")
        return None
    if world.size > 1:
        raise UserError("tasks are evaluated by one process: evaluate them afterwards, with 'admm-prune eval --tasks'")
    return Tasks(names, folder=settings.task_folder, shots=settings.shots, limit=settings.task_limit)


def _target(settings: Settings) -> Target:
    """The sparsity or pattern that is given, else that of the constraint."""
    constraint = settings.constraint
    if settings.sparsity is None and settings.pattern is None and not isinstance(constraint, str | type | None):
        return target_of(constraint) or parse_target(None, None)
    return parse_target(settings.sparsity, settings.pattern)


def _opened(settings: Settings, device: str, *, on_disk: bool) -> LoadedModel:
    model = settings.model
    if isinstance(model, str | Path):
        opens = open_on_disk if on_disk else load
        return opens(str(model), device=device, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code)
    check_no_adapters(type(model).__name__, model)
    return from_module(model, settings.tokenizer)
