"""A saved model judged on a text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from admm_prune.models import evaluate as evaluation
from admm_prune.models.evaluate import Evaluation
from admm_prune.models.loading import load
from admm_prune.models.structure import decoder_blocks
from admm_prune.runs.device import check_dtype, pick_device
from admm_prune.runs.texts import TextSettings, read_judging_text


@dataclass(frozen=True)
class Judgement:
    """How well a model predicts the text, and the share of zeros in its block matrices."""

    figures: Evaluation
    sparsity: float

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self.figures), "sparsity": self.sparsity}


def evaluate_model(
    model: str,
    text: TextSettings,
    *,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Judgement:
    """Loads a model and evaluates it on the evaluation text of `text`.

    Args:
        trust_remote_code: run code that comes with the model; never done otherwise.

    Raises:
        UserError: the model, the text, the device or the dtype cannot be used.
    """
    place = pick_device(device)
    check_dtype(dtype)
    loaded = load(model, device=place, dtype=dtype, trust_remote_code=trust_remote_code)
    sparsity = evaluation.sparsity(decoder_blocks(loaded.model))
    return Judgement(evaluation.evaluate(loaded.model, read_judging_text(text, loaded)), sparsity)
