"""The page ``/openapi.json``: every route, with the schemas of what it takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from weft.serve.answers import (
    AdapterAnswer,
    ChatAnswer,
    ClassifyAnswer,
    ErrorBody,
    HealthAnswer,
    ModelCard,
    ModelList,
    ResponseAnswer,
    TextAnswer,
)
from weft.serve.fields import ApiRequest
from weft.serve.requests import ChatRequest, ClassifyRequest, CompletionRequest, LoadRequest, UnloadRequest
from weft.serve.response_requests import ResponseRequest
from weft.serve.settings import ServeSettings
from weft.version import __version__

_REF = "#/components/schemas/{model}"
_ERRORS = {
    "400": "The request cannot be answered as it is.",
    "401": "The API key is missing or wrong.",
    "403": "The host, the page or the route is not allowed.",
    "404": "There is no such route or model.",
    "405": "The route has no such method.",
    "408": "The body came too slowly.",
    "413": "The body is too long.",
    "415": "The body is no plain JSON.",
    "429": "The server is overloaded; Retry-After says when to try again.",
    "500": "A defect of the server.",
    "503": "The server loads, ends, or is stuck.",
}

# One event of a stream: JSON in ``data``, or ``[DONE]``.
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
    "required": ["data"],
}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One route with one method."""

    path: str
    summary: str
    answer: type | None = None
    asked: type[ApiRequest] | None = None
    streams: bool = False
    text: str = ""
    is_open: bool = False


OPERATIONS = (
    Operation(path="/v1/models", summary="All models: the base and its adapters", answer=ModelList),
    Operation(path="/v1/models/{model}", summary="One model", answer=ModelCard),
    Operation(path="/v1/chat/completions", summary="Answer a chat", asked=ChatRequest, answer=ChatAnswer, streams=True),
    Operation(
        path="/v1/completions", summary="Continue texts", asked=CompletionRequest, answer=TextAnswer, streams=True
    ),
    Operation(
        path="/v1/responses",
        summary="Answer a chat; nothing is kept",
        asked=ResponseRequest,
        answer=ResponseAnswer,
        streams=True,
    ),
    Operation(path="/classify", summary="Name the class of texts", asked=ClassifyRequest, answer=ClassifyAnswer),
    Operation(path="/v1/load_lora_adapter", summary="Serve an adapter", asked=LoadRequest, answer=AdapterAnswer),
    Operation(
        path="/v1/unload_lora_adapter", summary="Serve an adapter no more", asked=UnloadRequest, answer=AdapterAnswer
    ),
    Operation(path="/health", summary="Whether the server lives", answer=HealthAnswer, is_open=True),
    Operation(path="/ready", summary="Whether the server answers", answer=HealthAnswer, is_open=True),
    Operation(path="/metrics", summary="Figures for Prometheus", text="text/plain"),
)


def describe_api(settings: ServeSettings) -> dict[str, Any]:
    """The description of the interface, in OpenAPI's form 3.1."""
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for one in OPERATIONS:
        method = "get" if one.asked is None else "post"
        paths.setdefault(one.path, {})[method] = _operation(
            one, schemas, guarded=bool(settings.keys) and not one.is_open
        )
    schemas["Error"] = _schema(ErrorBody, schemas)
    page: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "Weft",
            "version": __version__,
            "description": "One frozen base and adapters of any methods, in OpenAI's form. Fields that only OpenAI's "
            "own service reads are accepted and ignored; each says so.",
        },
        "paths": paths,
        "components": {"schemas": schemas, "responses": {code: _error(about) for code, about in _ERRORS.items()}},
    }
    if settings.keys:
        page["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return page


def _operation(one: Operation, schemas: dict[str, Any], *, guarded: bool) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if one.answer is not None:
        content["application/json"] = {"schema": _schema(one.answer, schemas)}
    if one.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    if one.text:
        content[one.text] = {"schema": {"type": "string"}}
    errors = {code: {"$ref": f"#/components/responses/{code}"} for code in _ERRORS}
    found: dict[str, Any] = {
        "summary": one.summary,
        "operationId": one.path.strip("/").replace("/", "_").replace("{", "").replace("}", ""),
        "responses": {"200": {"description": "The answer.", "content": content}, **errors},
    }
    if guarded:
        found["security"] = [{"key": []}]
    if "{model}" in one.path:
        named = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        found["parameters"] = [named]
    if one.asked is not None:
        schema = {"schema": _schema(one.asked, schemas)}
        found["requestBody"] = {"required": True, "content": {"application/json": schema}}
    return found


def _schema(kind: type, schemas: dict[str, Any]) -> dict[str, Any]:
    """A reference to the schema of a type, which is put among ``schemas`` with all that it names."""
    is_request = issubclass(kind, ApiRequest)
    found = TypeAdapter(kind).json_schema(ref_template=_REF, mode="validation" if is_request else "serialization")
    schemas |= found.pop("$defs", {})
    if issubclass(kind, ApiRequest):
        properties = found["properties"]
        for name in sorted(kind.IGNORED):
            properties[name] = {"description": "accepted and ignored"}
        for name, instead in sorted(kind.REFUSED.items()):
            properties[name] = {"type": "null", "description": f"refused: {instead}"}
    schemas[kind.__name__] = found
    return {"$ref": _REF.format(model=kind.__name__)}


def _error(about: str) -> dict[str, Any]:
    schema = {"$ref": _REF.format(model="Error")}
    return {"description": about, "content": {"application/json": {"schema": schema}}}
