"""Prefix-aware routing in Ray Serve: a conversation goes back to the replica that has its beginning in its cache."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from lowbit.ops.ray_serve.affinity import order

__all__ = ["PrefixRouter"]


class PrefixRouter(RequestRouter):  # type: ignore[misc,unused-ignore]
    """Ray Serve's request router with :func:`order` for a policy.

    The last two arguments of a call are its affinity and the names of the replicas that have just lost it.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas for one request."""
        affinity, avoid = _asked_for(pending_request)
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        usable = {name: replica for name, replica in by_name.items() if name not in avoid} or by_name
        lengths = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in usable.items()}
        return [[usable[name] for name in rank] for rank in order(affinity, lengths)]


def _asked_for(pending: Any) -> tuple[str, tuple[str, ...]]:
    arguments = tuple(getattr(pending, "args", ()) or ())
    return (arguments[4], arguments[5]) if len(arguments) == 6 else ("", ())
