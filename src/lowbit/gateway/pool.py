"""The pool of engines; its interface is :mod:`lowbit.gateway.protocol`."""

from __future__ import annotations

from lowbit.gateway.protocol import Lease, PoolProtocol

__all__ = ["Lease", "PoolProtocol"]
