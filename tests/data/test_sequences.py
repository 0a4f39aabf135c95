from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import GPT2Config, LlamaConfig, OPTConfig, PreTrainedTokenizerFast

from admm_prune.data.sequences import Batch, Sequences, pack
from admm_prune.data.sources import Corpus
from admm_prune.errors import UserError
from admm_prune.models.families import sequence_length

Tokenizers = tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]
DOCUMENTS = ("the cat sat on the mat", "to be", "a naïve café – 漢字", "the dog and the cat sat on the mat or not")


@pytest.fixture(scope="module")
def tokenizers(tokenizer: PreTrainedTokenizerFast, tokenizer_without_bos: PreTrainedTokenizerFast) -> Tokenizers:
    return tokenizer, tokenizer_without_bos


def encoded(tokenizer: PreTrainedTokenizerFast, documents: tuple[str, ...]) -> list[list[int]]:
    return [tokenizer.encode(document, add_special_tokens=False, verbose=False) for document in documents]


def scored(sequences: Sequences) -> list[int]:
    return [token for batch in sequences.batches for token in batch.input_ids[batch.scored].tolist()]


def test_documents_begin_with_bos_and_are_cut_at_the_length(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encoded(tokenizer, DOCUMENTS)
    sequences = pack(Corpus("x", DOCUMENTS), tokenizer, length=8, packing="documents")
    assert sorted(row.ids.tolist() for row in sequences.rows) == sorted([0, *document][:8] for document in ids)
    assert sequences.truncated_tokens == sum(max(0, len(document) - 7) for document in ids) > 0
    assert sequences.tokens == sum(len(document[:7]) + 1 for document in ids)
    assert sequences.scored_tokens == sum(len(document[:7]) for document in ids)


def test_characters_of_cut_documents_are_those_of_the_text_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    document = DOCUMENTS[0]
    ids = encoded(tokenizer, (document,))[0]
    for kept in range(1, len(ids) + 1):
        sequences = pack(Corpus("x", (document,)), tokenizer, length=kept + 1, packing="documents")
        assert sequences.characters == len(tokenizer.decode(ids[:kept]))


def test_a_character_is_counted_once_though_several_tokens_spell_it(tokenizer: PreTrainedTokenizerFast) -> None:
    snowman = Corpus("x", ("☃☃",))  # three byte tokens each
    counts = [pack(snowman, tokenizer, length=length, packing="documents").characters for length in range(2, 8)]
    assert counts == [0, 0, 1, 1, 1, 2]


@given(
    documents=st.lists(st.text(alphabet="the cat☃é\n", min_size=1), min_size=1, max_size=5),
    length=st.integers(2, 12),
    bos=st.booleans(),
)
def test_windows_score_every_token_and_character_once(
    tokenizers: Tokenizers, documents: list[str], length: int, bos: bool
) -> None:
    tokenizer = tokenizers[0 if bos else 1]
    stream = [token for document in encoded(tokenizer, tuple(documents)) for token in document]
    corpus = Corpus("x", tuple(documents))
    if len(stream) < 2 and not bos:
        with pytest.raises(UserError, match="no document has a token to score"):
            pack(corpus, tokenizer, length=length, packing="windows")
        return
    sequences = pack(corpus, tokenizer, length=length, packing="windows")
    expected = stream if bos else stream[1:]
    assert sorted(scored(sequences)) == sorted(expected)
    assert sequences.scored_tokens == len(expected)
    assert all(len(row.ids) <= length for row in sequences.rows)
    assert sequences.characters <= corpus.characters
    if bos:
        assert sequences.characters == corpus.characters


def test_windows_are_contiguous_and_their_shared_token_is_given(tokenizers: Tokenizers) -> None:
    with_bos, without = tokenizers
    corpus = Corpus("x", DOCUMENTS[:2])
    first, second = encoded(with_bos, corpus.documents)
    stream = [*first, 0, *second]
    rows = [row.ids.tolist() for row in pack(corpus, with_bos, length=5, packing="windows").rows]
    windows = [[0, *stream[i : i + 4]] for i in range(0, len(stream), 4)]
    assert rows == sorted(windows, key=len)
    stream = [*first, *second]
    rows = [row.ids.tolist() for row in pack(corpus, without, length=5, packing="windows").rows]
    assert rows == sorted((stream[i : i + 5] for i in range(0, len(stream) - 1, 4)), key=len)


def test_auto_takes_documents_where_they_fit(tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = Corpus("x", DOCUMENTS)
    mean = sum(len(ids) + 1 for ids in encoded(tokenizer, DOCUMENTS)) / len(DOCUMENTS)
    assert pack(corpus, tokenizer, length=int(mean) + 1).packing == "documents"
    assert pack(corpus, tokenizer, length=int(mean) - 1).packing == "windows"


def test_samples_are_drawn_without_replacement_by_the_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = Corpus("x", tuple(f"the cat number {i}" for i in range(40)))
    for packing in ("documents", "windows"):
        draws = [pack(corpus, tokenizer, length=12, packing=packing, samples=9, seed=s) for s in (0, 0, 1)]  # type: ignore[arg-type]
        assert draws[0].token_hash == draws[1].token_hash != draws[2].token_hash
        assert len(draws[0].rows) == 9
        everything = pack(corpus, tokenizer, length=12, packing=packing, samples=10_000)  # type: ignore[arg-type]
        available = [tuple(row.ids.tolist()) for row in everything.rows]
        drawn = [tuple(row.ids.tolist()) for row in draws[0].rows]
        assert all(drawn.count(row) <= available.count(row) for row in drawn)
    assert {len(row.ids) for row in everything.rows} == {12}
    assert everything.dropped_sequences == 1
    assert len(set(drawn)) == 9


def test_text_that_spells_bos_stays_text_and_is_scored(tokenizer: PreTrainedTokenizerFast) -> None:
    sequences = pack(Corpus("x", ("a <s> b",)), tokenizer, length=32, packing="documents")
    assert sequences.rows[0].ids.tolist().count(0) == 1
    assert tokenizer.decode(scored(sequences)) == "a <s> b"


def test_documents_with_nothing_to_score_are_dropped_and_counted(
    tokenizer_without_bos: PreTrainedTokenizerFast,
) -> None:
    sequences = pack(Corpus("x", ("t", "the cat sat")), tokenizer_without_bos, length=32, packing="documents")
    assert len(sequences.rows) == 1
    assert sequences.dropped_sequences == 1
    assert sequences.characters == len(" cat sat")


def test_batches_pad_on_the_right() -> None:
    batch = Batch(torch.tensor([[7, 5, 0, 0], [7, 5, 7, 4]]), torch.tensor([2, 4]), bos=7)
    assert batch.mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.scored.tolist() == [[False, True, False, False], [False, True, False, True]]


def test_batches_hold_all_rows_in_the_order_of_their_lengths(tokenizer: PreTrainedTokenizerFast) -> None:
    sequences = pack(Corpus("x", DOCUMENTS), tokenizer, length=64, packing="documents", batch_size=3)
    lengths = torch.cat([batch.lengths for batch in sequences.batches]).tolist()
    assert [len(batch.lengths) for batch in sequences.batches] == [3, 1]
    assert lengths == sorted(len(ids) + 1 for ids in encoded(tokenizer, DOCUMENTS))
    assert sum(int(batch.mask.sum()) for batch in sequences.batches) == sequences.tokens


@given(count=st.integers(1, 30), fraction=st.floats(0.0, 1.0))
def test_split_parts_whole_sequences(tokenizers: Tokenizers, count: int, fraction: float) -> None:
    corpus = Corpus("x", tuple("the cat " * (i + 1) for i in range(count)))
    sequences = pack(corpus, tokenizers[0], length=512, packing="documents")
    first, second = sequences.split(fraction)
    assert sorted(len(row.ids) for part in (first, second) for row in part.rows) == [len(r.ids) for r in sequences.rows]
    assert first.rows
    assert first.characters + second.characters == sequences.characters
    assert len(second.rows) == (0 if count == 1 else min(max(1, round(fraction * count)), count - 1))


def test_split_takes_short_and_long_sequences_alike(tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = Corpus("x", tuple("t" * (i + 1) for i in range(100)))
    _, second = pack(corpus, tokenizer, length=512, packing="documents").split(0.1)
    assert [len(row.ids) for row in second.rows] == [int(10 * (i + 0.5)) + 2 for i in range(10)]


@pytest.mark.parametrize("packing", ["auto", "documents", "windows"])
def test_a_sample_needs_the_text_of_one_sequence(tokenizer: PreTrainedTokenizerFast, packing: str) -> None:
    tokens = len(encoded(tokenizer, DOCUMENTS[:1])[0]) + 1
    pack(Corpus("x", DOCUMENTS[:1]), tokenizer, length=tokens, packing=packing, samples=1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"shorter than one sequence \({tokens} tokens found, {tokens + 1} needed\)"):
        pack(Corpus("x", DOCUMENTS[:1]), tokenizer, length=tokens + 1, packing=packing, samples=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", ["documents", "windows"])
def test_text_the_tokenizer_does_not_know_is_refused(packing: str) -> None:
    letters = Tokenizer(models.BPE(vocab={"a": 0, "<s>": 1}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>")
    with pytest.raises(UserError, match="no document has a token to score"):
        pack(Corpus("x", ("☃☃", "☃")), tokenizer, length=8, packing=packing)  # type: ignore[arg-type]
    known = pack(Corpus("x", ("☃", "aa", "☃")), tokenizer, length=8, packing=packing)  # type: ignore[arg-type]
    assert [row.ids.tolist() for row in known.rows] == [[1, 0, 0]]


def test_numbers_out_of_range_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="length of at least 2"):
        pack(Corpus("x", DOCUMENTS), tokenizer, length=1)
    with pytest.raises(UserError, match="at least 1"):
        pack(Corpus("x", DOCUMENTS), tokenizer, length=8, samples=0)


def test_long_texts_raise_no_warning(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    pack(Corpus("x", ("the cat " * 100,)), tokenizer, length=8)
    assert not caplog.records


def test_default_length_is_the_context_or_2048() -> None:
    assert sequence_length(LlamaConfig(max_position_embeddings=131072)) == 2048
    assert sequence_length(OPTConfig(max_position_embeddings=512)) == 512
    assert sequence_length(GPT2Config(n_positions=64)) == 64


def test_segments_are_those_of_published_code(tokenizers: Tokenizers) -> None:
    """enc = tokenizer("\\n\\n".join(texts)); segment i = enc[i * L : (i + 1) * L], the rest dropped."""
    for tokenizer in tokenizers:
        whole = tokenizer("\n\n".join(DOCUMENTS), verbose=False)["input_ids"]
        sequences = pack(Corpus("x", DOCUMENTS), tokenizer, length=6, packing="segments")
        expected = [whole[i * 6 : (i + 1) * 6] for i in range(len(whole) // 6)]
        assert sorted(row.ids.tolist() for row in sequences.rows) == sorted(expected)
        assert sequences.scored_tokens == 5 * len(expected)
        assert sequences.dropped_sequences == (1 if len(whole) % 6 else 0)
        assert sequences.characters < len("\n\n".join(DOCUMENTS))


def test_segments_of_a_text_that_is_too_short_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="no document has a token to score"):
        pack(Corpus("x", ("a",)), tokenizer, length=64, packing="segments")
