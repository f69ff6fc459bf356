"""What the routes share, and what each of them does first with a request."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from aiohttp import web
from pydantic import ValidationError

from lowbit.gateway.auth import KeyRing, OriginGuard
from lowbit.gateway.config import ServeConfig
from lowbit.gateway.gate import Gate
from lowbit.gateway.images import ImageReader
from lowbit.gateway.metrics import Metrics
from lowbit.gateway.protocol import ModelInfo, PoolProtocol
from lowbit.gateway.refusal import Refusal
from lowbit.gateway.relay import Call, Relay
from lowbit.gateway.requests import LowbitOptions, parse_json, validate

__all__ = ["CALL", "KEY", "REQUEST_ID", "STATE", "State", "begin", "read_json", "request_id", "start_call"]


@dataclass(slots=True)
class State:
    """One gateway."""

    config: ServeConfig
    pool: PoolProtocol
    gate: Gate
    relay: Relay
    metrics: Metrics
    keys: KeyRing
    origins: OriginGuard
    images: ImageReader
    kinds: Mapping[str, str]


STATE: web.AppKey[State] = web.AppKey("state", State)
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
KEY: web.RequestKey[str] = web.RequestKey("key", str)
CALL: web.RequestKey[Call] = web.RequestKey("call", Call)

_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_OPTION_HEADERS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "x-lowbit-tier": ("tier", str),
    "x-lowbit-precision": ("precision", str),
    "x-lowbit-memory": ("memory", int),
    "x-lowbit-speed": ("speed", lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()]),
    "x-lowbit-priority": ("priority", int),
    "x-lowbit-deadline": ("deadline", float),
}
_KINDS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "chat",
    "/v1/responses": "chat",
    "/v1/embeddings": "embedding",
    "/v1/rerank": "rerank",
}
"""Path of an engine's route to the kind of model that has it."""

_NO_OPTIONS = LowbitOptions()
Kind = TypeVar("Kind", bound=Any)


def request_id(headers: Mapping[str, str]) -> str:
    """The client's ``x-request-id`` if it is a plain word, else a new one."""
    given = headers.get("x-request-id")
    return given if given and _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


async def read_json(request: web.Request) -> dict[str, Any]:
    """The JSON object in the body. Raises :class:`Refusal` 400 or 413."""
    try:
        raw = await request.read()
    except web.HTTPRequestEntityTooLarge:
        limit = request.app[STATE].config.limits.body_bytes
        raise Refusal(413, f"the body is too large: this server takes {limit} bytes") from None
    return parse_json(raw)


async def begin(request: web.Request, kind: type[Kind], path: str) -> tuple[Call, Kind]:
    """Read and check a request of OpenAI's shape, and make the call to the engine's ``path`` of it."""
    body = await read_json(request)
    parsed: Kind = validate(kind, body)
    return await start_call(request, body, parsed.model, parsed.lowbit, path, stream=bool(body.get("stream"))), parsed


async def start_call(
    request: web.Request,
    body: dict[str, Any],
    model: str | None,
    options: LowbitOptions | None,
    path: str,
    *,
    stream: bool = False,
) -> Call:
    """The call for a checked body. Without a model the only one there is meant.

    Raises :class:`Refusal` or :class:`RefusedError` for a model that is not there.
    """
    state = request.app[STATE]
    kind = _KINDS.get(path)
    name, tier = state.pool.resolve(model if model is not None else _only_model(state.pool, kind))
    if kind is not None and state.kinds[name] != kind:
        raise _other_kind(name, kind, state.kinds)
    await state.images.settle(body)
    resource = request.match_info.route.resource
    call = Call(
        id=request[REQUEST_ID],
        route=resource.canonical if resource is not None else request.path,
        path=path,
        body=body,
        model=name,
        tier=tier,
        options=_options(options, request.headers),
        key=request[KEY],
        stream=stream,
    )
    request[CALL] = call
    return call


def _other_kind(name: str, kind: str, kinds: Mapping[str, str]) -> Refusal:
    others = [other for other, its in kinds.items() if its == kind]
    hint = f"; of that kind is {', '.join(others)}" if others else f"; set kind: {kind} for one that can do it"
    message = f"{name!r} is a model of kind {kinds[name]}, this route wants {kind}{hint}"
    return Refusal(404, message, param="model", code="not_supported")


def _only_model(pool: PoolProtocol, kind: str | None) -> str:
    models: list[ModelInfo] = [model for model in pool.models() if kind is None or model.kind == kind]
    if kind is None and len(models) > 1:
        models = [model for model in models if model.kind == "chat"] or models
    if len(models) != 1:
        names = ", ".join(model.name for model in models) or "none"
        raise Refusal(400, f"model: name one of {names}", param="model", code="missing_model")
    return models[0].name


def _options(options: LowbitOptions | None, headers: Mapping[str, str]) -> LowbitOptions:
    """The body's field ``lowbit``, filled up from the headers ``x-lowbit-…``."""
    values: dict[str, Any] = {}
    for header, (name, convert) in _OPTION_HEADERS.items():
        text = headers.get(header)
        if text is None:
            continue
        try:
            values[name] = convert(text)
            LowbitOptions(**{name: values[name]})
        except (ValueError, KeyError, ValidationError):
            raise Refusal(400, f"header {header}: {text!r} is no such value", param=header) from None
    if not values:
        return options or _NO_OPTIONS
    return LowbitOptions(**{**values, **(options.model_dump(exclude_unset=True) if options else {})})
