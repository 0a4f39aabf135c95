"""Conversations of chat datasets as text: by the model's chat template, or as plain text without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from admm_prune.data.hub import first_line
from admm_prune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEYS = (("role", "content"), ("from", "value"))  # of the OpenAI form, and of ShareGPT's
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}  # of ShareGPT
_CALLS = {"tool_calls", "function_call"}  # of the OpenAI form

Message = dict[str, Any]


class ChatText(str):
    """A document that a chat template wrote: the special tokens that it spells are encoded as such."""

    __slots__ = ()


def conversation_of(value: object) -> list[Message] | None:
    """The messages of a conversation, as {"role": ..., "content": ...}; None if `value` is not one.

    Args:
        value: a list of {"role", "content"} or of {"from", "value"}; or a mapping of such keys to lists, as `datasets`
            gives for a sequence of structures. A message that calls a tool may have no content.
    """
    if isinstance(value, Mapping):
        for keys in _KEYS:
            if all(isinstance(value.get(key), list) for key in keys):
                names = [name for name, items in value.items() if isinstance(items, list)]
                if len({len(value[name]) for name in names}) != 1:
                    return None
                rows = zip(*(value[name] for name in names), strict=True)
                return conversation_of([dict(zip(names, row, strict=True)) for row in rows])
        return None
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        return None
    for role, content in _KEYS:
        if all(isinstance(message.get(role), str) for message in value) and _have_content(value, content):
            others = [{key: item for key, item in m.items() if key not in (role, content)} for m in value]
            return [
                {"role": _ROLES.get(message[role], message[role]), "content": message.get(content), **other}
                for message, other in zip(value, others, strict=True)
            ]
    return None


def _have_content(messages: list[Message], content: str) -> bool:
    without = [message for message in messages if content not in message]
    return len(without) < len(messages) and all(_CALLS & message.keys() for message in without)


def has_template(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """True for the tokenizer of a chat model."""
    return getattr(tokenizer, "chat_template", None) is not None


def untemplated(conversation: Sequence[Message], where: str) -> str:
    """The contents of the messages, in their order, with a blank line between them; roles are left out.

    Raises:
        UserError: a message holds something other than text.
    """
    contents = [_plain(message["content"], where) for message in conversation]
    return "\n\n".join(content for content in contents if content)


def templated(conversation: Sequence[Message], tokenizer: PreTrainedTokenizerBase, where: str) -> ChatText:
    """A conversation formatted with the tokenizer's chat template, without the BOS that packing adds.

    Raises:
        UserError: the template refuses the conversation, or a message holds something other than text.
    """
    messages: list[dict[str, Any]] = [
        {**message, "content": _plain(message["content"], where)} for message in conversation
    ]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program and can raise any error
        raise UserError(f"{where}: the model's chat template refuses the conversation ({first_line(error)})") from error
    if not isinstance(text, str):
        raise UserError(f"{where}: the model's chat template gives {type(text).__name__}, not text")
    bos = tokenizer.bos_token
    return ChatText(text.removeprefix(bos) if isinstance(bos, str) else text)


def _plain(content: object, where: str) -> str | None:
    """The text of a message's content, which may consist of parts; None is kept, as in a message with a tool call."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{where}: a message holds {type(content).__name__}, not text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(f"{where}: a message has a part of type {kind!r}: only text can be read")
        texts.append(text)
    return "\n".join(texts)
