"""Images in messages: data urls pass, addresses only where the configuration allows them, fetched here and checked.

An engine never fetches anything for a client: what is allowed is downloaded by the gateway, from public addresses
only, and put into the message as a data url. The address is checked when the name is resolved for the connection
itself, for every redirect anew, so that a name cannot change its mind in between.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket
from typing import Any
from urllib.parse import urljoin, urlsplit

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from lowbit.gateway.config import ImagesConfig
from lowbit.gateway.refusal import Refusal

__all__ = ["ImageReader", "PublicResolver", "is_public"]

_REDIRECTS = 3
_TIMEOUT = ClientTimeout(total=20.0, sock_connect=5.0)
_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
    b"BM": "image/bmp",
}


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet; an IPv4 one in IPv6 clothes counts as what it is."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo[1] if parsed.teredo else None)
        if inner is not None:
            parsed = inner
        elif parsed in ipaddress.ip_network("64:ff9b::/96"):
            parsed = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
    return parsed.is_global and not parsed.is_multicast


class PublicResolver(AbstractResolver):
    """Resolves names to public addresses only."""

    def __init__(self, inner: AbstractResolver | None = None) -> None:
        self._inner = inner or ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The public addresses of ``host``. Raises :class:`OSError` where there is none."""
        found = [each for each in await self._inner.resolve(host, port, family) if is_public(each["host"])]
        if not found:
            raise OSError(f"{host} has no public address")
        return found

    async def close(self) -> None:
        """Close the resolver behind it."""
        await self._inner.close()


class ImageReader:
    """Makes every image of a request one that the engine needs not fetch."""

    def __init__(self, config: ImagesConfig, resolver: AbstractResolver | None = None) -> None:
        self._config = config
        self._resolver = resolver
        self._session: ClientSession | None = None

    async def settle(self, body: dict[str, Any]) -> None:
        """Check the images of ``body`` and put what allowed addresses lead to in their place, or raise a refusal."""
        for index, message in enumerate(body.get("messages") or ()):
            content = message.get("content")
            if not isinstance(content, list):
                continue
            for number, part in enumerate(content):
                where = f"messages[{index}].content[{number}]"
                for field in ("image_url", "video_url", "audio_url"):
                    holder = part.get(field)
                    if holder is not None:
                        url = holder.get("url") if isinstance(holder, dict) else holder
                        part[field] = {
                            **(holder if isinstance(holder, dict) else {}),
                            "url": await self._data(url, where),
                        }
        if isinstance(body.get("input"), list):
            self._refuse_nested(body["input"], "input")

    def _refuse_nested(self, value: object, where: str) -> None:
        """/v1/responses: images by data url only."""
        if isinstance(value, list):
            for index, item in enumerate(value):
                self._refuse_nested(item, f"{where}[{index}]")
        elif isinstance(value, dict):
            for key in ("image_url", "file_url"):
                url = value.get(key)
                if isinstance(url, str) and not url.startswith("data:"):
                    raise Refusal(400, f"{where}.{key}: only data: urls are taken here", param=f"{where}.{key}")
            for key, item in value.items():
                self._refuse_nested(item, f"{where}.{key}")

    async def _data(self, url: object, where: str) -> str:
        if not isinstance(url, str):
            raise Refusal(400, f"{where}: the url must be a string", param=where)
        if url.startswith("data:"):
            if len(url) > self._config.bytes * 4 // 3 + 64:
                raise Refusal(413, f"{where}: the image has more than {self._config.bytes} bytes", param=where)
            return url
        scheme = urlsplit(url).scheme
        if scheme not in ("http", "https"):
            raise Refusal(400, f"{where}: an image is a data: url, not {scheme or 'a path'}", param=where)
        if not self._config.remote:
            raise Refusal(400, f"{where}: this server fetches no images; send a data: url", param=where)
        return await self._fetch(url, where)

    async def _fetch(self, url: str, where: str) -> str:
        session = self._client()
        try:
            for _ in range(_REDIRECTS + 1):
                self._check_host(url, where)
                async with session.get(url, allow_redirects=False, timeout=_TIMEOUT) as response:
                    if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                        url = urljoin(url, response.headers["Location"])
                        continue
                    if response.status != 200:
                        raise Refusal(400, f"{where}: the image's server answered {response.status}", param=where)
                    return await self._encode(response.content, where)
        except (ClientError, OSError, asyncio.TimeoutError, ValueError):
            raise Refusal(400, f"{where}: the image cannot be fetched", param=where) from None
        raise Refusal(400, f"{where}: more than {_REDIRECTS} redirects", param=where)

    def _check_host(self, url: str, where: str) -> None:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".").lower()
        if parts.scheme not in ("http", "https") or not host or parts.username is not None:
            raise Refusal(400, f"{where}: not a plain http(s) url", param=where)
        allowed = self._config.domains
        if allowed and not any(host == name or host.endswith(f".{name}") for name in allowed):
            raise Refusal(400, f"{where}: images of {host} are not allowed here", param=where)
        literal = host.replace(".", "").isdecimal() or ":" in host or host.startswith("0x")
        if literal and not is_public(host):
            raise Refusal(400, f"{where}: {host} is no public address", param=where)

    async def _encode(self, content: Any, where: str) -> str:
        data = bytearray()
        async for chunk in content.iter_any():
            data += chunk
            if len(data) > self._config.bytes:
                raise Refusal(413, f"{where}: the image has more than {self._config.bytes} bytes", param=where)
        kind = next((name for magic, name in _MAGIC.items() if data.startswith(magic)), None)
        if kind is None and data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            kind = "image/webp"
        if kind is None:
            raise Refusal(400, f"{where}: what the url leads to is no image", param=where)
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"

    def _client(self) -> ClientSession:
        if self._session is None:
            connector = TCPConnector(resolver=PublicResolver(self._resolver), use_dns_cache=False, force_close=True)
            self._session = ClientSession(connector=connector, trust_env=False, auto_decompress=False)
        return self._session

    async def close(self) -> None:
        """Close the client, if there was need of one."""
        if self._session is not None:
            await self._session.close()
