"""Joining a Ray cluster."""

from __future__ import annotations

import socket

from lowbit.errors import UnsupportedError, UsageError

__all__ = ["NAMESPACE", "connect", "require_ray"]

NAMESPACE = "lowbit"
"""Of everything that lowbit starts on a cluster."""

_PATIENCE = 10.0


def require_ray() -> None:
    """Raise :class:`UnsupportedError` where Ray is not installed."""
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise UnsupportedError("--ray needs Ray", ["pip install 'lowbit[ray]'"]) from error


def connect(address: str) -> None:
    """Join the cluster at ``address`` (``auto``, ``host:6379`` or ``ray://…``; ``local`` starts one here).

    Raises :class:`UnsupportedError` without Ray, :class:`UsageError` where no cluster answers.
    """
    require_ray()
    import ray

    _require_listener(address)
    try:
        ray.init(
            None if address == "local" else address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, error) from error


def _require_listener(address: str) -> None:
    """Raise :class:`UsageError` where nobody listens at ``host:port``, which Ray tries for minutes."""
    host, _, port = address.rpartition(":")
    if "/" in host or not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> UsageError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UsageError(f"--ray {address}: no cluster answers there ({reason}): ray start --head begins one")
