"""A chat template in Go's language, as Ollama wants it, derived from the Jinja template by what that one writes.

Templates are not translated word by word. The Jinja template is run on conversations of placeholders, and what stands
between two turns is read off: the text before the first turn, between a turn and the next, and after the last, by the
roles of both. A template that writes nothing else is these texts, and the Go template says them. Whether it writes
nothing else is shown by both on other conversations; one that differs is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from weft.data import Message
from weft.errors import UserError
from weft.foreign import parse_json

Render = Callable[[Sequence[Message]], str]
START, ANSWER = "", "answer"  # the places before the first turn and after the last
_ROLES = ("system", "user", "assistant")
# Letters that no template strips, splits or repeats by itself.
_PLACE = "qzPLACE{}zq"
_TALK = ("user", "assistant", "user", "assistant", "user")
# Each pair of neighbours that a conversation can have occurs in one of these.
_PROBES = (("user",), ("system", "user"), _TALK, ("system", *_TALK))


@dataclass(frozen=True)
class Gaps:
    """What a template writes between turns: by the role before and the role after, ``START`` and ``ANSWER`` too."""

    texts: Mapping[tuple[str, str], str]

    @property
    def system(self) -> bool:
        """Whether it takes a system message."""
        return (START, "system") in self.texts


def find_gaps(render: Render) -> Gaps:
    """What the template of ``render`` writes between turns.

    Raises:
        UserError: It writes something else for the same neighbours, or does not write a turn as it is.
    """
    texts: dict[tuple[str, str], str] = {}
    for roles in _PROBES:
        messages = [Message(role, _PLACE.format(place)) for place, role in enumerate(roles)]
        try:
            whole = render(messages)
        except Exception as error:
            if roles == _PROBES[0]:
                raise UserError(f"the chat template does not render a question: {error}") from None
            continue  # it takes no system message, or no earlier answers
        for pair, text in _split(whole, roles):
            if texts.setdefault(pair, text) != text:
                raise UserError(_refusal(f"what it writes between {_words(pair)} is not always the same"))
    return Gaps(texts)


def _split(whole: str, roles: Sequence[str]) -> Iterator[tuple[tuple[str, str], str]]:
    at = 0
    for place, role in enumerate(roles):
        mark = _PLACE.format(place)
        if whole.count(mark) != 1 or (start := whole.index(mark)) < at:
            raise UserError(_refusal(f"it does not write the {role}'s turns once and in order"))
        yield (roles[place - 1] if place else START, role), whole[at:start]
        at = start + len(mark)
    yield (roles[-1], ANSWER), whole[at:]


def _words(pair: tuple[str, str]) -> str:
    names = {START: "the beginning", ANSWER: "the answer"}
    return " and ".join(names.get(one, f"the {one}'s turn") for one in pair)


def _refusal(why: str) -> str:
    return (
        f"the chat template cannot become one of Ollama's, whose language knows little: {why}. Export --to gguf, which "
        "holds the template itself (llama.cpp runs it), or train with a simpler one (chat_template: chatml)."
    )


def go_template(gaps: Gaps, leave_out: str = "") -> str:
    """The gaps as a template in Go's language.

    Args:
        leave_out: what the program itself puts at the beginning (the BOS), and the template must not.
    """
    cases: list[str] = []
    for role in _ROLES:
        before = {pair[0]: text for pair, text in gaps.texts.items() if pair[1] == role}
        if not before:
            continue
        before |= {START: before[START].removeprefix(leave_out)} if START in before else {}
        body = _by_last(before) + "{{ .Content }}"
        cases.append(f'{{{{ {"else " if cases else ""}if eq .Role "{role}" }}}}{body}')
    after = {pair[0]: text for pair, text in gaps.texts.items() if pair[1] == ANSWER}
    return (
        '{{- $last := "" }}{{- range .Messages }}'
        + "".join(cases)
        + "{{ end }}{{ $last = .Role }}{{ end }}"
        + _by_last(after)
    )


def _by_last(texts: Mapping[str, str]) -> str:
    """The text for each role of the turn before."""
    if len(set(texts.values())) == 1 and START not in texts:
        return _written(next(iter(texts.values())))
    found: list[str] = []
    for role, text in texts.items():
        found.append(f'{{{{ {"else " if found else ""}if eq $last "{role}" }}}}{_written(text)}')
    return "".join(found) + "{{ end }}"


def _written(text: str) -> str:
    """A text as a value of Go's, so that no space of it is trimmed and no brace of it is a command."""
    return "{{ " + _quoted(text) + " }}" if text else ""


def _quoted(text: str) -> str:
    # A string of JSON is one of Go's, but for pairs of surrogates, which ensure_ascii would make.
    return json.dumps(text, ensure_ascii=False)


