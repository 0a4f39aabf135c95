"""The plan of a run: memory by part, disk space, operations and time by stage, and whether the run fits."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from admm_prune.errors import UserError
from admm_prune.methods.allocation.rules import RULES, AllocationRule
from admm_prune.methods.base import Recipe, Task
from admm_prune.methods.elsa.trained import Trained
from admm_prune.methods.registry import RECIPES
from admm_prune.methods.target import Target
from admm_prune.models.loading import locate
from admm_prune.models.structure import notes_on
from admm_prune.plan.anatomy import Anatomy, Reading, check_tokenizer, read
from admm_prune.plan.blockwise import (
    ERRORS,
    FORWARD,
    GRAMS,
    SCORES,
    SOLVER,
    TABLE,
    allocating,
    pruning_stages,
)
from admm_prune.plan.counting import LIBRARIES, Stage, Work, by_name
from admm_prune.plan.machine import Machine, gpu_memory, gpu_named, measured_here
from admm_prune.plan.training import KEPT_IN_CHECKPOINTS, STEP, TRAINING, training_stages
from admm_prune.plan.whole_model import ACTIVATIONS_PART, WEIGHTS, evaluating, loading, saving
from admm_prune.runs.journal.folder import check_output, existing_parent
from admm_prune.runs.machine import free_bytes, pick_device, resident_bytes
from admm_prune.runs.prune import decide, default_activation_bytes
from admm_prune.runs.resolved import check_supported, parsed
from admm_prune.runs.signature import takes
from admm_prune.runs.texts import passed_from_python
from admm_prune.settings import PlanSettings, TextSettings, options

_GB = 1e9
TEXT, TOKENS = "text", "tokenizer's lists"
_ON_HOST = (LIBRARIES, ACTIVATIONS_PART, SCORES, ERRORS, TABLE, TEXT, TOKENS)  # parts on the host, whatever the device
_AT_ONCE = 2  # checkpoints, and activations, on disk at once: the old ones are deleted when the new ones are complete
_RECORD = 32 << 10  # bytes per block in the journal, mostly states of the random number generators
_MATRIX = 8 << 10  # bytes per pruned matrix in the records, the manifest and the report
_PAGES = 128 << 10  # bytes of the manifest, the card and the report in addition to those of the matrices
_TOKENIZER = ("tokenizer*", "vocab*", "merges*", "*.model", "added_tokens*", "special_tokens*", "chat_template*")
_PYTHON_ONLY = ("solver",)  # supported settings that are no options of the command line
_OF_TEXT = ("eval_data", "split", "eval_split", "column", "documents", "eval_documents")  # used only with a text
_SHARDED = ("weights", "gradients", "Adam's moments", "masks", "anchors", "teacher", "best weights so far")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The estimated cost of a run.

    Attributes:
        stages: the stages of the run, in order.
        machine: the machine whose rates give the time.
        limits: available bytes on "host" and, with a GPU, "device".
        disk: upper bounds of the bytes by purpose.
        free_disk: free bytes on the disk of the output; None if no output is named.
        notes: assumptions, and parts that are not counted.
    """

    model: str
    method: str
    target: str
    parameters: int
    weight_bytes: int
    samples: int
    length: int
    stream: bool
    stages: tuple[Stage, ...]
    machine: Machine
    limits: Mapping[str, int]
    disk: Mapping[str, int]
    free_disk: int | None = None
    notes: tuple[str, ...] = ()

    def peak(self, place: str) -> Stage:
        """The stage with the largest memory on "host" or "device", and its parts there."""
        return max((self._at(stage, place) for stage in self.stages), key=lambda stage: stage.bytes)

    @property
    def seconds(self) -> float:
        return sum(map(self.machine.seconds, (stage.work for stage in self.stages)))

    def refusal(self) -> str | None:
        """Why the run does not fit, and what would help; None if it fits."""
        for place, limit in self.limits.items():
            stage = self.peak(place)
            if stage.bytes > limit:
                part = max((name for name in stage.parts if name != LIBRARIES), key=lambda name: stage.parts[name])
                return (
                    f"{self.method} does not fit: it needs {stage.bytes / _GB:.2f} GB on the {place}, "
                    f"{limit / _GB:.2f} GB are available; at stage '{stage.name}', {stage.parts[part] / _GB:.2f} GB "
                    f"are for {part}: {self._advice(part, place)}"
                )
        needed = sum(self.disk.values())
        if self.free_disk is not None and needed > self.free_disk:
            part = max(self.disk, key=lambda name: self.disk[name])
            return (
                f"{self.method} does not fit: it needs {needed / _GB:.2f} GB on the disk of --out, "
                f"{self.free_disk / _GB:.2f} GB are available; {self.disk[part] / _GB:.2f} GB are for {part}: "
                "use an --out on another disk"
            )
        return None

    def as_json(self) -> dict[str, Any]:
        names = ("model", "method", "target", "parameters", "weight_bytes", "samples", "length", "stream")
        return {
            **{name: getattr(self, name) for name in names},
            "memory": {
                place: {
                    "bytes": (stage := self.peak(place)).bytes,
                    "stage": stage.name,
                    "parts": dict(stage.parts),
                    "limit": limit,
                }
                for place, limit in self.limits.items()
            },
            "disk": dict(self.disk),
            "free_disk": self.free_disk,
            "stages": {
                name: {"operations": done.operations, "seconds": self.machine.seconds(done)}
                for name, done in by_name(list(self.stages)).items()
            },
            "seconds": self.seconds,
            "rates": {"of": self.machine.name, "source": self.machine.source, **self.machine.rates},
            "notes": self.notes,
        }

    def _at(self, stage: Stage, place: str) -> Stage:
        if "device" not in self.limits:
            return stage
        host = place == "host"
        return replace(stage, parts={name: n for name, n in stage.parts.items() if (name in _ON_HOST) == host})

    def _advice(self, part: str, place: str) -> str:
        recipe = RECIPES.get(self.method)  # None of a plug-in, which prunes layer by layer
        streams = recipe is None or recipe.streaming_obstacle() is None
        if part == "weights" and streams and not self.stream and "Adam's moments" not in self.peak(place).parts:
            return "use --stream, which holds one block at a time"
        if part == "Adam's moments" and recipe is not None and _keeps_full_moments(recipe):
            return "use elsa-l, whose moments take a quarter, or more --gpus"
        if part == ACTIVATIONS_PART:
            return "use --activation-memory, which moves the rest to disk, or fewer --samples"
        if part in ("tokens of the network", "targets"):
            return "use fewer --samples or a shorter --length"
        if part == STEP:
            return "use a smaller --micro-batch, --gradient-checkpointing, or a shorter --length"
        if part in (FORWARD, "logits"):
            return "use a shorter --length"
        if part in (GRAMS, SOLVER):
            return "use a method that holds less, such as wanda or magnitude"
        return "use more --gpus, or a blockwise method with --stream"


