"""Templates of a task: Jinja in the sandbox, with the fields of a record as variables."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from weft.data.rendering.sandbox import render_template, variables_of
from weft.errors import UserError, nearest, reason_of

# What every record has beside its own fields.
GIVEN = ("file", "group")


class Template:
    """One template; ``where`` names its place in errors.

    Raises:
        UserError: It is no template.
    """

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where = text, where
        self._plain = "{" not in text
        try:
            self.variables = frozenset[str]() if self._plain else variables_of(text)
        except Exception as error:  # jinja's own
            raise UserError(f"{where}: this is no template: {reason_of(error)}.") from None

    def check(self, known: Collection[str], source: str) -> None:
        """Refuse a template with a variable that is no field of any record.

        Raises:
            UserError: There is one.
        """
        lower = {name.lower() for name in known}
        for name in sorted(self.variables):
            if name not in known and name.lower() not in lower and name not in GIVEN:
                fields = ", ".join(sorted(known)[:20])
                raise UserError(
                    f"{self.where}: no record of {source} has a field '{name}'.{nearest(name, known)} Fields: {fields}."
                )

    def render(self, fields: Mapping[str, Any], source: str) -> str:
        """The text for one record.

        Raises:
            UserError: The template fails.
        """
        if self._plain:
            return self.text
        try:
            return render_template(self.text, fields)
        except Exception as error:  # the template is a program of the user
            raise UserError(f"{source}: {self.where} fails: {reason_of(error)}.") from None


def templates(given: str | Sequence[str] | None, where: str) -> list[Template]:
    """The templates of a key, which may hold one, several or none.

    Raises:
        UserError: One of them is no template.
    """
    if given is None:
        return []
    return [Template(one, where) for one in ([given] if isinstance(given, str) else given)]


def with_small_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, also by their names in small letters, where no other field has such a name. Those that are null are
    left out: Jinja would write ``None``."""
    known = {name: value for name, value in fields.items() if value is not None}
    return {**{name.lower(): value for name, value in known.items()}, **known}
