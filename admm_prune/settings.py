"""Every setting of a run, declared once: a field of `TextSettings` or `Settings` with an `Option`.

From it come the arguments of `prune` and `make_plan` with their documentation, the options of the command line, the
fields of recipe files and of their JSON schema, and the settings in the manifest. A new field needs no other edit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from admm_prune.errors import UserError, check_type, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from admm_prune.data.sequences import Packing
    from admm_prune.methods.base import OnProgress, Ridge
    from admm_prune.methods.callbacks import Callback, Tracker
    from admm_prune.methods.parts import Objective
    from admm_prune.problems.constraints import SparseSet
    from admm_prune.solvers.base import Solver

T = TypeVar("T")
Stream = Literal["auto"] | bool
_RUNS = "run reproduce compare plan"
_COMMANDS = f"{_RUNS} capture"
_NO_LIMIT = 1e9  # GB: more than any machine has, and finite, so that it is a number of bytes
SAME: Any = object()  # a default of the command line that is the field's own


@dataclass(frozen=True, kw_only=True)
class Option:
    """The declaration of a setting beside its name, type and default.

    Attributes:
        help: on the command line, in the schema of recipes, and in the documentation of `prune`.
        python: what `prune` takes beyond that; empty where the same.
        commands: that have it as an option, separated by spaces.
        group: of the options in the help; those of "Text" are together in recipes and manifests too.
        saved_in: "recipe": in recipe files and in the manifest; "manifest": there alone; "": in neither.
        part_of: the field of the manifest that holds it together with others; its own name by default.
        least, most, choices: of its values.
        in_file, typed: its type in a recipe file, and on the command line; by default that of the field where it is a
            number or a flag, else str.
        default: of `prune` and of recipe files: the field's.
        typed_default: of the command line; the field's by default, but for a field that has none.
        spelled: its name on the command line; the field's by default.
        flags: of the command line, in place of the one that follows from the name.
        parse: the field's value from the one typed.
    """

    help: str
    python: str = ""
    commands: str = "run plan"
    group: str = "Pruning"
    saved_in: Literal["recipe", "manifest", ""] = "recipe"
    part_of: str | None = None
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    in_file: Any = None
    typed: Any = None
    default: Any = None
    typed_default: Any = SAME
    spelled: str = ""
    flags: tuple[str, ...] = ()
    parse: Callable[[Any], Any] | None = None

    def check(self, name: str, value: Any) -> None:
        """Raises UserError for a value out of range; what is a part of another setting is checked with it."""
        if value is None or self.part_of is not None:
            return
        if self.least is not None and not value >= self.least:  # NaN is neither
            raise UserError(f"{name} must be at least {self.least}, not {value}")
        if self.most is not None and not value <= self.most:
            raise UserError(f"{name} must be at most {self.most}, not {value}")
        if self.choices and value not in self.choices:
            choices = " or ".join(", ".join(self.choices).rsplit(", ", 1))
            raise UserError(f"{name} must be {choices}, not '{value}'{did_you_mean(str(value), self.choices)}")


def option(default: T, help: str, **how: Any) -> T:
    """A field of this default with an `Option`."""
    made: T = field(default=default, metadata={"option": Option(help=help, **how)})
    return made


def _compared(default: T, help: str, **how: Any) -> T:
    return option(default, help, commands="run compare plan", **how)


def _text(default: T, help: str, *, commands: str = _COMMANDS, **how: Any) -> T:
    return option(default, help, group="Text", commands=commands, **how)


def _run(default: T, help: str, *, saved_in: str = "", **how: Any) -> T:
    return option(default, help, group="Run", saved_in=saved_in, **how)


def _training(default: T, help: str, **how: Any) -> T:
    return option(default, help, group="Training", commands=_RUNS, **how)


def _structured(default: T, help: str, **how: Any) -> T:
    return option(default, help, group="Structured pruning", commands="run compare plan", **how)


def _tasks(default: T, help: str, **how: Any) -> T:
    return option(default, help, group="Tasks", commands="run compare eval", **how)


def _machine(default: T, help: str, **how: Any) -> T:
    return option(default, help, group="Machine", commands="plan", saved_in="", **how)


def _patterns(default: T, help: str, **how: Any) -> T:
    typed = {"typed": list[str] | None, **_NONE_IS_EMPTY}
    return option(default, help, commands="run compare plan", part_of="selection", **typed | how)


def _ridge(typed: str) -> Ridge:
    from admm_prune.methods.ridge import parse_ridge

    return parse_ridge(typed)


def _overrides(typed: list[str]) -> dict[str, float | str]:
    from admm_prune.methods.selection import parse_overrides

    return parse_overrides(typed)


_NONE_IS_EMPTY: dict[str, Any] = {"typed_default": None, "parse": lambda typed: () if typed is None else typed}
_GIGABYTES: dict[str, Any] = {"least": 0.001, "most": _NO_LIMIT}
_NAMES = {"in_file": tuple[str, ...], "typed": str | None, **_NONE_IS_EMPTY}
_DATA = {
    "option": Option(
        help="Calibration text: a file (.txt, .json, .jsonl, .csv, .tsv, .parquet, or compressed text), a folder, "
        "a Hub id, or 'embedded', the text that comes with the embedded model and is the default for it only.",
        python="Or text itself: a `datasets.Dataset`, a list of strings, of rows or of token ids, or an iterable of "
        "batches with input_ids.",
        in_file=str | None,
        typed=str | None,
        group="Text",
        commands=_COMMANDS,
    )
}


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Which text calibrates a run, and which evaluates it.

    `data` is the name of a text (see `data.sources.read_corpus`), or `PYTHON_OBJECT` where it was passed from Python.

    Raises:
        UserError: a number is out of range, or there is no such packing.
    """

    data: Any = field(metadata=_DATA)
    eval_data: Any | None = _text(
        None,
        "Text to evaluate on; by default the validation split of the calibration text, or the last tenth of it.",
        python="As `data`.",
    )
    split: str = _text("train", "Split of a Hub id or saved data set to calibrate on.")
    eval_split: str | None = _text(
        None,
        "Split of a Hub id or saved data set to evaluate on; 'validation' or 'test' by default.",
        commands=f"{_COMMANDS} eval",
    )
    column: str | None = _text(
        None,
        "Column of the data set that holds the text or a chat; 'text' by default, or the only column with text.",
        commands=f"{_COMMANDS} eval",
    )
    documents: int | None = _text(
        None, "Calibration documents to read; by default all, or 20,000 of a Hub data set.", least=1
    )
    eval_documents: int | None = _text(
        None, "Evaluation documents to read; by default all, or 20,000 of a Hub data set.", least=1
    )
    samples: int | None = _text(
        None, "Calibration sequences; by default 128, or as many as are trained on.", least=1, commands=_RUNS
    )
    eval_samples: int | None = _text(None, "Evaluation sequences; by default the whole text.", least=1, commands=_RUNS)
    length: int | None = _text(
        None,
        "Tokens per sequence; by default the context length of the model, but at most 2048.",
        least=2,
        commands=f"{_COMMANDS} eval",
    )
    packing: Packing = _text(
        "auto",
        "How documents become sequences: 'documents' (one per sequence), 'windows' (all documents one after the other, "
        "cut into windows), 'segments' (as in the code of GPTQ and Wanda), or 'auto' (documents if they fit in a "
        "sequence on average, else windows).",
        choices=("auto", "documents", "windows", "segments"),
        commands="run compare plan capture eval",
    )
    seed: int = _text(
        0, "Seed of all random choices.", least=0, most=2**63 - 1, commands="run reproduce compare capture eval"
    )

    def __post_init__(self) -> None:
        kinds = {one.name: str(one.type) for one in fields(self)}
        for name, declared in options(type(self)).items():
            if declared.part_of != "target":  # a sparsity may come as text from the command line
                check_type(name, kinds[name], getattr(self, name))
            declared.check(name, getattr(self, name))

    def text(self, **changes: Any) -> TextSettings:
        """The settings of the text alone, with changes."""
        return TextSettings(**{one.name: getattr(self, one.name) for one in fields(TextSettings)} | changes)


