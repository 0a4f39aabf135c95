"""A pruning run: from a model, a method and a target to a pruned model, its figures and its folder.

Decides whether the model is streamed from disk block by block, or loaded as a whole.
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
from admm_prune.errors import UserError
from admm_prune.methods.allocation.rules import AllocationRule
from admm_prune.methods.base import NOTHING, Journal, LayerReport, OnRecord, Recipe, Runtime, Task
from admm_prune.methods.callbacks import Callback, Tracker
from admm_prune.methods.registry import DEFAULT
from admm_prune.models.adapters import check_no_adapters
from admm_prune.models.checkpoint import weight_bytes
from admm_prune.models.evaluate import sparsity
from admm_prune.models.gguf_file import is_gguf
from admm_prune.models.loading import LoadedModel, fingerprint, from_module, load, open_on_disk, save
from admm_prune.models.parallel import World
from admm_prune.models.reloading import check_reloaded
from admm_prune.models.structure import Block, decoder_blocks, notes_on
from admm_prune.runs import machine
from admm_prune.runs.card import CARD, card_of
from admm_prune.runs.claims import files_sha256, weights_sha256, with_digest
from admm_prune.runs.evaluate import Tasks, Validation, evaluated, evaluated_dense
from admm_prune.runs.journal.folder import MANIFEST, TIMINGS, write_json
from admm_prune.runs.journal.journal import SharedJournal, shared_journal
from admm_prune.runs.machine import free_bytes, return_freed_memory
from admm_prune.runs.manifest import Phases, manifest
from admm_prune.runs.recipe_file import MODULE, RECIPE, content_of
from admm_prune.runs.recipe_file import written as written_recipe
from admm_prune.runs.report import write_report
from admm_prune.runs.resolved import PARTS, ResolvedRun, described_parts, recorded_tasks, resolved
from admm_prune.runs.results import Report
from admm_prune.runs.signature import takes
from admm_prune.runs.texts import Texts
from admm_prune.runs.trackers import figures_of, followed
from admm_prune.settings import Settings, Stream, recorded

_LOG = logging.getLogger(__name__)
_WEIGHT_FRACTION = 0.5  # of the free memory that weights may occupy: statistics and activations need the rest
_PRUNED_BEFORE = 0.01  # fraction of zeros above which a model counts as pruned before
_COMPARED = 64  # tokens on which a model is compared with its saved folder
_TASKS_IN_MEMORY = "tasks need the whole model in memory: evaluate them afterwards, with 'admm-prune eval --tasks'"
_ROOM = 1.25  # free memory needed for a second copy of a model, relative to its weights


def decide(stream: Stream, model: object, recipe: Recipe, written: bool, free: int, tasks: Tasks | None = None) -> bool:
    """Whether to stream the model from disk.

    Args:
        stream: the setting; "auto" streams a folder whose weights would take more than half of the free memory.
        model: a name, a folder, or a module.
        written: whether the result is written to a folder.
        free: bytes of free memory on the device for the weights.
        tasks: the tasks on which the pruned model is evaluated.

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
    return why is None and weight_bytes(expanded(str(model))) > _WEIGHT_FRACTION * free


def shards_weights(settings: Settings, recipe: Recipe, world: World) -> bool:
    """Whether the processes shard the weights, so that none holds the whole model: they train it together, and it can
    stay on disk."""
    if world.size == 1 or recipe.stages != "training" or settings.stream != "auto":
        return False
    return _why_in_memory(settings.model, settings.out is not None, settings.tasks) is None


def default_activation_bytes(free: int) -> int:
    """The activations between blocks that a streamed run holds in memory by default: a quarter of the free memory of
    the host, where they are stored on every device."""
    return free // 4


