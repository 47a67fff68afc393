"""The words of ``--prompting``: ways to ask the base."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

from weft.errors import UserError, nearest

PROPOSALS = 8  # instructions that a search has the base propose, where no number is given
How = Literal["first", "random", "similar", "instruction", "search"]
_HOW = get_args(How)
_SHOWN = 40  # characters of an instruction in a contestant's name
_FORMS = "first:K, random:K, similar:K, instruction:TEXT, search or search:K"


@dataclass(frozen=True)
class Wanted:
    """One way to ask the base.

    Attributes:
        how: which examples stand before a question, or which instruction.
        count: how many examples, or how many instructions are tried.
        text: the instruction.
    """

    how: How
    _: KW_ONLY
    count: int = 0
    text: str = ""

    @property
    def name(self) -> str:
        """By which its answers are named."""
        if self.how == "instruction":
            shown = self.text if len(self.text) <= _SHOWN else f"{self.text[:_SHOWN]}…"
            return f"base, instruction: {shown}"
        return "base, searched instruction" if self.how == "search" else f"base, {self.count} {self.how} examples"

    @property
    def needs_examples(self) -> bool:
        """Whether there must be exercises beside those that are scored."""
        return self.how != "instruction"


def wanted_of(word: str) -> Wanted:
    """What a word after ``--prompting`` asks for.

    Raises:
        UserError: It is no such word.
    """
    how, colon, rest = word.partition(":")
    if how not in _HOW:
        raise UserError(f"--prompting {word}: there is no '{how}'.{nearest(how, _HOW)} Forms: {_FORMS}.")
    if how == "instruction":
        if not rest.strip():
            raise UserError(f"--prompting {word}: the instruction is missing behind 'instruction:'.")
        return Wanted("instruction", text=rest.strip())
    if how == "search" and not colon:
        return Wanted("search", count=PROPOSALS)
    if not (rest.isascii() and rest.isdecimal() and int(rest) > 0):
        raise UserError(f"--prompting {word}: expected a number above 0 behind '{how}:', such as {how}:4.")
    return Wanted(how, count=int(rest))  # type: ignore[arg-type]
