"""The routes, and the application that answers them.

It is there before the base is: nothing here waits for torch.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cached_property
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from weft.serve.envelope import ApiError, json_response
from weft.serve.guard import Guard
from weft.serve.health import Health
from weft.serve.metrics import CONTENT_TYPE, Metrics
from weft.serve.openapi import describe_api
from weft.serve.settings import ServeSettings

_RETRY = 2  # seconds, while the server loads or ends
_Function = Callable[[Request], Awaitable[Response]]


class Routes:
    """The functions behind the routes of one server."""

    def __init__(self, settings: ServeSettings, health: Health, metrics: Metrics) -> None:
        self.settings, self.health, self.metrics = settings, health, metrics

    def table(self) -> list[Route]:
        """All routes."""
        posts: dict[str, _Function] = {
            "/v1/chat/completions": self._loaded("chat"),
            "/v1/completions": self._loaded("completions"),
            "/v1/responses": self._loaded("responses"),
            "/v1/embeddings": self.embeddings,
            "/classify": self._loaded("classify"),
            "/v1/load_lora_adapter": self._loaded("load"),
            "/v1/unload_lora_adapter": self._loaded("unload"),
        }
        gets: dict[str, _Function] = {
            "/v1/models": self._loaded("models"),
            "/v1/models/{model:path}": self._loaded("model"),
            "/health": self.alive,
            "/ready": self.ready,
            "/metrics": self.figures,
            "/openapi.json": self.page,
        }
        return [
            *(Route(path, function, methods=["POST"]) for path, function in posts.items()),
            *(Route(path, function, methods=["GET"]) for path, function in gets.items()),
        ]

    def _loaded(self, name: str) -> _Function:
        """The endpoint of that name; it refuses while the server loads, and when it ends."""

        async def answer(request: Request) -> Response:
            endpoints = self.health.endpoints
            if endpoints is None or self.health.draining:
                what = "draining" if self.health.draining else "loading"
                raise ApiError(503, f"The server is {what}. Try again later.", code=what, retry_after=_RETRY)
            found: Response = await getattr(endpoints, name)(request)
            return found

        return answer

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings, which is refused.

        Raises:
            ApiError: Always.
        """
        raise ApiError(404, "This server writes text and names classes; it gives no embeddings.", code="no_embeddings")

    async def alive(self, request: Request) -> Response:
        """GET /health: the process lives, and its engine takes steps."""
        return self._state(well=not self.health.stalled)

    async def ready(self, request: Request) -> Response:
        """GET /ready: requests are answered."""
        return self._state(well=self.health.phase == "ok")

    def _state(self, well: bool) -> Response:
        phase = self.health.phase
        if well:
            return json_response({"status": phase})
        raise ApiError(503, f"The server is {phase}.", code=phase, retry_after=_RETRY)

    async def figures(self, request: Request) -> Response:
        """GET /metrics."""
        endpoints, stats = self.health.endpoints, self.health.stats
        service = None if endpoints is None else endpoints.service
        gauges: dict[str, tuple[str, float]] = {
            "weft_ready": ("Whether requests are answered.", self.health.phase == "ok"),
            "weft_answers_open": ("Answers that are written or wait.", service.admission.rows if service else 0),
            "weft_models": ("Models that are served.", len(service.registry.models()) if service else 0),
        }
        if stats is not None:
            gauges |= {
                "weft_engine_running": ("Rows that are being written.", stats.running),
                "weft_engine_waiting": ("Rows that wait for the engine.", stats.waiting),
                "weft_engine_steps": ("Steps of the engine.", stats.steps),
                "weft_cache_blocks_used": ("Blocks of the cache in use.", stats.blocks_used),
                "weft_cache_blocks": ("Blocks of the cache.", stats.blocks_total),
            }
        return Response(self.metrics.text(gauges), headers={"content-type": CONTENT_TYPE})

    async def page(self, request: Request) -> Response:
        """GET /openapi.json."""
        return json_response(self._page)

    @cached_property
    def _page(self) -> dict[str, Any]:
        return describe_api(self.settings)


async def _no_route(scope: Scope, receive: Receive, send: Send) -> None:
    raise ApiError(404, f"There is no {scope['path'][:200]} here; /openapi.json lists the routes.", code="no_route")


def make_app(settings: ServeSettings, health: Health, metrics: Metrics) -> Guard:
    """The whole application."""
    table = Routes(settings, health, metrics).table()
    router = Router(table, redirect_slashes=False, default=_no_route)
    return Guard(router, settings, metrics, frozenset(route.path for route in table))