def _why_in_memory(model: object, written: bool, tasks: object) -> str | None:
    """Why the whole model must be in memory; None if it can stay on disk."""
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
    # 1. Resolve the settings, so that errors in them appear before anything is read.
    run = resolved(settings)
    with (
        nullcontext()
        if run.out is None
        else shared_journal(run.out, run.world, resume=settings.resume, overwrite=settings.overwrite) as journal
    ):
        # 2. Open the model: block by block if its weights do not fit in memory.
        phases = Phases(run.device, callback=run.callback)
        streams = _streams(settings, run, journal)
        with phases("opening the model"):
            on_disk = streams or shards_weights(settings, run.recipe, run.world)
            loaded = _opened(settings, run.device, on_disk=on_disk)
        target = run.selection.applied(loaded.model, run.target)
        run.recipe.check(loaded.model, target)
        if run.allocation is not None:
            offloaded = loaded.offloading.is_offloaded
            run.allocation.check(run.recipe, loaded.model, target, offloaded=offloaded, world=run.world)
        # 3. Read the text; from here on the run can be described completely.
        with phases("reading the text"):
            texts = Texts(run.text, loaded, run.passed)
        model = loaded.source if isinstance(settings.model, str | Path) else f"{loaded.source}{MODULE}"
        content = _recorded(settings, run, model=model, target=target, stream=streams)
        place = loaded.offloading.device(loaded.model)
        record = manifest(content, texts.records(run.recipe.samples), loaded.revision, place)
        if journal is not None:
            journal.begin(lambda: {**record, "weights": fingerprint(loaded)})
        calibration, evaluation = texts.calibration(run.recipe.samples), texts.evaluation
        notes = texts.notes(run.recipe.samples)
        del texts
        task = Task(target=target, calibration=calibration, seed=settings.seed, ridge=run.ridge, bounds=settings.bounds)
        run.recipe.check_task(task)
        if run.allocation is not None:
            run.allocation.check_task(task)
        runtime = _runtime(settings, run, loaded, journal or NOTHING)
        with followed(run.tracker, record["settings"]) as summary:
            # 4. Evaluate the dense model.
            with phases("evaluating the dense model"):
                dense = evaluated_dense(loaded, evaluation, runtime)
            # 5. Prune, and evaluate the pruned model.
            report = run_recipe(
                run.recipe,
                task,
                runtime,
                loaded,
                dense,
                record,
                phases,
                tasks=run.tasks,
                allocation=run.allocation,
                notes=notes,
            )
            # 6. Write the model, the manifest and the report.
            if journal is not None:
                written = journal.output(
                    lambda folder: _as_written(save_run(loaded, report, folder, evaluation, run.callback))
                )
                report = replace(report, out=journal.out, **written)
            summary |= figures_of(report.as_json())
    for note in dict.fromkeys(report.notes):
        _LOG.info("note: %s", note)
    return report


def _streams(settings: Settings, run: ResolvedRun, journal: SharedJournal | None) -> bool:
    """Whether the model is streamed; a resumed run repeats the decision of the interrupted one."""
    stream = settings.stream
    if stream == "auto" and journal is not None and journal.resumed:  # the free memory may have changed since
        stream = bool(journal.begun_with("stream"))
    return run.world.broadcast_from_rank0(
        lambda: decide(stream, settings.model, run.recipe, run.out is not None, free_bytes(run.device), run.tasks)
    )


def _recorded(settings: Settings, run: ResolvedRun, **opened: Any) -> dict[str, Any]:
    """The settings as the manifest holds them.

    Args:
        opened: the settings that depend on the opened model.
    """
    return recorded(
        settings,
        method=settings.method or (DEFAULT if settings.solver is None else None),
        text=run.text,
        ridge=run.ridge,
        selection=run.selection,
        coordinate=run.joint.coordinate,
        **recorded_tasks(settings, run.tasks),
        **opened,
        **described_parts(settings, PARTS),
    )


def _runtime(settings: Settings, run: ResolvedRun, loaded: LoadedModel, journal: Journal) -> Runtime:
    activation_bytes = settings.activation_bytes
    if loaded.offloading.is_offloaded:
        activation_bytes = default_activation_bytes(free_bytes("cpu")) if activation_bytes is None else activation_bytes
        return_freed_memory()
    return Runtime(
        offloading=loaded.offloading,
        world=run.world,
        journal=journal,
        on_progress=run.callback.on_progress,
        on_record=_recorders(run.tracker, run.callback),
        activation_bytes=activation_bytes,
    )


