"""Text passed from Python: strings, data sets, rows, token ids in lists, tensors and batches."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, PreTrainedTokenizerFast

from admm_prune.data import objects
from admm_prune.data.objects import check_ids, corpus_of
from admm_prune.data.sequences import encode, pack
from admm_prune.data.sources import Corpus, hold_out
from admm_prune.errors import UserError

STORIES = ("the cat sat", "to be or not")
IDS = ((3, 4, 5), (6, 7, 8))
TENSOR = torch.tensor(IDS)
PADDED = {
    "input_ids": torch.tensor([[3, 4, 5, 0], [0, 6, 7, 8]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]),
}


class Tokens(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(TENSOR)


TEXTS: dict[str, Any] = {
    "a list": list(STORIES),
    "a tuple": STORIES,
    "a generator": (story for story in STORIES),
    "a series": pandas.Series(STORIES),
    "rows": [{"text": story, "n": 1} for story in STORIES],
    "a dataset": datasets.Dataset.from_dict({"text": STORIES, "n": [1, 2]}),
    "a dataset with tokens beside": datasets.Dataset.from_dict({"text": STORIES, "input_ids": IDS}),
    "another column": datasets.Dataset.from_dict({"story": STORIES, "n": [1, 2]}),
    "a streamed dataset": datasets.Dataset.from_dict({"text": STORIES}).to_iterable_dataset(),
    "a loader of strings": DataLoader(list(STORIES), batch_size=2),  # type: ignore[arg-type]
    "a loader of rows": DataLoader([{"text": story, "n": 1} for story in STORIES], batch_size=2),  # type: ignore[arg-type]
    "a loader of a dataset": DataLoader(datasets.Dataset.from_dict({"text": STORIES, "n": [1, 2]}), batch_size=2),  # type: ignore[arg-type]
    "splits": datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": STORIES})),
}
TOKENS: dict[str, Any] = {
    "a mask of truth values": PADDED | {"attention_mask": PADDED["attention_mask"].bool()},
    "a mask of fractions": PADDED | {"attention_mask": PADDED["attention_mask"].half()},
    "a mask of truth values in lists": [
        {"input_ids": [*IDS[0], 0], "attention_mask": [True, True, True, False]},
        {"input_ids": [0, *IDS[1]], "attention_mask": np.array([False, True, True, True])},
    ],
    "a streamed dataset after map": datasets.Dataset.from_dict({"text": STORIES})
    .to_iterable_dataset()
    .map(lambda row: {"input_ids": IDS[STORIES.index(row["text"])]}, remove_columns=["text"]),
    "lists": [list(ids) for ids in IDS],
    "a list of tensors": list(TENSOR),
    "arrays": [np.array(ids, dtype=np.uint16) for ids in IDS],
    "a matrix": TENSOR,
    "a matrix of numpy": TENSOR.numpy(),
    "batches": [TENSOR],
    "pairs of ids and labels": [(TENSOR, TENSOR)],
    "rows with ids": [{"input_ids": list(ids), "attention_mask": [1, 1, 1]} for ids in IDS],
    "padded batches": [PADDED],
    "a loader": DataLoader(TensorDataset(TENSOR), batch_size=2),
    "a loader of an iterable": DataLoader(Tokens(), batch_size=2),
    # Torch collates lists by position: three tensors of two ids, not two of three.
    "a loader of lists": DataLoader([list(ids) for ids in IDS], batch_size=2),  # type: ignore[arg-type]
    "a loader of rows of lists": DataLoader(
        [{"input_ids": list(ids), "attention_mask": [1] * 3} for ids in IDS], batch_size=2
    ),  # type: ignore[arg-type]
    "a loader of a dataset": DataLoader(datasets.Dataset.from_dict({"input_ids": IDS}), batch_size=2),  # type: ignore[arg-type]
    "a loader of single rows": DataLoader([{"input_ids": list(ids)} for ids in IDS], batch_size=1),  # type: ignore[arg-type]
    "what a tokenizer returns": BatchEncoding({"input_ids": [list(ids) for ids in IDS]}),
    "padded tensors of a tokenizer": BatchEncoding(PADDED),
    "empty lists between": [[], *map(list, IDS), []],
    "a batch with an empty list": [[[], *map(list, IDS)]],
    "a dataset": datasets.Dataset.from_dict({"input_ids": IDS, "labels": IDS}),
    "a dataset of tensors": datasets.Dataset.from_dict({"input_ids": IDS}).with_format("torch"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_text_is_taken(kind: str) -> None:
    corpus = corpus_of(TEXTS[kind])
    assert (corpus.name, corpus.documents) == ("<python object>", STORIES)
    assert corpus.fingerprint == Corpus("x", STORIES).fingerprint
    assert len(corpus.notes) == (kind == "another column")


@pytest.mark.parametrize("kind", TOKENS)
def test_tokens_are_taken(kind: str) -> None:
    corpus = corpus_of(TOKENS[kind])
    assert corpus == Corpus("<python object>", IDS)
    assert corpus.fingerprint not in {Corpus("x", tuple(map(str, IDS))).fingerprint, Corpus("x", IDS[:1]).fingerprint}
    assert corpus_of([list(ids) for ids in IDS], limit=1).documents == IDS[:1]


WRONG: dict[str, tuple[Any, str]] = {
    "a number": (3, "data cannot be read from int: give "),
    "bytes": (b"text", "cannot be read from bytes"),
    "a set": ({"a"}, "cannot be read from set"),
    "a mapping": ({"text": ["a"]}, "cannot be read from dict"),
    "a data frame": (pandas.DataFrame({"text": STORIES}), "cannot be read from DataFrame"),
    "a file": (io.StringIO("text"), "cannot be read from StringIO"),
    "an empty list": ([], "the text is empty"),
    "blanks": (["", " "], "the text is empty"),
    "lists without tokens": ([[], []], "the text is empty"),
    "numbers": ([1, 2], "item 1 is int, neither text nor tokens"),
    "fractions": ([[1.0, 2.0]], "item 1 is list, neither"),
    "a matrix of fractions": (torch.zeros(2, 3), "item 1 is Tensor, neither"),
    "truth values": ([[True, False]], "item 1 is list, neither"),
    "nothing": ([None], "the text is empty"),
    "nothing after text": (["a", None], "item 2 is NoneType"),
    "text and tokens": (["a", [1, 2]], "text and tokens are mixed"),
    "text after rows": ([{"text": "a"}, 3], "item 2 is not a JSON object with the key 'text'"),
    "a mask of another shape": ([{"input_ids": [1, 2], "attention_mask": [[1], [1]]}], "neither text nor tokens"),
    "a mask that is none": ([{"input_ids": [1, 2], "attention_mask": "11"}], "neither text nor tokens"),
    "a mask without its name": ([tuple(PADDED.values())], "neither text nor tokens"),
    "two columns": (datasets.Dataset.from_dict({"a": STORIES, "b": STORIES}), "no column 'text'; found a, b"),
    "no such split": (datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": STORIES})), "no split 'train'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_neither_is_refused_in_one_line(kind: str) -> None:
    data, reason = WRONG[kind]
    with pytest.raises(UserError) as caught:
        corpus_of(data)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_of_words_are_no_batches() -> None:
    row = {"input_ids": list(IDS[0]), "tokens": ["the", "cat", "sat"]}
    assert corpus_of([row]).documents == IDS[:1]
    for words in ([["the", "cat"]], [{"words": ["the", "cat"]}]):
        with pytest.raises(UserError):
            corpus_of(words)


def test_what_has_no_end_is_taken_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "HUB_DOCUMENTS", 5)
    endless = corpus_of(iter(lambda: "again", None))
    assert endless.documents == ("again",) * 5
    assert endless.notes == ("<python object>: the first 5 documents are taken (documents= sets another number)",)
    assert len(corpus_of(["again"] * 9).documents) == 9
    assert len(corpus_of(iter(lambda: "again", None), limit=2).documents) == 2


def test_tokens_beyond_the_model_are_refused() -> None:
    check_ids(Corpus("x", IDS), 9)
    with pytest.raises(UserError, match="x: document 2 contains the token 8: the model has 0 to 7"):
        check_ids(Corpus("x", IDS), 8)
    with pytest.raises(UserError, match="document 1 contains the token -100"):
        check_ids(Corpus("x", ((-100, 2),)), 8)


@pytest.mark.parametrize("packing", ["documents", "windows", "segments"])
def test_tokens_are_packed_as_the_text_they_spell(tokenizer: PreTrainedTokenizerFast, packing: Any) -> None:
    texts = ("the cat sat on the mat", "a naïve café – 漢字", "☃☃")
    ids = tuple(tuple(document.ids.tolist()) for document in encode(texts, tokenizer))
    with_bos = tuple((0, *document) for document in ids)
    texts = texts if packing != "segments" else texts[:1]  # text has blank lines between documents, tokens have none
    expected = pack(Corpus("x", texts), tokenizer, length=4, packing=packing)
    for given_ids in (ids, with_bos):
        found = pack(Corpus("x", given_ids[: len(texts)]), tokenizer, length=4, packing=packing)
        assert found.token_hash == expected.token_hash
        assert abs(found.characters - expected.characters) <= len(texts), "a character may be cut between tokens"


@given(st.text(alphabet="the cat ☃é漢\n", min_size=1, max_size=40))
def test_characters_of_tokens_add_up_to_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    (expected,) = encode([text], tokenizer)
    (found,) = encode([tuple(expected.ids.tolist())], tokenizer)
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.bounds[0] == 0
    assert found.bounds[-1] == len(text)
    assert found.bounds.diff().min() >= 0


@pytest.mark.parametrize("packing", ["documents", "windows", "segments"])
def test_characters_of_a_begin_within_a_text_are_not_counted(tokenizer: PreTrainedTokenizerFast, packing: Any) -> None:
    """It is given, not scored: bits per character would divide by three characters too many."""
    one, other = (tuple(document.ids.tolist()) for document in encode(("the cat", "a mat"), tokenizer))
    whole = (*one, 0, 0, *other)  # "<s>" twice
    given = packing == "segments"  # the first token of a segment, here without a BOS before it
    found = pack(Corpus("x", (whole,)), tokenizer, length=len(whole) + (not given), packing=packing)
    assert found.scored_tokens == len(one + other) - given
    assert found.characters == len("the cat" + "a mat") - given * len(tokenizer.decode(one[:1]))


def test_a_text_of_one_token_holds_nothing_out(tokenizer: PreTrainedTokenizerFast) -> None:
    _, last = hold_out(corpus_of([[5]]))
    with pytest.raises(UserError, match="no document has a token to score"):
        pack(last, tokenizer, length=8)


def test_tokens_are_held_out_by_documents_or_within_one() -> None:
    first, last = hold_out(Corpus("x", tuple((i, i) for i in range(20))))
    assert (len(first.documents), len(last.documents)) == (18, 2)
    first, last = hold_out(Corpus("x", (tuple(range(20)),), ("a note",)))
    assert (first.documents, last.documents) == ((tuple(range(18)),), ((18, 19),))
    assert first.notes == last.notes == ("a note",)
