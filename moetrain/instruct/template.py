"""A conversation as text, and which of it a model learns to say.

row        {"prompt": …, "response": …}, or {"messages": [{"role": "user", "content": …}, …]}
template   a text for each role, with {content} where the message goes
counted    what the assistant says, with what the template puts after it, and the end of the text
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetrain.errors import DataError

CONTENT = "{content}"
ASSISTANT = "assistant"
# one line break, not two: byte-level tokenizers take two at the end of a piece as one token, but two in the middle of a
# prompt that is written as a whole (`moetrain sample`, an exported model's chat template) as two
TEMPLATE = {
    "system": "{content}\n",
    "user": "### User:\n{content}\n",
    ASSISTANT: "### Assistant:\n{content}\n",
}
"""Where no other is given."""


@dataclass(frozen=True)
class Part:
    """A piece of a conversation."""

    text: str
    counted: bool  # whether the model learns to say it


def parts_of(row: Mapping[str, Any], *, template: Mapping[str, str], where: str) -> list[Part]:
    """A conversation in pieces, each tokenized by itself, so that no token crosses into what is learnt.

    Args:
        where: begins the message of an error.

    Raises:
        DataError: the row is no conversation, a role is not in the template, or nothing in it is learnt.
    """
    parts: list[Part] = []
    for role, content in _messages(row, where=where):
        if role not in template:
            raise DataError(f"{where} has the role {role!r}, but the template has {', '.join(template)}: add it")
        before, _, after = template[role].partition(CONTENT)
        is_learnt = role == ASSISTANT
        parts += [Part(before, False), Part(content + after, is_learnt)]
    if not any(part.counted and part.text for part in parts):
        raise DataError(f"{where} has no message of the {ASSISTANT}, so there is nothing to learn: leave the row out")
    return [part for part in parts if part.text]


def check_template(template: Mapping[str, str]) -> None:
    """Raises:
    DataError: a text has not exactly one place for the content, or the assistant has none.
    """
    for role, text in template.items():
        if text.count(CONTENT) != 1:
            raise DataError(f"data.template.{role} is {text!r}, but must have {CONTENT} in it once")
    if ASSISTANT not in template:
        raise DataError(f"data.template has no text for {ASSISTANT!r}, whose words are what is learnt: add one")


def _messages(row: Mapping[str, Any], *, where: str) -> Sequence[tuple[str, str]]:
    if isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        return [("user", row["prompt"]), (ASSISTANT, row["response"])]
    messages = row.get("messages")
    if isinstance(messages, list) and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
        for each in messages
    ):
        return [(each["role"], each["content"]) for each in messages]
    raise DataError(
        f"{where} is no conversation: write prompt and response, or messages with role and content, all of them texts"
    )
