"""Which text calibrates a run and which text judges it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from admm_prune.data.sequences import Packing, Sequences, default_length, pack
from admm_prune.data.sources import EMBEDDED, Corpus, read_corpus
from admm_prune.data.splits import hold_out
from admm_prune.errors import UserError
from admm_prune.runs.manifest import TextRecord

if TYPE_CHECKING:
    from admm_prune.models.loading import LoadedModel


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Which text calibrates and which text judges.

    Args:
        data: calibration text: "embedded", a file, a folder or a Hub id.
        eval_data: text to evaluate on. By default the held-out part of the same source: its validation split, or the
            last tenth of a local file, which then does not calibrate.
        samples: calibration sequences, drawn by `seed`.
        eval_samples: evaluation sequences, drawn by `seed`; None for all of the text.
        length: tokens of a sequence; the model's context by default, at most 2048.
        packing: "documents" (one a sequence), "windows" (contiguous), or "auto".

    Raises:
        UserError: a number is out of range, or there is no such packing.
    """

    data: str = EMBEDDED
    eval_data: str | None = None
    samples: int = 128
    eval_samples: int | None = None
    length: int | None = None
    packing: Packing = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.packing not in get_args(Packing):
            raise UserError(f"packing must be auto, documents or windows, not '{self.packing}'")
        for name, number, least in (
            ("samples", self.samples, 1),
            ("eval_samples", self.eval_samples, 1),
            ("length", self.length, 2),
        ):
            if number is not None and number < least:
                raise UserError(f"{name} must be at least {least}, not {number}")


@dataclass(frozen=True)
class Texts:
    """Both texts, packed for one tokenizer."""

    calibration: Sequences
    evaluation: Sequences
    records: dict[str, TextRecord]


def read_texts(settings: TextSettings, loaded: LoadedModel) -> Texts:
    """Reads and packs both texts for the model's tokenizer and context.

    Raises:
        UserError: a text cannot be used, or the length is beyond the model's context.
    """
    length = _length(settings, loaded.model.config)
    calibration, judging = _corpora(settings)
    calibration_sequences = pack(
        calibration,
        loaded.tokenizer,
        length=length,
        packing=settings.packing,
        samples=settings.samples,
        seed=settings.seed,
    )
    evaluation_sequences = _pack_judging(judging, settings, length, loaded)
    return Texts(
        calibration_sequences,
        evaluation_sequences,
        {
            "calibration": TextRecord.of(calibration, calibration_sequences),
            "evaluation": TextRecord.of(judging, evaluation_sequences),
        },
    )


def read_judging_text(settings: TextSettings, loaded: LoadedModel) -> Sequences:
    """The evaluation text alone: all of a local file, the held-out part of other sources.

    Raises:
        UserError: the text cannot be used, or the length is beyond the model's context.
    """
    length = _length(settings, loaded.model.config)
    corpus = read_corpus(settings.eval_data or settings.data, split="validation")
    return _pack_judging(corpus, settings, length, loaded)


def _pack_judging(corpus: Corpus, settings: TextSettings, length: int, loaded: LoadedModel) -> Sequences:
    return pack(
        corpus,
        loaded.tokenizer,
        length=length,
        packing=settings.packing,
        samples=settings.eval_samples,
        seed=settings.seed,
    )


def _corpora(settings: TextSettings) -> tuple[Corpus, Corpus]:
    if settings.eval_data is not None:
        return read_corpus(settings.data), read_corpus(settings.eval_data, split="validation")
    # A folder that happens to be called "embedded" is not meant by the name.
    if settings.data != EMBEDDED and Path(settings.data).expanduser().exists():
        return hold_out(read_corpus(settings.data))
    return read_corpus(settings.data), read_corpus(settings.data, split="validation")


def _length(settings: TextSettings, config: Any) -> int:
    if settings.length is None:
        return default_length(config)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and settings.length > context:
        raise UserError(f"length {settings.length} is beyond the model's context of {context} tokens")
    return settings.length
