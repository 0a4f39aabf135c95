"""Evaluation of a model on a text (perplexity, sparsity, a continuation), or on tasks of lm-evaluation-harness."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from admm_prune.data.hub import expanded, first_line
from admm_prune.data.sequences import Sequences
from admm_prune.data.sources import PYTHON_OBJECT, is_file_name
from admm_prune.errors import UserError
from admm_prune.methods.base import OnProgress, Runtime
from admm_prune.models import evaluate as evaluation
from admm_prune.models.activation_store import ActivationStore
from admm_prune.models.evaluate import Evaluation, continued, evaluate
from admm_prune.models.loading import LoadedModel, load
from admm_prune.models.structure import decoder_blocks
from admm_prune.runs.journal.folder import MANIFEST
from admm_prune.runs.machine import check_dtype, pick_device
from admm_prune.runs.manifest import TextRecord
from admm_prune.runs.texts import check_data, evaluation_corpus, log_notes, packed_evaluation, validation_text
from admm_prune.settings import TextSettings

_IN_THE_WORKING_FOLDER = "; a relative path is one in the working folder"
_READ_WITH = {"eval_split", "column", "eval_documents"}  # settings of the evaluation text other than those of packing
_PROMPT, _CONTINUED = 24, 24  # tokens of the prompt and of its continuation


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The evaluation of a dense or pruned model.

    Attributes:
        text: the evaluation text.
        figures: perplexity and the other metrics.
        prompt: the beginning of the text.
        continuation: the greedy continuation of the prompt. Both are empty if the model is not in memory, because every
            generated token needs all weights.
    """

    text: Sequences
    figures: Evaluation
    prompt: str
    continuation: str

    def beside(self, pruned: Validation) -> dict[str, str]:
        """The prompt, and the continuations by this dense and by a pruned model; empty if there are none."""
        written = {"prompt": self.prompt, "dense": self.continuation, "pruned": pruned.continuation}
        return written if self.prompt and pruned.prompt else {}


def evaluated(loaded: LoadedModel, text: Sequences, runtime: Runtime) -> Validation:
    """Evaluates a model, in memory or streamed."""
    prompt, continuation = ("", "") if loaded.offloading.is_offloaded else beginning_continued(loaded, text)
    activation_store = ActivationStore(runtime.activation_bytes, runtime.journal.scratch())
    figures = evaluate(
        loaded.model, text, loaded.offloading, activation_store, runtime.world, on_progress=runtime.report_progress
    )
    return Validation(text=text, figures=figures, prompt=prompt, continuation=continuation)


def beginning_continued(loaded: LoadedModel, text: Sequences) -> tuple[str, str]:
    """The beginning of a text, and its greedy continuation by a model in memory."""
    ids = text.rows[0].ids[:_PROMPT]
    continuation = continued(loaded.model, ids, _CONTINUED)
    return str(loaded.tokenizer.decode(ids)), str(loaded.tokenizer.decode(continuation))


def evaluated_dense(loaded: LoadedModel, text: Sequences, runtime: Runtime) -> Validation:
    """The evaluation of the model before it is pruned; in a resumed run from the journal."""

    def compute() -> dict[str, object]:
        dense = evaluated(loaded, text, runtime)
        return {"figures": asdict(dense.figures), "prompt": dense.prompt, "continuation": dense.continuation}

    record = runtime.journal.once("dense", compute)
    return Validation(
        text=text,
        figures=Evaluation(**record["figures"]),
        prompt=record["prompt"],
        continuation=record["continuation"],
    )


@dataclass(frozen=True)
class ModelEvaluation:
    """The perplexity of a model on the text, and the fraction of zeros in its block matrices.

    `notes` are on tensors of its files that the model does not use.
    """

    figures: Evaluation
    sparsity: float
    text: TextRecord
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self.figures),
            "sparsity": self.sparsity,
            "text": asdict(self.text),
            "notes": list(self.notes),
        }


