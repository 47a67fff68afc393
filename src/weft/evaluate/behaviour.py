"""How a model behaves in a domain: it refuses what lies outside, answers from the text it is given, keeps a style.

The functions of ``METRICS`` take an answer, the reference and the context of the question, and give the score of this
answer alone. What is a figure of many answers (``detection``) stands beside them.
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from weft.assets import ROOT
from weft.data.retrieval import covered, is_cjk
from weft.errors import UserError
from weft.evaluate.results import Item
from weft.foreign import parse_json, read_text
from weft.patterns import Pattern

Metric = Callable[[str, str, str], float]
REFUSALS, NOT_IN_TEXT = ROOT / "refusals.txt", ROOT / "not_in_text.txt"
# Who refuses says so at once; further on the same words are a part of an answer.
_HEAD = 200
_NUMBER = re.compile(r"\d+(?:[,.]\d+)*")
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_FENCE = re.compile(r"\A\s*```\w*\n(.*?)\n?```\s*\Z", re.DOTALL)


# ------------------------------------------------------------------------------------------------------------- phrases


@functools.cache
def read_phrases(path: str | Path = REFUSALS) -> tuple[str, ...]:
    """The phrases of a file, one a line; lines that begin with ``#`` are comments.

    Raises:
        UserError: There is no such file, or it holds no phrase.
    """
    lines = (_plain(line) for line in read_text(path).splitlines())
    found = tuple(line for line in lines if line and not line.startswith("#"))
    if not found:
        raise UserError(f"{path} holds no phrase; write one a line.")
    return found


def says(answer: str, phrases: Sequence[str]) -> bool:
    """Whether one of the phrases stands in the first 200 characters of an answer, as whole words."""
    head = _plain(answer)[:_HEAD]
    return any(_stands(_plain(phrase), head) for phrase in phrases)


def _stands(phrase: str, text: str) -> bool:
    """Whether a phrase stands in a text; letters beside it would make another word of it, except in CJK."""
    place = text.find(phrase)
    while place >= 0 and phrase:
        before, after = text[place - 1 : place], text[place + len(phrase) : place + len(phrase) + 1]
        if not (_joined(before, phrase[0]) or _joined(phrase[-1], after)):
            return True
        place = text.find(phrase, place + 1)
    return False


def _joined(one: str, other: str) -> bool:
    return bool(one and other) and one.isalnum() and other.isalnum() and not (is_cjk(one) or is_cjk(other))


def _plain(text: str) -> str:
    """A text with one kind of white space, of apostrophes and of letters."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'").split())


# ------------------------------------------------------------------------------------------------------------- metrics


def refusal(answer: str, reference: str = "", context: str = "", *, phrases: Sequence[str] | None = None) -> float:
    """1 for an answer that refuses, else 0."""
    return float(says(answer, read_phrases() if phrases is None else phrases))


def refusal_right(
    answer: str, reference: str = "", context: str = "", *, phrases: Sequence[str] | None = None
) -> float:
    """1 if the answer refuses where the reference does, and answers where that answers."""
    return float(refusal(answer, phrases=phrases) == refusal(reference, phrases=phrases))


def not_in_text(answer: str, reference: str = "", context: str = "", *, phrases: Sequence[str] | None = None) -> float:
    """1 for an answer that says that the text does not hold it, else 0."""
    return float(says(answer, read_phrases(NOT_IN_TEXT) if phrases is None else phrases))


def not_in_text_right(
    answer: str, reference: str = "", context: str = "", *, phrases: Sequence[str] | None = None
) -> float:
    """1 if the answer says that the text does not hold it where the reference does, and nowhere else."""
    return float(not_in_text(answer, phrases=phrases) == not_in_text(reference, phrases=phrases))


def supported(answer: str, reference: str = "", context: str = "") -> float:
    """The share of the answer's words (of Chinese: pairs of characters) that stand in the context: K-Precision.

    What says that the text does not hold the answer claims nothing, and counts 1. It is a measure of words: what the
    context says otherwise put scores low, and what puts its words together wrongly scores high.
    """
    return 1.0 if not_in_text(answer) else covered(answer, context)


def numbers_supported(answer: str, reference: str = "", context: str = "") -> float:
    """The share of the numbers in an answer that stand in the context; of no numbers 1. 1,000 is 1000."""
    own, there = (list(map(_number, _NUMBER.findall(text))) for text in (answer, context))
    return sum(number in there for number in own) / len(own) if own else 1.0


def _number(text: str) -> str:
    return re.sub(r",(?=\d{3}(?!\d))", "", unicodedata.normalize("NFKC", text))


METRICS: Mapping[str, Metric] = {
    "refusal": refusal,
    "refusal_right": refusal_right,
    "not_in_text": not_in_text,
    "not_in_text_right": not_in_text_right,
    "supported": supported,
    "numbers_supported": numbers_supported,
}


