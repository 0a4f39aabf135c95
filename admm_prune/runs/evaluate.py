"""A model evaluated on a text: perplexity, sparsity, and a continuation of the text's beginning."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from admm_prune.data.sequences import Sequences
from admm_prune.data.sources import PYTHON_OBJECT, is_file_name
from admm_prune.errors import UserError
from admm_prune.methods.base import Request
from admm_prune.models import evaluate as evaluation
from admm_prune.models.activation_store import Shelf
from admm_prune.models.evaluate import Evaluation, continued, evaluate
from admm_prune.models.loading import LoadedModel, load
from admm_prune.models.structure import decoder_blocks
from admm_prune.runs.journal.folder import MANIFEST
from admm_prune.runs.machine import check_dtype, pick_device
from admm_prune.runs.manifest import TextRecord
from admm_prune.runs.texts import Texts, TextSettings, check_data, judging_text

_PROMPT, _CONTINUED = 24, 24  # tokens


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The figures of a model on the evaluation text, dense or pruned.

    Attributes:
        text: the evaluation text.
        prompt: the beginning of the text.
        continuation: the model's greedy continuation. Both are empty if the model is not in memory, because every
            generated token needs all weights.
    """

    text: Sequences
    figures: Evaluation
    prompt: str
    continuation: str

    def beside(self, pruned: Validation) -> dict[str, str]:
        """The prompt, and both continuations; empty where there are none."""
        written = {"prompt": self.prompt, "dense": self.continuation, "pruned": pruned.continuation}
        return written if self.prompt else {}


def judged(loaded: LoadedModel, text: Sequences, request: Request) -> Validation:
    """Evaluates a model, in memory or streamed."""
    prompt, continuation = ("", "") if loaded.residence.hollow else beginning_continued(loaded, text)
    shelf = Shelf(request.activation_bytes, request.journal.scratch())
    figures = evaluate(loaded.model, text, loaded.residence, shelf, request.world)
    return Validation(text=text, figures=figures, prompt=prompt, continuation=continuation)


def beginning_continued(loaded: LoadedModel, text: Sequences) -> tuple[str, str]:
    """The beginning of a text, and how a model in memory continues it greedily."""
    ids = text.rows[0].ids[:_PROMPT]
    continuation = continued(loaded.model, ids, _CONTINUED)
    return str(loaded.tokenizer.decode(ids)), str(loaded.tokenizer.decode(continuation))


def judged_dense(loaded: LoadedModel, text: Sequences, request: Request) -> Validation:
    """A model before it is pruned, from the request's journal where that has it."""

    def judge() -> dict[str, object]:
        found = judged(loaded, text, request)
        return {"figures": asdict(found.figures), "prompt": found.prompt, "continuation": found.continuation}

    found = request.journal.once("dense", judge)
    return Validation(
        text=text,
        figures=Evaluation(**found["figures"]),
        prompt=found["prompt"],
        continuation=found["continuation"],
    )


@dataclass(frozen=True)
class ModelEvaluation:
    """The perplexity of a model on the text, and the fraction of zeros in its block matrices."""

    figures: Evaluation
    sparsity: float
    text: TextRecord

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self.figures), "sparsity": self.sparsity, "text": asdict(self.text)}


def evaluate_model(
    model: str,
    text: TextSettings | None = None,
    *,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    **changes: Any,
) -> ModelEvaluation:
    """Loads a model and evaluates it on a text.

    Args:
        text: settings of the evaluation text; None for the evaluation text of the run that wrote the model, from its
            manifest. The embedded model has the embedded text.
        trust_remote_code: allow running code that comes with the model.
        changes: settings of `TextSettings` that override the run's if `text` is None.

    Raises:
        UserError: the model, the text, the device or the dtype cannot be used, or no run wrote the model and there is
            no text.
    """
    place = pick_device(device)
    check_dtype(dtype)
    run = None if text is not None else text_of_run(model)
    if text is None and run is None:
        text = TextSettings(data=check_data(None, model), **changes)
    loaded = load(model, device=place, dtype=dtype, trust_remote_code=trust_remote_code)
    sparsity = evaluation.sparsity(decoder_blocks(loaded.model))
    if run is not None:
        texts = Texts(replace(run, **changes), loaded)
        sequences, record = texts.evaluation, texts.evaluation_record
    else:
        assert text is not None
        sequences, record = judging_text(text, loaded)
    return ModelEvaluation(evaluation.evaluate(loaded.model, sequences), sparsity, record)


def text_of_run(model: str) -> TextSettings | None:
    """The text of the run that wrote a model folder; None where no manifest is in it.

    Raises:
        UserError: the manifest is damaged, or its text is no longer available.
    """
    path = Path(model).expanduser() / MANIFEST
    if not path.is_file():
        return None
    known = {field.name for field in fields(TextSettings)}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))["settings"]["text"]
        settings = TextSettings(**{name: value for name, value in content.items() if name in known})
        places = [Path(place) for place in (settings.data, settings.eval_data) if place is not None]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} does not say on which text the run evaluated: name one with --data") from error
    if Path(PYTHON_OBJECT) in places:
        raise UserError(f"{model}: its run was given the text as a Python object: name a text with --data")
    for place in places:
        if is_file_name(str(place)) and not place.expanduser().exists():
            raise UserError(f"{model}: the text of its run, {place}, is not there any more: name a text with --data")
    return settings
