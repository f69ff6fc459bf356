"""Text Generation Inference's own routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from aiohttp import web
from pydantic import Field

from lowbit import __version__
from lowbit.gateway.events import data_event
from lowbit.gateway.relay import Call
from lowbit.gateway.requests import (
    NonEmpty,
    Penalty,
    Positive,
    RepetitionPenalty,
    Seed,
    Share,
    Strict,
    Temperature,
    TopK,
    validate,
)
from lowbit.gateway.routes.translate import COMPLETIONS, Piece, ask, send_stream, taken, whole
from lowbit.gateway.state import STATE, read_json

__all__ = ["ROUTES", "TgiGenerate"]

_PARAMETERS = {
    "max_new_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "stop": "stop",
}


class TgiParameters(Strict):
    """Sampling, in TGI's names."""

    max_new_tokens: Positive | None = None
    do_sample: bool | None = None
    temperature: Temperature = None
    top_p: Share = None
    top_k: TopK = None
    repetition_penalty: RepetitionPenalty = None
    frequency_penalty: Penalty = None
    seed: Seed = None
    details: bool | None = None
    return_full_text: bool | None = None
    stop: Annotated[list[NonEmpty], Field(max_length=16)] | None = None


class TgiGenerate(Strict):
    """POST /generate and /generate_stream. ``model`` may be left out where there is only one."""

    inputs: Annotated[str, Field(min_length=1)]
    parameters: TgiParameters | None = None
    model: NonEmpty | None = None
    stream: bool | None = None


async def _call(request: web.Request, parsed: TgiGenerate, stream: bool) -> Call:
    given = parsed.parameters.model_dump() if parsed.parameters else {}
    body = {"prompt": parsed.inputs, "max_tokens": 100, **taken(given, _PARAMETERS)}
    if parsed.model is not None:
        body["model"] = parsed.model
    if given.get("do_sample") is False:
        body["temperature"] = 0.0
    return await ask(request, body, COMPLETIONS, stream=stream)


async def generate(request: web.Request) -> web.StreamResponse:
    """The continuation of a text."""
    parsed = validate(TgiGenerate, await read_json(request))
    if parsed.stream:
        return await _stream(request, parsed)
    call = await _call(request, parsed, stream=False)
    async with request.app[STATE].relay.answer(call) as answer:
        piece = whole(answer)
        parameters = parsed.parameters or TgiParameters()
        prefix = parsed.inputs if parameters.return_full_text else ""
        value: dict[str, Any] = {"generated_text": prefix + piece.text}
        if parameters.details:
            value["details"] = _details(piece)
        return web.json_response(value, headers=answer.headers)


async def generate_stream(request: web.Request) -> web.StreamResponse:
    """The same as events, one a token."""
    return await _stream(request, validate(TgiGenerate, await read_json(request)))


async def _stream(request: web.Request, parsed: TgiGenerate) -> web.StreamResponse:
    call = await _call(request, parsed, stream=True)
    texts: list[str] = []

    def render(piece: Piece, last: bool) -> bytes:
        texts.append(piece.text)
        token = {"id": 0, "text": piece.text, "logprob": 0.0, "special": last and not piece.text}
        value = {"index": len(texts), "token": token, "generated_text": None, "details": None}
        if last:
            value |= {"generated_text": "".join(texts), "details": _details(piece)}
        return b"data:" + data_event(value).removeprefix(b"data: ")

    return await send_stream(
        request, call, "text/event-stream; charset=utf-8", render, lambda error: b"data:" + data_event(error)[6:]
    )


def _details(piece: Piece) -> dict[str, Any]:
    reason = "length" if piece.finish == "length" else "eos_token"
    return {"finish_reason": reason, "generated_tokens": piece.completion_tokens, "seed": None, "prefill": []}


async def info(request: web.Request) -> web.Response:
    """What is served."""
    model = request.app[STATE].pool.models()[0]
    tier = model.tiers[0]
    return web.json_response(
        {
            "model_id": model.name,
            "model_dtype": tier.name,
            "max_total_tokens": tier.context,
            "max_input_tokens": tier.context and tier.context - 1,
            "version": __version__,
            "router": "lowbit",
        }
    )


ROUTES: Mapping[tuple[str, str], Any] = {
    ("POST", "/generate"): generate,
    ("POST", "/generate_stream"): generate_stream,
    ("GET", "/info"): info,
}
