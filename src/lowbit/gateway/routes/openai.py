"""OpenAI's routes: what comes is checked and passed to an engine, what it answers goes back byte for byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from lowbit.gateway.events import data_event
from lowbit.gateway.protocol import ModelInfo, TierInfo
from lowbit.gateway.refusal import Refusal, error_body
from lowbit.gateway.relay import Answer, EngineFailed
from lowbit.gateway.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    RerankRequest,
    ResponsesRequest,
    Strict,
    TokenizeRequest,
    validate,
)
from lowbit.gateway.state import STATE, begin, read_json, start_call

__all__ = ["ROUTES", "STREAM_HEADERS", "EventStream", "pipe"]

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class EventStream(web.StreamResponse):
    """A stream whose head leaves in one packet with the first token: half the system calls of a short answer."""

    _send_headers_immediately = False  # aiohttp's own for whole answers; one that forgets it just sends two packets


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """A chat's next message."""
    return await _pass(request, ChatRequest, "/v1/chat/completions")


async def completions(request: web.Request) -> web.StreamResponse:
    """The continuation of a text."""
    return await _pass(request, CompletionRequest, "/v1/completions")


async def responses(request: web.Request) -> web.StreamResponse:
    """OpenAI's newer interface, where the engine has it."""
    return await _pass(request, ResponsesRequest, "/v1/responses")


async def embeddings(request: web.Request) -> web.StreamResponse:
    """Vectors of texts."""
    return await _pass(request, EmbeddingRequest, "/v1/embeddings")


async def rerank(request: web.Request) -> web.StreamResponse:
    """Documents in order of relevance to a query."""
    return await _pass(request, RerankRequest, "/v1/rerank")


async def _pass(request: web.Request, kind: type[Strict], path: str) -> web.StreamResponse:
    call, _ = await begin(request, kind, path)
    async with request.app[STATE].relay.answer(call) as answer:
        if call.stream:
            return await pipe(request, answer)
        return web.Response(body=answer.body, content_type="application/json", headers=answer.headers)


async def pipe(request: web.Request, answer: Answer) -> web.StreamResponse:
    """Send a stream on. If the engine breaks off, the last event is the error, and there is no ``[DONE]``."""
    response = EventStream(headers={**STREAM_HEADERS, **answer.headers})
    await response.prepare(request)
    try:
        async for chunk in answer.chunks():
            if answer.complete:
                await response.write_eof(chunk)
            else:
                await response.write(chunk)
    except EngineFailed as error:
        await response.write(b"\n\n" + data_event(error_body(502, str(error), "engine_failed")))
    await response.write_eof()
    return response


async def models(request: web.Request) -> web.Response:
    """All models, and each of their tiers as ``model@tier``."""
    entries = [entry for model in request.app[STATE].pool.models() for entry in _entries(model)]
    return web.json_response({"object": "list", "data": entries})


async def model(request: web.Request) -> web.Response:
    """One model or tier."""
    pool = request.app[STATE].pool
    name, tier = pool.resolve(request.match_info["model"])
    wanted = name if tier is None else f"{name}@{tier}"
    found = next(entry for each in pool.models() for entry in _entries(each) if entry["id"] == wanted)
    return web.json_response(found)


def _entries(model: ModelInfo) -> list[dict[str, Any]]:
    base = {"object": "model", "created": model.created, "owned_by": "lowbit"}
    whole = {"kind": model.kind, "aliases": list(model.aliases), "tiers": [_tier(tier) for tier in model.tiers]}
    tiers = [{"id": tier.id, **base, "lowbit": {"kind": model.kind, **_tier(tier)}} for tier in model.tiers]
    return [{"id": model.name, **base, "lowbit": whole}, *tiers]


def _tier(tier: TierInfo) -> dict[str, Any]:
    return {
        "tier": tier.name,
        "engine": tier.engine,
        "bits": tier.bits,
        "memory": tier.memory,
        **({"gpu_memory": sum(tier.gpu_memory)} if any(tier.gpu_memory) else {}),
        "kl": tier.kl,
        "error": tier.error,
        "context": tier.context,
    }


async def tokenize(request: web.Request) -> web.Response:
    """Tokens of a text or a chat: the answer suits clients of llama.cpp (``tokens``) and of vLLM (``count``)."""
    body = await read_json(request)
    parsed = validate(TokenizeRequest, body)
    call = await start_call(request, body, parsed.model, parsed.lowbit, "/tokenize")
    async with request.app[STATE].relay.borrow(call) as lease:
        tokens = await request.app[STATE].relay.tokenize(lease, body)
        if tokens is None:
            raise Refusal(501, f"the engine of {lease.tier_id} does not tokenize; llama.cpp and vLLM do")
        answer = {"tokens": tokens, "count": len(tokens), "max_model_len": lease.context}
        return web.json_response(answer, headers={"x-lowbit-tier": lease.tier})


async def detokenize(request: web.Request) -> web.Response:
    """The text of tokens."""
    body = await read_json(request)
    parsed = validate(DetokenizeRequest, body)
    call = await start_call(request, {"tokens": parsed.tokens}, parsed.model, parsed.lowbit, "/detokenize")
    async with request.app[STATE].relay.answer(call) as answer:
        value = answer.json()
        text = value.get("content", value.get("prompt"))
        return web.json_response({"content": text, "prompt": text}, headers=answer.headers)


ROUTES: Mapping[tuple[str, str], Any] = {
    ("POST", "/v1/chat/completions"): chat_completions,
    ("POST", "/v1/completions"): completions,
    ("POST", "/v1/responses"): responses,
    ("POST", "/v1/embeddings"): embeddings,
    ("POST", "/v1/rerank"): rerank,
    ("POST", "/rerank"): rerank,
    ("GET", "/v1/models"): models,
    ("GET", "/v1/models/{model:.+}"): model,
    ("POST", "/tokenize"): tokenize,
    ("POST", "/detokenize"): detokenize,
}