@takes(PlanSettings, "plan", also=_PYTHON_ONLY)
def make_plan(settings: PlanSettings) -> Plan:
    """Estimates the cost of a run from the config of the model, without its weights.

    Args:
        {options}

    Raises:
        UserError: an argument cannot be used.
    """
    # 1. The method, and the settings that do not depend on the model.
    check_supported(settings, "plan", "a plan", also=_PYTHON_ONLY)
    text = _text(settings)
    if not isinstance(settings.model, str | Path):
        raise UserError("a plan reads the config of a model: give its folder or its Hub id, not a module")
    model, trusts = str(settings.model), settings.trust_remote_code
    gpu, gpus = settings.gpu, settings.gpus
    pruning = parsed(settings)
    recipe, allocation = pruning.recipe, pruning.allocation
    device = _device(settings)
    limits = _limits(settings, device)
    # As a run that writes its output decides, by the free memory of the device that holds the weights.
    free = limits.get("device", limits["host"] if settings.memory else free_bytes("cpu"))
    stream = decide(settings.stream, model, recipe, True, free)
    out = None
    if settings.out is not None:
        check_output(Path(settings.out), overwrite=True)
        out = existing_parent(Path(settings.out))
    # 2. The model, and what the method does with it.
    anatomy = Anatomy.of(model, settings.dtype, trust_remote_code=trusts)
    check_tokenizer(model, anatomy.model, required=text is not None, trust_remote_code=trusts)
    target = pruning.selection.applied(anatomy.model, pruning.target)
    recipe.check(anatomy.model, target)
    if allocation is not None:
        allocation.check(recipe, anatomy.model, target, offloaded=stream)
    sequences = anatomy.sequences(settings.samples or recipe.samples, settings.length)
    task = Task(target=target, calibration=sequences, ridge=pruning.ridge)
    recipe.check_task(task)
    if allocation is not None:
        allocation.check_task(task)
    # 3. The text, the rates of the machine, and the stages.
    reading = None if text is None else read(text, model, anatomy.model, stream=stream, trust_remote_code=trusts)
    local = measured_here(out, _narrow(anatomy), "cpu" if gpu is not None else device)
    libraries = {LIBRARIES: resident_bytes()}  # includes the buffers allocated by matrix products
    notes = [*anatomy.notes, *notes_on(anatomy.model)]
    if stream and settings.stream == "auto":
        notes.append(
            "the run would read the model block by block (--stream), since its weights would fill the memory; "
            "--no-stream plans it in memory"
        )
    if settings.bounds:
        notes.append("the time of --bounds is not counted: seconds for every matrix")
    validation = _validation_tokens(reading, settings.eval_samples, sequences.length, notes)
    stages = _stages(anatomy, recipe, task, validation, allocation, stream=stream, device=device)
    if reading is None:
        notes.append("the text itself and its tokenizer are not counted: give --data that is on this disk")
    else:
        stages = _with_text(stages, reading, {} if stream else {WEIGHTS: anatomy.weight_bytes})
        local = replace(local, rates={**local.rates, "tokenize": reading.rate})
    output = round(anatomy.weight_bytes * _saved_fraction(anatomy, recipe, task.target))
    passes = 1
    if allocation is not None:
        passes += RULES[allocation.name].collects + (RULES[allocation.name].nearby > 0)
    disk = _disk(anatomy, stages, output, passes, stream=stream)
    machine = local if gpu is None else gpu_named(gpu, local)
    if device == "cpu":
        notes += _notes_on_dtype(anatomy, local)
    if gpus > 1:
        stages = [_shared_out(stage, gpus) for stage in stages]
        notes.append(f"work and sharded state are divided by {gpus} GPUs evenly; communication is not counted")
    if gpu is not None:
        notes.append(f"time of {gpu}: {machine.source}")
    activation_bytes = settings.activation_bytes
    if activation_bytes is None and stream:
        activation_bytes = default_activation_bytes(max(0, limits["host"] - libraries[LIBRARIES]))
    if activation_bytes is not None:
        stages, filed = _with_activations_on_disk(stages, activation_bytes)
        if filed:
            disk = {**disk, "activations beyond --activation-memory": gpus * filed}
            notes.append(
                f"{gpus * filed / _GB:.2f} GB of activations are on disk (--activation-memory): the time to write and "
                "read them is not counted"
            )
    return Plan(
        model=model,
        method=recipe.name,
        target=target.label,
        parameters=anatomy.parameters,
        weight_bytes=anatomy.weight_bytes,
        samples=len(sequences.rows),
        length=sequences.length,
        stream=stream,
        stages=tuple(stage.beside(libraries) for stage in stages),
        machine=machine,
        limits=limits,
        disk=disk,
        free_disk=None if out is None else shutil.disk_usage(out).free,
        notes=tuple(notes),
    )


