"""Joining a Ray cluster."""

from __future__ import annotations

from lowbit.errors import UnsupportedError, UsageError

__all__ = ["NAMESPACE", "connect", "require_ray"]

NAMESPACE = "lowbit"
"""Of everything that lowbit starts on a cluster."""


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

    try:
        ray.init(
            None if address == "local" else address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--ray {address}: no cluster answers there ({reason}): ray start --head begins one"
        ) from error
