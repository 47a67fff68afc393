"""What the routes do once the base is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from weft.serve.access_log import note
from weft.serve.answers import ModelList
from weft.serve.body import read_body
from weft.serve.candidates import read_candidate
from weft.serve.chat import Chat
from weft.serve.classify import classify
from weft.serve.completions import TextCompletion
from weft.serve.envelope import ApiError, json_response
from weft.serve.fields import ApiRequest
from weft.serve.requests import ChatRequest, ClassifyRequest, CompletionRequest, LoadRequest, UnloadRequest
from weft.serve.response_requests import ResponseRequest
from weft.serve.responses import ResponseWriter
from weft.serve.service import Service, Writing
from weft.serve.sse import Events, EventStream, until_gone

_Body = TypeVar("_Body", bound=ApiRequest)


class Writer(Protocol):
    """What writes the answer of a request for text."""

    writing: Writing

    async def begin(self) -> None:
        """Hand the prompt to the engine."""

    async def answer(self) -> object:
        """The whole answer."""

    def events(self) -> Events:
        """The answer in pieces."""


class Endpoints:
    """The functions behind the routes that ask the engine or change what is served."""

    def __init__(self, service: Service) -> None:
        self.service, self.settings = service, service.settings

    async def _write(
        self, request: Request, kind: type[_Body], writer_of: Callable[[Service, _Body], Writer]
    ) -> Response:
        """The answer to a request for text, whole or in pieces."""
        self.service.admission.check()  # an overloaded server should not even parse
        asked = await read_body(request, kind)
        self._note(request, asked)
        writer = writer_of(self.service, asked)
        if not getattr(asked, "stream", None):

            async def whole() -> Response:
                await writer.begin()
                return json_response(await writer.answer())

            try:
                return await until_gone(request, asyncio.ensure_future(whole()))
            finally:
                writer.writing.close()
        try:
            await writer.begin()
        except BaseException:
            writer.writing.close()
            raise
        return EventStream(writer.events(), writer.writing.close)

    def _note(self, request: Request, asked: ApiRequest) -> None:
        note(request, model=getattr(asked, "model", None))
        if self.settings.log_prompts:
            said = asked.model_dump(include={"messages", "prompt", "input", "instructions"}, exclude_none=True)
            note(request, prompt=said)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._write(request, ChatRequest, Chat)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._write(request, CompletionRequest, TextCompletion)

    async def responses(self, request: Request) -> Response:
        """POST /v1/responses."""
        return await self._write(request, ResponseRequest, ResponseWriter)

    async def classify(self, request: Request) -> Response:
        """POST /classify."""
        asked = await read_body(request, ClassifyRequest)
        self._note(request, asked)

        async def whole() -> Response:
            return json_response(await classify(self.service, asked))

        return await until_gone(request, asyncio.ensure_future(whole()))

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        cards: ModelList = {"object": "list", "data": [one.card() for one in self.service.registry.models()]}
        return json_response(cards)

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        return json_response(self.service.registry.find(request.path_params["model"]).card())

    async def load(self, request: Request) -> Response:
        """POST /v1/load_lora_adapter."""
        root = self._adapters_folder()
        service, asked = self.service, await read_body(request, LoadRequest)
        candidate = await asyncio.to_thread(read_candidate, service.target, root, asked.lora_name, asked.lora_path)
        return json_response(await service.registry.load(candidate, in_place=bool(asked.load_inplace)))

    async def unload(self, request: Request) -> Response:
        """POST /v1/unload_lora_adapter."""
        self._adapters_folder()
        service, asked = self.service, await read_body(request, UnloadRequest)
        return json_response(await service.registry.unload(asked.lora_name))

    def _adapters_folder(self) -> Path:
        if self.settings.adapters_folder is None:
            raise ApiError(
                403, "Adapters are not loaded while the server runs; --adapters-folder lets it.", code="not_enabled"
            )
        return self.settings.adapters_folder