def _text(settings: PlanSettings) -> TextSettings | None:
    """The settings of the text; None if none is named.

    Raises:
        UserError: the text is an object, or there are settings of a text but no text.
    """
    passed, (data, eval_data) = passed_from_python(settings.data, settings.eval_data)
    for role in passed:
        raise UserError(f"{role} must be the name of a text in a plan: write the text to a file")
    declared = options(PlanSettings)
    if data is not None:
        return settings.text(data=data, eval_data=eval_data)
    for name in _OF_TEXT:
        if getattr(settings, name) != declared[name].default:
            raise UserError(f"--{name.replace('_', '-')} is of the text: name the calibration text with --data")
    return None


def _device(settings: PlanSettings) -> str:
    """The device that the plan is for, "cpu" or "cuda": by default the one on which a run would be.

    Raises:
        UserError: there is no such device, or it is not the one of --gpu.
    """
    if settings.gpu is None:
        return pick_device(settings.device)
    if settings.device == "cpu":
        raise UserError("--gpu plans for a GPU, --device cpu for the processor: leave one of them out")
    return "cuda"


def _limits(settings: PlanSettings, device: str) -> dict[str, int]:
    """Bytes of memory of the host, and of one GPU if the plan is for a GPU.

    Raises:
        UserError: options for GPUs without the kind of GPU, or an unknown kind.
    """
    if settings.gpus > 1 and settings.gpu is None:
        raise UserError("--gpus needs the kind of GPU: add --gpu, such as --gpu h100")
    if settings.device_memory is not None and settings.gpu is None:
        raise UserError("--device-memory is that of a GPU: add its kind, or one like it, such as --gpu a100")
    limits = {"host": int(settings.memory * _GB) if settings.memory else free_bytes("cpu") + resident_bytes()}
    if settings.gpu is not None:
        limits["device"] = int(settings.device_memory * _GB) if settings.device_memory else gpu_memory(settings.gpu)
    elif device == "cuda":
        limits["device"] = free_bytes(device)
    return limits


