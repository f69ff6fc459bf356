"""What the routes of other servers share: their request as one of OpenAI's, OpenAI's answer as theirs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from lowbit.gateway.events import EventReader
from lowbit.gateway.refusal import error_body
from lowbit.gateway.relay import Answer, Call, EngineFailed
from lowbit.gateway.requests import ChatRequest, CompletionRequest, validate
from lowbit.gateway.state import STATE, start_call

__all__ = ["Piece", "ask", "pieces", "send_stream", "taken", "whole"]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@dataclass(slots=True)
class Piece:
    """A part of an answer, or all of it: text, reasoning, tool calls, why it ended, tokens so far."""

    text: str = ""
    thinking: str = ""
    tool_calls: list[dict[str, Any]] | None = None
    finish: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprobs: Mapping[str, Any] | None = None


def taken(source: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The fields of ``source`` that are given, under OpenAI's names."""
    return {ours: source[theirs] for theirs, ours in names.items() if source.get(theirs) is not None}


async def ask(
    request: web.Request, body: dict[str, Any], path: str, *, stream: bool, options: Mapping[str, Any] | None = None
) -> Call:
    """The call for a request that was put in OpenAI's terms. Raises a refusal for values out of range."""
    sent = {key: value for key, value in body.items() if value is not None}
    if stream:
        sent |= {"stream": True, "stream_options": {"include_usage": True}}
    if options:
        sent["lowbit"] = dict(options)
    named = {"model": "-", **sent}
    parsed = validate(ChatRequest, named) if path == CHAT else validate(CompletionRequest, named)
    return await start_call(request, sent, sent.get("model"), parsed.lowbit, path, stream=stream)


def whole(answer: Answer) -> Piece:
    """A complete answer."""
    value = answer.json()
    choice = (value.get("choices") or [{}])[0]
    message = choice.get("message") or {}
    usage = value.get("usage") or {}
    return Piece(
        text=message.get("content") or choice.get("text") or "",
        thinking=message.get("reasoning_content") or "",
        tool_calls=message.get("tool_calls"),
        finish=choice.get("finish_reason"),
        prompt_tokens=usage.get("prompt_tokens", 0),
        completion_tokens=usage.get("completion_tokens", 0),
        logprobs=choice.get("logprobs"),
    )


async def pieces(answer: Answer) -> AsyncIterator[Piece]:
    """A stream's pieces with text; the last one has the finish reason, the tokens and all tool calls."""
    reader = EventReader()
    last = Piece(finish="stop")
    calls: dict[int, dict[str, Any]] = {}
    async for chunk in answer.chunks():
        try:
            events = list(reader.feed(chunk))
        except ValueError as error:
            answer.lease.failed("garbage")
            raise EngineFailed("garbage", f"the engine of {answer.lease.tier_id} sent a broken event") from error
        for event in events:
            usage = event.get("usage")
            if usage:
                last.prompt_tokens = usage.get("prompt_tokens", 0)
                last.completion_tokens = usage.get("completion_tokens", 0)
            for choice in event.get("choices") or ():
                delta = choice.get("delta") or {}
                last.finish = choice.get("finish_reason") or last.finish
                _collect(calls, delta.get("tool_calls") or ())
                text = delta.get("content") or choice.get("text") or ""
                thinking = delta.get("reasoning_content") or ""
                if text or thinking:
                    yield Piece(text=text, thinking=thinking, logprobs=choice.get("logprobs"))
    last.tool_calls = [calls[index] for index in sorted(calls)] or None
    last.completion_tokens = last.completion_tokens or answer.call.completion_tokens
    yield last


def _collect(calls: dict[int, dict[str, Any]], deltas: Any) -> None:
    """Put the fragments of streamed tool calls together."""
    for delta in deltas:
        call = calls.setdefault(
            delta.get("index", 0), {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        )
        call["id"] = delta.get("id") or call["id"]
        function = delta.get("function") or {}
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""


async def send_stream(
    request: web.Request,
    call: Call,
    content_type: str,
    render: Callable[[Piece, bool], bytes],
    failed: Callable[[dict[str, Any]], bytes] = lambda error: json.dumps(error).encode() + b"\n",
) -> web.StreamResponse:
    """Stream an answer in another server's words: ``render`` gets each piece, and whether it is the last."""
    async with request.app[STATE].relay.answer(call) as answer:
        response = web.StreamResponse(
            headers={"Content-Type": content_type, "Cache-Control": "no-cache", **answer.headers}
        )
        await response.prepare(request)
        try:
            async for piece in pieces(answer):
                await response.write(render(piece, piece.finish is not None))
        except EngineFailed as error:
            await response.write(failed(error_body(502, str(error), "engine_failed")))
        await response.write_eof()
        return response
