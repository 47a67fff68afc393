"""The bodies of answers, as the page ``/openapi.json`` describes them. The code that writes them is checked by them."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

Finish = Literal["stop", "length", "tool_calls"]


class ErrorDetail(TypedDict):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The envelope of every error."""

    error: ErrorDetail


class PromptDetails(TypedDict):
    """Tokens of the prompt that were computed before."""

    cached_tokens: int
    audio_tokens: int


class CompletionDetails(TypedDict):
    """Kinds of tokens of an answer that this server does not tell apart."""

    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(TypedDict):
    """How many tokens were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TopLogprob(TypedDict):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The token that stands there."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(TypedDict):
    """The log-probabilities of a choice's tokens."""

    content: list[TokenLogprob]
    refusal: None


class FunctionCall(TypedDict):
    """The function of a call; ``arguments`` is JSON text."""

    name: str
    arguments: str


class MessageCall(TypedDict):
    """A call of a tool. Only a stream numbers them."""

    id: str
    type: Literal["function"]
    function: FunctionCall
    index: NotRequired[int]


class AnswerMessage(TypedDict):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[MessageCall]]


class ChatChoice(TypedDict):
    """One answer of several."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Finish


class ChatAnswer(TypedDict):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    service_tier: None


class OldLogprobs(TypedDict):
    """Log-probabilities in the form of /v1/completions."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(TypedDict):
    """One text of several."""

    index: int
    text: str
    logprobs: OldLogprobs | None
    finish_reason: Finish | None


class TextAnswer(TypedDict):
    """The answer of /v1/completions; a chunk of its stream has the same form."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]
    system_fingerprint: str


class ModelCard(TypedDict):
    """A model that is served. ``parent`` is the base of an adapter; ``sha256`` tells what the adapter holds."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None
    sha256: str | None
    method: str | None
    labels: list[str] | None


class ModelList(TypedDict):
    """All models."""

    object: Literal["list"]
    data: list[ModelCard]


class ClassifiedText(TypedDict):
    """The class of a text, and the probability of each, in the order of ``labels``."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyUsage(TypedDict):
    """How many tokens were read."""

    prompt_tokens: int
    total_tokens: int


class ClassifyAnswer(TypedDict):
    """The answer of /classify."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    labels: list[str]
    data: list[ClassifiedText]
    usage: ClassifyUsage


class AdapterAnswer(TypedDict):
    """What became of an adapter that was loaded or unloaded."""

    status: Literal["loaded", "unloaded", "unchanged", "replaced"]
    lora_name: str
    sha256: str


class HealthAnswer(TypedDict):
    """How the server is."""

    status: Literal["ok", "stalled", "loading", "draining"]


class InputDetails(TypedDict):
    """Tokens of the input that were computed before."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(TypedDict):
    """Tokens of thoughts, which this server does not tell apart."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """How many tokens were read and written."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseAnswer(TypedDict):
    """The answer of /v1/responses."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    temperature: float
    top_p: float
    tool_choice: str
    tools: list[dict[str, Any]]
    text: dict[str, Any]
    max_output_tokens: int | None
    previous_response_id: None
    metadata: dict[str, str]
    store: bool
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
