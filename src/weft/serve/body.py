"""From the bytes of a body to a request."""

from __future__ import annotations

from typing import TypeVar

from starlette.requests import Request

from weft.errors import UserError
from weft.foreign import parse_json
from weft.serve.envelope import bad_request
from weft.serve.fields import ApiRequest

_Body = TypeVar("_Body", bound=ApiRequest)


async def read_body(request: Request, kind: type[_Body]) -> _Body:
    """The body of a request.

    Raises:
        ApiError: It is no JSON, or not of this kind.
    """
    body = await request.body()
    try:
        values = parse_json(body, "The body")
    except UserError as error:
        raise bad_request(str(error), code="invalid_json") from None
    check_unicode(values)
    return kind.read(values)


def check_unicode(value: object) -> None:
    """Refuse text with half a surrogate pair, which JSON can write and no tokenizer can read.

    Raises:
        ApiError: A text of ``value`` holds one.
    """
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            if any("\ud800" <= letter <= "\udfff" for letter in one):
                raise bad_request("The body holds half a surrogate pair (\\ud800 … \\udfff), which is no text.")
        elif isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            waiting += one