def evaluate_model(
    model: str,
    text: TextSettings | None = None,
    *,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    on_progress: OnProgress | None = None,
    **changes: Any,
) -> ModelEvaluation:
    """Loads a model and evaluates it on a text.

    Args:
        model: a folder, a Hub id or "embedded".
        text: the settings of the evaluation text. None uses the evaluation text of the run that wrote the model, from
            its manifest, or the embedded text for the embedded model.
        trust_remote_code: allow running code that comes with the model.
        on_progress: called at every batch.
        changes: settings of `TextSettings` that override those of the run if `text` is None.

    Raises:
        UserError: the model, the text, the device or the dtype cannot be used; no text is given and no run wrote the
            model; or the text of the run has changed since.
    """
    place = pick_device(device)
    check_dtype(dtype)
    run = None if text is not None else text_of_run(model)
    if text is None and run is None:
        text = TextSettings(data=check_data(None, model), **changes)
    loaded = load(model, device=place, dtype=dtype, trust_remote_code=trust_remote_code)
    sparsity = evaluation.sparsity(decoder_blocks(loaded.model))
    log_notes(loaded)
    if run is not None:
        sequences, record = run.evaluation(loaded, changes)
    else:
        assert text is not None
        sequences, record = validation_text(text, loaded)
    report = Runtime(on_progress=on_progress).report_progress
    figures = evaluation.evaluate(loaded.model, sequences, on_progress=report)
    return ModelEvaluation(figures, sparsity, record, loaded.notes)


@dataclass(frozen=True)
class RunText:
    """The text on which the run that wrote a model folder was evaluated, and the hash of its tokens."""

    model: str
    settings: TextSettings
    token_hash: str

    def evaluation(self, loaded: LoadedModel, changes: dict[str, Any]) -> tuple[Sequences, TextRecord]:
        """The evaluation text with the settings of the run, some of which may be changed.

        Raises:
            UserError: without changes the tokens differ from those of the run, or the text cannot be used.
        """
        corpus = evaluation_corpus(self.settings, loaded)
        text = packed_evaluation(corpus, self.settings, loaded)
        now = text[0].token_hash
        if now != self.token_hash:
            place = str(self.settings.eval_data or self.settings.data)
            relative = is_file_name(place) and not expanded(place).is_absolute()
            raise UserError(
                f"{self.model}: {place} is not the text that its run was evaluated on (token hash "
                f"{self.token_hash[:12]} became {now[:12]}){_IN_THE_WORKING_FOLDER if relative else ''}: name a text "
                "with --data"
            )
        if not changes:
            return text
        changed = replace(self.settings, **changes)
        if changes.keys() & _READ_WITH:
            corpus = evaluation_corpus(changed, loaded)
        return packed_evaluation(corpus, changed, loaded)


def text_of_run(model: str) -> RunText | None:
    """The evaluation text of the run that wrote a model folder; None if the folder has no manifest.

    Raises:
        UserError: the manifest is damaged, or its text is no longer available.
    """
    path = expanded(model) / MANIFEST
    if not path.is_file():
        return None
    known = {field.name for field in fields(TextSettings)}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        named = {name: value for name, value in content["settings"]["text"].items() if name in known}
        settings, token_hash = TextSettings(**named), str(content["texts"]["evaluation"]["token_hash"])
        place = Path(settings.data if settings.eval_data is None else settings.eval_data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} does not say on which text the run evaluated: name one with --data") from error
    if place == Path(PYTHON_OBJECT):
        raise UserError(f"{model}: its run was given the text as a Python object: name a text with --data")
    if is_file_name(str(place)) and not expanded(place).exists():
        relative = "" if expanded(place).is_absolute() else _IN_THE_WORKING_FOLDER
        raise UserError(f"{model}: the text of its run, {place}, is not there{relative}: name a text with --data")
    return RunText(model, settings, token_hash)


