"""What an OpenAI-compatible server has sent, read strictly: a generated text, or a failure with its name."""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import Mapping
from typing import TypeGuard

from weft.errors import UserError
from weft.foreign import parse_json
from weft.generators.budget import Price
from weft.generators.outcome import Failure, FailureKind, Generated, Usage, checked
from weft.generators.request import GeneratorRequest

_SAID = 300  # characters of a server's message
# A server answers with the full name of what was asked for by a short one: a date, a version, a tag.
_VERSION = re.compile(r"[-@:]?(v?\d[\d.\-]*|latest|preview)")
_KINDS: dict[int, FailureKind] = {401: "key_refused", 403: "key_refused", 404: "no_model", 429: "rate_limited"}
_NO_QUOTA = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
# A gateway that gave up waiting does not know whether the server behind it has answered, and billed.
_GAVE_UP = frozenset({408, 504, 524})


def read_answer(
    request: GeneratorRequest, body: bytes, model: str, price: Price, aliases: frozenset[str] = frozenset()
) -> Generated | Failure:
    """The answer in the body of a response with status 200. ``aliases``: other names that the model may answer with.

    Raises:
        UserError: The request's schema cannot be checked.
    """
    try:
        found = parse_json(body, "the answer")
    except UserError as error:
        return Failure("not_json", str(error)[:_SAID], billed=True)
    usage = _usage(found)
    choices = found.get("choices") if isinstance(found, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict) or not isinstance(message.get("content") or "", str):
        return Failure("not_chat", f"the answer is no chat completion: {str(found)[:_SAID]}", usage=usage, billed=True)
    assert isinstance(choice, dict)
    said = found.get("model")
    if isinstance(said, str) and said and not is_model(said, model) and said not in aliases:
        told = f"the answer is from the model {said[:80]!r}, and {model!r} was asked"
        return Failure("wrong_model", told, usage=usage, billed=True)
    if message.get("refusal"):
        return Failure("refusal", f"the model refuses: {str(message['refusal'])[:_SAID]}", usage=usage, billed=True)
    reason, text = choice.get("finish_reason"), message.get("content") or ""
    made = Generated(
        text,
        reason if isinstance(reason, str) else "none",
        usage=usage or Usage(),
        model=said if isinstance(said, str) else "",
        money=price.of(usage or Usage()),
    )
    outcome = checked(request, made)
    if isinstance(outcome, Failure) and usage is None:
        return Failure(outcome.kind, outcome.message, billed=True)
    return outcome


def tells_usage(body: bytes) -> bool:
    """Whether a body that ``read_answer`` took says what was billed."""
    return _usage(parse_json(body, "the answer")) is not None


def _usage(found: object) -> Usage | None:
    told = found.get("usage") if isinstance(found, dict) else None
    if not isinstance(told, dict):
        return None
    prompt, answer = told.get("prompt_tokens"), told.get("completion_tokens")
    if not (_is_count(prompt) and _is_count(answer)):
        return None
    return Usage(prompt, answer)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_model(said: str, asked: str) -> bool:
    """Whether a server that was asked for a model may call it so: with a version more, with or without its owner."""
    one, other = said.rpartition("/")[2].lower(), asked.rpartition("/")[2].lower()
    return one == other or (one.startswith(other) and _VERSION.fullmatch(one[len(other) :]) is not None)


def read_refusal(status: int, headers: Mapping[str, str], body: bytes) -> Failure:
    """What a status other than 200 means."""
    code, message = _error(body)
    told = f"status {status}: {message.rstrip('.')}" if message else f"status {status}"
    kind = _KINDS.get(status)
    if status == 402 or (status == 429 and code in _NO_QUOTA):
        kind = "no_quota"
    if kind is None:
        kind = "server_error" if status >= 500 or status in (408, 409, 425) else "bad_request"
    return Failure(kind, told, billed=status in _GAVE_UP, after=retry_after(headers))


def _error(body: bytes) -> tuple[str, str]:
    """The code and the message of an error, as far as there are any."""
    try:
        found = parse_json(body, "the error")
    except UserError:
        return "", " ".join(body[:_SAID].decode("utf-8", "replace").split())
    error = found.get("error", found) if isinstance(found, dict) else found
    if isinstance(error, dict):
        return str(error.get("code") or ""), " ".join(str(error.get("message") or error)[:_SAID].split())
    return "", str(error)[:_SAID]


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """The seconds that a server asks to wait (RFC 9110, 10.2.3: seconds or a date); None: it does not ask."""
    told = headers.get("retry-after-ms")
    try:
        wanted = float(told) / 1000 if told is not None else float(headers.get("retry-after", "nan"))
    except ValueError:
        date = email.utils.parsedate_tz(headers.get("retry-after", ""))
        if date is None:
            return None
        wanted = email.utils.mktime_tz(date) - (time.time() if now is None else now)
    return max(0.0, wanted) if math.isfinite(wanted) else None
