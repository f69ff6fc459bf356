"""Ollama's routes, for clients that speak only those. ``keep_alive`` and ``num_ctx`` are the server's affair."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import Field

from lowbit import __version__
from lowbit.gateway.protocol import ModelInfo, RefusedError, TierInfo
from lowbit.gateway.relay import Call
from lowbit.gateway.requests import (
    WHOLE,
    EmbeddingRequest,
    NonEmpty,
    Penalty,
    RepetitionPenalty,
    Seed,
    Share,
    Stop,
    Strict,
    Temperature,
    Tool,
    TopK,
    validate,
)
from lowbit.gateway.routes.translate import CHAT, COMPLETIONS, Piece, ask, send_stream, taken, whole
from lowbit.gateway.state import STATE, read_json, start_call

__all__ = ["ROUTES", "OllamaChat", "OllamaEmbed", "OllamaGenerate", "OllamaShow"]

_OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}


class OllamaMessage(Strict):
    """One message; ``images`` are base64."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: list[str] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class OllamaOptions(Strict):
    """Sampling, in Ollama's names; the others (``num_ctx`` …) are the server's affair."""

    temperature: Temperature = None
    top_p: Share = None
    top_k: TopK = None
    min_p: Share = None
    seed: Seed = None
    stop: Stop = None
    repeat_penalty: RepetitionPenalty = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    num_predict: Annotated[int, WHOLE] | None = None


class OllamaChat(Strict):
    """POST /api/chat."""

    model: NonEmpty
    messages: Annotated[list[OllamaMessage], Field(min_length=1)]
    tools: Annotated[list[Tool], Field(max_length=512)] | None = None
    format: Literal["json", ""] | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    stream: bool | None = None


class OllamaGenerate(Strict):
    """POST /api/generate."""

    model: NonEmpty
    prompt: NonEmpty
    system: str | None = None
    suffix: str | None = None
    images: list[str] | None = None
    format: Literal["json", ""] | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    stream: bool | None = None
    raw: bool | None = None


class OllamaEmbed(Strict):
    """POST /api/embed."""

    model: NonEmpty
    input: str | Annotated[list[str], Field(min_length=1)]


class OllamaShow(Strict):
    """POST /api/show."""

    model: str | None = None
    name: str | None = None


async def chat(request: web.Request) -> web.StreamResponse:
    """A chat's next message, line by line."""
    raw = await read_json(request)
    parsed = validate(OllamaChat, raw)
    body = {
        "model": _name(request, parsed.model),
        "messages": [_message(message) for message in parsed.messages],
        "tools": raw.get("tools") or None,
        **_format(parsed.format),
        **_sampling(parsed.options),
    }
    call = await ask(request, body, CHAT, stream=parsed.stream is not False)
    return await _answer(request, call, parsed.model, "message")


async def generate(request: web.Request) -> web.StreamResponse:
    """The answer to a prompt; the chat template is applied unless ``raw``."""
    parsed = validate(OllamaGenerate, await read_json(request))
    body: dict[str, Any] = {
        "model": _name(request, parsed.model),
        **_format(parsed.format),
        **_sampling(parsed.options),
    }
    if parsed.raw or parsed.suffix:
        body |= {"prompt": parsed.prompt, "suffix": parsed.suffix}
        call = await ask(request, body, COMPLETIONS, stream=parsed.stream is not False)
    else:
        system = [{"role": "system", "content": parsed.system}] if parsed.system else []
        user = OllamaMessage(role="user", content=parsed.prompt, images=parsed.images)
        body["messages"] = [*system, _message(user)]
        call = await ask(request, body, CHAT, stream=parsed.stream is not False)
    return await _answer(request, call, parsed.model, "response")


async def _answer(request: web.Request, call: Call, model: str, field: str) -> web.StreamResponse:
    """``message`` of /api/chat or ``response`` of /api/generate."""

    def line(piece: Piece, last: bool) -> dict[str, Any]:
        value: dict[str, Any] = {"model": model, "created_at": _moment()}
        if field == "message":
            message: dict[str, Any] = {"role": "assistant", "content": piece.text}
            if piece.thinking:
                message["thinking"] = piece.thinking
            if piece.tool_calls:
                message["tool_calls"] = [_tool_call(each) for each in piece.tool_calls]
            value["message"] = message
        else:
            value["response"] = piece.text
        value["done"] = last
        return value | (_totals(call, piece) if last else {})

    def render(piece: Piece, last: bool) -> bytes:
        return json.dumps(line(piece, last), ensure_ascii=False).encode() + b"\n"

    if call.stream:
        return await send_stream(request, call, "application/x-ndjson", render)
    async with request.app[STATE].relay.answer(call) as answer:
        return web.json_response(line(whole(answer), last=True), headers=answer.headers)