def _with_activations_on_disk(stages: list[Stage], limit: int) -> tuple[list[Stage], int]:
    """The stages with at most `limit` bytes of activations in memory, and the bytes that are on disk instead."""
    held = [stage.parts.get(ACTIVATIONS_PART, 0) for stage in stages]
    limited = [
        replace(stage, parts={**stage.parts, ACTIVATIONS_PART: limit}) if size > limit else stage
        for stage, size in zip(stages, held, strict=True)
    ]
    return limited, max(0, max(held) - limit)


def _with_text(stages: list[Stage], reading: Reading, weights: dict[str, int]) -> list[Stage]:
    """The stages with one that tokenizes the text after the first, and with the text in memory from then on.

    Args:
        weights: in memory while the text is tokenized.
    """
    parts = {TEXT: reading.held, **weights, TOKENS: reading.peak}
    tokenizing = Stage(name="tokenizer", parts=parts, work=Work.of(tokenize=reading.characters))
    resident = {TEXT: reading.held, TOKENS: reading.left}
    return [stages[0], tokenizing, *(stage.beside(resident) for stage in stages[1:])]


def _notes_on_dtype(anatomy: Anatomy, host: Machine) -> list[str]:
    """A note if the processor multiplies in the dtype of the model more slowly than in float32."""
    narrow = next(anatomy.model.parameters()).dtype.itemsize == 2
    ratio = host.rates["products_half"] / host.rates["products_float32"]
    if not narrow or ratio >= 1:
        return []
    faster = "--dtype float32 is faster, with twice the memory for weights and activations"
    return [f"16-bit products run at {ratio:.2f} of the rate of float32 here: {faster}"]


def _keeps_full_moments(recipe: Recipe) -> bool:
    """Whether a method that prunes keeps Adam's moments in full."""
    return recipe.prunes and getattr(recipe, "moments", None) == "full"


