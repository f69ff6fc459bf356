"""Messages to text through the model's own chat template."""

from __future__ import annotations

import json
from typing import Any

import jinja2

from lowbit.calibration.rows import Document, Message
from lowbit.calibration.tokenizer import Tokenizer

# Some templates write today's date. Calibration must hash the same tomorrow, or --resume would refuse to go on.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{%- if format == '%d %b %Y' -%}26 Jul 2024"
    "{%- else -%}2024-07-26{%- endif -%}{%- endmacro -%}"
)


class TemplateRefusalError(Exception):
    """A conversation that the chat template refuses in every form; holds the template's reason."""


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer brings a chat template."""
    return bool(tokenizer.chat_template)


def render(document: Document, tokenizer: Tokenizer) -> str:
    """The text of a conversation, special tokens included, as the model saw such data in training.

    A template that knows no tools, no system role or no tool role gets them folded into the plain turns. Without a
    template the turns are joined as paragraphs. Raises :class:`TemplateRefusalError`.
    """
    if not has_template(tokenizer):
        return "\n\n".join(message["content"] for message in _plain(document.messages) if message["content"].strip())
    tools = list(document.tools) or None
    template = tokenizer.get_chat_template(tools=tools)
    forms: list[tuple[list[Message], Any]] = []
    if "tool_calls" in template:
        forms.append((list(document.messages), tools))
    forms.append((_plain(document.messages), None))
    forms.append((_alternating(_plain(document.messages)), None))
    if "strftime_now" in template:
        template = _FIXED_DATE + template
    reason = ""
    for messages, offered in forms:
        try:
            text = tokenizer.apply_chat_template(messages, tools=offered, chat_template=template, tokenize=False)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            reason = str(error)
            continue
        return str(text)
    raise TemplateRefusalError(" ".join(reason.split())[:200])


def _plain(messages: tuple[Message, ...]) -> list[Message]:
    """The same turns with calls and results of tools as ordinary text of the assistant and the user."""
    plain: list[Message] = []
    for message in messages:
        content = message["content"]
        for call in message.get("tool_calls", ()):
            content += json.dumps(call.get("function", call), ensure_ascii=False, default=str)
        plain.append({"role": "user" if message["role"] == "tool" else message["role"], "content": content})
    return plain


def _alternating(messages: list[Message]) -> list[Message]:
    """User and assistant in turn, user first: system text joins the first user turn, neighbours of one role merge."""
    merged: list[Message] = []
    for message in messages:
        role = "assistant" if message["role"] == "assistant" else "user"
        if merged and merged[-1]["role"] == role:
            merged[-1] = {"role": role, "content": f"{merged[-1]['content']}\n\n{message['content']}"}
        elif merged or role == "user":
            merged.append({"role": role, "content": message["content"]})
    return merged
