"""The calibration text and the evaluation text of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from admm_prune.data.formats import NoSplitError, has_splits
from admm_prune.data.hub import expanded
from admm_prune.data.objects import check_ids as check_passed_ids
from admm_prune.data.objects import check_object, corpus_of, is_split_dataset
from admm_prune.data.rows import NoColumnError
from admm_prune.data.sequences import Sequences, pack
from admm_prune.data.sources import EMBEDDED, PYTHON_OBJECT, Corpus, hold_out, is_file_name, read_corpus
from admm_prune.errors import UserError
from admm_prune.models.checks import check_ids
from admm_prune.models.families import sequence_length
from admm_prune.models.loading import locate
from admm_prune.runs.manifest import TextRecord
from admm_prune.settings import TextSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from admm_prune.models.loading import LoadedModel


DEFAULT_SAMPLES = 128
_LONGEST = 255  # characters; a longer string is checked to be a path

_LOG = logging.getLogger(__name__)


def check_data(data: str | None, model: object) -> str:
    """The name of the calibration text of a run. Only the embedded model has a default, the embedded text.

    Args:
        data: the name that the user gave, if any.
        model: the model of the run.

    Raises:
        UserError: no text is given for another model, or there is no such model.
    """
    if data is not None:
        return data
    if isinstance(model, str | Path) and str(model) == EMBEDDED:
        return EMBEDDED
    if isinstance(model, str | Path):
        locate(str(model))  # an error in the name of the model is reported first
    named = f"{model}: " if isinstance(model, str | Path) else ""
    raise UserError(
        f"{named}name the text with --data: a file, a folder or a Hub dataset, such as --data wikitext2 "
        "(only the embedded model has a default text)"
    )


def passed_from_python(data: Any, eval_data: Any) -> tuple[dict[str, Any], tuple[str | None, str | None]]:
    """Separates texts that are passed as objects from names of texts.

    Returns:
        The objects by role, "data" or "eval_data", and the two names for `TextSettings`.

    Raises:
        UserError: an object cannot be a text.
    """
    passed: dict[str, Any] = {}
    names: list[str | None] = []
    for role, value in (("data", data), ("eval_data", eval_data)):
        long = isinstance(value, str) and ("\n" in value or len(value) > _LONGEST)
        if long and not os.path.exists(value):  # noqa: PTH110  # Path.exists raises for a name this long
            raise UserError(f"{role} is the name of a text, not text itself: pass that as a list, {role}=[text]")
        if value is None or isinstance(value, str | Path):
            names.append(None if value is None else str(value))
        else:
            check_object(value, role)
            passed[role] = value
            names.append(PYTHON_OBJECT)
    return passed, (names[0], names[1])


class Texts:
    """The calibration and the evaluation text of a run, read once and packed for the tokenizer and the context length
    of the model.

    Args:
        passed: texts that were passed as objects instead of a path or a Hub id, by role, "data" or "eval_data".

    Raises:
        UserError: a text cannot be used, or the sequences are longer than the context of the model.
    """

    def __init__(self, settings: TextSettings, loaded: LoadedModel, passed: Mapping[str, Any] | None = None) -> None:
        self._settings, self._loaded = settings, loaded
        self._length = sequence_length(loaded.model.config, settings.length)
        self._calibration_corpus, self._validation_corpus = _sources(settings, loaded, passed or {}).both()
        self._packed: dict[int, Sequences] = {}
        self.evaluation = _pack_validation(self._validation_corpus, settings, self._length, loaded)
        log_notes(self._calibration_corpus, self._validation_corpus)

    def release_model(self) -> None:
        """Releases the model, with whose vocabulary texts are compared when they are packed.

        What has been packed can still be read; nothing else can be packed.
        """
        del self._loaded

    def calibration(self, samples: int = DEFAULT_SAMPLES) -> Sequences:
        """The calibration text.

        Args:
            samples: the number of sequences, if the settings name none.

        Raises:
            UserError: the text is shorter than one sequence.
        """
        samples = self._settings.samples or samples
        if samples not in self._packed:
            self._packed[samples] = _pack(self._calibration_corpus, self._settings, self._length, self._loaded, samples)
        return self._packed[samples]

    def records(self, samples: int = DEFAULT_SAMPLES) -> dict[str, TextRecord]:
        """The records of both texts, by their role; `samples` as for `calibration`."""
        return {
            "calibration": TextRecord.of(self._calibration_corpus, self.calibration(samples)),
            "evaluation": TextRecord.of(self._validation_corpus, self.evaluation),
        }

    def notes(self, samples: int = DEFAULT_SAMPLES) -> tuple[str, ...]:
        """Notes on texts with fewer sequences than the settings request; `samples` as for `calibration`."""
        used = (
            ("calibration", self._settings.samples, len(self.calibration(samples).rows)),
            ("evaluation", self._settings.eval_samples, len(self.evaluation.rows)),
        )
        return tuple(
            f"the {role} text has {count} sequences of {self._length} tokens, fewer than the requested {requested}"
            for role, requested, count in used
            if requested is not None and count < requested
        )


def validation_text(settings: TextSettings, loaded: LoadedModel) -> tuple[Sequences, TextRecord]:
    """The evaluation text, without reading a calibration text: a local file as a whole, the held-out split of other
    sources.

    Raises:
        UserError: the text cannot be used, or the sequences are longer than the context of the model.
    """
    corpus = _sources(settings, loaded, {}).validation(whole=True)
    assert corpus is not None
    log_notes(corpus)
    return packed_evaluation(corpus, settings, loaded)


def evaluation_corpus(settings: TextSettings, loaded: LoadedModel) -> Corpus:
    """The evaluation text of a run. The calibration text is read only if the evaluation text is a part of it.

    Raises:
        UserError: the text cannot be used.
    """
    corpus = _sources(settings, loaded, {}).evaluation()
    log_notes(corpus)
    return corpus


def packed_evaluation(corpus: Corpus, settings: TextSettings, loaded: LoadedModel) -> tuple[Sequences, TextRecord]:
    """The sequences of an evaluation text, and their record.

    Raises:
        UserError: the text cannot be used, or the sequences are longer than the context of the model.
    """
    length = sequence_length(loaded.model.config, settings.length)
    sequences = _pack_validation(corpus, settings, length, loaded)
    return sequences, TextRecord.of(corpus, sequences)


def _pack_validation(corpus: Corpus, settings: TextSettings, length: int, loaded: LoadedModel) -> Sequences:
    return _pack(corpus, settings, length, loaded, settings.eval_samples)


def _pack(corpus: Corpus, settings: TextSettings, length: int, loaded: LoadedModel, samples: int | None) -> Sequences:
    text = pack(corpus, loaded.tokenizer, length=length, packing=settings.packing, samples=samples, seed=settings.seed)
    check_ids(loaded.source, (row.ids for row in text.rows), loaded.model)
    return text


def is_local(settings: TextSettings) -> bool:
    """Whether both texts are local, not on the Hub."""
    places = [place for place in (settings.data, settings.eval_data) if place is not None and place != EMBEDDED]
    return all(is_file_name(place) or expanded(place).exists() for place in places)


def read_corpora(settings: TextSettings, tokenizer: PreTrainedTokenizerBase) -> tuple[Corpus, Corpus]:
    """The calibration and the evaluation text, with conversations formatted by the tokenizer's chat template.

    Raises:
        UserError: a text cannot be used.
    """
    return _Sources(settings, tokenizer, {}, None).both()


def _sources(settings: TextSettings, loaded: LoadedModel, passed: Mapping[str, Any]) -> _Sources:
    vocabulary = getattr(loaded.model.config.get_text_config(), "vocab_size", None)
    return _Sources(settings, loaded.tokenizer, passed, vocabulary)


@dataclass(frozen=True)
class _Sources:
    """Reads the two texts from their sources.

    Attributes:
        vocabulary: the number of tokens of the model; None if it is unknown.
        plain: the roles of texts that have no columns, although `settings.column` names one.
    """

    settings: TextSettings
    tokenizer: PreTrainedTokenizerBase
    passed: Mapping[str, Any]
    vocabulary: int | None
    plain: list[str] = field(default_factory=list)

    def both(self) -> tuple[Corpus, Corpus]:
        """(calibration text, evaluation text)."""
        settings = self.settings
        if settings.split != "train" and not self._has_splits("data"):
            raise UserError(f"{settings.data}: there are no splits in it: leave --split out")
        calibrating = self._read("data", settings.split, settings.documents)
        if self._may_be_separate:
            validation = self.validation()
            if validation is not None:
                return _with_note_on_overlap(calibrating, validation), validation
            note = f"{settings.data}: no split to evaluate on: the last tenth of what is read is held out"
            calibrating = replace(calibrating, notes=(*calibrating.notes, note))
        calibrating, validation = hold_out(calibrating)
        return calibrating, replace(validation, documents=validation.documents[: settings.eval_documents])

    @property
    def _may_be_separate(self) -> bool:
        """Whether the evaluation text is another text or another split, if there is such a split."""
        settings = self.settings
        return settings.eval_data is not None or settings.eval_split is not None or self._has_splits("data")

    def evaluation(self) -> Corpus:
        """The evaluation text alone, which is held out of the calibration text if it is not separate."""
        validation = self.validation() if self._may_be_separate else None
        return self.both()[1] if validation is None else validation

    def validation(self, *, whole: bool = False) -> Corpus | None:
        """The evaluation text; None if it is not set and the calibration text has no split for it.

        Args:
            whole: no calibration text is read. If the source has a single split, that is used for evaluation.
        """
        settings = self.settings
        role = "data" if settings.eval_data is None else "eval_data"
        if settings.eval_split is not None and not self._has_splits(role):
            raise UserError(f"{self._source(role)}: there are no splits in it: leave --eval-split out")
        beside_calibration = role == "data" and not whole
        try:
            return self._read_evaluation(role, settings.eval_split or "validation", beside_calibration)
        except NoSplitError as error:
            if settings.eval_split is not None:
                raise
            if "test" in error.available and not (beside_calibration and len(error.available) == 1):
                return self._read_evaluation(role, "test", beside_calibration)
            if beside_calibration:
                return None
            if len(error.available) != 1:
                raise
            return self._read(role, error.available[0], settings.eval_documents)

    def _read_evaluation(self, role: str, split: str, beside_calibration: bool) -> Corpus:
        """The evaluation text from a split, which must not be that of a calibration text from the same source."""
        one, other = self.settings.split, split
        if self._source(role) == EMBEDDED:
            one, other = (name if name == "train" else "validation" for name in (one, other))  # "test" is the same text
        if beside_calibration and one == other:
            also = "" if split == self.settings.split else f" (the same text as '{split}')"
            raise UserError(
                f"{self._source(role)}: the split '{self.settings.split}'{also} is the calibration text: evaluate on "
                "another one with --eval-split, or on another text with --eval-data"
            )
        return self._read(role, split, self.settings.eval_documents)

    def _source(self, role: str) -> str | None:
        return self.settings.data if role == "data" else self.settings.eval_data

    def _has_splits(self, role: str) -> bool:
        if role in self.passed:
            return is_split_dataset(self.passed[role])
        source = self._source(role)
        assert source is not None
        path = expanded(source)
        # The name stands for the embedded text, even if there is a folder of this name.
        return source == EMBEDDED or not path.exists() or has_splits(path)

    def _read(self, role: str, split: str, limit: int | None) -> Corpus:
        settings = self.settings
        how: dict[str, Any] = {"split": split, "limit": limit, "tokenizer": self.tokenizer}
        try:
            return self._corpus(role, column=settings.column, **how)
        except NoColumnError as error:
            other = role == "eval_data" or (error.plain and settings.eval_data is not None)
            if settings.column is None or not other or (error.plain and self.plain):
                raise
            if error.plain:
                self.plain.append(role)
            return self._corpus(role, **how)  # the column refers to the other text

    def _corpus(self, role: str, **how: Any) -> Corpus:
        if role in self.passed:
            corpus = corpus_of(self.passed[role], **how)
            if self.vocabulary is not None:
                check_passed_ids(corpus, self.vocabulary)
            return corpus
        source = self._source(role)
        assert source is not None
        if source == PYTHON_OBJECT:
            raise UserError("the text was passed from Python: name one with --data")
        return read_corpus(source, **how)


def _with_note_on_overlap(calibrating: Corpus, validation: Corpus) -> Corpus:
    """The calibration text, with a note if all of its documents are evaluation documents, or the other way round.

    The evaluation text has no such note, so that it can be read again without the calibration text. A few equal
    documents, such as headings in lines of their own, are common in data sets.
    """
    calibration_documents, documents = set(calibrating.documents), set(validation.documents)
    if not (documents <= calibration_documents or calibration_documents <= documents):
        return calibrating
    note = f"{calibrating.name}: the calibration text contains the evaluation text, or is contained in it"
    return replace(calibrating, notes=(*calibrating.notes, note))


def log_notes(*annotated: Corpus | LoadedModel) -> None:
    """Logs assumptions and replacements made in reading texts or a model, in one process only."""
    if os.environ.get("RANK", "0") == "0":
        for note in dict.fromkeys(note for one in annotated for note in one.notes):
            _LOG.warning("note: %s", note)
