"""A model judged: its figures on a text, and how it goes on after the text's beginning."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from admm_prune.data.sequences import Sequences
from admm_prune.methods.base import Request
from admm_prune.models.activation_store import Shelf
from admm_prune.models.evaluate import Evaluation, continued, evaluate
from admm_prune.models.loading import LoadedModel

_PROMPT, _CONTINUED = 24, 24  # tokens


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a model is held against, or held up to.

    Attributes:
        text: that it was judged on.
        prompt: the beginning of the text.
        continuation: what the model writes after it, greedily. Both are empty where the model is not in memory, because
            every token that is written takes all weights.
    """

    text: Sequences
    figures: Evaluation
    prompt: str
    continuation: str

    def beside(self, pruned: Judgement) -> dict[str, str]:
        """The prompt, and both continuations; empty where there are none."""
        written = {"prompt": self.prompt, "dense": self.continuation, "pruned": pruned.continuation}
        return written if self.prompt else {}


def judged(loaded: LoadedModel, text: Sequences, request: Request) -> Judgement:
    """A model as it is now, wherever its weights are."""
    prompt, continuation = ("", "") if loaded.residence.hollow else beginning_continued(loaded, text)
    shelf = Shelf(request.activation_bytes, request.journal.scratch())
    figures = evaluate(loaded.model, text, loaded.residence, shelf, request.world)
    return Judgement(text=text, figures=figures, prompt=prompt, continuation=continuation)


def beginning_continued(loaded: LoadedModel, text: Sequences) -> tuple[str, str]:
    """The beginning of a text, and how a model in memory continues it greedily."""
    ids = text.rows[0].ids[:_PROMPT]
    continuation = continued(loaded.model, ids, _CONTINUED)
    return str(loaded.tokenizer.decode(ids)), str(loaded.tokenizer.decode(continuation))


def judged_dense(loaded: LoadedModel, text: Sequences, request: Request) -> Judgement:
    """A model before it is pruned, from the request's journal where that has it."""

    def judge() -> dict[str, object]:
        found = judged(loaded, text, request)
        return {"figures": asdict(found.figures), "prompt": found.prompt, "continuation": found.continuation}

    found = request.journal.once("dense", judge)
    return Judgement(
        text=text,
        figures=Evaluation(**found["figures"]),
        prompt=found["prompt"],
        continuation=found["continuation"],
    )