def run_recipe(
    recipe: Recipe,
    task: Task,
    runtime: Runtime,
    loaded: LoadedModel,
    dense: Validation,
    record: dict[str, Any],
    phases: Phases | None = None,
    *,
    tasks: Tasks | None = None,
    allocation: AllocationRule | None = None,
    notes: tuple[str, ...] = (),
) -> Report:
    """Prunes a loaded model, in place if the recipe does so, and evaluates the result.

    Args:
        dense: the evaluation of the dense model.
        record: the manifest of the run.
        phases: the phases so far; None if there are none.
        tasks: tasks on which the pruned model is also evaluated.
        allocation: distributes the target over the matrices; None gives all of them the same.
        notes: notes on the run, in addition to those of the method.
    """
    notes += (*loaded.notes, *_notes_on_zeros(loaded))
    phases = Phases(loaded.offloading.device(loaded.model)) if phases is None else phases
    label, details, seconds = task.target.label, {}, 0.0
    if allocation is not None:
        with phases("allocating the budget") as allocating:
            allocated = allocation.applied(loaded.model, task, runtime, recipe)
        task, details = replace(task, target=allocated.target), {"allocation": allocated.details}
        seconds = allocating.seconds
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
        seconds=seconds + pruning.seconds,
        notes=(*outcome.notes, *_notes_on_bounds(outcome.layers, task), *notes, *notes_on(model)),
        details={**outcome.details, **details},
        continuation=dense.beside(pruned),
        manifest=record,
        model=model,
        phases=tuple(phases),
    )


def _notes_on_bounds(layers: Sequence[LayerReport], task: Task) -> tuple[str, ...]:
    """A note if bounds were requested and some pruned matrices have none."""
    pruned = [layer for layer in layers if task.target.at(layer.name) is not None]
    without = [layer.name for layer in pruned if layer.bound is None]
    if not task.bounds or not without:
        return ()
    which = f"{len(without)} of {len(pruned)} pruned matrices, such as {without[0]}"
    return (f"no lower bound of {which}: not solved as a layer alone, or none is proved for its set or its inputs",)


def _notes_on_zeros(loaded: LoadedModel) -> tuple[str, ...]:
    """A note if the model was pruned before, according to the zeros in its first, middle and last block."""
    zeros = sparsity(_three_blocks(loaded))
    if zeros <= _PRUNED_BEFORE:
        return ()
    part = f"{zeros:.1%} of the weights in its first, middle and last block are zero"
    return (f"the model was pruned before: {part}; 'dense' stands for the model as it was given",)


def _three_blocks(loaded: LoadedModel) -> Iterator[Block]:
    """The first, the middle and the last block; each is in memory until the next one is requested."""
    blocks = decoder_blocks(loaded.model)
    for index in sorted({0, len(blocks) // 2, len(blocks) - 1}):
        with loaded.offloading.block(index):
            yield blocks[index]


def _removed(allocated: Mapping[str, Any], layers: Sequence[LayerReport]) -> dict[str, int]:
    """The number of weights that the matrices of an allocation have actually lost: constraints on rows or groups round
    their targets."""
    zeros = {layer.name: layer.shape[0] * layer.shape[1] - layer.nonzeros for layer in layers}
    return {"removed": sum(zeros[name] for name in allocated["targets"])}


def save_run(
    loaded: LoadedModel, report: Report, folder: Path, text: Sequences, callback: Callback | None = None
) -> Report:
    """Writes the model as a `save_pretrained` folder, with a manifest that contains fingerprints, and a report.

    Before the manifest is written the folder is loaded again and compared with the model: by `from_pretrained` if the
    free memory holds the weights a second time, otherwise one block at a time.

    Args:
        text: the two models are compared on its first sequence.
        callback: as for `Phases`.

    Returns:
        The report as written.

    Raises:
        UserError: the folder cannot be loaded, or gives another model.
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
    if "target" in settings:  # only a single run has a recipe; the manifest of a comparison has several targets
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
    """A function that passes figures to a tracker and a callback."""

    def record(figures: dict[str, float], step: int) -> None:
        if tracker is not None:
            tracker.log(figures, step)
        callback.on_figures(figures, step)

    return record


def _as_written(report: Report) -> dict[str, Any]:
    """The fields of a report that `save_run` changes."""
    return {"manifest": report.manifest, "phases": report.phases}


def _opened(settings: Settings, device: str, *, on_disk: bool) -> LoadedModel:
    model = settings.model
    if isinstance(model, str | Path):
        opens = open_on_disk if on_disk else load
        return opens(str(model), device=device, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code)
    check_no_adapters(type(model).__name__, model)
    return from_module(model, settings.tokenizer)
