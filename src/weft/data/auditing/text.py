"""Checks of what a record says: placeholders, left-over template variables, broken characters, secrets."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from weft.data.auditing.base import Facts, Item, each, short
from weft.data.auditing.duplicates import normalise
from weft.data.auditing.scripts import looks_like_code
from weft.data.auditing.secrets import KINDS, find_secrets

_COPIED = 40  # characters of a question that an answer may begin with

_PLACEHOLDERS = frozenset({
    "todo", "tbd", "fixme", "n/a", "n.a.", "na", "null", "nan", "nil", "undefined", "none", "placeholder", "xxx", "...",
    "…", "[object object]", "<answer>", "[answer]", "<output>", "<response>", "<noinput>", "<nooutput>", "no answer",
    "no output", "your answer here", "answer here", "[insert answer here]", "待补充", "待定", "暂无", "暂无答案", "略",
    "答案略", "无答案",
})  # fmt: skip
_FILLER = re.compile(
    r"(?i)\blorem ipsum\b|\[(?:insert|your|add) [a-z ]{2,40}here\]|<insert [a-z ]{2,40}>|^TODO\b|待补充"
)
_REFUSAL = re.compile(
    r"(?i)^\W*(?:i'?m sorry,? but |sorry,? )?(?:as an? (?:ai|artificial intelligence|large language|language)\b"
    r"|i(?:'m| am) (?:just |only )?an? (?:ai|large)? ?language model)"
    r"|^\W*(?:抱歉|对不起)?[，, ]*(?:我是|作为)(?:一个|一名|一款)?"
    r"(?:AI|人工智能|语言模型|大型语言模型|大语言模型)(?:语言模型|助手|模型)?[，,]? ?(?:我)?(?:无法|不能|没有)"
)
# {{name}}, ${name}, and {instruction}. The last counts only with a name that prompt templates use.
_VARIABLE = re.compile(
    r"\{\{ ?[A-Za-z_\u4e00-\u9fff][\w. \u4e00-\u9fff]{0,40}\}\}|\$\{[A-Za-z_]\w{0,40}\}|\{\{?(?:instruction|input|"
    r"output|prompt|response|question|answer|context|system|query|history|completion|user_input|name|author)\}|"
    r"\{%-? ?(?:for|if|endif|endfor|set)\b"
)
# The marks that templates of chat models write, and people do not.
_MARKUP = re.compile(
    r"<\|(?:im_start|im_end|eot_id|start_header_id|end_header_id|begin_of_text|endoftext|end|user|assistant|system)\|>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<｜(?:User|Assistant|end▁of▁sentence)｜>"
    r"|^### (?:Instruction|Response|指令|回答):?\s*$|^(?:USER|ASSISTANT|Human|Assistant): ",
    re.MULTILINE,
)
# UTF-8 that was read as Windows-1252: Ã, â … for the first byte of a character of two or three, then the others.
_MISREAD = re.compile("[ÂÃÄÅÐÑØÙâãäåæçèé][\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]{1,2}")
_GARBLED = re.compile("锟斤拷|烫烫烫|屯屯屯|鈥[檚淍]|銆[傚俔]|\ufeff.|ï»¿")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f\ue000-\uf8ff]")


@each("answer-without-words", "error", "an answer without letters or digits says nothing: remove the record")
def answer_without_words(item: Item, facts: Facts) -> tuple[str, str] | None:
    """An answer of punctuation or white space only."""
    if not item.answer or any(unicodedata.category(letter)[0] in "LNS" for letter in item.answer[:400]):
        return None
    return "the answer has neither letters nor digits", short(f"{item.question} → {item.answer}")


@each("placeholder-answer", "error", "write the answer, or remove the record")
def placeholder_answer(item: Item, facts: Facts) -> tuple[str, str] | None:
    """An answer that somebody meant to fill in."""
    if not item.answer:
        return None
    if len(item.answer) <= 40 and normalise(item.answer).strip("'\"`*_ ") in _PLACEHOLDERS:
        return "the answer is a placeholder", short(f"{item.question} → {item.answer}")
    found = _FILLER.search(item.answer)
    if found is None or looks_like_code(item.answer) or _FILLER.search(item.prompt):
        return None
    return "the answer holds a placeholder", short(item.answer, found.start())


@each("refusal", "warning", "if the model should answer such questions, remove the record or write an answer")
def refusal(item: Item, facts: Facts) -> tuple[str, str] | None:
    """An answer of another model that speaks of itself (As an AI …)."""
    if not item.answer or not _REFUSAL.search(item.answer[:200]):
        return None
    return "the answer speaks as some other AI model", short(item.answer)


@each("template-variable", "error", "fill the variable in, or remove the record: the model would learn to write it")
def template_variable(item: Item, facts: Facts) -> tuple[str, str] | None:
    """A variable of a template that was never filled in, such as {{name}}."""
    if "{" not in item.text:
        return None
    found = _VARIABLE.search(item.text)
    if found is None or _about_templates(item.text):
        return None
    return f"{found[0]!r} was never filled in", short(item.text, found.start())


def _about_templates(text: str) -> bool:
    """Whether the text is about braces: programs, mark-up, formulas."""
    return looks_like_code(text) or bool(re.search(r"`|</|\(\)|;\s*$|\\[a-z]+\{|print\(|\bf\"", text, re.MULTILINE))


@each("chat-markup", "error", "it was rendered for some model before: give the plain text, the template adds its own")
def chat_markup(item: Item, facts: Facts) -> tuple[str, str] | None:
    """Text that is already rendered with some chat template's marks."""
    marks = {found[0].strip() for found in _MARKUP.finditer(item.text)}
    if len(marks) < 2 or looks_like_code(item.text):
        return None
    first = _MARKUP.search(item.text)
    message = f"the text holds the marks of a chat template ({', '.join(sorted(marks)[:3])})"
    return message, short(item.text, first.start() if first else None)


