"""Which replica a prompt belongs to: the pure part of prefix-aware routing.

Rendezvous hashing gives every prompt beginning a home among the replicas; when one comes or goes, only the prompts
whose home it was move. A home with a longer queue than another by ``slack`` requests is passed over: a cached prefix
saves less than a wait costs.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["affinity_of", "home_of", "order"]

_PREFIX = 1024
SLACK = 4
"""Requests by which a home's queue may exceed the shortest one."""


def home_of(affinity: str, replicas: Sequence[str]) -> str:
    """The replica that ``affinity`` belongs to: the one with the highest hash of both."""
    return max(replicas, key=lambda replica: hashlib.blake2b(f"{affinity}|{replica}".encode()).digest())


def order(
    affinity: str, lengths: Mapping[str, int], *, slack: int = SLACK, rng: random.Random | None = None
) -> list[list[str]]:
    """Replicas to try, best rank first: the home unless it is overloaded, then two at random, then all.

    ``lengths`` are the requests under way by replica, as far as they are known.
    """
    names = sorted(lengths)
    if not names:
        return []
    pair = (rng or random.Random()).sample(names, min(2, len(names)))
    ranks = [pair, names]
    if affinity:
        home = home_of(affinity, names)
        if lengths[home] <= min(lengths.values()) + slack:
            ranks.insert(0, [home])
    return ranks


def affinity_of(body: bytes) -> str:
    """A hash of how the prompt begins, so that conversations return to the replica that has their prefix cached."""
    try:
        content: Any = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(content, dict):
        return ""
    start = content.get("messages") or content.get("prompt") or ""
    if isinstance(start, list) and start and isinstance(start[0], dict):
        start = start[:2]
    text = start if isinstance(start, str) else json.dumps(start, sort_keys=True)
    return hashlib.sha256(text[:_PREFIX].encode()).hexdigest()[:16] if text else ""
