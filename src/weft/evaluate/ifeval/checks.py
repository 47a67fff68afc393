"""The 25 kinds of instruction by their names in IFEval's file, and whether an answer follows one.

Sentences, and words in capitals, are told by rules of our own where IFEval's program asks nltk's trained models. So the
counts of sentences can differ from its own by one where an abbreviation ends with a full stop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from weft.errors import UserError, nearest
from weft.evaluate.ifeval import layout, wording

Check = Callable[[str, Mapping[str, object]], bool]

CHECKS: Mapping[str, Check] = {
    "keywords:existence": wording.has_keywords,
    "keywords:frequency": wording.keyword_frequency,
    "keywords:forbidden_words": wording.has_no_forbidden_word,
    "keywords:letter_frequency": wording.letter_frequency,
    "language:response_language": wording.in_language,
    "length_constraints:number_sentences": wording.number_of_sentences,
    "length_constraints:number_words": wording.number_of_words,
    "length_constraints:number_paragraphs": layout.number_of_paragraphs,
    "length_constraints:nth_paragraph_first_word": layout.paragraph_begins_with,
    "detectable_content:number_placeholders": layout.number_of_placeholders,
    "detectable_content:postscript": layout.has_postscript,
    "detectable_format:number_bullet_lists": layout.number_of_bullets,
    "detectable_format:constrained_response": layout.is_one_of_three,
    "detectable_format:number_highlighted_sections": layout.number_of_highlights,
    "detectable_format:multiple_sections": layout.number_of_sections,
    "detectable_format:json_format": layout.is_json,
    "detectable_format:title": layout.has_title,
    "combination:two_responses": layout.is_two_responses,
    "combination:repeat_prompt": layout.repeats_prompt,
    "startend:end_checker": layout.ends_with,
    "startend:quotation": layout.is_quoted,
    "change_case:capital_word_frequency": wording.capital_word_frequency,
    "change_case:english_capital": wording.in_capitals,
    "change_case:english_lowercase": wording.in_small_letters,
    "punctuation:no_comma": layout.has_no_comma,
}


def unknown_instruction(name: str) -> UserError:
    """What is said of an instruction that is none of the 25."""
    return UserError(f"no instruction {name!r}.{nearest(name, CHECKS)} IFEval's are: {', '.join(CHECKS)}.")


def follows(answer: str, instruction: str, settings: Mapping[str, object]) -> bool:
    """Whether an answer follows one instruction; an empty answer follows none.

    Raises:
        UserError: There is no such instruction, or a setting of it is missing.
    """
    if instruction not in CHECKS:
        raise unknown_instruction(instruction)
    return bool(answer.strip()) and CHECKS[instruction](answer, settings)


def follows_loosely(answer: str, instruction: str, settings: Mapping[str, object]) -> bool:
    """The same for the answer or one of its seven variants: without stars, first line, last line, and these together.

    Raises:
        UserError: There is no such instruction, or a setting of it is missing.
    """
    lines = answer.split("\n")
    cut = [answer, *("\n".join(some).strip() for some in (lines[1:], lines[:-1], lines[1:-1]))]
    variants = dict.fromkeys([*cut, *(text.replace("*", "") for text in cut)])
    return any(follows(text, instruction, settings) for text in variants)
