"""What goes wrong, as an HTTP status and OpenAI's error object."""

from __future__ import annotations

import errno
from typing import Any


class ServingError(Exception):
    """Something to tell the client.

    Attributes:
        status: of HTTP. kind, code: OpenAI's `type` and `code`. retry_after: seconds after which it may be different.
        param: the field of the request that is at fault.
    """

    status, kind, code = 500, "server_error", "internal_error"
    retry_after: int | None = None

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param

    def body(self) -> dict[str, Any]:
        """The response."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Of the response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


class BadRequest(ServingError):
    """The request makes no sense."""

    status, kind, code = 400, "invalid_request_error", "invalid_request"


class NoKey(ServingError):
    """There is no key, or a wrong one."""

    status, kind, code = 401, "invalid_request_error", "invalid_api_key"


class Forbidden(ServingError):
    """It is not allowed here."""

    status, kind, code = 403, "invalid_request_error", "not_allowed"


class NotThere(ServingError):
    """There is no such video, model or page."""

    status, kind, code = 404, "invalid_request_error", "not_found"


class TooSlow(ServingError):
    """The client took too long to send its request."""

    status, kind, code = 408, "invalid_request_error", "request_timeout"


class Conflict(ServingError):
    """Not in its present state."""

    status, kind, code = 409, "invalid_request_error", "conflict"


class TooLarge(ServingError):
    """More bytes, seconds, frames or pixels than allowed."""

    status, kind, code = 413, "invalid_request_error", "too_large"


class TooMany(ServingError):
    """The queue is full."""

    status, kind, code, retry_after = 429, "rate_limit_error", "queue_full", 2


class Unavailable(ServingError):
    """The server is stopping, or has more connections than it takes."""

    status, kind, code, retry_after = 503, "server_error", "unavailable", 5


class StoreFull(ServingError):
    """There is no room for another state."""

    status, kind, code = 507, "server_error", "store_full"


def error_of(error: Exception) -> ServingError:
    """What to tell a client of any error."""
    if isinstance(error, ServingError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull("the disk of the server is full: delete videos, or try again later")
    return ServingError(f"the server made a mistake ({type(error).__name__}): its log says more")


def error_with(code: str, message: str, param: str | None = None) -> ServingError:
    """An error that was written down by its code and message."""
    kinds = {kind.code: kind for kind in (ServingError, *ServingError.__subclasses__())}
    return kinds.get(code, ServingError)(message, param)