def check_go_template(
    template: str, render: Render, conversations: Sequence[Sequence[Message]], head: str
) -> tuple[int, bool]:
    """Compare both templates on conversations.

    Args:
        head: what the program itself puts at the beginning.

    Returns:
        The number of conversations that became the same text, and whether spaces at the ends of a message stay alike.

    Raises:
        UserError: One without such spaces becomes another text.
    """
    count, spaces = 0, True
    for messages in conversations:
        try:
            wanted = render(messages)
        except Exception:  # the template refuses this conversation, and so Ollama need not take it
            continue
        found = head + run_go_template(template, messages)
        if found == (wanted if wanted.startswith(head) else head + wanted):
            count += 1
        elif any(one.content != one.content.strip() for one in messages):
            spaces = False
        else:
            raise UserError(_refusal(f"{[m.content for m in messages]} becomes {found!r} instead of {wanted!r}"))
    return count, spaces


# -- the part of Go's template language that ``go_template`` uses

_COMMAND = re.compile(r'\{\{(-?)\s((?:"(?:[^"\\]|\\.)*"|[^"}]|\}(?!\}))*?)\s(-?)\}\}', re.DOTALL)


def run_go_template(template: str, messages: Sequence[Message]) -> str:
    """The text of messages by a template with ``range .Messages``, ``if eq``, ``else if``, strings and variables.

    Raises:
        UserError: The template uses more of the language.
    """
    tokens = list(_tokens(template))
    nodes, rest = _block(tokens, 0)
    if rest != len(tokens):
        raise UserError("the Go template has an end too many.")
    found: list[str] = []
    _run(nodes, {}, [{"Role": one.role, "Content": one.content} for one in messages], None, found)
    return "".join(found)


@dataclass(frozen=True)
class Node:
    """A text, a command, or a block with its alternative.

    Attributes:
        kind: text, do, if or range.
        words: the text, or what stands in the command after its kind.
    """

    kind: str
    words: str
    body: tuple[Node, ...] = ()
    otherwise: tuple[Node, ...] = ()


Tokens = Sequence[tuple[bool, str]]


def _tokens(template: str) -> Iterator[tuple[bool, str]]:
    """Commands (True) and texts (False), with the texts beside ``{{-`` and ``-}}`` trimmed; a string hides braces."""
    at, trim = 0, ""
    for match in _COMMAND.finditer(template):
        text = template[at : match.start()]
        text = text.lstrip() if trim else text
        yield False, text.rstrip() if match[1] else text
        yield True, match[2].strip()
        at, trim = match.end(), match[3]
    yield False, template[at:].lstrip() if trim else template[at:]


def _block(tokens: Tokens, at: int) -> tuple[tuple[Node, ...], int]:
    """The nodes from a place on, and the place of the command that ends them."""
    nodes: list[Node] = []
    while at < len(tokens):
        command, words = tokens[at]
        kind, _, condition = words.partition(" ")
        if not command:
            nodes.append(Node("text", words))
        elif kind in ("end", "else"):
            break
        elif kind in ("if", "range"):
            node, at = _branch(tokens, at, kind, condition)
            nodes.append(node)
        else:
            nodes.append(Node("do", words))
        at += 1
    return tuple(nodes), at


def _branch(tokens: Tokens, at: int, kind: str, condition: str) -> tuple[Node, int]:
    """The block that a command opens, and the place of its end, which a chain of ``else if`` shares."""
    body, at = _block(tokens, at + 1)
    otherwise: tuple[Node, ...] = ()
    words = tokens[at][1] if at < len(tokens) else ""
    if words.startswith("else if "):
        node, at = _branch(tokens, at, "if", words.removeprefix("else if "))
        otherwise = (node,)
    elif words == "else":
        otherwise, at = _block(tokens, at + 1)
    if at >= len(tokens) or tokens[at][1] != "end":
        raise UserError(f"the Go template does not end its {kind} {condition}.")
    return Node(kind, condition, body, otherwise), at


Scope = dict[str, str]


def _run(nodes: Sequence[Node], scope: Scope, messages: Sequence[Scope], dot: Scope | None, found: list[str]) -> None:
    for node in nodes:
        if node.kind == "text":
            found.append(node.words)
        elif node.kind == "range":
            if node.words != ".Messages":
                raise UserError(f"the Go template ranges over {node.words}.")
            for message in messages:
                _run(node.body, scope, messages, message, found)
        elif node.kind == "if":
            name, *values = _words_of(node.words)
            if name != "eq" or len(values) != 2:
                raise UserError(f"the Go template asks {node.words}.")
            left, right = (_value(one, scope, dot) for one in values)
            _run(node.body if left == right else node.otherwise, scope, messages, dot, found)
        elif match := re.fullmatch(r"(\$\w+) :?= (.*)", node.words, re.DOTALL):
            scope[match[1]] = _value(match[2], scope, dot)
        else:
            found.append(_value(node.words, scope, dot))


def _words_of(words: str) -> list[str]:
    return re.findall(r'"(?:[^"\\]|\\.)*"|\S+', words)


def _value(word: str, scope: Scope, dot: Scope | None) -> str:
    if word.startswith('"'):
        return str(parse_json(word, "a string of the Go template"))
    if word.startswith("$") and word in scope:
        return scope[word]
    if word.startswith(".") and dot is not None and word[1:] in dot:
        return dot[word[1:]]
    raise UserError(f"the Go template uses {word}.")