def _totals(call: Call, piece: Piece) -> dict[str, Any]:
    total = time.perf_counter() - call.started
    first = call.first_token or total
    nanoseconds = 1_000_000_000
    return {
        "done_reason": "length" if piece.finish == "length" else "stop",
        "total_duration": int(total * nanoseconds),
        "load_duration": int(call.waited * nanoseconds),
        "prompt_eval_count": piece.prompt_tokens,
        "prompt_eval_duration": int(max(0.0, first - call.waited) * nanoseconds),
        "eval_count": piece.completion_tokens,
        "eval_duration": int(max(0.0, total - first) * nanoseconds),
    }


def _message(message: OllamaMessage) -> dict[str, Any]:
    value: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.images:
        urls = [
            image if image.startswith("data:") else f"data:{_kind(image)};base64,{image}" for image in message.images
        ]
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        value["content"] = [{"type": "text", "text": message.content or ""}, *parts]
    if message.tool_calls:
        value["tool_calls"] = [
            {
                "id": f"call_{index}",
                "type": "function",
                "function": {
                    "name": (call.get("function") or {}).get("name", ""),
                    "arguments": json.dumps((call.get("function") or {}).get("arguments") or {}),
                },
            }
            for index, call in enumerate(message.tool_calls)
        ]
    return value


def _kind(image: str) -> str:
    """The type of a base64 image, by how it begins."""
    return "image/jpeg" if image.startswith("/9j/") else "image/png"


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        arguments = {"": function["arguments"]}
    return {"function": {"name": function["name"], "arguments": arguments}}


def _format(form: str | dict[str, Any] | None) -> dict[str, Any]:
    if isinstance(form, dict):
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "format", "schema": form}}}
    return {"response_format": {"type": "json_object"}} if form == "json" else {}


def _sampling(options: OllamaOptions | None) -> dict[str, Any]:
    given = options.model_dump(exclude_none=True) if options else {}
    limit = given.get("num_predict", 0)
    return taken(given, _OPTIONS) | ({"max_tokens": limit} if limit > 0 else {})


def _name(request: web.Request, name: str) -> str:
    """Ollama's clients add ``:latest`` to a name without a tag."""
    try:
        request.app[STATE].pool.resolve(name)
    except RefusedError:
        return name.removesuffix(":latest")
    return name


def _moment(seconds: float | None = None) -> str:
    when = datetime.now(timezone.utc) if seconds is None else datetime.fromtimestamp(seconds, timezone.utc)
    return when.isoformat().replace("+00:00", "Z")


async def embed(request: web.Request) -> web.Response:
    """Vectors of texts."""
    parsed = validate(OllamaEmbed, await read_json(request))
    name = _name(request, parsed.model)
    body = {"model": name, "input": parsed.input}
    validate(EmbeddingRequest, body)
    call = await start_call(request, body, name, None, "/v1/embeddings")
    async with request.app[STATE].relay.answer(call) as answer:
        vectors = [item["embedding"] for item in answer.json()["data"]]
        value = {"model": parsed.model, "embeddings": vectors, "prompt_eval_count": call.prompt_tokens}
        return web.json_response(value, headers=answer.headers)


async def tags(request: web.Request) -> web.Response:
    """All models, and each of their tiers."""
    models = request.app[STATE].pool.models()
    entries = [entry for model in models for entry in _entries(model)]
    return web.json_response({"models": entries})


def _entries(model: ModelInfo) -> list[dict[str, Any]]:
    def entry(name: str, tier: TierInfo) -> dict[str, Any]:
        moment = _moment(model.created)
        return {
            "name": name,
            "model": name,
            "modified_at": moment,
            "size": tier.memory,
            "digest": "",
            "details": _details(tier),
        }

    return [entry(model.name, model.tiers[0]), *(entry(tier.id, tier) for tier in model.tiers)]


def _details(tier: TierInfo) -> dict[str, Any]:
    return {
        "format": tier.engine,
        "family": "",
        "families": [],
        "parameter_size": "",
        "quantization_level": tier.name,
    }


async def show(request: web.Request) -> web.Response:
    """One model."""
    pool = request.app[STATE].pool
    parsed = validate(OllamaShow, await read_json(request))
    name, wanted = pool.resolve(_name(request, parsed.model or parsed.name or ""))
    model = next(model for model in pool.models() if model.name == name)
    tier = next((tier for tier in model.tiers if tier.name == wanted), model.tiers[0])
    info = {"general.name": name, "context_length": tier.context, "lowbit.kl": tier.kl, "lowbit.bits": tier.bits}
    chat = ["completion"] if tier.tools is False else ["completion", "tools"]
    capabilities = {"chat": chat, "embedding": ["embedding"], "rerank": []}[model.kind]
    return web.json_response(
        {"details": _details(tier), "model_info": info, "capabilities": capabilities, "template": ""}
    )


async def version(request: web.Request) -> web.Response:
    """The version of lowbit."""
    return web.json_response({"version": __version__})


ROUTES: Mapping[tuple[str, str], Any] = {
    ("POST", "/api/chat"): chat,
    ("POST", "/api/generate"): generate,
    ("POST", "/api/embed"): embed,
    ("GET", "/api/tags"): tags,
    ("POST", "/api/show"): show,
    ("GET", "/api/version"): version,
}
