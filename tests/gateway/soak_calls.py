"""The calls of the soak: each route with the answer that must come, judged as complete, refused, broken or wrong."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import ClientError, ClientResponse, ClientSession

TOKENS = 16
ANSWER = " ".join(f"w{index}" for index in range(TOKENS))
PROPER = frozenset({400, 404, 413, 429, 501, 502, 503, 504})
"""Statuses that refuse or fail a request in order; each needs a message in OpenAI's shape."""

CHATS = ("assistant", "coder", "writer")
TIMEOUT = 60.0


class WrongError(Exception):
    """An answer that is neither complete nor an error."""


@dataclass(frozen=True)
class Outcome:
    """``kind`` of call, and ``answered``, ``left``, ``unreachable``, ``cut`` (the gateway died), ``broken: …`` (an
    error event) or ``refused: STATUS code``."""

    kind: str
    result: str
    id: str


Call = Callable[[ClientSession, str, dict[str, str], random.Random], Awaitable[str]]


def messages(chance: random.Random) -> list[dict[str, str]]:
    return [{"role": "user", "content": "word " * chance.randint(1, 200)}]


async def refused(response: ClientResponse) -> str | None:
    """What an answer with an error status is; None for status 200."""
    if response.status == 200:
        return None
    if response.status not in PROPER:
        raise WrongError(f"status {response.status}: {(await response.text())[:200]}")
    error = (await response.json())["error"]
    if not error["message"] or set(error) != {"message", "type", "param", "code"}:
        raise WrongError(f"an error without its fields: {error}")
    return f"refused: {response.status} {error['code']}"


def check(text: str, whole: bool) -> None:
    if (whole and text != ANSWER) or not ANSWER.startswith(text):
        raise WrongError(f"a token is lost or doubled: {text[:200]!r}")


def posting(path: str, body: Callable[[random.Random], dict[str, Any]], text: Callable[[Any], str]) -> Call:
    """A call whose answer comes at once; ``text`` finds it."""

    async def call(http: ClientSession, url: str, headers: dict[str, str], chance: random.Random) -> str:
        async with http.post(url + path, json=body(chance), headers=headers) as response:
            bad = await refused(response)
            if bad is not None:
                return bad
            check(text(await response.json()), whole=True)
            return "answered"

    return call


def streaming(
    path: str, body: Callable[[random.Random], dict[str, Any]], piece: Callable[[Any], tuple[str, bool]]
) -> Call:
    """A call whose answer streams; ``piece`` gives the text of an event and whether it is the last."""

    async def call(http: ClientSession, url: str, headers: dict[str, str], chance: random.Random) -> str:
        async with http.post(url + path, json=body(chance), headers=headers) as response:
            bad = await refused(response)
            return bad if bad is not None else await read_stream(response, piece)

    return call


async def read_stream(response: ClientResponse, piece: Callable[[Any], tuple[str, bool]]) -> str:
    """Every line that comes: the whole answer and its end, or a part of it and an error."""
    text, done, error = "", False, None
    async for line in response.content:
        data = line.removeprefix(b"data:").strip()
        if not data:
            continue
        if data == b"[DONE]":
            done = True
            continue
        event = json.loads(data)
        if "error" in event:
            error = event["error"]
            continue
        if done or error:
            raise WrongError("something after the end")
        found, last = piece(event)
        text += found
        done = last
    check(text, whole=done)
    if done == (error is not None):
        raise WrongError(f"a stream that ends without an end after {text!r}")
    return "answered" if done else f"broken: {error['code'] if isinstance(error, dict) else error}"


def leaving(call: Call) -> Call:
    """The same, from a client that goes away."""

    async def left(http: ClientSession, url: str, headers: dict[str, str], chance: random.Random) -> str:
        try:
            return await asyncio.wait_for(call(http, url, headers, chance), chance.choice([0.005, 0.05, 0.3]))
        except asyncio.TimeoutError:
            return "left"

    return left


def expecting(path: str, raw: bytes | dict[str, Any], status: int) -> Call:
    """A request that makes no sense, and the status that says so."""

    async def call(http: ClientSession, url: str, headers: dict[str, str], chance: random.Random) -> str:
        data = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
        async with http.post(url + path, data=data, headers=headers) as response:
            bad = await refused(response)
            if response.status != status and response.status != 503:
                raise WrongError(f"status {response.status} for {path}, not {status}: {bad}")
            return str(bad)

    return call


