"""From the fields of a request to what the engine is asked."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from weft.data.rendering.sample import Prompt
from weft.errors import UserError
from weft.generation.constraint import Constraint
from weft.generation.request import Request
from weft.generation.sampling import Sampling
from weft.serve.envelope import bad_request
from weft.serve.fields import MAX_TOKENS, SamplingFields
from weft.serve.registry import Served
from weft.serve.requests import JsonFormat, SchemaFormat, StructuredOutputs, TextFormat
from weft.serve.service import Service

_SEEDS = 1 << 63


def sampling_of(fields: SamplingFields, served: Served, seed: int, index: int) -> Sampling:
    """How the answer number ``index`` chooses its tokens."""
    return Sampling(
        1.0 if fields.temperature is None else fields.temperature,
        max(fields.top_k or 0, 0),
        1.0 if fields.top_p is None else fields.top_p,
        seed=(seed + index + _SEEDS) % (2 * _SEEDS) - _SEEDS,
        min_p=fields.min_p or 0.0,
        repetition_penalty=1.0 if fields.repetition_penalty is None else fields.repetition_penalty,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        logit_bias=_biases(fields, served),
    )


def _biases(fields: SamplingFields, served: Served) -> dict[int, float]:
    found, tokens = {}, served.target.base.token_rows
    for key, value in (fields.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < tokens):
            raise bad_request(
                f"logit_bias: {key[:40]!r} is no token; they are the numbers from 0 to {tokens - 1}.",
                "logit_bias", "invalid_value",
            )  # fmt: skip
        found[int(key)] = value
    return found


def stops_of(stop: str | list[str] | None) -> tuple[str, ...]:
    """The texts that end an answer."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def constraint_of(
    form: TextFormat | JsonFormat | SchemaFormat | None, outputs: StructuredOutputs | None
) -> Constraint | None:
    """The form that an answer must have.

    Raises:
        ApiError: Several are asked for, or it cannot be enforced.
    """
    given = [value for value in (outputs.json_, outputs.regex, outputs.choice) if value is not None] if outputs else []
    wanted = form is not None and form.type != "text"
    if len(given) + wanted > 1 or (outputs is not None and not given):
        raise bad_request(
            "Give one of json, regex and choice, or response_format.", "structured_outputs", "invalid_value"
        )
    if outputs is None and not wanted:
        return None
    try:
        if outputs is not None:
            return _structured(outputs)
        if isinstance(form, SchemaFormat) and form.json_schema.schema_ is not None:
            return Constraint.json_schema(form.json_schema.schema_)
        return Constraint.json_object()
    except UserError as error:
        param = "response_format" if outputs is None else "structured_outputs"
        raise bad_request(str(error), param, "invalid_value") from None


def _structured(outputs: StructuredOutputs) -> Constraint:
    if outputs.regex is not None:
        return Constraint.regex(outputs.regex)
    if outputs.choice is not None:
        return Constraint.choice(outputs.choice)
    return Constraint.json_schema(outputs.json_ or {})


class Ask:
    """What a request asks for, whatever the prompt is; ``requests`` puts prompts to it."""

    def __init__(
        self,
        service: Service,
        served: Served,
        fields: SamplingFields,
        *,
        n: int = 1,
        max_tokens: int | None = None,
        usual: int = MAX_TOKENS,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        constraint: Constraint | None = None,
        param: str = "messages",
    ) -> None:
        """``usual``: the longest answer if ``max_tokens`` is None; ``param``: the field with the prompt."""
        if not served.writes:
            raise bad_request(
                f"'{served.name}' names the class of a text and writes none. POST /classify asks it.",
                "model",
                "no_text",
            )
        self.service, self.served, self.fields, self.n = service, served, fields, n
        self.max_tokens, self.usual, self.stop, self.logprobs = max_tokens, usual, tuple(stop), logprobs
        self.constraint, self.param = constraint, param
        self.deadline = time.monotonic() + service.settings.request_timeout

    def requests(self, prompts: Sequence[Prompt]) -> list[Request]:
        """``n`` requests for each prompt, each with a seed of its own.

        Raises:
            ApiError: A prompt is empty, or leaves no room for the answer.
        """
        seed = secrets.randbits(62) if self.fields.seed is None else self.fields.seed
        found: list[Request] = []
        for prompt in prompts:
            if not prompt.ids:
                raise bad_request(f"{self.param}: a prompt without a token cannot be continued.", self.param, "empty")
            room = self._room(len(prompt.ids))
            for _ in range(self.n):
                found.append(
                    Request(
                        prompt.ids,
                        self.served.internal,
                        room,
                        sampling=sampling_of(self.fields, self.served, seed, len(found)),
                        slots=prompt.slots,
                        stop=self.stop,
                        ignore_stop_ids=bool(self.fields.ignore_eos),
                        logprobs=self.logprobs,
                        deadline=self.deadline,
                        constraint=self.constraint,
                    )
                )
        return found

    def _room(self, length: int) -> int:
        target, wanted = self.served.target, self.max_tokens
        bounded = target.adapters.architecture.max_length is not None
        if wanted is None and (bounded or self.usual < MAX_TOKENS):
            wanted = self.usual
        try:
            return target.room(length, self.served.internal, wanted, clip=self.max_tokens is None)
        except UserError as error:
            raise bad_request(str(error), self.param, "context_length_exceeded") from None
