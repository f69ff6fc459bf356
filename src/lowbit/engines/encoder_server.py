"""The encoder engine: ``python -m lowbit.engines.encoder_server --model DIR --kind embedding|rerank --port N``.

OpenAI's ``/v1/embeddings``, and ``/rerank`` as Cohere, Jina, TEI and vLLM have it, over :mod:`lowbit.engines.encoder`
with dynamic batching. A text that is too long is refused with its length unless ``truncate`` is true.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hmac
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from aiohttp import web

from lowbit.engines.batching import Batcher
from lowbit.engines.encoder import Encoder, Encoding
from lowbit.engines.llama_server import KEY_VARIABLE
from lowbit.errors import LowbitError

__all__ = ["main", "make_app"]

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_OPEN = "/health"


class _BadRequestError(Exception):
    """What the client can mend."""


class Service:
    """The routes over one encoder."""

    def __init__(self, encoder: Encoder, name: str) -> None:
        self.encoder, self.name = encoder, name
        self.batcher: Batcher[Encoding] = Batcher(encoder.run, lambda each: len(each.ids))
        self.tokens = 0
        self.active = 0

    async def _encode(self, encodings: list[Encoding]) -> list[npt.NDArray[np.float32]]:
        self.active += 1
        try:
            results = await self.batcher.submit(encodings)
        finally:
            self.active -= 1
        self.tokens += sum(len(each.ids) for each in encodings)
        return results

    def _fitting(self, encoding: Encoding, truncate: bool, what: str) -> Encoding:
        limit = self.encoder.limit
        if len(encoding.ids) <= limit:
            return encoding
        if truncate:
            return Encoding((*encoding.ids[: limit - 1], encoding.ids[-1]), encoding.segments[:limit])
        over = len(encoding.ids) - limit
        raise _BadRequestError(f"{what} has {len(encoding.ids)} tokens, {over} more than the {limit} of this model")

    async def embeddings(self, request: web.Request) -> web.Response:
        """``/v1/embeddings``."""
        if self.encoder.kind != "embedding":
            raise _BadRequestError("this model ranks; it makes no embeddings")
        body = await _body(request)
        truncate = bool(body.get("truncate", False))
        inputs = _inputs(body.get("input"))
        encodings = []
        for index, item in enumerate(inputs):
            try:
                found = self.encoder.tokenize(item) if isinstance(item, str) else self.encoder.wrap(item)
            except ValueError as error:
                raise _BadRequestError(f"input {index}: {error}") from error
            encodings.append(self._fitting(found, truncate, f"input {index}"))
        vectors = await self._encode(encodings)
        dimensions = body.get("dimensions")
        if dimensions is not None:
            vectors = [_shortened(vector, dimensions) for vector in vectors]
        packed = body.get("encoding_format") == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode() if packed else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ]
        usage = sum(len(each.ids) for each in encodings)
        return web.json_response(
            {
                "object": "list",
                "model": self.name,
                "data": data,
                "usage": {"prompt_tokens": usage, "total_tokens": usage},
            }
        )

    async def rerank(self, request: web.Request) -> web.Response:
        """``/rerank``: the documents by falling relevance to the query."""
        if self.encoder.kind != "rerank":
            raise _BadRequestError("this model makes embeddings; it does not rank")
        body = await _body(request)
        query = body.get("query")
        documents = body.get("documents", body.get("texts"))
        if not isinstance(query, str) or not isinstance(documents, list) or not documents:
            raise _BadRequestError("query must be a text and documents a list of texts that is not empty")
        texts = [each.get("text") if isinstance(each, dict) else each for each in documents]
        if not all(isinstance(text, str) for text in texts):
            raise _BadRequestError("documents must be texts, or objects with text")
        truncate = bool(body.get("truncate", False))
        encodings = [
            self._fitting(self.encoder.tokenize(query, text), truncate, f"the query with document {index}")
            for index, text in enumerate(texts)
        ]
        scores = [float(score[0]) for score in await self._encode(encodings)]
        order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
        count = body.get("top_n") or len(order)
        if not isinstance(count, int) or count < 1:
            raise _BadRequestError("top_n must be a whole number above zero")
        results = [
            {"index": index, "relevance_score": scores[index]}
            | ({"document": {"text": texts[index]}} if body.get("return_documents") else {})
            for index in order[:count]
        ]
        usage = sum(len(each.ids) for each in encodings)
        return web.json_response(
            {"model": self.name, "results": results, "usage": {"prompt_tokens": usage, "total_tokens": usage}}
        )

    async def tokenize(self, request: web.Request) -> web.Response:
        """``/tokenize``."""
        body = await _body(request)
        text = body.get("content", body.get("prompt"))
        if not isinstance(text, str):
            raise _BadRequestError("content must be a text")
        return web.json_response({"tokens": list(self.encoder.tokenize(text).ids)})

    async def models(self, request: web.Request) -> web.Response:
        """``/v1/models``."""
        data = {"id": self.name, "object": "model", "created": int(time.time()), "owned_by": "lowbit"}
        return web.json_response({"object": "list", "data": [data]})

    async def metrics(self, request: web.Request) -> web.Response:
        """``/metrics``, for Prometheus."""
        values = {
            "lowbit_encoder_requests_running": self.active,
            "lowbit_encoder_items_waiting": self.batcher.waiting,
            "lowbit_encoder_items_total": self.batcher.items,
            "lowbit_encoder_batches_total": self.batcher.batches,
            "lowbit_encoder_tokens_total": self.tokens,
        }
        return web.Response(text="".join(f"{name} {value}\n" for name, value in values.items()))


def _shortened(vector: npt.NDArray[np.float32], dimensions: object) -> npt.NDArray[np.float32]:
    """The first ``dimensions`` of a vector, of unit length again."""
    if not isinstance(dimensions, int) or not 1 <= dimensions <= len(vector):
        raise _BadRequestError(f"dimensions must be between 1 and {len(vector)}")
    head = vector[:dimensions]
    return head / max(float(np.linalg.norm(head)), 1e-12)


def _inputs(value: object) -> Sequence[str | Sequence[int]]:
    """OpenAI's ``input``: a text, texts, token ids, or lists of token ids."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise _BadRequestError("input must be a text, a list of texts, or token ids; it must not be empty")
    if all(type(item) is int for item in value):
        value = [value]
    for item in value:
        if not isinstance(item, str) and not (isinstance(item, list) and all(type(each) is int for each in item)):
            raise _BadRequestError("input must hold texts or token ids only")
    return value


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError:
        raise _BadRequestError("the body is not JSON") from None
    if not isinstance(body, dict):
        raise _BadRequestError("the body must be a JSON object")
    return body


