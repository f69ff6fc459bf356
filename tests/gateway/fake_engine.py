"""An OpenAI-compatible engine that answers from nothing and breaks on command: a process for tests and benchmarks.

    python fake_engine.py --port 0 [--tokens 16 --first-token 0.1 --token-time 0.01 --context 4096 --fault hang:3]

Prints ``ready PORT`` once it listens. Its answer is always the words ``w0 w1 w2 …``, so that a lost or doubled token
shows. ``POST /fault {"kind": …, "count": n or null}`` breaks the next ``n`` generations (null: all of them), and
``GET /log`` tells what arrived.

=============  =========================================================================
refuse_load    exits with status 1 at start, as an engine out of memory does
not_ready      /health answers 503
die            the process exits when a generation arrives
die_mid        the process exits after three tokens
hang           a generation never answers
hang_all       the whole process stops answering, health too
stall_mid      a stream stops after three tokens, the connection stays open
close_mid      the connection is cut after three tokens
garbage        status 200 with bytes that are neither JSON nor events
garbage_mid    three good tokens, then a broken event
close_end      the connection is cut after the last event, before the stream is closed
error500       status 500 with an HTML page
error503       status 503 with Retry-After
=============  =========================================================================
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Body = dict[str, Any]
GENERATION_FAULTS = (
    "die",
    "die_mid",
    "hang",
    "hang_all",
    "stall_mid",
    "close_mid",
    "garbage",
    "garbage_mid",
    "close_end",
    "error500",
    "error503",
)


@dataclass
class Engine:
    """Settings, switches and counters of one fake engine."""

    model: str = "fake"
    tokens: int = 16
    first_token: float = 0.0
    token_time: float = 0.0
    context: int = 4096
    dialect: str = "llama.cpp"
    fault: str | None = None
    fault_count: int | None = None
    ready_at: float = 0.0
    active: int = 0
    most_active: int = 0
    counts: dict[str, int] = field(default_factory=lambda: {"requests": 0, "completed": 0, "cancelled": 0, "tokens": 0})
    bodies: list[Body] = field(default_factory=list)
    ready_chunks: dict[int, list[bytes]] = field(default_factory=dict)

    def take_fault(self) -> str | None:
        """The fault that this generation suffers, counted down."""
        if self.fault not in GENERATION_FAULTS or self.fault_count == 0:
            return None
        if self.fault_count is not None:
            self.fault_count -= 1
        return self.fault


ENGINE: web.AppKey[Engine] = web.AppKey("engine", Engine)


def count_tokens(text: str) -> int:
    return len(text.split())


def prompt_text(body: Body) -> str:
    if "messages" in body:
        parts = []
        for message in body["messages"]:
            content = message.get("content") or ""
            if isinstance(content, list):
                content = " ".join(part.get("text", "image") for part in content)
            parts.append(content)
        return " ".join(parts)
    prompt = body.get("prompt", body.get("input", body.get("content", "")))
    return " ".join(map(str, prompt)) if isinstance(prompt, list) else str(prompt)


def instance_of(schema: Body) -> Any:
    """The least value that a JSON schema accepts."""
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "object")
    if kind == "object":
        return {key: instance_of(value) for key, value in schema.get("properties", {}).items()}
    return {"array": [], "string": "w0", "integer": 1, "number": 1.5, "boolean": True, "null": None}[kind]


def answer(body: Body, engine: Engine) -> tuple[list[str], str, list[Body] | None]:
    """``(pieces of text, finish reason, tool calls)`` of one choice."""
    tools = body.get("tools")
    if tools and body.get("tool_choice", "auto") != "none":
        function = tools[0]["function"]
        arguments = json.dumps(instance_of(function.get("parameters") or {}))
        return (
            [],
            "tool_calls",
            [{"id": "call_0", "type": "function", "function": {"name": function["name"], "arguments": arguments}}],
        )
    form = body.get("response_format") or {}
    if form.get("type") == "json_schema":
        return [json.dumps(instance_of(form["json_schema"]["schema"]))], "stop", None
    if form.get("type") == "json_object":
        return ["{}"], "stop", None
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or body.get("n_predict") or engine.tokens
    pieces = [f"w{index}" if index == 0 else f" w{index}" for index in range(limit)]
    stops = body.get("stop") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = "".join(pieces)
        if stop in text:
            return [text[: text.index(stop)]], "stop", None
    return pieces, "stop" if limit == engine.tokens else "length", None


def frame(data: Any) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def chat_chunks(body: Body, engine: Engine) -> list[bytes]:
    """The events of a chat's stream; those of a plain request are made once, so that a benchmark times others' work."""
    plain = {"model", "messages", "stream", "max_tokens", "temperature"}
    if not plain.issuperset(body):
        return make_chat_chunks(body, engine)
    limit = body.get("max_tokens") or engine.tokens
    if limit not in engine.ready_chunks:
        engine.ready_chunks[limit] = make_chat_chunks(body, engine)
    return engine.ready_chunks[limit]


def make_chat_chunks(body: Body, engine: Engine) -> list[bytes]:
    base = {"id": "chatcmpl-fake", "object": "chat.completion.chunk", "created": 1, "model": engine.model}
    chunks = []

    def add(index: int, delta: Body, finish: str | None = None) -> None:
        chunks.append(frame({**base, "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}))

    total = 0
    for index in range(body.get("n") or 1):
        pieces, finish, calls = answer(body, engine)
        add(index, {"role": "assistant", "content": None if calls else ""})
        for piece in pieces:
            add(index, {"content": piece})
        for number, call in enumerate(calls or []):
            add(index, {"tool_calls": [{"index": number, **call}]})
        add(index, {}, finish)
        total += len(pieces)
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append(frame({**base, "choices": [], "usage": usage(body, total)}))
    return [*chunks, frame(b"[DONE]")]


def completion_chunks(body: Body, engine: Engine) -> list[bytes]:
    base = {"id": "cmpl-fake", "object": "text_completion", "created": 1, "model": engine.model}
    pieces, finish, _ = answer(body, engine)
    chunks = [frame({**base, "choices": [{"index": 0, "text": piece, "finish_reason": None}]}) for piece in pieces]
    chunks.append(frame({**base, "choices": [{"index": 0, "text": "", "finish_reason": finish}]}))
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append(frame({**base, "choices": [], "usage": usage(body, len(pieces))}))
    return [*chunks, frame(b"[DONE]")]


def usage(body: Body, completion: int) -> Body:
    prompt = count_tokens(prompt_text(body))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def whole_chat(body: Body, engine: Engine) -> Body:
    choices, total = [], 0
    for index in range(body.get("n") or 1):
        pieces, finish, calls = answer(body, engine)
        total += len(pieces)
        message: Body = {"role": "assistant", "content": None if calls else "".join(pieces)}
        if calls:
            message["tool_calls"] = calls
        choice: Body = {"index": index, "message": message, "finish_reason": finish}
        if body.get("logprobs"):
            choice["logprobs"] = {
                "content": [{"token": piece, "logprob": -0.5, "bytes": None, "top_logprobs": []} for piece in pieces]
            }
        choices.append(choice)
    return {
        "id": "chatcmpl-fake",
        "object": "chat.completion",
        "created": 1,
        "model": engine.model,
        "choices": choices,
        "usage": usage(body, total),
    }


def whole_completion(body: Body, engine: Engine) -> Body:
    prompts = (
        body["prompt"]
        if isinstance(body.get("prompt"), list) and body["prompt"] and isinstance(body["prompt"][0], str)
        else [body.get("prompt")]
    )
    choices, total = [], 0
    for index, prompt in enumerate(prompts):
        pieces, finish, _ = answer(body, engine)
        total += len(pieces)
        text = "".join(pieces)
        logprobs = None
        if body.get("echo"):
            words = str(prompt).split(" ")
            tokens = [word if i == 0 else " " + word for i, word in enumerate(words)] + (
                pieces if body.get("max_tokens") else []
            )
            text = "".join(tokens)
            logprobs = {
                "tokens": tokens,
                "token_logprobs": [None, *[-1.0] * (len(tokens) - 1)],
                "top_logprobs": [None, *[{t: -1.0} for t in tokens[1:]]],
                "text_offset": [0] * len(tokens),
            }
        choices.append({"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs})
    return {
        "id": "cmpl-fake",
        "object": "text_completion",
        "created": 1,
        "model": engine.model,
        "choices": choices,
        "usage": usage(body, total),
    }


async def timed(chunks: list[bytes], engine: Engine) -> AsyncIterator[bytes]:
    if engine.first_token:
        await asyncio.sleep(engine.first_token)
    for chunk in chunks:
        yield chunk
        if engine.token_time:
            await asyncio.sleep(engine.token_time)


async def stream(request: web.Request, engine: Engine, chunks: list[bytes], fault: str | None) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    sent = 0
    async for chunk in timed(chunks, engine):
        await response.write(chunk)
        sent += 1
        engine.counts["tokens"] += 1
        if sent == 4 and fault and fault != "close_end":
            await break_mid(request, response, fault)
            return response
    if fault == "close_end":
        await break_mid(request, response, "close_mid")
        return response
    await response.write_eof()
    return response


async def break_mid(request: web.Request, response: web.StreamResponse, fault: str) -> None:
    await asyncio.sleep(0.05)
    if fault == "die_mid":
        os._exit(9)
    if fault == "stall_mid":
        await asyncio.sleep(3600)
    if fault == "close_mid" and request.transport is not None:
        request.transport.abort()
    if fault == "garbage_mid":
        await response.write(b"\x00\xff{{{ not an event\n\n")


async def generate(request: web.Request, chunked: Any, whole: Any) -> web.StreamResponse:
    engine = request.app[ENGINE]
    body = await request.json()
    engine.counts["requests"] += 1
    engine.bodies = [*engine.bodies[-63:], body]
    engine.active += 1
    engine.most_active = max(engine.most_active, engine.active)
    try:
        response = await respond(request, engine, body, chunked, whole)
        engine.counts["completed"] += 1
        return response
    except (asyncio.CancelledError, ConnectionResetError):
        engine.counts["cancelled"] += 1
        raise
    finally:
        engine.active -= 1


async def respond(request: web.Request, engine: Engine, body: Body, chunked: Any, whole: Any) -> web.StreamResponse:
    fault = engine.take_fault()
    if fault == "die":
        os._exit(9)
    if fault == "hang":
        await asyncio.sleep(3600)
    if fault == "hang_all":
        time.sleep(3600)
    if fault == "error500":
        return web.Response(status=500, text="<html>Internal Server Error</html>", content_type="text/html")
    if fault == "error503":
        return web.json_response(
            {"error": {"message": "no free slot", "code": 503}}, status=503, headers={"Retry-After": "1"}
        )
    if fault == "garbage":
        return web.Response(
            body=b"\x00\xff{{{ not json", content_type="text/event-stream" if body.get("stream") else "application/json"
        )
    needed = count_tokens(prompt_text(body))
    if needed > engine.context:
        message = f"the request exceeds the available context size: {needed} > {engine.context}"
        return web.json_response(
            {"error": {"message": message, "type": "exceed_context_size_error", "code": 400}}, status=400
        )
    if body.get("stream"):
        return await stream(request, engine, chunked(body, engine), fault)
    result = whole(body, engine)
    await asyncio.sleep(engine.first_token + engine.token_time * result.get("usage", {}).get("completion_tokens", 0))
    if fault in ("die_mid", "close_mid", "stall_mid"):
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(b'{"id": "chatcmpl')
        await break_mid(request, response, fault)
        return response
    return web.json_response(result)


async def chat(request: web.Request) -> web.StreamResponse:
    return await generate(request, chat_chunks, whole_chat)


async def completions(request: web.Request) -> web.StreamResponse:
    return await generate(request, completion_chunks, whole_completion)


async def embeddings(request: web.Request) -> web.StreamResponse:
    def whole(body: Body, engine: Engine) -> Body:
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        data = [
            {"object": "embedding", "index": i, "embedding": [float(len(str(t))), 1.0, 0.5]}
            for i, t in enumerate(texts)
        ]
        return {"object": "list", "model": engine.model, "data": data, "usage": usage(body, 0)}

    return await generate(request, completion_chunks, whole)


async def rerank(request: web.Request) -> web.StreamResponse:
    def whole(body: Body, engine: Engine) -> Body:
        words = set(body["query"].split())
        texts = [each if isinstance(each, str) else str(each.get("text")) for each in body["documents"]]
        scores = [(index, float(len(words & set(text.split())))) for index, text in enumerate(texts)]
        results = [
            {"index": index, "relevance_score": score} for index, score in sorted(scores, key=lambda pair: -pair[1])
        ]
        return {"model": engine.model, "results": results, "usage": {"prompt_tokens": 1, "total_tokens": 1}}

    return await generate(request, completion_chunks, whole)


async def tokenize(request: web.Request) -> web.Response:
    body = await request.json()
    tokens = list(range(count_tokens(prompt_text(body))))
    if request.app[ENGINE].dialect == "vllm":
        return web.json_response({"count": len(tokens), "max_model_len": request.app[ENGINE].context, "tokens": tokens})
    return web.json_response({"tokens": tokens})


async def detokenize(request: web.Request) -> web.Response:
    body = await request.json()
    text = " ".join(f"w{token}" for token in body["tokens"])
    return web.json_response({"prompt": text} if request.app[ENGINE].dialect == "vllm" else {"content": text})


async def apply_template(request: web.Request) -> web.Response:
    return web.json_response({"prompt": prompt_text(await request.json())})


async def health(request: web.Request) -> web.Response:
    engine = request.app[ENGINE]
    ready = engine.fault != "not_ready" and time.monotonic() >= engine.ready_at
    return web.json_response({"status": "ok" if ready else "loading model"}, status=200 if ready else 503)


async def models(request: web.Request) -> web.Response:
    return web.json_response(
        {
            "object": "list",
            "data": [{"id": request.app[ENGINE].model, "object": "model", "created": 1, "owned_by": "fake"}],
        }
    )


async def metrics(request: web.Request) -> web.Response:
    engine = request.app[ENGINE]
    if engine.dialect == "vllm":
        label = f'{{model_name="{engine.model}"}}'
        lines = [f"vllm:num_requests_running{label} {engine.active}", f"vllm:kv_cache_usage_perc{label} 0.25"]
    else:
        lines = [f"llamacpp:requests_processing {engine.active}", "llamacpp:requests_deferred 0"]
        lines.append(f"llamacpp:tokens_predicted_total {engine.counts['tokens']}")
    text = "\n".join(lines) + "\n"
    return web.Response(text=text)


async def set_fault(request: web.Request) -> web.Response:
    body = await request.json()
    engine = request.app[ENGINE]
    engine.fault, engine.fault_count = body.get("kind"), body.get("count")
    for name in ("tokens", "first_token", "token_time"):
        if name in body:
            setattr(engine, name, body[name])
    return web.json_response({})


async def log(request: web.Request) -> web.Response:
    engine = request.app[ENGINE]
    return web.json_response(
        {
            **engine.counts,
            "active": engine.active,
            "most_active": engine.most_active,
            "bodies": engine.bodies,
            "pid": os.getpid(),
        }
    )


def make_app(engine: Engine) -> web.Application:
    """The fake engine's application, for tests that keep it in their own process."""
    app = web.Application(client_max_size=2**30)
    app[ENGINE] = engine
    for path, handler in {
        "/v1/chat/completions": chat,
        "/v1/completions": completions,
        "/completion": completions,
        "/v1/embeddings": embeddings,
        "/v1/rerank": rerank,
        "/rerank": rerank,
        "/tokenize": tokenize,
        "/detokenize": detokenize,
        "/apply-template": apply_template,
        "/fault": set_fault,
    }.items():
        app.router.add_post(path, handler)
    for path, handler in {"/health": health, "/v1/models": models, "/metrics": metrics, "/log": log}.items():
        app.router.add_get(path, handler)
    return app


async def serve(port: int, engine: Engine) -> None:
    runner = web.AppRunner(make_app(engine), access_log=None, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    print("ready", runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="fake")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--first-token", type=float, default=0.0)
    parser.add_argument("--token-time", type=float, default=0.0)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--dialect", default="llama.cpp")
    parser.add_argument("--load-time", type=float, default=0.0)
    parser.add_argument("--fault", default="")
    arguments = parser.parse_args()
    kind, _, count = arguments.fault.partition(":")
    if kind == "refuse_load":
        sys.exit("out of memory: cannot allocate the model")
    engine = Engine(
        model=arguments.model,
        tokens=arguments.tokens,
        first_token=arguments.first_token,
        token_time=arguments.token_time,
        context=arguments.context,
        dialect=arguments.dialect,
        fault=kind or None,
        fault_count=int(count) if count else None,
        ready_at=time.monotonic() + arguments.load_time,
    )
    asyncio.run(serve(arguments.port, engine))


if __name__ == "__main__":
    main()
