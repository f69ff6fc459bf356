"""llama.cpp's own completion route, over any engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from aiohttp import web

from lowbit.gateway.events import data_event
from lowbit.gateway.relay import Call
from lowbit.gateway.requests import WHOLE, NonEmpty, Prompt, Strict, validate
from lowbit.gateway.routes.translate import COMPLETIONS, Piece, ask, send_stream, whole
from lowbit.gateway.state import STATE, read_json

__all__ = ["ROUTES", "LlamaCompletion"]

_RENAMED = {"repeat_penalty": "repetition_penalty", "n_predict": "max_tokens"}


class LlamaCompletion(Strict):
    """POST /completion; further fields are those of the sampler and pass as they are."""

    prompt: Prompt
    model: NonEmpty | None = None
    n_predict: Annotated[int, WHOLE] | None = None
    stream: bool | None = None


async def completion(request: web.Request) -> web.StreamResponse:
    """The continuation of a text."""
    raw = await read_json(request)
    parsed = validate(LlamaCompletion, raw)
    body = {_RENAMED.get(key, key): value for key, value in raw.items() if key not in ("stream", "stream_options")}
    if (parsed.n_predict or 0) < 0:
        del body["max_tokens"]
    call = await ask(request, body, COMPLETIONS, stream=bool(parsed.stream))
    if not call.stream:
        async with request.app[STATE].relay.answer(call) as answer:
            return web.json_response(_value(call, whole(answer), last=True), headers=answer.headers)

    def render(piece: Piece, last: bool) -> bytes:
        return data_event(_value(call, piece, last))

    return await send_stream(request, call, "text/event-stream; charset=utf-8", render, data_event)


def _value(call: Call, piece: Piece, last: bool) -> dict[str, Any]:
    value: dict[str, Any] = {"index": 0, "content": piece.text, "stop": last}
    if last:
        value |= {
            "model": call.model,
            "stop_type": "limit" if piece.finish == "length" else "eos",
            "tokens_evaluated": piece.prompt_tokens,
            "tokens_predicted": piece.completion_tokens,
            "truncated": False,
        }
    return value


ROUTES: Mapping[tuple[str, str], Any] = {("POST", "/completion"): completion}
