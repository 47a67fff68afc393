"""Texts beside a reference: equal, the same number, the same words."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from decimal import Decimal, InvalidOperation

from pydantic import Field

from weft.evaluate.metrics.base import Metric, Reply
from weft.evaluate.metrics.words import words
from weft.patterns import Pattern, pattern

_NUMBER = re.compile(r"[-+]?(\d[\d,]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class ExactMatch(Metric):
    """1 for an answer that is a reference word for word; white space is folded before they are compared."""

    ignore_case: bool = Field(False, description="whether capitals and small letters are the same")
    ignore_punctuation: bool = Field(False, description="whether punctuation counts")
    ignore: list[str] = Field([], description="regular expressions of which every match is taken out of both texts")

    def model_post_init(self, _: object) -> None:
        for one in self.ignore:
            pattern(one, "exact_match: ignore")

    def score(self, reply: Reply) -> float:
        if reply.text is None:
            return 0.0
        said = self._plain(reply.text)
        return float(any(said == self._plain(one) for one in reply.references))

    def _plain(self, text: str) -> str:
        for one in self.ignore:
            for found in reversed(Pattern(one, "exact_match: ignore").all(text)):
                text = text[: found.start()] + text[found.end() :]
        text = text.lower() if self.ignore_case else text
        if self.ignore_punctuation:
            text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
        return " ".join(text.split())


class NumericMatch(Metric):
    """1 for an answer that is the same number as a reference: 1,000.0 is 1000, and a sign of money or % is passed over.

    An answer that is no number alone is wrong: ``extract: last_number`` takes one out of a text.
    """

    def score(self, reply: Reply) -> float:
        said = number_in(reply.text or "")
        return float(said is not None and any(said == number_in(one) for one in reply.references))


def number_in(text: str) -> Decimal | None:
    """The number that a text is; None: it is none."""
    text = text.strip().strip("$€£¥￥%").strip().removesuffix(".")
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None


class TokenF1(Metric):
    """F1 of the words of answer and reference, the best of the references (Rajpurkar et al. 2016, SQuAD).

    English articles, punctuation and case do not count. Of Chinese and Japanese every character is a word.
    """

    def score(self, reply: Reply) -> float:
        return max((_overlap(reply.text or "", one) for one in reply.references), default=0.0)


def _overlap(answer: str, reference: str) -> float:
    said, expected = (_kept_words(text) for text in (answer, reference))
    if not said or not expected:
        return float(said == expected)
    common = sum((Counter(said) & Counter(expected)).values())
    return 2 * common / (len(said) + len(expected))


def _kept_words(text: str) -> list[str]:
    without = text.lower().translate(str.maketrans("", "", string.punctuation))
    return words(_ARTICLES.sub(" ", without))


class Length(Metric):
    """The characters of an answer, for questions that have no right one."""

    needs_reference = False

    def score(self, reply: Reply) -> float:
        return float(len(reply.text or ""))