@dataclass(frozen=True)
class Settings(TextSettings):
    """What `prune` takes, as it is given.

    Raises:
        UserError: a number is out of range, or there is no such choice.
    """

    model: str | Path | PreTrainedModel = field(
        metadata={
            "option": Option(
                help="'embedded', a from_pretrained folder, a Hub id, or a .gguf file.",
                python="Or a PyTorch module, which is pruned in place; pass its `tokenizer` as well.",
                commands=_COMMANDS,
                typed_default="embedded",
            )
        }
    )
    _: KW_ONLY
    data: Any = field(default=None, metadata=_DATA)
    method: str | None = option(
        None, "Name of a method, as 'admm-prune list' prints it; 'admm' by default.", commands="run plan"
    )
    solver: str | Solver | None = option(
        None,
        "Solver of the layer problems: a name. It replaces the solver of the method, or is given instead of a method.",
        python="Or an object such as `ADMM.best()`.",
        commands="",
    )
    problem: str | Objective | None = option(
        None,
        "Objective of the layer problems, a name that 'admm-prune list' prints; the method's own by default.",
        python="Or a callable that builds the layer problems, such as `LayerReconstruction`.",
        commands="run compare solve plan",
    )
    constraint: str | SparseSet | type[SparseSet] | None = option(
        None,
        "Sparse set that --sparsity refers to, a name that 'admm-prune list' prints; the method's own by default.",
        python="Or a sparse set for every matrix, such as `RowWise(0.5)`, which needs no `sparsity`, or its class.",
        commands="run compare solve plan",
    )
    sparsity: float | None = option(
        None,
        "Fraction of every matrix to prune, such as 0.7; with an allocation, of all matrices together; with "
        "structured methods, of the budget of all blocks.",
        commands="run reproduce plan",
        part_of="target",
        least=0.0,
        most=1.0,
        typed=str | None,
    )
    pattern: str | None = option(
        None,
        "Pattern N:M, such as 2:4: N of every M consecutive inputs are kept.",
        python="Instead of `sparsity`.",
        commands="run reproduce plan",
        part_of="target",
    )
    targets: str | Sequence[str] = _patterns(
        (),
        "Prune only what matches: the name of a module or the end of it (q_proj, mlp.up_proj), a class (LlamaMLP), or "
        "re:REGEX; repeatable. 'admm-prune list modules' lists the names.",
        python="See `Selection`.",
        in_file=tuple[str, ...],
    )
    ignore: str | Sequence[str] = _patterns(
        (), "Do not prune what matches; patterns as for targets; repeatable.", in_file=tuple[str, ...]
    )
    overrides: Mapping[str, float | str] | None = _patterns(
        None,
        "PATTERN=0.5, PATTERN=2:4 or PATTERN=dense: a different sparsity for what matches; repeatable.",
        python='Here a mapping from patterns to 0.5, "2:4" or "dense".',
        in_file=dict[str, float | str] | None,
        spelled="override",
        parse=lambda typed: _overrides(typed) if typed else {},
    )
    allocation: str | None = _compared(
        None,
        "Rule that distributes the budget over all matrices: uniform, owl, alphapruning, softmax, equal-slope, "
        "fisher, taylor, measured, knapsack, patterns, search or evolutionary.",
    )
    allocation_passes: int | None = _compared(None, "Forward passes of a search; 64 by default.", least=2)
    coordinate: str | Sequence[str] = _compared(
        (), "attention: prune the value and output projections of a block together.", **_NAMES
    )
    refit: str | None = _compared(
        None, "block: fit the pruned matrices of a block together to its dense output.", choices=("block",)
    )
    ridge: Ridge = option(
        None,
        "Ridge, relative to diag(H); the solver's own by default; 'auto' selects it on validation tokens.",
        python="'auto' selects the damping too, once for all matrices of one input. Wanda and magnitude take no ridge.",
        commands="run plan compare solve",
        in_file=float | Literal["auto"] | None,
        typed=str | None,
        parse=lambda typed: None if typed is None else _ridge(typed),  # which imports torch
    )
    steps: int | None = _training(
        None, "Training steps, those of the learning rate range test included; by default set by the method.", least=1
    )
    distillation: float | None = _training(
        None,
        "Weight of the distillation loss in training, 0 to 1, the dense model being the teacher; by default set by the "
        "method.",
        least=0.0,
        most=1.0,
    )
    precision: str = _training(
        "auto",
        "Precision of training: bf16 (autocast, weights in float32), float32, or auto (bf16 if the hardware has it).",
        choices=("auto", "bf16", "float32"),
    )
    micro_batch: int | None = _training(
        None, "Sequences in one forward and backward pass of training; by default the whole batch.", least=1
    )
    gradient_checkpointing: bool = _training(
        False, "Compute activations again in the backward pass of training: less memory, a third more work."
    )
    compile: bool = _training(False, "Compile the blocks with torch.compile for training.")
    unit: str | None = _structured(
        None,
        "Unit of the budget of structured methods: parameters, bytes, kv-cache, flops or latency.",
        choices=("parameters", "bytes", "kv-cache", "flops", "latency"),
    )
    multiple: int | None = _structured(
        None, "Make the number of neurons that a structured method keeps a multiple of this, such as 64.", least=1
    )
    bounds: bool = _compared(
        False, "Also compute a proven lower bound of every layer's error; takes seconds per matrix."
    )
    tasks: str | Sequence[str] = _tasks(
        (),
        "Comma-separated tasks of lm-evaluation-harness on which the model is evaluated.",
        python="Or a sequence of names.",
        **_NAMES,
    )
    task_folder: str | Path | None = _tasks(
        None, "Folder with additional tasks, as YAML files.", in_file=str | None, typed=str | None
    )
    shots: int | None = _tasks(None, "Number of few-shot examples of the tasks; by default as they define.", least=0)
    task_limit: int | None = _tasks(None, "Limit on the questions of each task, for a quick check.", least=1)
    dtype: str | None = _run(
        None,
        "Data type of the weights: float32, bfloat16 or float16; as stored by default.",
        python="A module that is passed keeps its data type.",
        commands=f"{_COMMANDS} eval",
        choices=("float32", "bfloat16", "float16"),
        saved_in="recipe",
    )
    device: str = _run(
        "auto",
        "Device: auto, cpu or cuda.",
        python="A module that is passed stays on its device.",
        commands=f"{_COMMANDS} solve eval",
        choices=("auto", "cpu", "cuda"),
        saved_in="recipe",
    )
    out: str | Path | None = _run(
        None,
        "Output folder; written completely, or, if the run fails, not at all.",
        commands="run reproduce",
        typed=Path | None,
    )
    resume: bool = _run(
        False,
        "Resume an interrupted run; all other arguments must be the same.",
        python="The journal of the run is next to `out`.",
        commands="run reproduce compare",
    )
    overwrite: bool = _run(
        False,
        "Replace an earlier result at the output path, which is an error otherwise. Other files are never replaced.",
        commands="run reproduce compare capture solve",
    )
    stream: Stream = _run(
        "auto",
        "Read the model from its folder block by block; by default only if the whole model would fill the memory.",
        python="Every pruned block is written to `out` before the next is read.",
        commands="run plan reproduce",
        saved_in="manifest",
        typed=bool | None,
        typed_default=None,
        flags=("--stream/--no-stream",),
        parse=lambda typed: "auto" if typed is None else typed,
    )
    activation_bytes: int | None = _run(
        None,
        "GiB of activations between blocks to keep in memory; the rest is stored on disk.",
        python="Here in bytes. By default a quarter of the free memory if weights are streamed, else no limit.",
        commands="run reproduce plan",
        least=0,
        typed=float | None,
        spelled="activation_memory",
        parse=lambda typed: None if typed is None else round(min(typed, _NO_LIMIT) * 2**30),
    )
    trust_remote_code: bool = _run(
        False,
        "Run Python code that comes with the model; never run otherwise.",
        commands="run reproduce eval compare plan capture",
        saved_in="manifest",
    )
    log: str | Tracker | None = _run(
        None,
        "Log the figures of the run to tensorboard:FOLDER, wandb:PROJECT or trackio:PROJECT.",
        python="Or an object with the methods of `Tracker`.",
        commands="run reproduce",
    )
    tokenizer: Any = _run(None, "Tokenizer of a model that is passed as a module.", commands="")
    progress: OnProgress | None = _run(
        None,
        "Callable that receives (steps done, all steps, name of the current part) in every phase of the run: blocks or "
        "steps of training while the model is pruned, batches while it is evaluated.",
        commands="",
    )
    callbacks: Callback | Sequence[Callback] = _run(
        (), "A `Callback` or several: they are called at the phases and the blocks of the run.", commands=""
    )


