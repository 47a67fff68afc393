"""Instructions about words, letters, sentences and languages."""

from __future__ import annotations

import re
from collections.abc import Mapping

from weft.errors import UserError
from weft.evaluate.ifeval.settings import compare, matches, text, texts

_WORD = re.compile(r"\w+")
# A sentence ends with a mark of its own, behind which stand white space or, in Chinese and Japanese, nothing.
_SENTENCE = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)|[。！？]+[”』」]*")
_ABBREVIATION = re.compile(r"(?:\b(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|e\.g|i\.e|U\.S)|^\s*\d+)$")
_SPELLED = re.compile(r"\w+(?:-\w+)*")


def has_keywords(answer: str, settings: Mapping[str, object]) -> bool:
    """Every keyword is there."""
    return all(matches(word, answer) for word in texts(settings, "keywords"))


def keyword_frequency(answer: str, settings: Mapping[str, object]) -> bool:
    """The keyword is there so often."""
    return compare(matches(text(settings, "keyword"), answer), settings, "relation", "frequency")


def has_no_forbidden_word(answer: str, settings: Mapping[str, object]) -> bool:
    """None of these words is there as a word of its own."""
    return not any(matches(rf"\b{word}\b", answer) for word in texts(settings, "forbidden_words"))


def letter_frequency(answer: str, settings: Mapping[str, object]) -> bool:
    """The letter is there so often, large or small."""
    letter = text(settings, "letter").lower()
    return compare(answer.lower().count(letter), settings, "let_relation", "let_frequency")


def in_language(answer: str, settings: Mapping[str, object]) -> bool:
    """The answer is in this language; one whose language cannot be told passes."""
    found = language_of(answer)
    return found is None or found == text(settings, "language")


def language_of(answer: str) -> str | None:
    """The code of a text's language, by langdetect; None: it cannot be told, as of digits alone.

    Raises:
        UserError: langdetect is not installed.
    """
    try:
        import langdetect
    except ImportError:
        raise UserError(
            'IFEval\'s instructions about languages need langdetect: pip install "weft[evaluate]".'
        ) from None
    langdetect.DetectorFactory.seed = 0  # else a short text has another language in every process
    try:
        return str(langdetect.detect(answer))
    except langdetect.LangDetectException:
        return None


def number_of_sentences(answer: str, settings: Mapping[str, object]) -> bool:
    """There are so many sentences."""
    return compare(sentences(answer), settings, "relation", "num_sentences")


def sentences(answer: str) -> int:
    """How many sentences a text has; what stands behind the last mark is one more."""
    count, begin = 0, 0
    for mark in _SENTENCE.finditer(answer):
        if mark[0].startswith(".") and _ABBREVIATION.search(answer[begin : mark.start()]):
            continue
        count += bool(_WORD.search(answer, begin, mark.start()))
        begin = mark.end()
    return count + bool(_WORD.search(answer, begin))


def number_of_words(answer: str, settings: Mapping[str, object]) -> bool:
    """There are so many words: letters, digits and underscores side by side."""
    return compare(len(_WORD.findall(answer)), settings, "relation", "num_words")


def capital_word_frequency(answer: str, settings: Mapping[str, object]) -> bool:
    """So many words are in capitals alone."""
    count = sum(word.isupper() for word in _SPELLED.findall(answer))
    return compare(count, settings, "capital_relation", "capital_frequency")


def in_capitals(answer: str, settings: Mapping[str, object]) -> bool:
    """All is English and in capitals."""
    return answer.isupper() and language_of(answer) in ("en", None)


def in_small_letters(answer: str, settings: Mapping[str, object]) -> bool:
    """All is English and in small letters."""
    return answer.islower() and language_of(answer) in ("en", None)
