"""What a client gets instead of an answer, in the shape of OpenAI's API."""

from __future__ import annotations

from typing import Any

__all__ = ["Refusal", "error_body"]

_KINDS = {
    400: ("invalid_request_error", "invalid_request"),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    501: ("not_supported_error", "not_supported"),
    502: ("engine_error", "engine_failed"),
    503: ("overloaded_error", "overloaded"),
    504: ("timeout_error", "deadline_exceeded"),
}
"""Status to the ``type`` and the usual ``code`` of the error."""


class Refusal(Exception):  # noqa: N818 - not an error of ours: an answer to the client
    """An answer with an error status: raised anywhere on a request's way, turned into JSON at its edge.

    ``param`` names the field of the request at fault, ``retry_after`` (seconds) becomes the header of that name.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code or _KINDS.get(status, ("server_error", "server_error"))[1]
        self.param = param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return error_body(self.status, self.message, self.code, self.param)

    @property
    def headers(self) -> dict[str, str]:
        """``Retry-After`` in whole seconds, at least one, where waiting helps."""
        return {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}


def error_body(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    """``{"error": {"message", "type", "param", "code"}}``."""
    kind = _KINDS.get(status, ("server_error", ""))[0]
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
