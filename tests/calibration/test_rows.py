"""Rows of data sets and chat templates."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from lowbit.calibration.chat import TemplateRefusalError, render
from lowbit.calibration.rows import Document, documents
from lowbit.calibration.tokenizer import Tokenizer


def chat(*turns: tuple[str, str]) -> Document:
    return Document(messages=tuple({"role": role, "content": content} for role, content in turns))


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("plain", [Document("plain")]),
        ("  ", []),
        (7, []),
        ({"text": "a", "title": "a longer title"}, [Document("a")]),
        ({"id": "x1", "sentence": "the longest string", "n": 3}, [Document("the longest string")]),
        ({"n": 3}, []),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            [chat(("user", "q"), ("assistant", "a"))],
        ),
        ([{"role": "user", "content": "q"}], [chat(("user", "q"))]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image_url"}]}]},
            [chat(("user", "q"))],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            [chat(("system", "s"), ("user", "q"), ("assistant", "a"))],
        ),
        ({"conversations": [{"from": "system", "value": "s"}]}, []),
        ({"conversations": [{"from": "martian", "value": "s"}, "x"]}, []),
        (
            {"instruction": "i", "input": "x", "output": "o", "history": [["p", "r"]]},
            [chat(("user", "p"), ("assistant", "r"), ("user", "i\n\nx"), ("assistant", "o"))],
        ),
        ({"instruction": "i", "input": "", "output": "o"}, [chat(("user", "i"), ("assistant", "o"))]),
        ({"question": "q", "answer": "a"}, [chat(("user", "q"), ("assistant", "a"))]),
        ({"prompt": "q", "completion": "a"}, [chat(("user", "q"), ("assistant", "a"))]),
        ({"turns": ["one", "two"]}, [chat(("user", "one")), chat(("user", "two"))]),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "3"},
                ],
                "tools": '[{"name": "add", "parameters": {}}]',
            },
            [
                Document(
                    messages=(
                        {"role": "user", "content": "q"},
                        {"role": "assistant", "content": "", "tool_calls": [CALL]},
                        {"role": "tool", "content": "3"},
                    ),
                    tools=(TOOL,),
                )
            ],
        ),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [CALL]}]},
            [
                Document(
                    messages=(
                        {"role": "user", "content": "q"},
                        {"role": "assistant", "content": "", "tool_calls": [CALL]},
                    )
                )
            ],
        ),
    ],
)
def test_rows_are_recognised(row: Any, expected: list[Document]) -> None:
    before = copy.deepcopy(row)
    assert list(documents(row)) == expected
    assert row == before


def test_a_named_field_wins() -> None:
    assert list(documents({"text": "a", "body": "b"}, "body")) == [Document("b")]
    assert list(documents({"chat": [{"role": "user", "content": "q"}]}, "chat")) == [chat(("user", "q"))]
    assert list(documents({"text": "a"}, "missing")) == []


STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
)


def test_a_strict_template_gets_folded_turns(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = STRICT
    turns = chat(("system", "s"), ("user", "q"), ("user", "r"), ("assistant", "a"), ("tool", "t"))
    assert render(turns, tokenizer) == "[user]s\n\nq\n\nr[assistant]a[user]t"
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(TemplateRefusalError, match="never"):
        render(turns, tokenizer)


def test_tools_reach_templates_that_know_them(tokenizer: Tokenizer) -> None:
    turns = Document(
        messages=({"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}),
        tools=(TOOL,),
    )
    tokenizer.chat_template = (
        "{% for t in tools or [] %}<{{ t['function']['name'] }}>{% endfor %}"
        "{% for m in messages %}{{ m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}({{ c['function']['arguments']['a'] }}){% endfor %}{% endfor %}"
    )
    assert render(turns, tokenizer) == "<add>q(1)"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    assert render(turns, tokenizer) == 'q|{"name": "add", "arguments": {"a": 1}}|'


def test_a_template_with_a_date_gives_the_same_text_every_day(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}{{ messages[0]['content'] }}{{ strftime_now('%Y-%m-%d') }}"
    assert render(chat(("user", "q")), tokenizer) == "26 Jul 2024q2024-07-26"


def test_without_a_template_turns_are_paragraphs(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = None
    assert render(chat(("user", "q"), ("assistant", "a")), tokenizer) == "q\n\na"
