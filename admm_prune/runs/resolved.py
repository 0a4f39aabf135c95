"""The settings of a run, parsed and checked before the model and the texts are read."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from admm_prune.errors import UserError, check_installed
from admm_prune.methods.allocation.rules import AllocationRule
from admm_prune.methods.base import Recipe, Ridge
from admm_prune.methods.callbacks import Callbacks, Tracker
from admm_prune.methods.elsa.engine import Engine
from admm_prune.methods.joint import Joint
from admm_prune.methods.parts import check_one_set, described, target_of
from admm_prune.methods.registry import composed
from admm_prune.methods.ridge import parse_ridge
from admm_prune.methods.selection import Selection
from admm_prune.methods.struprune.struprune import configured
from admm_prune.methods.target import Target, parse_target
from admm_prune.models.parallel import ALONE, World
from admm_prune.runs.evaluate import Tasks, task_names
from admm_prune.runs.journal.folder import check_apart
from admm_prune.runs.machine import pick_device
from admm_prune.runs.report import REPORT_PACKAGES
from admm_prune.runs.texts import check_data, passed_from_python
from admm_prune.runs.trackers import tracker_of
from admm_prune.settings import Settings, TextSettings, options

PARTS = ("solver", "problem", "constraint")


@dataclass(frozen=True, kw_only=True)
class SharedSettings:
    """The settings of pruning that are the same for every method and target, parsed and checked without the model."""

    joint: Joint
    selection: Selection
    allocation: AllocationRule | None
    ridge: Ridge

    @classmethod
    def of(cls, settings: Settings) -> SharedSettings:
        """Parses the settings of a run.

        Raises:
            UserError: one of them cannot be used, or an option of tasks is given without tasks.
        """
        _check_tasks(settings)
        return SharedSettings(
            joint=Joint.of(settings.coordinate, settings.refit),
            selection=Selection.of(settings.targets, settings.ignore, settings.overrides or {}),
            allocation=AllocationRule.named(settings.allocation, settings.allocation_passes),
            ridge=parse_ridge(settings.ridge),
        )


@dataclass(frozen=True, kw_only=True)
class ParsedSettings(SharedSettings):
    """The settings of a run that say how a model is pruned, parsed and checked without the model.

    Attributes:
        recipe: the method with all of its parts.
        target: before the selection of weights is applied to a model.
    """

    recipe: Recipe
    target: Target


@dataclass(frozen=True, kw_only=True)
class ResolvedRun(ParsedSettings):
    """All settings of a run, parsed and checked as far as possible without its model and texts.

    Attributes:
        text: the settings of the texts, which name them.
        passed: the texts that were passed as objects, by their role.
        tracker: in the first process, which logs for all of them.
    """

    text: TextSettings
    passed: dict[str, Any]
    out: Path | None
    device: str
    world: World
    tasks: Tasks | None
    tracker: Tracker | None
    callback: Callbacks


def parsed(settings: Settings) -> ParsedSettings:
    """Parses and checks the settings with which any model would be pruned; reads neither a model nor a text.

    Raises:
        UserError: a setting cannot be used, alone or with the others.
    """
    check_one_set(settings.constraint, settings.pattern)
    shared = SharedSettings.of(settings)
    names = ("steps", "distillation", *PARTS)
    given: dict[str, Any] = {name: getattr(settings, name) for name in names}
    recipe = composed(settings.method, **given, engine=Engine.of(settings), joint=shared.joint)
    return ParsedSettings(
        **vars(shared), recipe=configured(recipe, settings.unit, settings.multiple), target=_target(settings)
    )


def resolved(settings: Settings) -> ResolvedRun:
    """Parses and checks all settings of a run.

    Raises:
        UserError: a setting cannot be used, alone or with the others.
    """
    model, out = settings.model, None if settings.out is None else Path(settings.out)
    if out is not None:
        check_installed(*REPORT_PACKAGES)
    if settings.tokenizer is not None and isinstance(model, str | Path):
        raise UserError(
            f"tokenizer is for a model that is passed as a module; {model} has its own: leave tokenizer out"
        )
    device = pick_device(settings.device) if isinstance(model, str | Path) else _device_of_module(settings)
    pruning = parsed(settings)
    text, passed = named_texts(settings)
    if settings.resume and out is None:
        raise UserError("only a run with --out can be resumed: its journal is beside that folder")
    if out is not None:
        check_apart(out, model, settings.data, settings.eval_data)
    world = World.current()
    tasks = tasks_of(settings, world)
    tracker = tracker_of(settings.log, out)
    return ResolvedRun(
        **vars(pruning),
        text=text,
        passed=passed,
        out=out,
        device=device,
        world=world,
        tasks=tasks,
        tracker=tracker if world.first else None,
        callback=Callbacks(settings.callbacks, settings.progress),
    )


def _device_of_module(settings: Settings) -> str:
    """The device of a model that is passed as a module.

    Raises:
        UserError: the settings name another device, or a data type.
    """
    weight = next(settings.model.parameters(), None) if isinstance(settings.model, nn.Module) else None
    if weight is None:  # reported when the model is checked
        return pick_device(settings.device)
    if settings.dtype is not None:
        raise UserError("a model that is passed as a module keeps its data type: leave dtype out, or convert the model")
    if settings.device not in ("auto", weight.device.type):
        raise UserError(
            f"a model that is passed as a module stays on its device, here {weight.device}: leave device out, or move "
            "the model"
        )
    return str(weight.device)


def named_texts(settings: Settings) -> tuple[TextSettings, dict[str, Any]]:
    """The settings of the texts, which name them, and the texts that were passed as objects, by their role.

    Raises:
        UserError: no text is given for the model, or an object cannot be a text.
    """
    passed, (source, eval_source) = passed_from_python(settings.data, settings.eval_data)
    return settings.text(data=check_data(source, settings.model), eval_data=eval_source), passed


def described_parts(settings: Settings, names: Iterable[str]) -> dict[str, str | None]:
    """Parts for the manifest: names, and descriptions of objects; None for those that are not given."""
    given = {name: getattr(settings, name) for name in names}
    return {name: None if part is None else described(part) for name, part in given.items()}


def tasks_of(settings: Settings, world: World = ALONE) -> Tasks | None:
    """The tasks on which models are evaluated; None if none are named.

    Raises:
        UserError: as `Tasks`; an option of tasks without tasks, or several processes.
    """
    names = _check_tasks(settings)
    if not names:
        return None
    if world.size > 1:
        raise UserError("tasks are evaluated by one process: evaluate them afterwards, with 'admm-prune eval --tasks'")
    return Tasks(names, folder=settings.task_folder, shots=settings.shots, limit=settings.task_limit)


def _check_tasks(settings: Settings) -> tuple[str, ...]:
    """The names of the tasks, without loading them.

    Raises:
        UserError: no name is given, or an option of tasks without tasks.
    """
    names = task_names(settings.tasks)
    if not names and (isinstance(settings.tasks, str) or settings.tasks):  # an empty string, or blanks and commas alone
        raise UserError("name at least one task, such as piqa,arc_easy")
    unused = [name for name in ("task_folder", "shots", "task_limit") if getattr(settings, name) is not None]
    if not names and unused:
        raise UserError(f"{unused[0]} is of tasks: name them with tasks")
    return names


def recorded_tasks(settings: Settings, tasks: Tasks | None) -> dict[str, Any]:
    """The settings of tasks for the manifest that are not JSON values themselves."""
    folder = settings.task_folder
    return {"tasks": () if tasks is None else tasks.names, "task_folder": None if folder is None else str(folder)}


def check_supported(settings: Settings, command: str, what: str, *, also: Collection[str] = ()) -> None:
    """Refuses settings that a command does not support.

    Args:
        command: supports the settings that it has as options.
        what: the command supports settings of this, for the message, such as "a plan".
        also: settings that it supports although they are no options of the command line.

    Raises:
        UserError: another setting has a value other than its default.
    """
    for name, declared in options(type(settings)).items():
        supported = command in declared.commands.split() or name in also
        if not supported and getattr(settings, name) != declared.default:
            raise UserError(f"{what} takes no {name}: leave it out")


def _target(settings: Settings) -> Target:
    """The target from the sparsity or the pattern, or from the constraint if neither is given."""
    constraint = settings.constraint
    if settings.sparsity is None and settings.pattern is None and not isinstance(constraint, str | type | None):
        return target_of(constraint) or parse_target(None, None)
    return parse_target(settings.sparsity, settings.pattern)
