"""JSON: whether an answer keeps a schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from weft.errors import UserError
from weft.evaluate.metrics.base import Metric, Reply
from weft.foreign import parse_json
from weft.rewards.json_schema import JsonSchema


class FollowsSchema(Metric):
    """1 for an answer that is JSON of the schema; without one any JSON object will do.

    An answer that has other text around its JSON is wrong: ``extract: json`` takes it out.
    """

    needs_reference = False

    schema_: dict[str, Any] | None = Field(None, alias="schema", description="the schema of all answers")
    schema_field: str | None = Field(None, description="the field of the record that holds its own schema")

    def model_post_init(self, _: object) -> None:
        """Check the settings.

        Raises:
            UserError: Both are given, or the schema is none.
        """
        if self.schema_ is not None and self.schema_field is not None:
            raise UserError("json_schema: give schema or schema_field, one of the two.")
        if self.schema_ is not None:
            JsonSchema(schema=self.schema_)  # which refuses what is none

    def score(self, reply: Reply) -> float:
        """The value of one reply alone.

        Raises:
            UserError: The record has no schema of its own, where it should.
        """
        schema: object = self.schema_
        if self.schema_field is not None:
            found = reply.fields.get(self.schema_field)
            schema = parse_json(found, f"json_schema: {self.schema_field}") if isinstance(found, str) else found
            if not isinstance(schema, Mapping):
                raise UserError(f"json_schema: a record has no schema in its field '{self.schema_field}'.")
        checked = JsonSchema(schema=dict(schema)) if isinstance(schema, Mapping) else JsonSchema()
        return checked([""], [reply.text or ""])[0]
