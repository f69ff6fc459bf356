"""The routes of Ollama, TGI and llama.cpp, over fake engines."""

from __future__ import annotations

import json

import pytest
from fake_engine import Engine
from harness import gateway, run

WORDS = " ".join(f"w{index}" for index in range(16))
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"properties": {"n": {"type": "integer"}}}}}]


def test_ollama_chat() -> None:
    async def scenario() -> None:
        async with gateway([Engine()]) as bench:
            body = {"model": "assistant:latest", "messages": [{"role": "user", "content": "a b c"}]}
            lines = [json.loads(line) for line in (await bench.stream("/api/chat", body)).splitlines()]
            assert "".join(line["message"]["content"] for line in lines) == WORDS
            assert [line["done"] for line in lines] == [False] * 16 + [True]
            assert (lines[-1]["prompt_eval_count"], lines[-1]["eval_count"]) == (3, 16)
            assert lines[-1]["done_reason"] == "stop"
            body |= {"stream": False, "options": {"num_predict": 2, "temperature": 0.5, "repeat_penalty": 1.2}}
            status, answer = await bench.post("/api/chat", body)
            assert (status, answer["message"]["content"], answer["done"]) == (200, "w0 w1", True)
            assert answer["done_reason"] == "length"
            sent = bench.engines[0].bodies[-1]
            assert (sent["max_tokens"], sent["temperature"], sent["repeat_penalty"]) == (2, 0.5, 1.2)
            text = await bench.stream("/api/chat", body | {"tools": TOOLS, "options": {}})
            called = json.loads(text.splitlines()[-1])["message"]["tool_calls"]
            assert called == [{"function": {"name": "look", "arguments": {"n": 1}}}]

    run(scenario)


def test_ollama_generate_format_and_images() -> None:
    async def scenario() -> None:
        async with gateway([Engine()], more=True) as bench:
            body = {"model": "assistant", "prompt": "hi", "system": "be brief", "stream": False}
            status, answer = await bench.post("/api/generate", body)
            assert (status, answer["response"]) == (200, WORDS)
            assert [message["role"] for message in bench.engines[0].bodies[-1]["messages"]] == ["system", "user"]
            schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
            _, answer = await bench.post("/api/generate", body | {"format": schema})
            assert json.loads(answer["response"]) == {"age": 1}
            await bench.post("/api/generate", body | {"images": ["iVBORw0KGgo="]})
            part = bench.engines[0].bodies[-1]["messages"][1]["content"][1]
            assert part["image_url"]["url"] == "data:image/png;base64,iVBORw0KGgo="
            await bench.post("/api/generate", body | {"raw": True})
            assert bench.engines[0].bodies[-1]["prompt"] == "hi"
            status, answer = await bench.post("/api/embed", {"model": "embedder", "input": ["a", "b"]})
            assert len(answer["embeddings"]) == 2

    run(scenario)


def test_ollama_lists() -> None:
    async def scenario() -> None:
        async with gateway([Engine()]) as bench:
            async with bench.http.get(f"{bench.url}/api/tags") as response:
                names = [model["name"] for model in (await response.json())["models"]]
            assert names == ["assistant", "assistant@int8"]
            status, answer = await bench.post("/api/show", {"model": "assistant@int8"})
            assert (status, answer["details"]["quantization_level"]) == (200, "int8")
            assert answer["capabilities"] == ["completion", "tools"]
            async with bench.http.get(f"{bench.url}/api/version") as response:
                assert "version" in await response.json()
            status, answer = await bench.post("/api/chat", {"model": "nobody", "messages": [{"role": "user"}]})
            assert status in (400, 404)
            assert "message" in answer["error"]

    run(scenario)


def test_tgi() -> None:
    async def scenario() -> None:
        async with gateway([Engine()]) as bench:
            body = {"inputs": "once", "parameters": {"max_new_tokens": 3, "details": True, "temperature": 0.3}}
            status, answer = await bench.post("/generate", body)
            assert (status, answer["generated_text"]) == (200, "w0 w1 w2")
            assert answer["details"]["generated_tokens"] == 3
            assert bench.engines[0].bodies[-1]["temperature"] == 0.3
            _, answer = await bench.post(
                "/generate", body | {"parameters": {"max_new_tokens": 1, "return_full_text": True}}
            )
            assert answer["generated_text"] == "oncew0"
            text = await bench.stream("/generate_stream", body)
            events = [json.loads(line[5:]) for line in text.splitlines() if line]
            assert "".join(event["token"]["text"] for event in events) == "w0 w1 w2"
            assert events[-1]["generated_text"] == "w0 w1 w2"
            assert events[-1]["details"]["finish_reason"] == "length"
            async with bench.http.get(f"{bench.url}/info") as response:
                assert (await response.json())["model_id"] == "assistant"

    run(scenario)


def test_llama_cpp_completion() -> None:
    async def scenario() -> None:
        async with gateway([Engine()]) as bench:
            status, answer = await bench.post("/completion", {"prompt": "a", "n_predict": 2, "mirostat": 2})
            assert (status, answer["content"], answer["stop"], answer["stop_type"]) == (200, "w0 w1", True, "limit")
            assert bench.engines[0].bodies[-1]["mirostat"] == 2
            text = await bench.stream("/completion", {"prompt": "a", "n_predict": -1})
            events = [json.loads(line[6:]) for line in text.splitlines() if line]
            assert "".join(event["content"] for event in events) == WORDS
            assert [event["stop"] for event in events] == [False] * 16 + [True]

    run(scenario)


@pytest.mark.parametrize("fault", ["close_mid", "garbage_mid"])
def test_a_translated_stream_that_breaks_off_says_so(fault: str) -> None:
    async def scenario() -> None:
        async with gateway([Engine(fault=fault)]) as bench:
            body = {"model": "assistant", "messages": [{"role": "user", "content": "a"}]}
            last = json.loads((await bench.stream("/api/chat", body)).splitlines()[-1])
            assert last["error"]["code"] == "engine_failed"
            text = await bench.stream("/generate_stream", {"inputs": "a"})
            assert '"engine_failed"' in text.splitlines()[-2]
            assert sum(bench.pool.in_flight.values()) == 0

    run(scenario)