def make_app(service: Service, key: str = "") -> web.Application:
    """The application; with ``key``, all but ``/health`` wants it as a bearer token."""

    @web.middleware
    async def edge(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if key and request.path != _OPEN and not hmac.compare_digest(given.encode(), key.encode()):
            return _error(401, "the key is missing or wrong")
        try:
            return await handler(request)
        except _BadRequestError as error:
            return _error(400, str(error))
        except RuntimeError as error:
            return _error(500, str(error))

    async def health(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    app = web.Application(middlewares=[edge], client_max_size=64 * 1024**2)
    app.router.add_get(_OPEN, health)
    app.router.add_get("/v1/models", service.models)
    app.router.add_get("/metrics", service.metrics)
    app.router.add_post("/v1/embeddings", service.embeddings)
    app.router.add_post("/tokenize", service.tokenize)
    for path in ("/rerank", "/v1/rerank"):
        app.router.add_post(path, service.rerank)
    return app


def _error(status: int, message: str) -> web.Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return web.json_response({"error": {"message": message, "type": kind, "code": None}}, status=status)


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="lowbit.engines.encoder_server", allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--name", default="")
    parser.add_argument("--kind", choices=("embedding", "rerank"), required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--int8", action="store_true")
    parsed = parser.parse_args(arguments)
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    try:
        encoder = Encoder(parsed.model, parsed.kind, int8=parsed.int8)
    except LowbitError as error:
        print(error, file=sys.stderr)
        return 1
    app = make_app(Service(encoder, parsed.name or parsed.model.name), os.environ.pop(KEY_VARIABLE, ""))
    asyncio.run(_serve(app, parsed.host, parsed.port))
    return 0


async def _serve(app: web.Application, host: str, port: int) -> None:
    leave = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, leave.set)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    await leave.wait()
    await runner.cleanup()


if __name__ == "__main__":
    sys.exit(main())
