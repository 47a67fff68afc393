"""Words of any language: letters and digits side by side; of scripts without spaces every character."""

from __future__ import annotations

import regex

# Chinese, Japanese and the like are written without spaces; so a character is what can be compared.
_WORD = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]|(?:(?![\p{Han}\p{Hiragana}\p{Katakana}])[\p{L}\p{N}\p{M}])+")


def words(text: str) -> list[str]:
    """The words of a text, in small letters; punctuation is none."""
    return _WORD.findall(text.lower())