def model(chance: random.Random) -> str:
    return chance.choice(["assistant", "assistant", "assistant@int4", "coder", "writer"])


def chat_piece(event: Any) -> tuple[str, bool]:
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"]), False


CALLS: dict[str, tuple[int, Call]] = {
    "chat": (
        6,
        posting(
            "/v1/chat/completions",
            lambda chance: {"model": model(chance), "messages": messages(chance)},
            lambda value: value["choices"][0]["message"]["content"],
        ),
    ),
    "chat stream": (
        10,
        streaming(
            "/v1/chat/completions",
            lambda chance: {"model": model(chance), "messages": messages(chance), "stream": True},
            chat_piece,
        ),
    ),
    "completion": (
        3,
        posting(
            "/v1/completions",
            lambda chance: {"model": model(chance), "prompt": "x " * chance.randint(1, 50)},
            lambda value: value["choices"][0]["text"],
        ),
    ),
    "completion stream": (
        3,
        streaming(
            "/v1/completions",
            lambda chance: {"model": model(chance), "prompt": "x", "stream": True},
            lambda event: ("".join(choice["text"] for choice in event["choices"]), False),
        ),
    ),
    "embeddings": (
        3,
        posting(
            "/v1/embeddings",
            lambda chance: {"model": "embedder", "input": ["x"] * chance.randint(1, 8)},
            lambda value: ANSWER if value["data"][0]["embedding"] == [1.0, 1.0, 0.5] else "wrong vectors",
        ),
    ),
    "rerank": (
        2,
        posting(
            "/v1/rerank",
            lambda chance: {"model": "ranker", "query": "a b", "documents": ["c", "a b"]},
            lambda value: ANSWER if value["results"][0]["index"] == 1 else "wrong order",
        ),
    ),
    "ollama chat": (
        3,
        streaming(
            "/api/chat",
            lambda chance: {"model": model(chance), "messages": messages(chance)},
            lambda event: (event["message"]["content"], event["done"]),
        ),
    ),
    "ollama generate": (
        2,
        posting(
            "/api/generate",
            lambda chance: {"model": model(chance), "prompt": "x", "stream": False},
            lambda value: value["response"],
        ),
    ),
    "tgi": (
        2,
        posting(
            "/generate",
            lambda chance: {"model": model(chance), "inputs": "x", "parameters": {"max_new_tokens": TOKENS}},
            lambda value: value["generated_text"],
        ),
    ),
    "tgi stream": (
        2,
        streaming(
            "/generate_stream",
            lambda chance: {"model": model(chance), "inputs": "x", "parameters": {"max_new_tokens": TOKENS}},
            lambda event: (event["token"]["text"], event["generated_text"] is not None),
        ),
    ),
    "llama.cpp stream": (
        2,
        streaming(
            "/completion",
            lambda chance: {"model": model(chance), "prompt": "x", "stream": True},
            lambda event: (event["content"], event["stop"]),
        ),
    ),
    "broken JSON": (1, expecting("/v1/chat/completions", b'{"model": "assis', 400)),
    "unknown model": (1, expecting("/v1/completions", {"model": "assistent", "prompt": "x"}, 404)),
    "too long": (1, expecting("/v1/completions", {"model": "assistant", "prompt": "word " * 20_000}, 400)),
    "over the budget": (1, expecting("/v1/completions", {"model": "giant", "prompt": "x"}, 503)),
}
CALLS["chat stream, leaving"] = (4, leaving(CALLS["chat stream"][1]))
CALLS["ollama chat, leaving"] = (1, leaving(CALLS["ollama chat"][1]))


async def ask(http: ClientSession, url: str, kind: str, number: int, seed: int) -> Outcome:
    """One call, under an id of its own. Raises :class:`WrongError` for what no fault explains."""
    chance = random.Random(seed * 1_000_003 + number)
    name = f"soak-{number}"
    try:
        return Outcome(
            kind, await asyncio.wait_for(CALLS[kind][1](http, url, {"x-request-id": name}, chance), TIMEOUT), name
        )
    except asyncio.TimeoutError:
        raise WrongError(f"{kind}: no answer for {TIMEOUT:g} s") from None
    except (ClientError, ConnectionError) as error:
        return Outcome(kind, "unreachable" if "Connect" in type(error).__name__ else "cut", name)
    except WrongError as error:
        raise WrongError(f"{kind} {name}: {error}") from None
