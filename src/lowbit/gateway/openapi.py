"""``/openapi.json``: every route with what it takes, from the models that check it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from aiohttp import web
from pydantic.json_schema import models_json_schema

from lowbit import __version__
from lowbit.gateway import requests
from lowbit.gateway.routes import llama_cpp, ollama, tgi

__all__ = ["describe"]

BODIES: Mapping[str, type[requests.Strict]] = {
    "/v1/chat/completions": requests.ChatRequest,
    "/v1/completions": requests.CompletionRequest,
    "/v1/responses": requests.ResponsesRequest,
    "/v1/embeddings": requests.EmbeddingRequest,
    "/v1/rerank": requests.RerankRequest,
    "/rerank": requests.RerankRequest,
    "/tokenize": requests.TokenizeRequest,
    "/detokenize": requests.DetokenizeRequest,
    "/api/chat": ollama.OllamaChat,
    "/api/generate": ollama.OllamaGenerate,
    "/api/embed": ollama.OllamaEmbed,
    "/api/show": ollama.OllamaShow,
    "/generate": tgi.TgiGenerate,
    "/generate_stream": tgi.TgiGenerate,
    "/completion": llama_cpp.LlamaCompletion,
}
"""Path of a POST route to what its body is checked against."""

STREAMS: Mapping[str, str] = {
    "/v1/chat/completions": "text/event-stream",
    "/v1/completions": "text/event-stream",
    "/v1/responses": "text/event-stream",
    "/generate": "text/event-stream",
    "/generate_stream": "text/event-stream",
    "/completion": "text/event-stream",
    "/api/chat": "application/x-ndjson",
    "/api/generate": "application/x-ndjson",
}
"""Path to the media type of its stream."""

ENGINE_ROUTES = frozenset(BODIES) - {"/api/show"}
"""Routes that ask an engine, and so take the headers that choose it."""

PLAIN: Mapping[str, str] = {
    "/metrics": "text/plain",
    "/": "text/html",
    "/style.css": "text/css",
    "/app.js": "text/javascript",
    "/markdown.js": "text/javascript",
    "/status.js": "text/javascript",
}
"""Path to the media type of an answer that is not JSON."""

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}

_TIER_HEADERS = {
    "x-request-id": "of the client, or a new one",
    "x-lowbit-model": "the model that answered",
    "x-lowbit-tier": "its tier",
    "x-lowbit-kl": "the tier's measured KL divergence from the original, nats per token",
}


def describe(app: web.Application, *, keys: bool) -> dict[str, Any]:
    """OpenAPI 3.1 of all routes of ``app``; ``keys`` says whether they want one."""
    models = [(model, "validation") for model in dict.fromkeys(BODIES.values())]
    _, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for route in app.router.routes():
        if route.method in ("GET", "POST") and route.resource is not None:
            path = route.resource.canonical
            paths.setdefault(path, {})[route.method.lower()] = _operation(route, path, keys)
    error = {"description": "what is wrong", "content": {"application/json": {"schema": _ref("Error")}}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "lowbit",
            "version": __version__,
            "description": "Many quantized models at one address; speaks as OpenAI, Ollama, TGI and llama.cpp do.",
        },
        "paths": paths,
        "components": {
            "schemas": {**schemas.get("$defs", {}), "Error": _ERROR},
            "responses": {"Error": error},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: web.AbstractRoute, path: str, keys: bool) -> dict[str, Any]:
    body = BODIES.get(path) if route.method == "POST" else None
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{path}").strip("_"),
        "summary": (route.handler.__doc__ or "").strip().partition("\n")[0].rstrip("."),
        "responses": {"200": _answer(path, body is not None), "default": {"$ref": "#/components/responses/Error"}},
    }
    if path == "/ready":
        operation["responses"]["503"] = {"description": "not yet", "content": {"application/json": {}}}
    if keys and path not in ("/health", "/ready"):
        operation["security"] = [{"key": []}]
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)", path)
    ]
    if body is not None:
        content = {"application/json": {"schema": _ref(body.__name__)}}
        operation["requestBody"] = {"required": True, "content": content}
        parameters += _option_headers() if path in ENGINE_ROUTES else []
    if parameters:
        operation["parameters"] = parameters
    return operation


def _option_headers() -> list[dict[str, Any]]:
    """The headers ``x-lowbit-…``: the fields of :class:`~lowbit.gateway.requests.LowbitOptions`, one each."""
    found = []
    for name, schema in requests.LowbitOptions.model_json_schema()["properties"].items():
        kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
        plain = {key: value for key, value in kinds[0].items() if key not in ("title", "description", "default")}
        found.append(
            {"name": f"x-lowbit-{name}", "in": "header", "schema": plain, "description": schema["description"]}
        )
    return found


def _answer(path: str, asked: bool) -> dict[str, Any]:
    kinds = [PLAIN.get(path, "application/json"), *([STREAMS[path]] if path in STREAMS else [])]
    if path == "/generate_stream":
        kinds = kinds[1:]
    answer: dict[str, Any] = {"description": "the answer", "content": {kind: {} for kind in kinds}}
    if asked:
        headers = {name: {"description": text, "schema": {"type": "string"}} for name, text in _TIER_HEADERS.items()}
        answer["headers"] = headers
    return answer


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