class Tasks:
    """Tasks of lm-evaluation-harness, with their data.

    Args:
        names: tasks of the harness or of `folder`, as a sequence or in a comma-separated string.
        folder: a folder with additional tasks in YAML files.
        shots: the number of examples before each question; by default that of the task.
        limit: the maximum number of questions per task, for a quick check: such figures are not comparable.

    Raises:
        UserError: lm_eval is not installed, a task is unknown, or its data are not available.
    """

    def __init__(
        self,
        names: str | Sequence[str],
        *,
        folder: str | Path | None = None,
        shots: int | None = None,
        limit: int | None = None,
    ) -> None:
        self.names = task_names(names)
        if not self.names:
            raise UserError("name at least one task, such as --tasks piqa,arc_easy")
        place = None if folder is None else expanded(folder)
        if place is not None and not place.is_dir():
            raise UserError(f"{folder}: there is no such folder of tasks")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(f"tasks need lm-evaluation-harness: pip install 'admm-prune[eval]' ({error})") from error
        # The harness has thousands of task files, which are not read if the folder has all of the tasks.
        self._manager = TaskManager(include_path=None if place is None else str(place), include_defaults=False)
        if not set(self.names) <= set(self._manager.all_tasks):
            self._manager = TaskManager(include_path=None if place is None else str(place))
        unknown = [name for name in self.names if name not in self._manager.all_tasks]
        if unknown:
            raise UserError(
                f"lm_eval {lm_eval.__version__} knows no task '{unknown[0]}'; tasks of your own: --task-folder"
            )
        self._shots, self._limit = shots, limit
        with self._explained():  # loads the data now, so that errors appear before any work
            manager: Any = self._manager
            find = getattr(manager, "load", None) or manager.load_task_or_group  # the latter before lm_eval 0.4.11
            find([*self.names])

    def evaluate(self, loaded: LoadedModel, *, seed: int = 0, batch_size: int = 8) -> dict[str, Any]:
        """Evaluates a model in memory.

        Args:
            seed: the seed of all random choices of the harness.
            batch_size: the number of requests in a batch.

        Returns:
            JSON values: "results" by task and metric with their standard errors, under the names of the harness
            ("acc,none", "acc_norm,none"), the "versions" of the tasks, "shots", "limit", and the version of "lm_eval".

        Raises:
            UserError: a task cannot be evaluated.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        model_of: Any = HFLM
        simple_evaluate: Any = lm_eval.simple_evaluate
        # A copy of the tokenizer, because the harness adds a padding token, which must not be saved with the model.
        tokenizer = copy.deepcopy(loaded.tokenizer)
        harness = model_of(pretrained=loaded.model, tokenizer=tokenizer, batch_size=batch_size)
        with self._explained():
            results = simple_evaluate(
                harness,
                tasks=list(self.names),
                num_fewshot=self._shots,
                limit=self._limit,
                task_manager=self._manager,
                bootstrap_iters=1000,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        # In addition to metrics such as "acc,none", a row has the name of its task and the number of its samples.
        rows = {task: {k: v for k, v in row.items() if "," in k} for task, row in results["results"].items()}
        return {
            "results": rows,
            "versions": results["versions"],
            "shots": results["n-shot"],
            "limit": self._limit,
            "lm_eval": lm_eval.__version__,
        }

    @contextmanager
    def _explained(self) -> Generator[None]:
        try:
            yield
        except (OSError, ConnectionError, ValueError, KeyError) as error:
            raise UserError(f"{', '.join(self.names)}: {type(error).__name__}: {first_line(error)}") from error


def task_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """The names of tasks, from a sequence or a comma-separated string.

    Raises:
        UserError: the argument is neither.
    """
    listed: Any = names.split(",") if isinstance(names, str) else names
    if not isinstance(listed, list | tuple) or not all(isinstance(name, str) for name in listed):
        raise UserError(f"tasks must be a list of names, or names in a string with commas, not {names!r}")
    return tuple(dict.fromkeys(name.strip() for name in listed if name.strip()))


def evaluate_tasks(
    model: str,
    tasks: str | Sequence[str],
    *,
    device: str = "auto",
    dtype: str | None = None,
    seed: int = 0,
    batch_size: int = 8,
    trust_remote_code: bool = False,
    **how: Any,
) -> dict[str, Any]:
    """Loads a model and evaluates it on tasks of lm-evaluation-harness.

    Args:
        model: a folder, a Hub id or "embedded".
        tasks, seed, batch_size: as for `Tasks`.
        trust_remote_code: allow running code that comes with the model.
        how: further arguments of `Tasks`.

    Returns:
        As `Tasks.evaluate`.

    Raises:
        UserError: as `Tasks`; the model cannot be loaded.
    """
    place = pick_device(device)
    check_dtype(dtype)
    chosen = Tasks(tasks, **how)
    loaded = load(model, device=place, dtype=dtype, trust_remote_code=trust_remote_code)
    log_notes(loaded)
    return chosen.evaluate(loaded, seed=seed, batch_size=batch_size)
