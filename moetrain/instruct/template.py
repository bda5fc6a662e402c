"""A conversation as text, and which of it a model learns to say.

row        {"prompt": …, "response": …}, or {"messages": [{"role": "user", "content": …}, …]}
template   a text for each role, with {content} where the message goes
counted    what the assistant says, with what the template puts after it, and the end of the text
"""

from __future__ import annotations

import json
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

    There are none where all that the assistant says is empty.

    Args:
        where: begins the message of an error.

    Raises:
        DataError: the row is no conversation, a role is not in the template, or nothing is said by the assistant.
    """
    parts: list[Part] = []
    messages = _messages(row, where=where)
    for role, content in messages:
        if role not in template:
            raise DataError(f"{where} has the role {role!r}, but the template has {', '.join(template)}: add it")
        before, _, after = template[role].partition(CONTENT)
        is_learnt = role == ASSISTANT
        parts += [Part(before, False), Part(content + after, is_learnt)]
    said = [content for role, content in messages if role == ASSISTANT]
    if not said:
        raise DataError(f"{where} has no message of the {ASSISTANT}, so there is nothing to learn: leave the row out")
    return [part for part in parts if part.text] if any(map(str.strip, said)) else []


def chat_template(template: Mapping[str, str]) -> str:
    """The template in Jinja, as tokenizers of `transformers` hold one: conversations that begin and end with the token
    that ends a text, or go on to where the assistant speaks (``add_generation_prompt``)."""
    branches = []
    for role, text in template.items():
        before, _, after = text.partition(CONTENT)
        spoken = f"{{{{ {_quoted(before)} + message['content'] + {_quoted(after)} }}}}"
        branches.append(f"if message['role'] == {_quoted(role)} %}}{spoken}")
    told = _quoted(f"the template has no such role; it has {', '.join(template)}")
    opening = _quoted(template[ASSISTANT].partition(CONTENT)[0])
    return (
        "{{ bos_token }}{% for message in messages %}{% "
        + "{% el".join(branches)
        + f"{{% else %}}{{{{ raise_exception({told}) }}}}{{% endif %}}{{% endfor %}}"
        + f"{{% if add_generation_prompt %}}{{{{ {opening} }}}}{{% else %}}{{{{ eos_token }}}}{{% endif %}}"
    )


def _quoted(text: str) -> str:
    # Jinja reads the escapes of Python: JSON's are among them, but for halves of a pair
    return json.dumps(text, ensure_ascii=False)


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
