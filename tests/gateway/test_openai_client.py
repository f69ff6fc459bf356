"""The official openai client, unchanged, in its usual calls."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from fake_engine import Engine
from harness import gateway, run

MESSAGES = [{"role": "user", "content": "hello"}]
WORDS = " ".join(f"w{index}" for index in range(16))
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


def synchronous(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert next(iter(client.models.list())).id == "assistant"
    assert client.models.retrieve("assistant@int8").owned_by == "lowbit"
    chat = client.chat.completions.create(model="assistant", messages=MESSAGES, seed=1, temperature=0.5)
    assert chat.choices[0].message.content == WORDS
    assert chat.usage.completion_tokens == 16
    assert chat._request_id.startswith("req-")
    two = client.chat.completions.create(
        model="assistant", messages=MESSAGES, n=2, max_completion_tokens=3, stop=["w2"]
    )
    assert [choice.message.content for choice in two.choices] == ["w0 w1 ", "w0 w1 "]
    probable = client.chat.completions.create(model="assistant", messages=MESSAGES, logprobs=True, top_logprobs=2)
    assert probable.choices[0].logprobs.content[0].token == "w0"
    stream = client.chat.completions.create(
        model="assistant", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == WORDS
    assert chunks[-1].usage.completion_tokens == 16
    tools = client.chat.completions.create(model="assistant", messages=MESSAGES, tools=[TOOL], tool_choice="auto")
    assert json.loads(tools.choices[0].message.tool_calls[0].function.arguments) == {"city": "w0"}
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    structured = client.chat.completions.create(model="assistant", messages=MESSAGES, response_format=form)
    assert json.loads(structured.choices[0].message.content) == {"age": 1}
    text = client.completions.create(model="assistant", prompt="once", max_tokens=2)
    assert text.choices[0].text == "w0 w1"
    vectors = client.embeddings.create(model="embedder", input=["a", "b"], encoding_format="float")
    assert len(vectors.data) == 2
    raw = client.chat.completions.with_raw_response.create(
        model="assistant", messages=MESSAGES, extra_body={"lowbit": {"precision": "low"}, "min_p": 0.1}
    )
    assert raw.headers["x-lowbit-tier"] == "int8"
    assert raw.headers["x-lowbit-kl"] == "0.01"


def errors(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="assistant", messages=MESSAGES, temperature=-3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.InternalServerError) as broken:
        client.chat.completions.create(model="assistant", messages=MESSAGES)
    assert broken.value.code == "engine_failed"


def test_synchronous_client() -> None:
    async def scenario() -> None:
        async with gateway([Engine()], more=True) as bench:
            await asyncio.to_thread(synchronous, bench.url)

    run(scenario)


def test_errors_become_the_clients_exceptions() -> None:
    async def scenario() -> None:
        async with gateway([Engine(fault="error500")]) as bench:
            await asyncio.to_thread(errors, bench.url)

    run(scenario)


def test_asynchronous_client_and_a_stream_that_breaks_off() -> None:
    async def scenario() -> None:
        async with (
            gateway([Engine()]) as bench,
            openai.AsyncOpenAI(base_url=f"{bench.url}/v1", api_key="none", max_retries=0) as client,
        ):
            calls = (client.chat.completions.create(model="assistant", messages=MESSAGES) for _ in range(8))
            assert {answer.choices[0].message.content for answer in await asyncio.gather(*calls)} == {WORDS}
            async with client.chat.completions.stream(model="assistant", messages=MESSAGES, tools=[TOOL]) as stream:
                kinds = [event.type async for event in stream]
            assert "tool_calls.function.arguments.done" in kinds
            bench.engines[0].fault = "close_mid"
            pieces: list[str] = []
            with pytest.raises(openai.APIError, match="broke off"):
                await collect(client, pieces)
            assert "".join(pieces) == "w0 w1 w2"

    run(scenario)


async def collect(client: openai.AsyncOpenAI, pieces: list[str]) -> None:
    async for chunk in await client.chat.completions.create(model="assistant", messages=MESSAGES, stream=True):
        pieces.append(chunk.choices[0].delta.content or "")
