"""The gateway's web application: routes, and the edge that every request passes."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from aiohttp import ClientSession, web

from lowbit.gateway.auth import KeyRing, OriginGuard, check_binding
from lowbit.gateway.config import ServeConfig
from lowbit.gateway.gate import Gate
from lowbit.gateway.images import ImageReader
from lowbit.gateway.log import LOGGER, log_event
from lowbit.gateway.metrics import Metrics
from lowbit.gateway.openapi import describe
from lowbit.gateway.protocol import PoolProtocol, RefusedError
from lowbit.gateway.refusal import Refusal
from lowbit.gateway.relay import Call, Relay
from lowbit.gateway.routes import llama_cpp, ollama, openai, status, tgi
from lowbit.gateway.routes import web as page
from lowbit.gateway.state import CALL, KEY, REQUEST_ID, STATE, State, request_id

__all__ = ["make_app", "serve"]

OPEN_PATHS = frozenset({"/health", "/ready"})
"""What answers without a key: that the gateway lives, and nothing else about it."""

CLIENT_LEFT = 499
"""Status in logs and metrics of a request whose client went away."""

_EXTRA: web.RequestKey[dict[str, str]] = web.RequestKey("headers", dict)

_TABLES = (openai.ROUTES, ollama.ROUTES, tgi.ROUTES, llama_cpp.ROUTES, status.ROUTES, page.ROUTES)
_QUIET = frozenset({"/health", "/ready", "/metrics", "/status"})

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(pool: PoolProtocol, config: ServeConfig) -> web.Application:
    """The application over ``pool``; it starts and stops the pool with itself.

    Raises :class:`lowbit.errors.UsageError` for keys that are missing or an address that needs one.
    """
    check_binding(config)
    gate = Gate(config.limits, pool.capacity, pool.now)
    metrics = Metrics(pool, gate)
    app = web.Application(client_max_size=config.limits.body_bytes, middlewares=[_edge])
    app[STATE] = State(
        config=config,
        pool=pool,
        gate=gate,
        relay=Relay(pool, gate, config, metrics),
        metrics=metrics,
        keys=KeyRing.from_config(config.api_keys),
        origins=OriginGuard(config),
        images=ImageReader(config.images),
        kinds={model.name: model.kind for model in pool.models()},
    )
    for table in _TABLES:
        for (method, path), handler in table.items():
            app.router.add_route(method, path, handler)
    app.on_response_prepare.append(_add_headers)
    app.router.add_get("/openapi.json", _description)
    pool.subscribe(metrics.on_event)
    pool.subscribe(_Listener(gate))
    app.cleanup_ctx.append(_running)
    return app


async def _description(request: web.Request) -> web.Response:
    """This description."""
    return web.json_response(describe(request.app, keys=bool(request.app[STATE].keys)))


async def serve(app: web.Application, *, listening: Callable[[str, int], None] | None = None) -> None:
    """Answer until cancelled; then finish what is under way, for up to 30 seconds. ``listening`` hears the address."""
    config = app[STATE].config
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=30.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.host, config.port, backlog=1024)
        await site.start()
        gc.collect()
        gc.freeze()  # what is there now stays; the collector need not walk it again and again
        if listening is not None:
            host, port = runner.addresses[0][:2]
            listening(host, port)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


class _Listener:
    """Wakes queues when the pool changes, and logs what happened."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __call__(self, event: str, tier_id: str, details: Mapping[str, Any]) -> None:
        log_event(event, tier=tier_id, **{key: value for key, value in details.items() if key != "tier"})
        self._gate.wake(tier_id.rpartition("@")[0] or tier_id)


async def _running(app: web.Application) -> AsyncIterator[None]:
    state = app[STATE]
    async with ClientSession() as client:
        app[status.CLIENT] = client
        await state.pool.start()
        try:
            yield
        finally:
            await state.pool.stop()
            await state.images.close()
            for handler in LOGGER.handlers:
                handler.flush()


@web.middleware
async def _edge(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Identity, access, errors in OpenAI's shape, the log line."""
    started = time.perf_counter()
    state = request.app[STATE]
    request[REQUEST_ID] = request_id(request.headers)
    extra = {"x-request-id": request[REQUEST_ID], "x-lowbit-request-id": request[REQUEST_ID]}
    request[_EXTRA] = extra
    outcome = 500
    try:
        try:
            response = await _admit(request, handler, state, extra)
        except Refusal as refusal:
            response = _answer(refusal)
            if refusal.status == 401 and request.path in page.PATHS:
                response.headers["WWW-Authenticate"] = 'Basic realm="lowbit: any name, the API key as password"'
        except RefusedError as error:
            response = _answer(Refusal(error.status, error.message, code=error.code, retry_after=error.retry_after))
        except web.HTTPException as error:
            response = _http_error(request, error)
        outcome = response.status
        return response
    except asyncio.CancelledError:
        outcome = CLIENT_LEFT
        raise
    except ConnectionError:  # found out in writing that the client is gone: nobody reads what is returned
        outcome = CLIENT_LEFT
        return web.Response(status=CLIENT_LEFT)
    except Exception:  # noqa: BLE001 - the request's boundary: whatever went wrong stays this request's trouble
        LOGGER.exception("bug", extra={"fields": {"id": request[REQUEST_ID], "route": request.path}})
        return _answer(Refusal(500, "an error inside the gateway; its log has the details under this request id"))
    finally:
        _record(request, state, outcome, time.perf_counter() - started)


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(request.get(_EXTRA, {}))


async def _admit(request: web.Request, handler: Handler, state: State, extra: dict[str, str]) -> web.StreamResponse:
    extra.update(state.origins.check(request.headers))
    if request.method == "OPTIONS" and "Origin" in request.headers:
        return web.Response(status=204)
    if request.path not in OPEN_PATHS:
        request[KEY] = state.keys.identify(request.headers, request.remote or "")
    return await handler(request)


def _answer(refusal: Refusal) -> web.Response:
    return web.json_response(refusal.body, status=refusal.status, headers=refusal.headers)


def _http_error(request: web.Request, error: web.HTTPException) -> web.Response:
    """aiohttp's own errors (no such route, wrong method) in OpenAI's shape."""
    if error.status == 404:
        message = f"there is no route {request.method} {request.path}; /openapi.json lists them"
    elif isinstance(error, web.HTTPMethodNotAllowed):
        message = f"{request.path} takes {', '.join(sorted(error.allowed_methods))}, not {request.method}"
    else:
        message = error.reason
    refusal = Refusal(error.status, message)
    allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    return web.json_response(refusal.body, status=error.status, headers=allow)


def _record(request: web.Request, state: State, outcome: int, seconds: float) -> None:
    call: Call | None = request.get(CALL)
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else "none"
    model, tier = (call.model, call.answered_by) if call is not None else ("", "")
    state.metrics.answered(model, tier, route, outcome, seconds)
    if outcome == CLIENT_LEFT:
        state.metrics.left(model)
    if route in _QUIET and outcome < 400:
        return
    log_event(
        "request",
        logging.INFO if outcome < 500 else logging.WARNING,
        id=request[REQUEST_ID],
        method=request.method,
        route=route,
        status=outcome,
        key=request.get(KEY),
        model=model,
        tier=tier,
        tried=call.tried if call else None,
        seconds=round(seconds, 4),
        waited=round(call.waited, 4) if call else None,
        first_token=round(call.first_token, 4) if call and call.first_token else None,
        prompt_tokens=call.prompt_tokens if call else None,
        completion_tokens=call.completion_tokens if call else None,
    )
