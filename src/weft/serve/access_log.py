"""The access log: one line for each request, on stderr. Texts of prompts stand in it only if that is asked for."""

from __future__ import annotations

import json
import logging
import sys

from starlette.requests import Request
from starlette.types import Scope

_NAME = "weft.serve.access"
_LONGEST = 200  # characters of a path


def show_access() -> None:
    """Write the log to stderr. Other messages of Weft go their own way."""
    logger = logging.getLogger(_NAME)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def note(request: Request, **about: object) -> None:
    """Remember something for the request's line."""
    request.scope["state"].setdefault("noted", {}).update(about)


def log_request(scope: Scope, name: str, *, status: int, seconds: float) -> None:
    """Write a request's line. A path is as it came, percent-encoded, so that no line break can be in it; its query is
    left out."""
    path = scope.get("raw_path", b"").decode("ascii", errors="replace").partition("?")[0][:_LONGEST]
    client = scope.get("client")
    noted = "".join(f" {key}={json.dumps(value)}" for key, value in scope["state"].get("noted", {}).items())
    logging.getLogger(_NAME).info(
        "request=%s client=%s method=%s path=%s status=%d seconds=%.3f%s",
        name, client[0] if client else "-", scope["method"], path, status, seconds, noted,
    )  # fmt: skip