@dataclass(frozen=True, kw_only=True)
class PlanSettings(Settings):
    """What `make_plan` takes: the settings of the run, and the machine that it is planned for."""

    out: str | Path | None = _run(
        None, "Folder that the run would write; its disk must have the room.", typed=Path | None, commands="plan"
    )
    gpu: str | None = _machine(None, "Plan for a GPU that this machine does not have: h100, h200 or a100.")
    gpus: int = _machine(1, "Number of GPUs of this kind.", least=1)
    device_memory: float | None = _machine(None, "Memory of each GPU in GB; by default its own.", **_GIGABYTES)
    memory: float | None = _machine(None, "Memory of the host in GB; by default the free memory.", **_GIGABYTES)


def options(kind: Any) -> dict[str, Option]:
    """The options of a class of settings, complete, by the names of their fields; those of a group are together."""
    completed: dict[str, Option] = {}
    for one in fields(kind):
        declared: Option = one.metadata["option"]
        bare = str(one.type).removesuffix(" | None")
        plain: Any = {"bool": bool, "int": int, "float": float}.get(bare, str)
        in_file: Any = Literal[declared.choices] if declared.choices else plain
        typed_default = one.default if declared.typed_default is SAME else declared.typed_default
        completed[one.name] = replace(
            declared,
            default=typed_default if one.default is MISSING else one.default,
            in_file=declared.in_file or (in_file if bare == one.type else in_file | None),
            typed=declared.typed or (plain if bare == one.type else plain | None),
            typed_default=typed_default,
            spelled=declared.spelled or one.name,
        )
    first = ("Pruning", "Structured pruning", "Training", "Text", "Run")
    groups = [*dict.fromkeys([*first, *(one.group for one in completed.values())])]
    return dict(sorted(completed.items(), key=lambda item: groups.index(item[1].group)))


def names_of(*, saved_in: Sequence[str] = ("recipe", "manifest"), text: bool) -> list[str]:
    """The fields of `Settings` that are saved in a file: those of the text, or all others."""
    return [name for name, o in options(Settings).items() if o.saved_in in saved_in and (o.group == "Text") == text]


def recorded_names(command: str | None = None) -> set[str]:
    """The fields of a run's settings in the manifest; of a command those that it has as options."""
    return {
        "text" if one.group == "Text" else one.part_of or name
        for name, one in options(Settings).items()
        if one.saved_in and (command is None or command in one.commands.split())
    }


def recorded(settings: Settings, command: str | None = None, **resolved: Any) -> dict[str, Any]:
    """The settings as the manifest holds them, ready for JSON.

    Args:
        command: as for `recorded_names`.
        resolved: what was made of the settings, by the name in the manifest, such as the target of a sparsity.
    """
    values = {name: getattr(settings, name, None) for name in sorted(recorded_names(command))} | resolved
    return {name: asdict(value) if is_dataclass(value) else value for name, value in values.items()}  # type: ignore[arg-type]
