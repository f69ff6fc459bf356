"""JSON on the wire against the standard library's; the log's lines: all of them, in order, at once where they warn."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.gateway.log import LOGGER, JsonLines, log_event, log_to
from lowbit.gateway.refusal import Refusal
from lowbit.gateway.requests import CompletionRequest, parse_json, validate
from lowbit.gateway.wire import decode, encode

ANY_TEXT = st.text(st.characters(codec=None), max_size=8)  # halves of surrogate pairs, too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_values_come_back_as_they_went(value: Any) -> None:
    assert json.loads(encode(value).decode("utf-8", "surrogatepass")) == value
    assert decode(json.dumps(value).encode()) == value
    body = {"a": value}
    assert parse_json(json.dumps(body).encode()) == body


def test_numbers_that_json_has_no_word_for() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        encode({"a": float("inf")})
    assert encode({"a": "Infinity and NaN"}) == b'{"a":"Infinity and NaN"}'
    assert decode(b'{"logprob": -Infinity}') == {"logprob": float("-inf")}
    with pytest.raises(Refusal, match="NaN"):
        parse_json(b'{"a": NaN}')


def test_whole_numbers_may_be_written_as_fractions() -> None:
    body = {"model": "m", "prompt": [1.0, 2], "max_tokens": 5.0, "temperature": 1.0}
    assert validate(CompletionRequest, body).max_tokens == 5
    assert encode(body) == b'{"model":"m","prompt":[1,2],"max_tokens":5,"temperature":1.0}'
    for wrong in ({"max_tokens": 5.5}, {"max_tokens": "5"}, {"max_tokens": True}, {"prompt": [1.5]}):
        with pytest.raises(Refusal):
            validate(CompletionRequest, {"model": "m", "prompt": "x", **wrong})


@pytest.fixture
def log() -> Iterator[tuple[io.StringIO, JsonLines]]:
    kept = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate
    stream = io.StringIO()
    yield stream, log_to(stream)
    LOGGER.handlers[:], LOGGER.propagate = kept[0], kept[2]
    LOGGER.setLevel(kept[1])


def events(stream: io.StringIO) -> list[str]:
    return [json.loads(line)["event"] for line in stream.getvalue().splitlines()]


def test_lines_are_gathered_for_a_moment_and_warnings_are_not(log: tuple[io.StringIO, JsonLines]) -> None:
    stream, _ = log

    async def scenario() -> None:
        log_event("one", id="a", empty=None, nothing="", zero=0)
        log_event("two")
        assert events(stream) == []
        log_event("three", logging.WARNING)
        assert events(stream) == ["one", "two", "three"]
        log_event("four")
        LOGGER.error("five")
        assert events(stream) == ["one", "two", "three", "four", "five"]
        log_event("six")
        for _ in range(100):
            if len(events(stream)) == 6:
                break
            await asyncio.sleep(0.02)
        assert events(stream)[-1] == "six"

    asyncio.run(scenario())
    first = json.loads(stream.getvalue().splitlines()[0])
    assert set(first) == {"time", "level", "event", "id", "zero"}
    assert first["level"] == "info"


def test_without_a_loop_or_with_odd_text_lines_are_written_too(log: tuple[io.StringIO, JsonLines]) -> None:
    stream, handler = log
    log_event("half", reason="\ud800")
    assert json.loads(stream.getvalue())["reason"] == "\ud800"
    for _ in range(300):
        log_event("many")
    handler.flush()
    assert len(events(stream)) == 301
