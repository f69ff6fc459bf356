"""Rows of data sets: recognising text, chats, instructions and question lists among their fields.

A row becomes zero or more :class:`Document`: plain text, or messages that go through the model's chat template.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""``{"role": …, "content": …}``, for a call of functions also ``tool_calls``."""

_TEXT_FIELDS = ("text", "content", "document", "body", "passage", "article", "code", "page")
_MESSAGE_FIELDS = ("messages", "conversations", "conversation", "dialogue", "dialog")
_QUESTIONS = ("instruction", "prompt", "question", "query", "problem", "input")
_ANSWERS = ("output", "response", "completion", "answer", "best answer", "solution", "long_answer", "chosen")
_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "developer": "system",
    "function_call": "function_call",
    "tool_call": "function_call",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
    "tool": "tool",
    "ipython": "tool",
}


@dataclass(frozen=True, slots=True)
class Document:
    """One unit of calibration data: ``text``, or ``messages`` with the ``tools`` they may call."""

    text: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """What duplicates are recognised by: the content, white space at the ends aside."""
        if self.messages:
            return json.dumps([self.messages, self.tools], sort_keys=True, ensure_ascii=False, default=str)
        return self.text.strip()


def documents(row: Any, field: str | None = None) -> Iterator[Document]:
    """The documents in one row of a data set; none when nothing in it looks like text.

    ``field`` names the field to read; without it, in order: messages (OpenAI or ShareGPT), lists of user turns
    (MT-Bench), instruction and answer (alpaca and kin), a field with a usual name, the longest string.
    """
    if isinstance(row, str):
        yield from _text(row)
        return
    if isinstance(row, list):
        yield from _chat(row, (), None)
        return
    if not isinstance(row, Mapping):
        return
    if field is not None:
        value = row.get(field)
        yield from _text(value) if isinstance(value, str) else _chat(value, row.get("tools"), row.get("system"))
        return
    for name in _MESSAGE_FIELDS:
        if isinstance(row.get(name), list):
            yield from _chat(row[name], row.get("tools"), row.get("system"))
            return
    turns = row.get("turns")
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
        for turn in turns:
            if turn.strip():
                yield Document(messages=({"role": "user", "content": turn},))
        return
    if pair := _instruction(row):
        yield pair
        return
    yield from _text(_longest_text(row))


def _text(text: str) -> Iterator[Document]:
    if text.strip():
        yield Document(text=text)


def _longest_text(row: Mapping[str, Any]) -> str:
    for name in _TEXT_FIELDS:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value
    return max((value for value in row.values() if isinstance(value, str)), key=len, default="")


def _first(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, str]:
    """``(name, value)`` of the first of ``names`` that holds text; empty strings when none does."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return name, value
    return "", ""


def _instruction(row: Mapping[str, Any]) -> Document | None:
    name, question = _first(row, _QUESTIONS)
    _, answer = _first(row, _ANSWERS)
    if not question or not answer:
        return None
    extra = row.get("input")
    if name != "input" and isinstance(extra, str) and extra.strip():
        question = f"{question}\n\n{extra}"
    messages: list[Message] = []
    if isinstance(row.get("system"), str) and row["system"].strip():
        messages.append({"role": "system", "content": row["system"]})
    for turn in row.get("history") or ():
        if isinstance(turn, (list, tuple)) and len(turn) == 2:
            messages += [{"role": "user", "content": str(turn[0])}, {"role": "assistant", "content": str(turn[1])}]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Document(messages=tuple(messages))


def _chat(turns: Any, tools: Any, system: Any) -> Iterator[Document]:
    if not isinstance(turns, list):
        return
    messages = [message for turn in turns if (message := _message(turn)) is not None]
    if isinstance(system, str) and system.strip() and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    if any(message["role"] != "system" for message in messages):
        yield Document(messages=tuple(messages), tools=_tools(tools))


def _message(turn: Any) -> Message | None:
    """One turn in OpenAI form (``role``, ``content``) or ShareGPT form (``from``, ``value``); None when neither."""
    if not isinstance(turn, Mapping):
        return None
    role = _ROLES.get(str(turn.get("role", turn.get("from", ""))).lower())
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):  # OpenAI content parts: only text can be calibrated with
        content = "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    if content is None and turn.get("tool_calls"):
        content = ""
    if role is None or not isinstance(content, str):
        return None
    if role == "function_call":
        call = _tool_call(content)
        return {"role": "assistant", "content": "" if call else content, **({"tool_calls": [call]} if call else {})}
    message: Message = {"role": role, "content": content}
    if role == "assistant" and turn.get("tool_calls"):
        message["tool_calls"] = turn["tool_calls"]
    return message


def _tool_call(text: str) -> Mapping[str, Any] | None:
    try:
        call = json.loads(text)
    except ValueError:
        return None
    if not isinstance(call, dict) or "name" not in call:
        return None
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def _tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """Tool descriptions in OpenAI form, from a list or its JSON; empty when there are none."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            return ()
    if not isinstance(tools, list):
        return ()
    described = (tool for tool in tools if isinstance(tool, Mapping))
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in described)
