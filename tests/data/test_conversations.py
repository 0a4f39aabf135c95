"""Conversations become text by the tokenizer's chat template, and its special tokens are tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from admm_prune.data.conversations import ChatText, conversation_of
from admm_prune.data.sequences import pack
from admm_prune.data.sources import Corpus, hold_out, read_corpus
from admm_prune.errors import UserError

MESSAGES = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}]
RENDERED = "<|user|>the cat<|end|><|assistant|>sat on<|end|>"
SHAREGPT = [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat on"}]


ROWS: dict[str, tuple[dict[str, Any], str | None]] = {
    "messages": ({"messages": MESSAGES, "prompt": "the cat", "id": "a"}, "messages"),
    "ShareGPT": ({"conversations": SHAREGPT}, "conversations"),
    "under text": ({"text": MESSAGES}, None),
    "under another name": ({"turns": MESSAGES, "n": 3}, "turns"),
    "in parts": ({"text": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]}, None),
    "with other keys": ({"text": [{**m, "name": None} for m in MESSAGES]}, None),
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "saved"])
def test_conversations_go_through_the_template(
    tmp_path: Path, chatting: PreTrainedTokenizerFast, case: str, kind: str
) -> None:
    row, noted = ROWS[case]
    path = tmp_path / f"a.{kind}"
    if kind == "saved":
        datasets.Dataset.from_list([row]).save_to_disk(path)
    else:
        path.write_text(json.dumps(row if kind == "jsonl" else [row]))
    corpus = read_corpus(str(path), tokenizer=chatting)
    assert corpus.documents == (RENDERED,)
    assert len(corpus.notes) == (noted is not None)


def test_special_tokens_of_a_template_are_tokens_and_those_of_plain_text_are_not(
    chatting: PreTrainedTokenizerFast,
) -> None:
    end = chatting.convert_tokens_to_ids("<|end|>")
    documents = (ChatText(RENDERED), "plain <|end|>", ChatText(RENDERED))
    rows = pack(Corpus("x", documents), chatting, length=64, packing="documents").rows
    assert sorted(row.ids.tolist().count(end) for row in rows) == [0, 2, 2]
    assert all(row.ids.tolist().count(chatting.bos_token_id) == 1 for row in rows)
    assert sorted(row.characters for row in rows) == sorted(map(len, documents))
    (segment,) = pack(Corpus("x", documents[:1]), chatting, length=8, packing="segments").rows
    assert end in segment.ids
    one = Corpus("x", (ChatText(RENDERED * 9),))
    assert all(isinstance(part.documents[0], ChatText) for part in hold_out(one))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([{"role": "system", "content": "a"}], "refuses the conversation (no system role)"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a part of type 'image': only text can be read"),
        ([{"role": "user", "content": 3}], "a message holds int, not text"),
        ([{"role": "user"}], "holds list, not text"),
        ([{"role": "user", "content": "a"}, "b"], "holds list, not text"),
        ([{"role": 3, "content": "a"}], "holds list, not text"),
    ],
)
def test_conversations_that_cannot_be_written(
    tmp_path: Path, chatting: PreTrainedTokenizerFast, row: object, reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": MESSAGES}) + "\n" + json.dumps({"text": row}))
    with pytest.raises(UserError) as caught:
        read_corpus(str(path), tokenizer=chatting)
    assert str(caught.value).startswith(f"{path}: line 2: ")
    assert reason in str(caught.value)


def test_half_a_pair_in_a_conversation(tmp_path: Path, chatting: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"messages": [{"role": "user", "content": "\ud83d"}]}')
    assert read_corpus(str(path), tokenizer=chatting).documents == ("<|user|>\ufffd<|end|>",)


def test_without_a_template_the_messages_are_plain_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    parts = [
        *MESSAGES,
        {"role": "tool", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "mat"}]},
    ]
    path.write_text("".join(json.dumps({"messages": rows}) + "\n" for rows in (parts, MESSAGES)))
    for without in (None, tokenizer):
        corpus = read_corpus(str(path), tokenizer=without)
        assert corpus.documents == ("the cat\n\nsat on\n\nmat", "the cat\n\nsat on")
        assert not any(isinstance(document, ChatText) for document in corpus.documents)
        assert [
            note for note in corpus.notes if "line 1: column 'messages' is a conversation" in note and "1 more" in note
        ]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": [{"type": "image"}]}]}))
    with pytest.raises(UserError, match="only text can be read"):
        read_corpus(str(path), tokenizer=tokenizer)


def test_a_message_that_calls_a_tool_may_have_no_content() -> None:
    """As files for the API of OpenAI leave it out."""
    call = {"role": "assistant", "tool_calls": [{"type": "function"}]}
    assert conversation_of([MESSAGES[0], call]) == [MESSAGES[0], {**call, "content": None}]
    assert conversation_of([call]) is None
    assert conversation_of([MESSAGES[0], {"role": "assistant"}]) is None


def test_a_sequence_of_structures_is_a_conversation() -> None:
    assert conversation_of({"role": ["user", "assistant"], "content": ["the cat", "sat on"]}) == MESSAGES
    assert conversation_of({"from": ["human"], "value": ["the cat"]}) == MESSAGES[:1]
    for other in ({"role": ["user"], "content": []}, [], "text", {"a": [1]}, [[]], None):
        assert conversation_of(other) is None