# --------------------------------------------------------------------------------------------- figures of many answers


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How well answers that say something (a refusal) are those that should.

    Attributes:
        n: answers; ``expected``: how many should say it; ``found``: how many do; ``both``: how many do rightly.
    """

    n: int
    expected: int
    found: int
    both: int

    @property
    def precision(self) -> float | None:
        """Of those that say it the share that should; None: none does."""
        return self.both / self.found if self.found else None

    @property
    def recall(self) -> float | None:
        """Of those that should say it the share that does; None: none should."""
        return self.both / self.expected if self.expected else None

    @property
    def f1(self) -> float | None:
        """The harmonic mean of both; None: none says it and none should."""
        return 2 * self.both / (self.found + self.expected) if self.found + self.expected else None

    @property
    def errors(self) -> dict[str, float | None]:
        """The binomial standard errors of ``precision`` and ``recall``."""
        pairs = {"precision": (self.precision, self.found), "recall": (self.recall, self.expected)}
        return {key: None if p is None else math.sqrt(p * (1 - p) / n) for key, (p, n) in pairs.items()}


def detection(items: Iterable[Item], phrases: Sequence[str] | None = None) -> Detection:
    """Precision and recall of what some phrases say (default: refusals): in the outputs, beside the references."""
    known = read_phrases() if phrases is None else phrases
    pairs = [(says(item.reference, known), says(item.output, known)) for item in items]
    return Detection(
        n=len(pairs),
        expected=sum(should for should, _ in pairs),
        found=sum(does for _, does in pairs),
        both=sum(should and does for should, does in pairs),
    )


# --------------------------------------------------------------------------------------------------------------- style

Form = Literal["json", "bullets", "numbered", "one_line", "no_markdown"]
Unit = Literal["words", "characters", "sentences", "lines"]
_BULLET, _NUMBERED = re.compile(r"\s*[-*•·]\s+\S"), re.compile(r"\s*\d+[.)、]\s*\S")
_MARKDOWN = re.compile(r"(?m)^\s{0,3}(?:#{1,6}\s|>\s|```)|\*\*[^*\n]+\*\*|\[[^\]\n]+\]\([^)\n]+\)|`[^`\n]+`")
_FORMS: dict[str, Callable[[str], bool]] = {
    "json": lambda text: _is_json(text),
    "bullets": lambda text: _all_lines(text, _BULLET),
    "numbered": lambda text: _all_lines(text, _NUMBERED),
    "one_line": lambda text: "\n" not in text.strip(),
    "no_markdown": lambda text: not _MARKDOWN.search(text),
}


@dataclass(frozen=True)
class Style:
    """What an answer should look like; what is None is not asked for.

    Attributes:
        unit: of both lengths; a character of Chinese, Japanese or Korean is a word.
        form: ``json`` (the answer is JSON, also in a fence), ``bullets`` or ``numbered`` (every line is), ``one_line``,
            ``no_markdown``.
        pattern: a regular expression that has to be found in the answer.
        forbidden, required: words or phrases that must not, or must, stand in it; letters' case does not count.

    Raises:
        UserError: The form, the unit or the pattern is none, or the lengths contradict each other.
    """

    min_length: int | None = None
    max_length: int | None = None
    unit: Unit = "words"
    _: KW_ONLY
    form: Form | None = None
    pattern: str | None = None
    forbidden: Sequence[str] = ()
    required: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.unit not in _UNITS:
            raise UserError(f"unit {self.unit!r} is none of {', '.join(_UNITS)}.")
        if self.form is not None and self.form not in _FORMS:
            raise UserError(f"form {self.form!r} is none of {', '.join(_FORMS)}.")
        if self.min_length is not None and self.max_length is not None and self.min_length > self.max_length:
            raise UserError(f"min_length {self.min_length} is more than max_length {self.max_length}.")
        if isinstance(self.forbidden, str) or isinstance(self.required, str):
            raise UserError("forbidden and required are lists of words.")
        if self.pattern is not None:
            Pattern(self.pattern, "style: pattern")

    def scores(self, answer: str) -> dict[str, float]:
        """``length``; 1 or 0 for all that is asked for; ``forbidden_words``, how many; ``style``: all of it is kept."""
        size, found = length(answer, self.unit), {}
        if self.min_length is not None or self.max_length is not None:
            long_enough = self.min_length is None or size >= self.min_length
            found["length_kept"] = float(long_enough and (self.max_length is None or size <= self.max_length))
        if self.form is not None:
            found["form_kept"] = float(_FORMS[self.form](answer))
        if self.pattern is not None:
            found["pattern_kept"] = float(Pattern(self.pattern, "style: pattern").search(answer) is not None)
        text = _plain(answer)
        broken = sum(_stands(_plain(word), text) for word in self.forbidden)
        if self.forbidden:
            found["forbidden_kept"] = float(not broken)
        if self.required:
            found["required_kept"] = float(all(_stands(_plain(word), text) for word in self.required))
        kept = float(all(found.values()))
        counted = {"forbidden_words": float(broken)} if self.forbidden else {}
        return {"length": float(size), **found, **counted, "style": kept}


def length(answer: str, unit: Unit = "words") -> int:
    """How long an answer is; white space at both ends does not count."""
    return _UNITS[unit](answer.strip())


def _words(text: str) -> int:
    return sum(sum(map(is_cjk, word)) + bool(re.search(r"\w", _no_cjk(word))) for word in _WORD.findall(text))


def _no_cjk(word: str) -> str:
    return "".join(one for one in word if not is_cjk(one))


_UNITS: dict[str, Callable[[str], int]] = {
    "words": _words,
    "characters": len,
    # A full stop ends a sentence where white space or the end follows; those of Chinese always do.
    "sentences": lambda text: len([one for one in re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n+", text) if one.strip()]),
    "lines": lambda text: len([line for line in text.splitlines() if line.strip()]),
}


def _all_lines(text: str, shape: re.Pattern[str]) -> bool:
    lines = [line for line in text.splitlines() if line.strip()]
    return bool(lines) and all(shape.match(line) for line in lines)


def _is_json(text: str) -> bool:
    fenced = _FENCE.match(text)
    try:
        parse_json(fenced[1] if fenced else text, "the answer")
    except UserError:
        return False
    return True