def _stages(
    anatomy: Anatomy,
    recipe: Recipe,
    task: Task,
    validation: int,
    allocation: AllocationRule | None,
    *,
    stream: bool,
    device: str,
) -> list[Stage]:
    length = task.calibration.length
    evaluated: list[Stage] = []
    allocated: list[Stage] = []
    if allocation is not None:
        allocated = allocating(anatomy, allocation, task, stream=stream, device=device, recipe=recipe)
    if validation:
        text = anatomy.sequences(-(-validation // length), length)
        evaluated = list(evaluating(anatomy, text, stream=stream))
    if recipe.stages == "training":
        pruning = training_stages(anatomy, cast("Trained", recipe), task, device)
    else:
        pruning = pruning_stages(anatomy, recipe, task, stream=stream, device=device)
    return [
        loading(anatomy, stream=stream),
        *evaluated,
        *allocated,
        *pruning,
        *evaluated,
        saving(anatomy, stream=stream, factor=_saved_fraction(anatomy, recipe, task.target)),
    ]


def _saved_fraction(anatomy: Anatomy, recipe: Recipe, target: Target) -> float:
    """The size of the saved model relative to the dense one: 1 if zeros are stored."""
    if not recipe.shrinks:
        return 1.0
    return 1.0 - target.fraction * (1.0 - anatomy.outside_bytes / anatomy.weight_bytes)


def _disk(anatomy: Anatomy, stages: list[Stage], output: int, passes: int, *, stream: bool) -> dict[str, int]:
    """Upper bounds of the bytes on disk by purpose, which are all in use at the same time.

    A method that trains writes its state to checkpoints: the weights in float32, Adam's moments, masks, anchors, and
    the best weights so far. Other methods write every finished block to the journal; if the files of a streamed model
    have its parameters under the same names, the output links to those. A search of an allocation keeps its table.

    Args:
        stages: of a run in a single process.
        output: bytes of the pruned weights.
        passes: over the blocks, each of which writes a record for every block.
    """
    training = [stage.parts for stage in stages if stage.name == TRAINING]
    if training:
        state = max(sum(parts.get(part, 0) for part in KEPT_IN_CHECKPOINTS) for parts in training)
        journal = {"checkpoints": _AT_ONCE * state}
    else:
        held = max((stage.parts.get(ACTIVATIONS_PART, 0) for stage in stages), default=0)
        linked = stream and not anatomy.renames
        journal = {"journal": 0 if linked else output, "activations in the journal": _AT_ONCE * held}
        for part in (ERRORS, TABLE):
            size = max((stage.parts.get(part, 0) for stage in stages), default=0)
            journal |= {f"{part} in the journal": size} if size else {}
    matrices = sum(len(block.weights) for block in anatomy.blocks)
    results = _RECORD * (passes * len(anatomy.blocks) + _AT_ONCE) + _MATRIX * matrices + _PAGES
    others = {"records, report and tokenizer": results + _tokenizer_bytes(anatomy.source)}
    return {"output": output, **journal, **others}


def _tokenizer_bytes(source: str) -> int:
    """Bytes of the tokenizer's files in a local model folder; 0 for other models."""
    try:
        location = locate(source, weights=False)
    except UserError:
        return 0
    if not isinstance(location, Path) or not location.is_dir():
        return 0
    return sum(path.stat().st_size for path in {path for name in _TOKENIZER for path in location.glob(name)})


def _validation_tokens(text: Reading | None, eval_samples: int | None, length: int, notes: list[str]) -> int:
    if eval_samples is not None:
        return eval_samples * length
    if text is None:
        notes.append("evaluation is not counted: give --eval-samples, or --data that is on this disk")
        return 0
    return text.validation_tokens


def _shared_out(stage: Stage, gpus: int) -> Stage:
    """The stage on one of several GPUs, which share the tokens and shard the state of training."""
    divided = (*_SHARDED, ACTIVATIONS_PART) if "Adam's moments" in stage.parts else (ACTIVATIONS_PART,)
    parts = {name: -(-size // gpus) if name in divided else size for name, size in stage.parts.items()}
    return replace(stage, parts=parts, work=stage.work * (1 / gpus))


def _narrow(anatomy: Anatomy) -> torch.dtype:
    dtype: torch.dtype = next(anatomy.model.parameters()).dtype
    return dtype if dtype.itemsize == 2 else torch.bfloat16
