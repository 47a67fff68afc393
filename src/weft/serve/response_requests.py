"""The body of a request to ``/v1/responses``, OpenAI's newer form. Nothing is kept between two of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from weft.serve.fields import (
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_TOOLS,
    SERVICE_FIELDS,
    ModelName,
    SamplingFields,
    Strict,
    TokenCount,
)
from weft.serve.requests import JsonFormat, JsonObject, Name, StreamOptions, TextFormat

_KEPT = "nothing is kept between requests. Send the earlier turns in input."


class InputText(Strict):
    """A part of a message: of what was asked, or of an earlier answer."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[JsonObject], Field(max_length=0)] | None = None
    logprobs: list[JsonObject] | None = None


class InputMessage(Strict):
    """A turn."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputText], Field(max_length=MAX_MESSAGES)]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class InputCall(Strict):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: str
    name: Name
    arguments: str
    id: str | None = None
    status: str | None = None


class InputResult(Strict):
    """What a called function gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Annotated[list[InputText], Field(max_length=MAX_MESSAGES)]
    id: str | None = None
    status: str | None = None


class FlatTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class FlatSchemaFormat(Strict):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    name: Name
    schema_: JsonObject = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextSettings(Strict):
    """The form of the text. How wordy it should be, no template says, so ``verbosity`` changes nothing."""

    format: Annotated[TextFormat | JsonFormat | FlatSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseRequest(SamplingFields):
    """POST /v1/responses."""

    IGNORED = SERVICE_FIELDS | {"access_programs", "image", "max_tool_calls", "reasoning"}
    REFUSED = {
        "background_options": "answers are written while the client waits. Leave it out.",
        "context_management": "a conversation is never shortened. Leave it out.",
        "conversation": _KEPT,
        "previous_response_id": _KEPT,
        "prompt": "there are no stored prompts. Send instructions and input.",
    }

    model: ModelName
    input: str | Annotated[list[InputMessage | InputCall | InputResult], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: TokenCount | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: TextSettings | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
