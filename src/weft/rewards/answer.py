"""The answer of the record, word for word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from weft.complaints import Worded
from weft.patterns import Pattern


class ExactAnswer(Worded):
    """1 for an answer that is the record's own, 0 for any other; white space at both ends does not count."""

    column: str = Field("answer", description="the field of the record with the right answer")
    pattern: str | None = Field(
        None, description="of an answer only what the first group of this expression finds in it is compared"
    )

    def model_post_init(self, _: Any) -> None:
        self._finder()

    def _finder(self) -> Pattern | None:
        """The expression, with its whole time to find things in."""
        return None if self.pattern is None else Pattern(self.pattern, "the reward exact_answer: pattern")

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        """The reward of each answer; None where the record has no answer."""
        finder = self._finder()
        return [
            None if right is None else float(said(text, finder) == str(right).strip())
            for text, right in zip(completions, columns[self.column], strict=True)
        ]


def said(text: str, finder: Pattern | None) -> str | None:
    """What of an answer is compared; None: the expression finds nothing in it."""
    if finder is None:
        return text.strip()
    found = finder.search(text)
    return None if found is None else (found.group(1) if found.groups() else found.group(0)).strip()
