"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}`` with the right status."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.responses import Response

from weft.errors import nearest

CLIENT_GONE = 499  # a status that only the access log and the figures read
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_LONGEST = 2000  # characters of a message; it may quote what was sent


class ApiError(Exception):
    """An answer that says what is wrong.

    Args:
        status: The HTTP status.
        message: What, where, what was expected.
        param: The field of the request.
        code: One word for programs.
        retry_after: Seconds after which it may go better; None: the same request fails again.
        headers: More headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.headers = retry_after, dict(headers or {})

    def body(self) -> dict[str, object]:
        """The envelope."""
        message = self.message if len(self.message) <= _LONGEST else f"{self.message[:_LONGEST]} …"
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer. The headers tell the client whether to try again: by itself it tries all of 429 and 5xx."""
        again = self.retry_after is not None
        headers = {"x-should-retry": str(again).lower(), **self.headers}
        if again:
            headers["retry-after"] = str(self.retry_after)
        return json_response(self.body(), self.status, headers)


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(json_bytes(value), status, headers, media_type="application/json")


def json_bytes(value: object) -> bytes:
    """A value as JSON on one line."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", errors="backslashreplace")  # which writes half a surrogate pair as JSON does


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error for a request that cannot be answered as it is."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, message: str) -> ApiError:
    """The error for a field, or a value of one, that OpenAI has and Weft has not."""
    return ApiError(400, f"{param}: {message}", param=param, code="unsupported_parameter")


def no_model(name: str, known: list[str]) -> ApiError:
    """The error for a model that is not served."""
    message = (
        f"The model '{name[:200]}' does not exist.{nearest(name[:200], known)} GET /v1/models lists what there is."
    )
    return ApiError(404, message, param="model", code="model_not_found")


def internal_error() -> ApiError:
    """The error for a defect of Weft. What it was stands in the server's log, not here."""
    return ApiError(500, "The server failed at this request; its log says how.", code="internal_error")
