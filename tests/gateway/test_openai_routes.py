"""OpenAI's routes over fake engines: what passes, what is refused, what a failing engine costs the client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fake_engine import Engine
from fake_pool import Tier
from harness import Bench, engine_process, gateway, run

CHAT: dict[str, Any] = {"model": "assistant", "messages": [{"role": "user", "content": "hello there"}]}
WORDS = " ".join(f"w{index}" for index in range(16))


def text_of(stream: str) -> str:
    """The content of a chat stream."""
    pieces = []
    for line in stream.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:]).get("choices", ()):
                pieces.append(choice["delta"].get("content") or "")
    return "".join(pieces)


def test_chat_whole_and_streamed() -> None:
    async def scenario() -> None:
        async with gateway([Engine()]) as bench:
            async with bench.http.post(f"{bench.url}/v1/chat/completions", json=CHAT) as response:
                answer = await response.json()
                assert answer["choices"][0]["message"]["content"] == WORDS
                assert response.headers["x-lowbit-model"] == "assistant"
                assert response.headers["x-lowbit-tier"] == "int8"
                assert response.headers["x-lowbit-kl"] == "0.01"
                assert response.headers["x-request-id"].startswith("req-")
            stream = await bench.stream("/v1/chat/completions", CHAT, headers={"x-request-id": "mine-1"})
            assert text_of(stream) == WORDS
            assert stream.endswith("data: [DONE]\n\n")
            assert bench.engines[0].bodies[0] == {**CHAT, "model": "fake"}
            assert [lease.released for lease in bench.pool.leases] == [1, 1]
            assert [lease.reports[-1][0] for lease in bench.pool.leases] == ["done", "done"]

    run(scenario)


def test_other_routes() -> None:
    async def scenario() -> None:
        async with gateway([Engine()], more=True) as bench:
            status, answer = await bench.post(
                "/v1/completions", {"model": "assistant", "prompt": "a b", "max_tokens": 2}
            )
            assert (status, answer["choices"][0]["text"]) == (200, "w0 w1")
            assert "w15" in await bench.stream("/v1/completions", {"model": "assistant@int8", "prompt": "a"})
            status, answer = await bench.post("/v1/embeddings", {"model": "embedder", "input": ["a", "bcd"]})
            assert [len(item["embedding"]) for item in answer["data"]] == [3, 3]
            for path in ("/v1/rerank", "/rerank"):
                body = {"model": "ranker", "query": "red fox", "documents": ["blue sea", "a red fox"]}
                status, answer = await bench.post(path, body)
                assert [item["index"] for item in answer["results"]] == [1, 0]
            status, answer = await bench.post("/tokenize", {"model": "assistant", "content": "one two three"})
            assert (status, answer["count"], answer["tokens"]) == (200, 3, [0, 1, 2])
            status, answer = await bench.post("/tokenize", {"model": "assistant", "messages": CHAT["messages"]})
            assert (status, answer["count"], answer["max_model_len"]) == (200, 2, 4096)
            status, answer = await bench.post("/detokenize", {"model": "assistant", "tokens": [4, 5]})
            assert (status, answer["content"], answer["prompt"]) == (200, "w4 w5", "w4 w5")
            status, answer = await bench.post("/v1/responses", {"model": "assistant", "input": "hi"})
            assert (status, answer["error"]["type"]) == (501, "not_supported_error")
            status, answer = await bench.post("/v1/embeddings", {"model": "assistant", "input": "a"})
            assert (status, answer["error"]["code"]) == (404, "not_supported")
            assert "embedder" in answer["error"]["message"]
            assert all(count == 0 for count in bench.pool.in_flight.values())

    run(scenario)


def test_vllm_tokenize_and_models() -> None:
    async def scenario() -> None:
        async with gateway([Engine(dialect="vllm"), Engine()]) as bench:
            status, answer = await bench.post("/tokenize", {"model": "assistant", "prompt": "one two"})
            assert (status, answer["count"]) == (200, 2)
            status, answer = await bench.post("/detokenize", {"model": "assistant", "tokens": [1]})
            assert answer["content"] == "w1"
            async with bench.http.get(f"{bench.url}/v1/models") as response:
                models = await response.json()
                assert [entry["id"] for entry in models["data"]] == ["assistant", "assistant@int8", "assistant@int4"]
            async with bench.http.get(f"{bench.url}/v1/models/assistant@int4") as response:
                assert (await response.json())["lowbit"]["kl"] == 0.02
            async with bench.http.get(f"{bench.url}/v1/models/other") as response:
                assert response.status == 404

    run(scenario)


def test_choice_of_tier_reaches_the_pool() -> None:
    async def scenario() -> None:
        async with gateway([Engine(), Engine()]) as bench:
            await bench.post("/v1/chat/completions", {**CHAT, "model": "assistant@int4"})
            await bench.post("/v1/chat/completions", {**CHAT, "lowbit": {"precision": "low", "speed": True}})
            headers = {"x-lowbit-precision": "high", "x-lowbit-memory": "123", "x-lowbit-deadline": "9.5"}
            await bench.post("/v1/chat/completions", CHAT, headers=headers)
            named, body, header = bench.pool.requests
            assert named.tier == "int4"
            assert (body.precision, body.speed) == ("low", True)
            assert (header.precision, header.memory_limit) == ("high", 123)
            assert header.deadline - header.arrived == pytest.approx(9.5, abs=0.5)
            assert all("lowbit" not in sent for engine in bench.engines for sent in engine.bodies)
            status, answer = await bench.post("/v1/chat/completions", CHAT, headers={"x-lowbit-precision": "best"})
            assert (status, answer["error"]["param"]) == (400, "x-lowbit-precision")

    run(scenario)


@pytest.mark.parametrize("fault", ["hang", "garbage", "error500", "error503"])
@pytest.mark.parametrize("stream", [False, True])
def test_failure_before_the_first_token_goes_to_the_next_tier(fault: str, stream: bool) -> None:
    async def scenario() -> None:
        limits = {"first_byte_timeout": 0.3}
        async with gateway([Engine(fault=fault), Engine()], limits=limits) as bench:
            if stream:
                assert text_of(await bench.stream("/v1/chat/completions", CHAT)) == WORDS
            else:
                status, answer = await bench.post("/v1/chat/completions", CHAT)
                assert (status, answer["choices"][0]["message"]["content"]) == (200, WORDS)
            first, second = bench.pool.leases
            kind = {"hang": "timeout", "garbage": "garbage"}.get(fault, "status")
            assert first.reports == [("failed", kind)]
            assert second.reports[-1] == ("done", 16)
            assert [first.released, second.released] == [1, 1]
            await bench.until_idle()

    run(scenario)


@pytest.mark.parametrize(("fault", "status"), [("hang", 504), ("garbage", 502), ("error500", 502), ("error503", 503)])
def test_failure_of_the_only_tier_is_an_error_of_openai_shape(fault: str, status: int) -> None:
    async def scenario() -> None:
        limits = {"first_byte_timeout": 0.2}
        async with (
            gateway([Engine(fault=fault)], limits=limits) as bench,
            bench.http.post(f"{bench.url}/v1/chat/completions", json={**CHAT, "stream": True}) as response,
        ):
            assert response.status == status
            error = (await response.json())["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert "assistant@int8" in error["message"]
            assert int(response.headers["Retry-After"]) >= 1

    run(scenario)


@pytest.mark.parametrize("fault", ["close_mid", "stall_mid"])
def test_a_stream_that_breaks_off_ends_with_an_error_and_no_done(fault: str) -> None:
    async def scenario() -> None:
        async with gateway([Engine(fault=fault), Engine()], limits={"first_byte_timeout": 0.3}) as bench:
            stream = await bench.stream("/v1/chat/completions", CHAT)
            assert text_of(stream) == "w0 w1 w2"
            assert "[DONE]" not in stream
            assert json.loads(stream.rstrip().splitlines()[-1][6:])["error"]["code"] == "engine_failed"
            assert len(bench.pool.leases) == 1, "no second engine is asked once the client has a token"
            assert bench.pool.leases[0].reports[-1][0] == "failed"

    run(scenario)


def test_a_stream_cut_after_its_last_event_is_whole() -> None:
    async def scenario() -> None:
        async with gateway([Engine(fault="close_end")]) as bench:
            text = await bench.stream("/v1/chat/completions", CHAT)
            assert text.endswith("data: [DONE]\n\n")
            assert "error" not in text
            assert bench.pool.leases[0].reports[-1][0] == "done"

    run(scenario)


def test_killed_engine() -> None:
    async def scenario() -> None:
        async with (
            engine_process("--token-time", "0.05", "--tokens", "1000") as (url, process),
            gateway([Engine()], [Tier("dying", url)]) as bench,
        ):
            requests = [bench.stream("/v1/chat/completions", {**CHAT, "model": "assistant@dying"}) for _ in range(20)]
            tasks = [asyncio.ensure_future(request) for request in requests]
            await all_speak(bench, url, len(tasks))
            process.kill()
            for stream in await asyncio.gather(*tasks):
                assert text_of(stream).startswith("w0 w1")
                assert '"engine_failed"' in stream
            status, answer = await bench.post("/v1/chat/completions", {**CHAT, "model": "assistant@dying"})
            assert (status, answer["error"]["code"]) == (502, "engine_failed")
            assert "cannot be reached" in answer["error"]["message"]
            assert bench.pool.in_flight == {"assistant@int8": 0, "assistant@dying": 0}

    run(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_the_generation(stream: bool) -> None:
    async def scenario() -> None:
        async with gateway([Engine(token_time=0.05, tokens=1000)]) as bench:
            request = bench.http.post(f"{bench.url}/v1/chat/completions", json={**CHAT, "stream": stream})
            task = asyncio.ensure_future(request)  # type: ignore[arg-type]
            await asyncio.sleep(0.4)
            if stream:
                (await task).close()
            else:
                task.cancel()
            await bench.until_idle()
            engine = bench.engines[0]
            assert (engine.counts["cancelled"], engine.counts["completed"], engine.active) == (1, 0, 0)
            assert bench.pool.leases[0].released == 1
            assert ("failed", "disconnected") not in bench.pool.leases[0].reports

    run(scenario)


async def all_speak(bench: Bench, url: str, streams: int) -> None:
    """Wait until an engine has given every stream a few tokens."""
    for _ in range(500):
        async with bench.http.get(f"{url}/log") as response:
            log = await response.json()
        if log["requests"] == streams and log["tokens"] > 8 * streams:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the engine is too slow")


def test_a_prompt_that_does_not_fit_is_told_by_how_much() -> None:
    async def scenario() -> None:
        async with gateway([Engine(context=50)], limits={"prompt_tokens": 1000}) as bench:
            for path, body in {
                "/v1/chat/completions": {"model": "assistant", "messages": [{"role": "user", "content": "word " * 60}]},
                "/v1/completions": {"model": "assistant", "prompt": "word " * 60},
            }.items():
                status, answer = await bench.post(path, body)
                assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
                assert "60 tokens, 11 more than fit" in answer["error"]["message"]
            assert bench.engines[0].counts["requests"] == 0
            body = {"model": "assistant", "prompt": "longer-words " * 40}
            assert (await bench.post("/v1/completions", body))[0] == 200
            status, answer = await bench.post("/v1/completions", {"model": "assistant", "prompt": "w " * 1500})
            assert "500 more than the 1000" in answer["error"]["message"]
            assert bench.pool.leases[-1].reports in ([], [("done", 0)])

    run(scenario)


def test_deadline_of_the_client() -> None:
    async def scenario() -> None:
        async with gateway([Engine(first_token=5)]) as bench:
            body = {**CHAT, "lowbit": {"deadline": 0.2}}
            status, answer = await bench.post("/v1/chat/completions", body)
            assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
            assert bench.pool.leases[0].reports == [], "the engine is not to blame"

    run(scenario)


def test_queue_full_and_key_limits() -> None:
    async def scenario() -> None:
        for limits, status, code in (
            ({"queue_requests": 2}, 503, "queue_full"),
            ({"key_concurrency": 3}, 429, "rate_limit_exceeded"),
            ({"key_requests_per_minute": 3}, 429, "rate_limit_exceeded"),
        ):
            async with gateway([Engine(first_token=0.2)], capacity=1, limits=limits) as bench:
                answers = await asyncio.gather(*(bench.post("/v1/chat/completions", CHAT) for _ in range(6)))
                assert sorted(found for found, _ in answers) == [200] * 3 + [status] * 3
                assert {answer["error"]["code"] for found, answer in answers if found != 200} == {code}
                assert bench.engines[0].counts["requests"] == 3

    run(scenario)


def test_unsupported_of_the_engine() -> None:
    async def scenario() -> None:
        async with gateway([Engine()]) as bench:
            status, answer = await bench.post("/v1/chat/completions", {**CHAT, "use_beam_search": True})
            assert (status, answer["error"]["param"]) == (400, "use_beam_search")
            await bench.post("/v1/chat/completions", {**CHAT, "repetition_penalty": 1.1, "max_completion_tokens": 3})
            sent = bench.engines[0].bodies[-1]
            assert (sent["repeat_penalty"], sent["max_tokens"]) == (1.1, 3)

    run(scenario)


def test_metrics_and_status() -> None:
    async def scenario() -> None:
        async with gateway([Engine(fault="error500", fault_count=1), Engine(dialect="vllm")]) as bench:
            await bench.stream("/v1/chat/completions", CHAT)
            async with bench.http.get(f"{bench.url}/metrics") as response:
                text = await response.text()
            for line in (
                'lowbit_requests_total{model="assistant",route="/v1/chat/completions",status="200",tier="int4"} 1.0',
                'lowbit_fallbacks_total{model="assistant",tier="int8"} 1.0',
                'lowbit_tokens_total{kind="completion",model="assistant",tier="int4"} 16.0',
                'lowbit_quantization_kl{model="assistant",tier="int8"} 0.01',
                'lowbit_kv_cache_usage_ratio{engine="vllm",model="assistant",tier="int4"} 0.25',
                'lowbit_time_to_first_token_seconds_count{model="assistant",tier="int4"} 1.0',
                'lowbit_tier_state{model="assistant",state="ready",tier="int8"} 1.0',
            ):
                assert line in text
            async with bench.http.get(f"{bench.url}/status") as response:
                status = await response.json()
            assert status["models"][0]["tiers"][0]["state"] == "ready"
            for path in ("/health", "/ready"):
                async with bench.http.get(bench.url + path) as response:
                    assert response.status == 200
            bench.pool.state = dict.fromkeys(bench.pool.state, "loading")
            async with bench.http.get(f"{bench.url}/ready") as response:
                assert response.status == 503

    run(scenario)


def test_an_engine_that_closes_kept_connections_loses_no_request() -> None:
    """llama.cpp's server does: a connection's second request is met with silence, and is not the engine's failure."""

    async def scenario() -> None:
        answered = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            answered.append(1)
            body = b'{"choices": []}'
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body))
            writer.write(body)
            await reader.read(1)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with gateway(tiers=[Tier("int4", f"http://127.0.0.1:{port}")]) as bench:
            await asyncio.gather(*(bench.post("/v1/chat/completions", CHAT) for _ in range(8)))
            for _ in range(20):
                assert (await bench.post("/v1/chat/completions", CHAT))[0] == 200
            assert len(answered) == 28
            assert all(lease.reports[-1][0] == "done" for lease in bench.pool.leases)
        server.close()

    run(scenario)
