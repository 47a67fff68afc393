"""The bodies of requests in OpenAI's form. Their schemas are those of the page ``/openapi.json``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from weft.serve.fields import (
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_N,
    MAX_PROMPTS,
    MAX_TOOLS,
    SERVICE_FIELDS,
    ApiRequest,
    ModelName,
    SamplingFields,
    Stop,
    Strict,
    TokenCount,
)

# A JSON schema, and other objects that are handed on as they are.
JsonObject = dict[str, Any]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.\-]+$")]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """The function of a call; ``arguments`` is JSON text."""

    name: Name
    arguments: str


class ToolCall(Strict):
    """A call that an earlier answer made."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Strict):
    """A turn. What it needs depends on its role: an assistant may call tools and say nothing."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    # The client sends these of an earlier answer back as null.
    refusal: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None


class FunctionSchema(Strict):
    """A function that the model may call; ``parameters`` is a JSON schema."""

    name: Name
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool of a chat."""

    type: Literal["function"]
    function: FunctionSchema


class StreamOptions(Strict):
    """What a stream holds beside the text. Chunks are not padded, so ``include_obfuscation`` changes nothing."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class NamedSchema(Strict):
    """A JSON schema with a name."""

    name: Name
    description: str | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JsonFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Strict):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class StructuredOutputs(Strict):
    """vLLM's: exactly one form of the answer."""

    json_: JsonObject | None = Field(None, alias="json")
    regex: Annotated[str, Field(min_length=1, max_length=2000)] | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=256)] | None = None


Format = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    IGNORED = SERVICE_FIELDS | {"prediction", "reasoning_effort", "verbosity", "web_search_options"}
    REFUSED = {
        "audio": "audio is not written. Leave it out.",
        "function_call": "this field is from before tools. Use tool_choice.",
        "functions": "this field is from before tools. Use tools.",
    }

    model: ModelName
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: TokenCount | None = None
    max_tokens: TokenCount | None = Field(None, description="the older name of max_completion_tokens")
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: Format | None = None
    structured_outputs: StructuredOutputs | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    REFUSED = {"suffix": "no text is written between two others. Leave it out."}

    model: ModelName
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: TokenCount | None = Field(None, description="default 16")
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = Field(None, description="no other than n")
    echo: bool | None = Field(None, description="not beside logprobs")
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    structured_outputs: StructuredOutputs | None = None


class ClassifyRequest(ApiRequest):
    """POST /classify, as vLLM has it: texts, of which an adapter names the class."""

    model: ModelName
    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]


class LoadRequest(ApiRequest):
    """POST /v1/load_lora_adapter: vLLM's name, for adapters of any method."""

    lora_name: Annotated[str, Field(min_length=1, max_length=100)]
    lora_path: Annotated[str, Field(min_length=1, max_length=1024, description="inside the folder of adapters")]
    load_inplace: bool | None = Field(None, description="whether it may take the place of one of its name")


class UnloadRequest(ApiRequest):
    """POST /v1/unload_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=100)]
    lora_int_id: int | None = None
