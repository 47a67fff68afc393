"""Instructions about the form of an answer: paragraphs, lists, marks, its beginning and its end."""

from __future__ import annotations

import re
from collections.abc import Mapping

from weft.errors import UserError
from weft.evaluate.ifeval.settings import text, whole
from weft.foreign import parse_json

_THREE = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_FENCES = ("```json", "```Json", "```JSON", "```")


def number_of_paragraphs(answer: str, settings: Mapping[str, object]) -> bool:
    """So many paragraphs stand between lines of three stars."""
    found = _filled(re.split(r"\s?\*\*\*\s?", answer))
    return found is not None and len(found) == whole(settings, "num_paragraphs")


def _filled(parts: list[str]) -> list[str] | None:
    """The parts without an empty one at either end; None: another one is empty."""
    kept = [part for place, part in enumerate(parts) if part.strip() or 0 < place < len(parts) - 1]
    return kept if all(part.strip() for part in kept) else None


def paragraph_begins_with(answer: str, settings: Mapping[str, object]) -> bool:
    """There are so many paragraphs with blank lines between them, and one of them begins with this word."""
    parts, place = answer.split("\n\n"), whole(settings, "nth_paragraph")
    filled = sum(bool(part.strip()) for part in parts)
    if place > filled or not parts[place - 1].strip():
        return False
    word = parts[place - 1].split()[0].lstrip("'").lstrip('"')
    first = re.split(r"[.,?!'\"]", word, maxsplit=1)[0].lower()
    return filled == whole(settings, "num_paragraphs") and first == text(settings, "first_word").lower()


def number_of_placeholders(answer: str, settings: Mapping[str, object]) -> bool:
    """At least so many places stand in square brackets."""
    return len(re.findall(r"\[.*?\]", answer)) >= whole(settings, "num_placeholders")


def has_postscript(answer: str, settings: Mapping[str, object]) -> bool:
    """There is a postscript with this mark, in which white space may stand."""
    marker = text(settings, "postscript_marker")
    spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(spaced.get(marker, re.escape(marker.lower())), answer.lower()) is not None


def number_of_bullets(answer: str, settings: Mapping[str, object]) -> bool:
    """Exactly so many lines begin with one star or a dash."""
    count = len(re.findall(r"^\s*\*[^*].*$|^\s*-.*$", answer, re.MULTILINE))
    return count == whole(settings, "num_bullets")


def is_one_of_three(answer: str, settings: Mapping[str, object]) -> bool:
    """One of the three answers that were allowed is in it."""
    return any(one in answer for one in _THREE)


def number_of_highlights(answer: str, settings: Mapping[str, object]) -> bool:
    """At least so many parts of lines stand between stars, or between double stars."""
    single = [one.strip("*").strip() for one in re.findall(r"\*[^\n*]*\*", answer)]
    double = [one.removeprefix("**").removesuffix("**").strip() for one in re.findall(r"\*\*[^\n*]*\*\*", answer)]
    return sum(map(bool, (*single, *double))) >= whole(settings, "num_highlights")


def number_of_sections(answer: str, settings: Mapping[str, object]) -> bool:
    """At least so many headings of this word and a number."""
    heading = rf"\s?{re.escape(text(settings, 'section_spliter'))}\s?\d+\s?"
    return len(re.findall(heading, answer)) >= whole(settings, "num_sections")


def is_json(answer: str, settings: Mapping[str, object]) -> bool:
    """All of it is JSON, in a fence of code or not."""
    found = answer.strip()
    for fence in _FENCES:
        found = found.removeprefix(fence)
    try:
        parse_json(found.removesuffix("```").strip(), "the answer", infinities=True)
    except UserError:
        return False
    return True


def has_title(answer: str, settings: Mapping[str, object]) -> bool:
    """There is a title in double angular brackets."""
    return any(one.lstrip("<").rstrip(">").strip() for one in re.findall(r"<<[^\n]+>>", answer))


def is_two_responses(answer: str, settings: Mapping[str, object]) -> bool:
    """It is two different answers with six stars between them."""
    found = _filled(answer.split("******"))
    return found is not None and len(found) == 2 and found[0].strip() != found[1].strip()


def repeats_prompt(answer: str, settings: Mapping[str, object]) -> bool:
    """It begins with the request, word for word."""
    return answer.strip().lower().startswith(text(settings, "prompt_to_repeat").strip().lower())


def ends_with(answer: str, settings: Mapping[str, object]) -> bool:
    """It ends with this phrase."""
    return answer.strip().strip('"').lower().endswith(text(settings, "end_phrase").strip().lower())


def is_quoted(answer: str, settings: Mapping[str, object]) -> bool:
    """All of it stands in double quotation marks."""
    found = answer.strip()
    return len(found) > 1 and found[0] == found[-1] == '"'


def has_no_comma(answer: str, settings: Mapping[str, object]) -> bool:
    """There is no comma."""
    return "," not in answer
