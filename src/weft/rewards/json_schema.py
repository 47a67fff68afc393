"""A JSON schema that an answer keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from weft.complaints import Worded
from weft.errors import UserError
from weft.foreign import parse_json


class JsonSchema(Worded):
    """1 for an answer that is JSON of this schema, 0 for any other; without a schema any JSON object will do."""

    schema_: dict[str, Any] | None = Field(None, alias="schema", description="the schema")

    def model_post_init(self, _: Any) -> None:
        if self.schema_ is not None:
            validator(self.schema_)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """The reward of each answer."""
        fits = None if self.schema_ is None else validator(self.schema_)
        found = []
        for text in completions:
            try:
                value = parse_json(text, "the answer")
            except UserError:
                found.append(0.0)
                continue
            found.append(float(isinstance(value, dict) if fits is None else fits.is_valid(value)))
        return found


def validator(schema: dict[str, Any], what: str = "the reward json_schema") -> Any:
    """What tells whether a value keeps the schema; ``what`` asks, for messages.

    Raises:
        UserError: jsonschema is not installed, or this is no schema.
    """
    try:
        import jsonschema
    except ImportError:
        raise UserError(f"{what} needs jsonschema: pip install jsonschema.") from None
    try:
        cls = jsonschema.validators.validator_for(schema)
        cls.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UserError(f"{what}: this is no schema: {error.message}.") from None
    return cls(schema)
