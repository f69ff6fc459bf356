"""Keys, origins, images, and what must not get out."""

from __future__ import annotations

import base64
import io
import json
import logging
from typing import Any

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from fake_engine import Engine
from harness import gateway, make_config, run, running

from lowbit.errors import UsageError
from lowbit.gateway.auth import KeyRing, check_binding, hash_key, new_key
from lowbit.gateway.config import ImagesConfig
from lowbit.gateway.images import ImageReader, is_public
from lowbit.gateway.log import LOGGER, log_to
from lowbit.gateway.refusal import Refusal

CHAT: dict[str, Any] = {"model": "assistant", "messages": [{"role": "user", "content": "my secret prompt"}]}


def test_every_route_but_health_wants_a_key() -> None:
    async def scenario() -> None:
        key, other = new_key(), new_key()
        async with gateway([Engine()], api_keys=[hash_key(key)]) as bench:
            for route in bench.app.router.routes():
                path = route.resource.canonical if route.resource is not None else ""
                if route.method not in ("GET", "POST") or path in ("/health", "/ready"):
                    continue
                for headers in ({}, {"Authorization": f"Bearer {other}"}, {"Authorization": "Basic eDp5"}):
                    url = bench.url + path.replace("{model}", "assistant")
                    async with bench.http.request(route.method, url, json={}, headers=headers) as response:
                        assert response.status == 401, path
                        assert key not in await response.text()
            basic = base64.b64encode(f"me:{key}".encode()).decode()
            for header, value in (
                ("Authorization", f"Bearer {key}"),
                ("x-api-key", key),
                ("Authorization", f"Basic {basic}"),
            ):
                status, _ = await bench.post("/v1/chat/completions", CHAT, headers={header: value})
                assert status == 200
            async with bench.http.get(f"{bench.url}/health") as response:
                assert await response.json() == {"status": "ok"}

    run(scenario)


def test_keys_come_hashed_or_from_the_environment() -> None:
    ring = KeyRing.from_config([hash_key("one"), "env:KEYS"], {"KEYS": "two, three"})
    names = {ring.identify({"Authorization": f"Bearer {key}"}, "") for key in ("one", "two", "three")}
    assert len(names) == 3
    with pytest.raises(Refusal):
        ring.identify({"Authorization": "Bearer four"}, "")
    with pytest.raises(UsageError, match="NOTHING"):
        KeyRing.from_config(["env:NOTHING"], {})


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_an_open_address_needs_a_key_or_a_word(host: str) -> None:
    with pytest.raises(UsageError, match="insecure"):
        check_binding(make_config(host=host))
    check_binding(make_config(host=host, insecure=True))
    check_binding(make_config(host=host, api_keys=["env:X"]))
    check_binding(make_config(host="::1"))


def test_pages_of_other_sites_are_kept_out() -> None:
    async def scenario() -> None:
        async with gateway([Engine()], cors_origins=["https://friend.example"]) as bench:
            for headers, expected in (
                ({"Origin": "https://evil.example"}, 403),
                ({"Origin": "null"}, 403),
                ({"Host": "evil.example"}, 403),
                ({"Origin": bench.url}, 200),
                ({"Origin": "https://friend.example"}, 200),
            ):
                status, _ = await bench.post("/v1/chat/completions", CHAT, headers=headers)
                assert status == expected, headers
            preflight = {"Origin": "https://friend.example", "Access-Control-Request-Method": "POST"}
            async with bench.http.options(f"{bench.url}/v1/chat/completions", headers=preflight) as response:
                assert response.status == 204
                assert response.headers["Access-Control-Allow-Origin"] == "https://friend.example"

    run(scenario)


def test_logs_hold_no_prompts_and_no_keys() -> None:
    async def scenario() -> None:
        key = new_key()
        stream = io.StringIO()
        kept = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate
        log_to(stream)
        try:
            async with gateway([Engine()], api_keys=[hash_key(key)]) as bench:
                headers = {"Authorization": f"Bearer {key}", "x-request-id": "abc"}
                await bench.post("/v1/chat/completions", CHAT, headers=headers)
                await bench.post("/v1/chat/completions", {**CHAT, "n": -1}, headers=headers)
        finally:
            LOGGER.handlers[:], LOGGER.propagate = kept[0], kept[2]
            LOGGER.setLevel(kept[1])
        lines = [json.loads(line) for line in stream.getvalue().splitlines()]
        assert [line["status"] for line in lines if line["event"] == "request"] == [200, 400]
        assert lines[0]["id"] == "abc"
        assert lines[0]["tier"] == "int8"
        assert "secret" not in stream.getvalue()
        assert key not in stream.getvalue()

    run(scenario)


