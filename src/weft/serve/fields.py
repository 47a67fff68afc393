"""The base of all requests: which fields are understood, which are ignored, and which are refused by name.

A field that only says how OpenAI's own service should work (where to keep a prompt, which tier to bill) changes nothing
here, and is ignored. One that would change the answer is honoured or refused, so that no answer is other than asked
for. Any other field is a mistake, and refused with the nearest name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from weft.errors import nearest, shown
from weft.serve.envelope import ApiError, bad_request, unsupported

# Of a request, as the description of the interface states them.
MAX_MESSAGES, MAX_PROMPTS, MAX_TOOLS, MAX_N, MAX_STOPS, MAX_LOGPROBS = 1024, 64, 128, 8, 4, 20
MAX_TOKENS = 1 << 20
_SEED = 1 << 63
_TYPES = frozenset({"str", "int", "float", "bool"})

# What only OpenAI's service reads.
SERVICE_FIELDS = frozenset({
    "metadata", "moderation", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "user",
})  # fmt: skip

Seed = Annotated[int, Field(ge=-_SEED, lt=_SEED)]
TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Stop = Annotated[list[StopText], Field(max_length=MAX_STOPS)] | StopText | None
ModelName = Annotated[str, Field(min_length=1, max_length=256, description="a name of GET /v1/models")]


class Strict(BaseModel):
    """A JSON object of which every field is known and has its own type; no text is taken for a number."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ApiRequest(Strict):
    """The body of a request."""

    IGNORED: ClassVar[frozenset[str]] = SERVICE_FIELDS
    # Each with what to do instead.
    REFUSED: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def read(cls, values: object) -> Self:
        """The request in the JSON value of a body.

        Raises:
            ApiError: A field is missing, unknown, unsupported, or has a value that it cannot have.
        """
        if not isinstance(values, dict):
            raise bad_request(f"The body must be a JSON object, not {shown(values)}.")
        for name, instead in cls.REFUSED.items():
            if values.get(name) is not None:
                raise unsupported(name, instead)
        kept = {key: value for key, value in values.items() if key not in cls.IGNORED and key not in cls.REFUSED}
        for key in kept:
            if key not in cls.model_fields:
                raise bad_request(
                    f"Unknown field {shown(key)}.{nearest(key, cls.model_fields)}", key[:200], "unknown_parameter"
                )
        try:
            return cls.model_validate(kept)
        except ValidationError as error:
            raise _explained(error) from None


class SamplingFields(ApiRequest):
    """The fields by which a token is chosen, of all requests for text. The last three are vLLM's."""

    temperature: Temperature | None = Field(None, description="0 always takes the likeliest token; default 1")
    top_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=1024, description="token id -> what is added to its logit"
    )
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = Field(None, description="0 and -1: all tokens")
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    ignore_eos: bool | None = None


def _explained(error: ValidationError) -> ApiError:
    """The error about the field that went wrong deepest: of several types that a field may have, the one meant."""
    found = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))
    place = "".join(_place(found["loc"])).lstrip(".")
    given = "" if found["type"] == "missing" else f", found {shown(found.get('input'))}"
    code = "missing_required_parameter" if found["type"] == "missing" else "invalid_value"
    return bad_request(f"{place or 'the body'}: {found['msg']}{given}.", place[:200] or None, code)


def _place(loc: tuple[int | str, ...]) -> Iterator[str]:
    for part in loc:
        if isinstance(part, int):
            yield f"[{part}]"
        # Pydantic puts the type that was tried between the fields.
        elif not any(mark in part for mark in "[]()-") and part not in _TYPES and not part[:1].isupper():
            yield f".{part}"
