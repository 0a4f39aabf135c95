"""Which text calibrates a run and which text judges it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from admm_prune.data.sequences import Packing, Sequences, default_length, pack
from admm_prune.data.sources import EMBEDDED, Corpus, read_corpus
from admm_prune.data.splits import hold_out
from admm_prune.errors import UserError
from admm_prune.models.vocabulary import check_ids
from admm_prune.runs.manifest import TextRecord

if TYPE_CHECKING:
    from admm_prune.models.loading import LoadedModel


DEFAULT_SAMPLES = 128


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Which text calibrates and which text judges.

    Args:
        data: calibration text: "embedded", a file, a folder or a Hub id.
        eval_data: text to evaluate on. By default the held-out part of the same source: its validation split, or the
            last tenth of a local file, which then does not calibrate.
        eval_split: of a Hub id to evaluate on: "validation" or "test".
        documents: of the calibration text that are read; None for all. A Hub id is then read no further.
        samples: calibration sequences, drawn by `seed`; None for as many as the work at hand asks for.
        eval_samples: evaluation sequences, drawn by `seed`; None for all of the text.
        length: tokens of a sequence; the model's context by default, at most 2048.
        packing: "documents" (one a sequence), "windows" (contiguous), "segments" (as
            published code of GPTQ and Wanda), or "auto"; see `data.sequences.pack`.

    Raises:
        UserError: a number is out of range, or there is no such packing.
    """

    data: str = EMBEDDED
    eval_data: str | None = None
    eval_split: str = "validation"
    documents: int | None = None
    samples: int | None = None
    eval_samples: int | None = None
    length: int | None = None
    packing: Packing = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        parse_packing(self.packing)
        if self.eval_split not in ("validation", "test"):
            raise UserError(f"eval_split must be validation or test, not '{self.eval_split}'")
        for name, number, least in (
            ("documents", self.documents, 1),
            ("samples", self.samples, 1),
            ("eval_samples", self.eval_samples, 1),
            ("length", self.length, 2),
        ):
            if number is not None and number < least:
                raise UserError(f"{name} must be at least {least}, not {number}")


def parse_packing(text: str) -> Packing:
    """The packing of this name.

    Raises:
        UserError: there is no such packing.
    """
    for packing in get_args(Packing):
        if text == packing:
            return cast(Packing, packing)
    raise UserError(f"packing must be {' or '.join(', '.join(get_args(Packing)).rsplit(', ', 1))}, not '{text}'")


class Texts:
    """Both texts of a run, read once and packed for the model's tokenizer and context.

    Raises:
        UserError: a text cannot be used, or the length is beyond the model's context.
    """

    def __init__(self, settings: TextSettings, loaded: LoadedModel) -> None:
        self._settings, self._loaded = settings, loaded
        self._length = _length(settings, loaded.model.config)
        self._calibrating, self._judging = _corpora(settings)
        self._packed: dict[int, Sequences] = {}
        self.evaluation = _pack_judging(self._judging, settings, self._length, loaded)

    def calibration(self, samples: int = DEFAULT_SAMPLES) -> Sequences:
        """The calibration text: so many sequences, unless the settings name another number.

        Raises:
            UserError: the text is shorter than one sequence.
        """
        samples = self._settings.samples or samples
        if samples not in self._packed:
            self._packed[samples] = _pack(self._calibrating, self._settings, self._length, self._loaded, samples)
        return self._packed[samples]

    def records(self, samples: int = DEFAULT_SAMPLES) -> dict[str, TextRecord]:
        """What both texts were, by their role; `samples` as for `calibration`."""
        return {
            "calibration": TextRecord.of(self._calibrating, self.calibration(samples)),
            "evaluation": TextRecord.of(self._judging, self.evaluation),
        }


def read_judging_text(settings: TextSettings, loaded: LoadedModel) -> Sequences:
    """The evaluation text alone: all of a local file, the held-out part of other sources.

    Raises:
        UserError: the text cannot be used, or the length is beyond the model's context.
    """
    length = _length(settings, loaded.model.config)
    corpus = read_corpus(settings.eval_data or settings.data, split=settings.eval_split)
    return _pack_judging(corpus, settings, length, loaded)


def _pack_judging(corpus: Corpus, settings: TextSettings, length: int, loaded: LoadedModel) -> Sequences:
    return _pack(corpus, settings, length, loaded, settings.eval_samples)


def _pack(corpus: Corpus, settings: TextSettings, length: int, loaded: LoadedModel, samples: int | None) -> Sequences:
    text = pack(corpus, loaded.tokenizer, length=length, packing=settings.packing, samples=samples, seed=settings.seed)
    check_ids(loaded.source, (row.ids for row in text.rows), loaded.model)
    return text


def _corpora(settings: TextSettings) -> tuple[Corpus, Corpus]:
    if settings.eval_data is not None:
        return _calibrating(settings), read_corpus(settings.eval_data, split=settings.eval_split)
    # A folder that happens to be called "embedded" is not meant by the name.
    if settings.data != EMBEDDED and Path(settings.data).expanduser().exists():
        return hold_out(_calibrating(settings))
    return _calibrating(settings), read_corpus(settings.data, split=settings.eval_split)


def _calibrating(settings: TextSettings) -> Corpus:
    return read_corpus(settings.data, limit=settings.documents)


def _length(settings: TextSettings, config: Any) -> int:
    if settings.length is None:
        return default_length(config)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and settings.length > context:
        raise UserError(f"length {settings.length} is beyond the model's context of {context} tokens")
    return settings.length