def test_a_bug_is_an_error_without_details() -> None:
    async def scenario() -> None:
        async with gateway([Engine()]) as bench:
            bench.pool.resolve = lambda name: 1 / 0  # type: ignore[assignment, return-value]
            LOGGER.setLevel(logging.CRITICAL)
            status, answer = await bench.post("/v1/chat/completions", CHAT)
            LOGGER.setLevel(logging.NOTSET)
            assert status == 500
            assert "ZeroDivision" not in json.dumps(answer)

    run(scenario)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1", False),
        ("fc00::1", False),
        ("::ffff:127.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("2606:4700:4700::1111", True),
        ("localhost", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


def message(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


class Names(AbstractResolver):
    """A name server of the test's own."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[ResolveResult]:
        address = self.names[host]
        return [{"hostname": host, "host": address, "port": port, "family": family, "proto": 0, "flags": 0}]

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "/etc/passwd",
        "ftp://example.org/x.png",
        "http://127.0.0.1/x.png",
        "http://[::1]/x.png",
        "http://2130706433/x.png",
        "http://0x7f000001/x.png",
        "http://user:pw@example.org/x.png",
        "http://inside.example/x.png",
        "http://169.254.169.254/latest/meta-data",
    ],
)
@pytest.mark.parametrize("remote", [False, True])
def test_images_from_where_they_may_not_come(url: str, remote: bool) -> None:
    async def scenario() -> None:
        reader = ImageReader(
            ImagesConfig(remote=remote), Names({"inside.example": "10.0.0.1", "example.org": "10.0.0.2"})
        )
        with pytest.raises(Refusal) as caught:
            await reader.settle(message(url))
        await reader.close()
        assert caught.value.status == 400

    run(scenario)


def test_an_allowed_image_is_fetched_and_its_redirects_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        png = b"\x89PNG\r\n\x1a\n" + b"0" * 100

        async def good(request: web.Request) -> web.Response:
            return web.Response(body=png)

        async def inside(request: web.Request) -> web.Response:
            raise web.HTTPFound("http://127.0.0.1:9/x.png")

        async def around(request: web.Request) -> web.Response:
            raise web.HTTPFound("/around")

        async def text(request: web.Request) -> web.Response:
            return web.Response(text="<html>")

        async def big(request: web.Request) -> web.Response:
            return web.Response(body=png * 1000)

        app = web.Application()
        for name, handler in {"good": good, "inside": inside, "around": around, "text": text, "big": big}.items():
            app.router.add_get(f"/{name}", handler)
        async with running(app) as url:
            port = url.rpartition(":")[2]
            seen: list[str] = []

            def only_the_tests_server(address: str) -> bool:
                seen.append(address)
                return len(seen) == 1

            reader = ImageReader(ImagesConfig(remote=True, bytes=5000), Names({"pics.example": "127.0.0.1"}))
            monkeypatch.setattr("lowbit.gateway.images.is_public", only_the_tests_server)
            body = message(f"http://pics.example:{port}/good")
            await reader.settle(body)
            data = body["messages"][0]["content"][0]["image_url"]["url"]
            assert data == "data:image/png;base64," + base64.b64encode(png).decode()
            for path, words in (("inside", "no public address"), ("text", "no image"), ("big", "5000 bytes")):
                seen.clear()
                with pytest.raises(Refusal, match=words):
                    await reader.settle(message(f"http://pics.example:{port}/{path}"))
            seen.clear()
            with pytest.raises(Refusal):
                await reader.settle(message(f"http://pics.example:{port}/around"))
            monkeypatch.undo()
            with pytest.raises(Refusal, match="cannot be fetched"):
                await reader.settle(message(f"http://pics.example:{port}/good"))
            await reader.close()

    run(scenario)
