"""Calls of tools in the text of an answer.

A format is used where it is proved: the chat template writes a call of its own, the tokenizer turns it into tokens and
back, and the format must find the very call in that text. Then a model that learned from the template is understood.
Otherwise tools are refused.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from weft.data import Message, Renderer
from weft.data.formats.examples import Conversation
from weft.errors import UserError
from weft.foreign import parse_json
from weft.generation.text import decode
from weft.serve.answers import MessageCall
from weft.serve.envelope import unsupported


@dataclass(frozen=True)
class Call:
    """A call of a tool."""

    name: str
    arguments: dict[str, Any]

    def message(self) -> MessageCall:
        """The call as an answer holds it."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": self.name, "arguments": arguments},
        }


@dataclass(frozen=True)
class ToolFormat:
    """A form in which models write calls.

    Attributes:
        marker: what a call begins with. ``leads``: whether it must stand at the head of the answer.
        read: the text before the calls, and the calls; None: the text holds none, or a damaged one.
    """

    name: str
    marker: str
    read: Callable[[str], tuple[str, list[Call]] | None]
    leads: bool = False


def _call(text: str, arguments: str = "arguments") -> Call | None:
    try:
        found = parse_json(text, "the call")
    except UserError:
        return None
    if not isinstance(found, dict) or set(found) - {"name", arguments}:
        return None
    name, given = found.get("name"), found.get(arguments, {})
    return Call(name, given) if isinstance(name, str) and isinstance(given, dict) else None


def _hermes(text: str) -> tuple[str, list[Call]] | None:
    """``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, once or several times."""
    before, *blocks = text.split("<tool_call>")
    calls = []
    for block in blocks:
        body, closed, after = block.partition("</tool_call>")
        call = _call(body)
        if call is None or not closed or after.strip():
            return None
        calls.append(call)
    return (before.strip(), calls) if calls else None


def _llama3(text: str) -> tuple[str, list[Call]] | None:
    """One object ``{"name": …, "parameters": {…}}`` and nothing else."""
    call = _call(text.strip(), "parameters")
    return None if call is None else ("", [call])


def _plain(text: str) -> tuple[str, list[Call]] | None:
    """Weft's plain headings: ``### Call:`` and an object on the next line."""
    before, *blocks = text.split("### Call:\n")
    calls = [call for block in blocks if (call := _call(block)) is not None]
    return (before.strip(), calls) if calls and len(calls) == len(blocks) else None


FORMATS = (
    ToolFormat("hermes", "<tool_call>", _hermes),
    ToolFormat("plain", "### Call:\n", _plain),
    ToolFormat("llama3_json", "{", _llama3, leads=True),
)


def find_format(renderer: Renderer, tools: Sequence[dict[str, Any]]) -> ToolFormat:
    """The format that is proved for a renderer.

    Raises:
        ApiError: None is.
    """
    probe = Call(str(tools[0]["function"]["name"]), {"text": 'a {"b"}\n ü', "number": 3, "list": [True, None]})
    function: dict[str, object] = {"name": probe.name, "arguments": probe.arguments}
    call: dict[str, object] = {"type": "function", "function": function}
    turns = (Message("user", "?"), Message("assistant", "", tool_calls=(call,)))
    try:
        asked = renderer.turns.text(Conversation(turns[:1], "the probe", tuple(tools)), generation=True)
        whole = renderer.turns.text(Conversation(turns, "the probe", tuple(tools)), generation=False)
        ids, _ = renderer.encoder.encode(whole[len(asked) :], first=False)
    except UserError as error:
        raise unsupported("tools", f"the chat template of this model writes no calls: {error}") from None
    ids = ids[: ids.index(renderer.eos_token_id)] if renderer.eos_token_id in ids else ids
    text = decode(renderer.tokenizer, ids)
    for one in FORMATS:
        found = one.read(text) if whole.startswith(asked) else None
        if found is not None and found[1] == [probe]:
            return one
    names = ", ".join(one.name for one in FORMATS)
    raise unsupported(
        "tools", f"the chat template of this model writes calls in none of the forms that are understood: {names}."
    )


class ToolSplitter:
    """Gives out an answer's text while it comes, but for calls, which are read when they are whole."""

    def __init__(self, form: ToolFormat) -> None:
        self.form = form
        self._text, self._sent = "", 0

    def push(self, text: str) -> str:
        """Take more text; returns what is certainly no call."""
        self._text += text
        begun, self._sent = self._sent, max(self._sent, self._certain())
        return self._text[begun : self._sent]

    def _certain(self) -> int:
        """How many letters stand before any call."""
        text, marker = self._text, self.form.marker
        if self.form.leads:
            head = text.lstrip()
            return 0 if not head or head.startswith(marker) else len(text)
        if marker in text:
            return text.index(marker)
        # The last letters may be the first ones of a marker.
        overlaps = range(min(len(text), len(marker) - 1), 0, -1)
        return len(text) - next((n for n in overlaps if text.endswith(marker[:n])), 0)

    def end(self) -> tuple[str, list[Call]]:
        """The rest of the text, and the calls."""
        found = self.form.read(self._text)
        return (self._text[self._sent :], []) if found is None else ("", found[1])


def check_rendered(with_tools: Sequence[int], without: Sequence[int]) -> None:
    """Refuse tools that the template leaves out of the prompt.

    Raises:
        ApiError: The prompt is the same without them.
    """
    if list(with_tools) == list(without):
        raise unsupported("tools", "the chat template of this model shows it no tools.")