@each("control-token", "warning", "it is ordinary text here and controls nothing: remove it unless it is the topic")
def control_token(item: Item, facts: Facts) -> tuple[str, str] | None:
    """A control token of the tokenizer, typed in the text of a record."""
    pattern = facts.control_pattern
    found = pattern.search(item.text) if pattern is not None else None
    if found is None:
        return None
    return f"the control token {found[0]!r} stands in the text", short(item.text, found.start())


@each("broken-characters", "error", "read the source again in its own encoding (see `iconv`), or remove the record")
def broken_characters(item: Item, facts: Facts) -> tuple[str, str] | None:
    """Replacement characters, and UTF-8 that was read as something else."""
    if item.text.isascii():
        return None
    place = item.text.find("\ufffd")
    if place >= 0:
        return "the replacement character U+FFFD: its text was decoded wrongly", short(item.text, place)
    found = _GARBLED.search(item.text) or next((m for m in _MISREAD.finditer(item.text) if _was_utf8(m[0])), None)
    return None if found is None else ("text that was decoded wrongly (mojibake)", short(item.text, found.start()))


def _was_utf8(text: str) -> bool:
    try:
        raw = b"".join(letter.encode("cp1252") if ord(letter) > 0xFF else letter.encode("latin1") for letter in text)
        return len(raw.decode("utf-8")) == 1
    except UnicodeError:
        return False


@each("control-characters", "warning", "remove them: they are left over from a terminal, a PDF or a symbol font")
def control_characters(item: Item, facts: Facts) -> tuple[str, str] | None:
    """Control characters and characters for private use."""
    found = _CONTROL.search(item.text)
    if found is None:
        return None
    shown = short(item.text.replace(found[0], "·"), found.start())
    return f"the character U+{ord(found[0]):04X} stands in the text", shown


@each("answer-is-question", "error", "the answer repeats the question: write an answer, or remove the record")
def answer_is_question(item: Item, facts: Facts) -> tuple[str, str] | None:
    """The answer is the question once more."""
    if not item.answer or len(item.answer) > 2 * len(item.question) or len(item.question) > 2 * len(item.answer):
        return None
    if normalise(item.answer) != normalise(item.question):
        return None
    return "the answer is the same text as the question", short(f"{item.question} → {item.answer}")


@each("answer-repeats-question", "warning", "cut the repetition off: answers would begin with the question")
def answer_repeats_question(item: Item, facts: Facts) -> tuple[str, str] | None:
    """The answer begins with the whole question."""
    question = item.question.strip()
    begins = len(question) >= _COPIED and item.answer.lstrip().startswith(question)
    if not begins or len(item.answer) < len(question) + 2 or looks_like_code(question):
        return None
    return "the answer begins with the whole question", short(f"{question} → {item.answer}")


@each("secret", "warning", "remove it or put made-up data in its place: a model learns by heart what it sees")
def secret(item: Item, facts: Facts) -> tuple[str, str] | None:
    """What looks like a person's or a service's secret: keys, e-mail addresses, phone, identity and card numbers."""
    found = list(find_secrets(item.text))
    if not found:
        return None
    kinds = Counter(KINDS[each.kind].what for each in found)
    what = ", ".join(kind + (f" ({count} times)" if count > 1 else "") for kind, count in kinds.items())
    return f"this looks like {what}", short("; ".join(each.masked for each in found))
