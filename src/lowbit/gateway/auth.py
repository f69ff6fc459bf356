"""Who may ask: API keys by their hashes, and which pages of the web may call this server."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import os
import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache
from urllib.parse import urlsplit

from lowbit.errors import UsageError
from lowbit.gateway.config import ServeConfig
from lowbit.gateway.refusal import Refusal

__all__ = ["KeyRing", "OriginGuard", "check_binding", "hash_key", "is_loopback", "new_key"]


def new_key() -> str:
    """A fresh API key: 256 random bits."""
    return f"lb-{secrets.token_urlsafe(32)}"


def hash_key(key: str) -> str:
    """``sha256:<hex>``, as the configuration holds it. Keys are long and random, so a plain hash is enough."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


@lru_cache(256)
def is_loopback(host: str) -> bool:
    """Whether an address to bind is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_binding(config: ServeConfig) -> None:
    """Raise :class:`UsageError` for an address that others reach without a key to keep them out."""
    if not is_loopback(config.host) and not config.api_keys and not config.insecure:
        raise UsageError(
            f"host {config.host}: other machines could use this server without a key; "
            "give --api-key (or api_keys in the configuration), or --insecure if that is meant"
        )


class KeyRing:
    """The hashes of the keys that are let in. An empty ring lets everyone in."""

    def __init__(self, digests: Sequence[bytes]) -> None:
        self._names = {digest: f"key-{digest.hex()[:8]}" for digest in digests}

    @classmethod
    def from_config(cls, keys: Sequence[str], environment: Mapping[str, str] = os.environ) -> KeyRing:
        """``sha256:<hex>`` or ``env:NAME``, a variable that holds one key or several with commas between them."""
        digests = []
        for key in keys:
            kind, _, value = key.partition(":")
            if kind == "sha256":
                digests.append(bytes.fromhex(value))
                continue
            held = [part.strip() for part in environment.get(value, "").split(",") if part.strip()]
            if not held:
                raise UsageError(f"api_keys: the environment variable {value} is empty or missing")
            digests += [hashlib.sha256(part.encode()).digest() for part in held]
        return cls(digests)

    def __bool__(self) -> bool:
        return bool(self._names)

    def identify(self, headers: Mapping[str, str], address: str) -> str:
        """The name under which limits and logs know the client: of its key, or its address where no key is needed.

        A key comes as ``Authorization: Bearer``, as ``x-api-key``, or as the password of ``Authorization: Basic``,
        which a browser asks for. Raises :class:`Refusal` 401.
        """
        if not self._names:
            return address
        key = _presented(headers)
        if key is None:
            raise Refusal(401, "this server needs an API key: Authorization: Bearer <key>", code="missing_api_key")
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, name in self._names.items():  # all of them: the time tells nothing about which was close
            if hmac.compare_digest(known, digest):
                found = name
        if found is None:
            raise Refusal(401, "this API key is not known to the server")
        return found


def _presented(headers: Mapping[str, str]) -> str | None:
    scheme, _, value = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2] or None
        except (binascii.Error, UnicodeDecodeError):
            return None
    return headers.get("x-api-key") or headers.get("api-key")


class OriginGuard:
    """Keeps pages of other sites from using a server that the browser can reach.

    A request with an ``Origin`` must come from this server's own page or from one of ``cors_origins``. A server that
    needs no key and is bound to loopback also answers only to loopback names, or a site could point its own name here
    (DNS rebinding).
    """

    def __init__(self, config: ServeConfig) -> None:
        self._allowed = {origin.rstrip("/").lower() for origin in config.cors_origins}
        self._loopback_only = is_loopback(config.host) and not config.api_keys

    def check(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Headers for the answer (CORS), or a :class:`Refusal` 403."""
        host = headers.get("Host", "")
        if self._loopback_only and host and not is_loopback(_hostname(host)):
            raise Refusal(
                403, f"this server answers to localhost only, not to {host!r}; give it an API key to change that"
            )
        origin = headers.get("Origin")
        if origin is None:
            return {}
        if "*" in self._allowed or origin.lower() in self._allowed:
            return {
                "Access-Control-Allow-Origin": origin,
                "Access-Control-Allow-Headers": "authorization, content-type, x-api-key, x-request-id, x-lowbit-tier",
                "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
                "Access-Control-Expose-Headers": "x-request-id, x-lowbit-model, x-lowbit-tier, x-lowbit-kl",
                "Vary": "Origin",
            }
        if urlsplit(origin).netloc.lower() != host.lower():
            raise Refusal(403, f"pages of {origin} may not use this server; list it in cors_origins to allow that")
        return {}


def _hostname(host: str) -> str:
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
