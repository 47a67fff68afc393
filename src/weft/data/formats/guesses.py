"""Guesses from the names of fields: which hold a question, and which an answer. They serve as advice, never to read.

Advice that takes a question for an answer would teach it. So a field with a word of a question in its name is never
advised as an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

ASKS = (
    "question", "query", "prompt", "instruction", "input", "ask", "problem", "title", "q", "context", "passage",
    "document", "dialogue", "article", "history", "system", "user", "human", "source", "task", "tool", "premise",
    "问题", "提问", "问", "指令", "输入", "历史", "上下文", "背景",
)  # fmt: skip
SAYS = (
    "answer", "response", "reply", "completion", "output", "solution", "assistant", "target", "content", "summary",
    "text", "a", "回答", "答案", "答", "输出", "回复", "摘要", "内容", "文本",
)  # fmt: skip
_ANSWERS = frozenset(
    ("answer", "response", "reply", "completion", "output", "solution", "target", "summary", "highlights", "a",
     "chosen", "rejected", "rejected_response", "response_j", "response_k", "completions")
)  # fmt: skip
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[^\W\d_A-Za-z]+")


def by_words(names: Sequence[str], usual: Sequence[str]) -> list[str]:
    """The names that hold a usual word, those with an earlier word first."""
    return [name for word in usual for name in names if word in _words(name)]


def _words(name: str) -> set[str]:
    found = {word.lower() for word in _WORDS.findall(name)}
    return found | {word.removesuffix("s") for word in found}


def candidates(missing: str, names: Sequence[str]) -> list[str]:
    """The names that may be meant by a format's field ``missing``: for an answer none that asks, and vice versa."""
    if missing in _ANSWERS:
        says = by_words(names, SAYS)
        return [name for name in dict.fromkeys((*says, *names)) if not by_words([name], ASKS)]
    if by_words([missing], ASKS):
        asks = by_words(names, ASKS)
        return [name for name in dict.fromkeys((*asks, *names)) if name in asks or not by_words([name], SAYS)]
    return list(names)


def yaml_name(name: str) -> str:
    """A field's name as it is written in YAML."""
    return name if name.replace("_", "").isalnum() and not name.isdecimal() else json.dumps(name, ensure_ascii=False)
