"""What became of a draw: a generated text, or a failure, which is never taken for a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from weft.errors import UserError
from weft.foreign import parse_json
from weft.generators.request import GeneratorRequest
from weft.rewards.json_schema import validator

FailureKind = Literal[
    # of the way to the server
    "unreachable", "timeout", "cut",
    # that the server says
    "rate_limited", "server_error", "key_refused", "no_model", "no_quota", "bad_request",
    # of what it answers
    "not_json", "not_chat", "wrong_model", "refusal", "length", "empty", "wrong_schema",
    # of ours
    "budget", "stopped",
]  # fmt: skip
# Another attempt may end otherwise: at once with another draw, or after a while.
REDRAWN = frozenset({"wrong_model", "refusal", "length", "empty", "wrong_schema"})
WAITED_FOR = frozenset({"unreachable", "timeout", "cut", "rate_limited", "server_error", "not_json", "not_chat"})
# Every other request would meet the same.
FATAL = frozenset({"key_refused", "no_model", "no_quota"})


@dataclass(frozen=True)
class Usage:
    """The tokens of an answer, as they are billed."""

    prompt_tokens: int = 0
    answer_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Both together."""
        return self.prompt_tokens + self.answer_tokens


@dataclass(frozen=True)
class Generated:
    """A text that was generated.

    Attributes:
        finish_reason: ``stop`` or, where the request keeps such answers, ``length``.
        model: the name that the server answered with, if it did.
        money: what it cost, in the currency of the price.
        cached: whether the ledger had it.
    """

    text: str
    finish_reason: str = "stop"
    _: KW_ONLY
    usage: Usage = Usage()
    model: str = ""
    money: float = 0.0
    cached: bool = False


@dataclass(frozen=True)
class Failure:
    """Why there is no text.

    Attributes:
        message: for people.
        usage: what the server says it has billed all the same; None: it does not say.
        billed: whether it may have billed something. Then, without ``usage``, the worst case counts.
        after: seconds to wait that the server asks for.
    """

    kind: FailureKind
    message: str
    _: KW_ONLY
    usage: Usage | None = None
    billed: bool = False
    after: float | None = None


def checked(request: GeneratorRequest, found: Generated) -> Generated | Failure:
    """What was generated, if it is what was asked for.

    Raises:
        UserError: A schema is to be checked, and jsonschema is not installed, or it is no schema.
    """

    def failure(kind: FailureKind, message: str) -> Failure:
        return Failure(kind, message, usage=found.usage, billed=True)

    if found.finish_reason == "content_filter":
        return failure("refusal", "the answer was held back by the server's content filter")
    if found.finish_reason == "length" and not request.keep_cut:
        return failure("length", f"the answer was cut at {request.max_tokens} tokens")
    if found.finish_reason not in ("stop", "length"):
        return failure("not_chat", f"the answer ended with {found.finish_reason!r}, which is not asked for")
    if not found.text.strip():
        return failure("empty", "the answer is empty")
    if request.schema is not None and (wrong := _breach(request.schema, found.text)):
        return failure("wrong_schema", wrong)
    return found


def schema_checker(schema: Mapping[str, object]) -> Any:
    """What tells how a value breaks a schema.

    Raises:
        UserError: jsonschema is not installed, or this is no schema.
    """
    return validator(dict(schema), "a schema of generated text")


def _breach(schema: Mapping[str, object], text: str) -> str:
    """How a text breaks a schema; "": it keeps it."""
    try:
        value = parse_json(text.strip(), "the answer")
    except UserError as error:
        return str(error)
    breach = next(schema_checker(schema).iter_errors(value), None)
    return "" if breach is None else f"the answer breaks the schema: {breach.message[:200]}"
