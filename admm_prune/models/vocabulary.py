"""Whether a model has an embedding for every token id of its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from admm_prune.errors import UserError


def check_vocabulary(source: str, tokenizer: Any, model: Any) -> None:
    """Refuses a tokenizer whose vocabulary has ids for which the model has no embedding.

    Tokens added to it later, such as a padding token, may lie beyond: `check_ids` looks whether a text has any.

    Raises:
        UserError: the message has both numbers.
    """
    rows = embedding_rows(model)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    begin = getattr(tokenizer, "bos_token_id", None) or 0  # which sequences begin with
    highest = max((number for number in tokenizer.get_vocab().values() if number not in added), default=0)
    highest = max(highest, begin)
    if rows is not None and highest >= rows:
        raise UserError(_beyond(source, highest + 1, rows))


def check_ids(source: str, ids: Iterable[Tensor], model: Any) -> None:
    """Refuses a tokenized text with ids for which the model has no embedding.

    Raises:
        UserError: the message has both numbers.
    """
    rows = embedding_rows(model)
    highest = max((int(tokens.max()) for tokens in ids if tokens.numel()), default=0)
    if rows is not None and highest >= rows:
        raise UserError(_beyond(source, highest + 1, rows))


def _beyond(source: str, ids: int, rows: int) -> str:
    return (
        f"{source}: its tokenizer has {ids} token ids, but the model has embeddings for {rows}: take the tokenizer "
        "that the model was trained with"
    )


def embedding_rows(model: Any) -> int | None:
    """For how many token ids a model has an embedding; None where it does not say which module that is."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None
    return None if weight is None else int(weight.shape[0])
