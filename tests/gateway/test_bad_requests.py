"""Requests that make no sense: a 4xx that says what is wrong, and an engine that never hears of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from fake_engine import Engine
from harness import gateway, run
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.gateway.refusal import Refusal
from lowbit.gateway.requests import ChatRequest, parse_json, validate
from lowbit.gateway.schema import check_schema

CHAT: dict[str, Any] = {"model": "assistant", "messages": [{"role": "user", "content": "hello"}]}

BODIES = [
    (b"{", 400, "line 1, column 2"),
    (b"\xff\xfe{}", 400, "UTF-8 at byte 0"),
    (b"", 400, "JSON"),
    (b"[1, 2]", 400, "an array"),
    (b'"text"', 400, "a string"),
    (b'{"model": NaN}', 400, "NaN"),
    (b"[" * 5000, 400, "deeper"),
    (b'{"a":' * 200 + b"1" + b"}" * 200, 400, "deeper"),
    (b'{"a": ' + b"9" * 5000 + b"}", 400, "JSON"),
    (b'{"model": "assistant"}', 400, "messages"),
    (b'{"model": 5, "messages": []}', 400, "model"),
]

FIELDS = [
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": True}, "n"),
    ({"seed": 2**70}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"logprobs": False, "top_logprobs": 3}, "top_logprobs"),
    ({"logit_bias": {"5": 200}}, "logit_bias"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"lowbit": {"teir": "int8"}}, "lowbit.teir"),
    ({"lowbit": {"precision": "best"}}, "lowbit.precision"),
    ({"model": "assistent"}, "did you mean 'assistant'"),
]


def test_bodies_and_fields() -> None:
    async def scenario() -> None:
        async with gateway([Engine()], limits={"body_bytes": 50_000}) as bench:
            for raw, expected, words in BODIES:
                async with bench.http.post(f"{bench.url}/v1/chat/completions", data=raw) as response:
                    error = (await response.json())["error"]
                    assert (response.status, set(error)) == (expected, {"message", "type", "param", "code"})
                    assert words in error["message"], error
            for extra, words in FIELDS:
                status, answer = await bench.post("/v1/chat/completions", {**CHAT, **extra})
                assert status == (404 if "model" in extra else 400), extra
                assert words in answer["error"]["message"], (extra, answer)
            async with bench.http.post(f"{bench.url}/v1/chat/completions", data=b" " * 60_000) as response:
                assert response.status == 413
                assert "50000 bytes" in (await response.json())["error"]["message"]
            for path, method, expected in (("/nowhere", "GET", 404), ("/v1/chat/completions", "GET", 405)):
                async with bench.http.request(method, bench.url + path) as response:
                    assert response.status == expected
                    assert (await response.json())["error"]["message"]
            assert bench.engines[0].counts["requests"] == 0
            assert bench.pool.leases == []
            assert (await bench.post("/v1/chat/completions", CHAT))[0] == 200

    run(scenario)


def test_a_prompt_of_a_hundred_thousand_tokens() -> None:
    async def scenario() -> None:
        async with gateway([Engine(context=4096)]) as bench:
            status, answer = await bench.post("/v1/completions", {"model": "assistant", "prompt": "word " * 100_000})
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
            assert "100000 tokens, 95905 more than fit" in answer["error"]["message"]
            assert bench.engines[0].counts["requests"] == 0

    run(scenario)


def test_the_engines_own_refusals_count_as_the_clients() -> None:
    async def scenario() -> None:
        async with gateway([Engine(context=5)]) as bench:
            bench.pool.tiers[0].context = None
            status, answer = await bench.post("/v1/completions", {"model": "assistant", "prompt": "a b c d e f g"})
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
            assert bench.pool.leases[0].reports == [("done", 0)]

    run(scenario)


Raised = TypeVar("Raised", bound=Exception)


def raised(kind: type[Raised], function: Callable[..., object], *arguments: object) -> Raised | None:
    """The error that a call ends with, of the one kind that it may."""
    try:
        function(*arguments)
    except kind as error:
        return error
    return None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
KEYS = st.sampled_from(sorted({*ChatRequest.model_fields, "extra"}))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, JSON, max_size=6))
def test_any_json_is_accepted_or_refused(body: dict[str, Any]) -> None:
    error = raised(Refusal, validate, ChatRequest, {**CHAT, **body})
    assert error is None or (error.status == 400 and error.message)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_parsed_or_refused(raw: bytes) -> None:
    error = raised(Refusal, parse_json, raw)
    assert error is None or error.status == 400


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (5, "must be an object"),
        ({"type": "objekt"}, "'objekt' is none of"),
        ({"properties": []}, "object of schemas"),
        ({"properties": {"a": {"type": 1}}}, "schema.properties.a.type"),
        ({"required": "a"}, "required"),
        ({"anyOf": []}, "anyOf"),
        ({"items": {"minItems": -1}}, "schema.items.minItems"),
        ({"minimum": "3"}, "minimum"),
        ({"pattern": "("}, "regular expression"),
        ({"$ref": "#/$defs/none"}, "leads nowhere"),
        ({"enum": []}, "enum"),
    ],
)
def test_schemas_that_make_no_sense(schema: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("$", r"\$").replace("(", r"\(")):
        check_schema(schema, "schema")


def test_a_schema_that_does() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "n": {"type": ["integer", "null"]}}}
    check_schema({"$defs": {"node": node}, "$ref": "#/$defs/node", "additionalProperties": False}, "schema")


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_any_schema_is_accepted_or_refused(schema: Any) -> None:
    error = raised(ValueError, check_schema, schema, "schema")
    assert error is None or str(error).startswith("schema")
