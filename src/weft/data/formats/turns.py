"""Lists of turns (OpenAI's, sharegpt's, ms-swift's, XTuner's) become messages; every conversation is checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from weft.data.formats.examples import Conversation, Message
from weft.data.formats.fields import as_list, parse_json, short, shown, string
from weft.data.reading.records import Record
from weft.errors import UserError, nearest

_ROLE_OF = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
_SWITCHES = ("train", "loss", "training")
_WEIGHTS = ("weight", "loss_scale")
_MARKS = frozenset((*_SWITCHES, *_WEIGHTS))
# Turns with these fields say more than is read here. To drop it silently would train something else.
_UNREAD = {
    "train_detail": "Write the parts as a record of `segments`",
    "training_detail": "Write the parts as a record of `segments`",
    "reasoning_content": "Put the thoughts into 'content', in the marks that the model's template uses",
}


# As programs give them.
Turn = Message | Mapping[str, object]


class EmptyAnswerError(UserError):
    """The answer of a record is empty. The error has a class of its own, so that a caller may skip such records."""


# -------------------------------------------------------------------------------------------------------- conversations


def read_turns(record: Record, shape: Sequence[str]) -> Conversation:
    """Read a record whose turns are listed in the field ``shape[0]``."""
    return conversation(record, turns(record, shape[0]))


def conversation(record: Record, messages: Sequence[Message]) -> Conversation:
    """The conversation with the record's system text first, after the checks of every conversation.

    Raises:
        UserError: There is no assistant turn.
        EmptyAnswerError: An answer is empty.
    """
    messages = with_system(record, messages)
    if not any(message.role == "assistant" for message in messages):
        raise UserError(
            f"{record.source}: no assistant turn, so there is nothing to learn. Expected one answer or more."
        )
    for number, message in enumerate(messages, start=1):
        if message.role == "assistant" and message.train is not False and is_silent(message):
            raise EmptyAnswerError(
                f"{record.source}: the answer (turn {number} of {len(messages)}) is empty. Remove the record, give it "
                "an answer, or have such records left out (`empty_answers: skip`)."
            )
    return Conversation(tuple(messages), record.source, tools(record))


def is_silent(message: Message) -> bool:
    """Whether a turn says nothing and calls nothing."""
    return not message.tool_calls and not message.content.strip()


def with_system(record: Record, messages: Sequence[Message]) -> Sequence[Message]:
    """The messages, the text of ``system`` (or ``system_prompt``) first if the record has one.

    Raises:
        UserError: The record has two system texts that differ.
    """
    given = [name for name in ("system", "system_prompt") if record.fields.get(name) is not None]
    texts = [text for text in (string(record, name) for name in given) if text.strip()]
    if not texts:
        return messages
    held = next((message.content for message in messages if message.role == "system"), None)
    if len(set(texts)) > 1 or (held is not None and held != texts[0]):
        raise UserError(f"{record.source}: the field '{given[0]}' and another system message differ: keep one.")
    return messages if held is not None else [Message("system", texts[0]), *messages]


def tools(record: Record) -> tuple[dict[str, object], ...]:
    """The schemas in ``tools``, a list or a JSON string (sharegpt).

    Raises:
        UserError: An entry is not an object.
    """
    value = record.fields.get("tools")
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    if isinstance(value, str):
        value = parse_json(value, f"{record.source}: 'tools'")
    schemas = as_list([] if value is None else value, "tools", record.source)
    if not all(isinstance(schema, dict) for schema in schemas):
        raise UserError(f"{record.source}: every entry of 'tools' must be an object (a JSON schema of one function).")
    return tuple(schemas)


# ---------------------------------------------------------------------------------------------------------------- turns


def turns(record: Record, name: str) -> list[Message]:
    """The turns in a field.

    Raises:
        UserError: A turn cannot be read; the message names line and turn.
    """
    items = as_list(record.fields[name], name, record.source)
    if items and all(isinstance(item, str) for item in items):  # LIMA's own release: question, answer, question …
        return [Message(("user", "assistant")[number % 2], text) for number, text in enumerate(items)]
    messages: list[Message] = []
    for number, item in enumerate(items, start=1):
        where = f"{record.source}: turn {number} of '{name}'"
        if isinstance(item, dict) and "role" not in item and "from" not in item:
            exchange = _exchange(item, where)
            if exchange:
                messages += exchange
                continue
        messages.append(message(item, where))
    return messages


def _exchange(item: dict[str, Any], where: str) -> list[Message]:
    """The two messages of an entry with ms-swift's and Firefly's keys, or XTuner's; none if it has neither."""
    asked, said = ("human", "assistant") if "human" in item else ("input", "output")
    if asked not in item or said not in item:
        return []
    texts = [item.get(name) for name in ("system", asked, said)]
    for name, text in zip(("system", asked, said), texts, strict=True):
        if not isinstance(text, str) and not (name == "system" and text is None):
            raise UserError(f"{where}: '{name}' must be a string, found {short(text)}.")
    roles = ("system", "user", "assistant")
    pairs = zip(roles, texts, strict=True)
    return [Message(role, text) for role, text in pairs if text or (role != "system" and text is not None)]


def as_messages(given: Sequence[Turn], where: str = "the conversation") -> tuple[Message, ...]:
    """The messages of a conversation that a program made: messages, or mappings with OpenAI's keys (transformers').

    Raises:
        UserError: It is no list of these; names the first that is neither.
    """
    if isinstance(given, (str, Mapping, Message)) or not isinstance(given, Iterable):
        raise UserError(
            f"{where} must be a list of messages (weft.Message, or 'role' and 'content'), not {short(given)}."
        )
    items = enumerate(given, start=1)
    return tuple(item if isinstance(item, Message) else message(item, f"{where}: turn {n}") for n, item in items)


def message(item: object, where: str) -> Message:
    """Read a turn with OpenAI's keys (role, content) or sharegpt's (from, value); ``where`` is its line and number.

    Raises:
        UserError: It is no such turn, its role is unknown, or it has a field that is not read.
    """
    if not isinstance(item, dict):
        expected = "an object with 'role' and 'content' (or 'from' and 'value')"
        raise UserError(f"{where} must be {expected}, found {short(item)}.")
    who, what = ("from", "value") if "from" in item else ("role", "content")
    if who not in item:
        found = ", ".join(map(repr, item)) or "none"
        raise UserError(f"{where} has no 'role' (or 'from'). Fields found: {found}.{nearest('role', item)}")
    named = item[who]
    role = _ROLE_OF.get(named) or _ROLE_OF.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        hint = nearest(named, _ROLE_OF) if isinstance(named, str) else ""
        raise UserError(f"{where} has the unknown role {shown(named)}.{hint} Known: {', '.join(_ROLE_OF)}.")
    content, calls = item.get(what), item.get("tool_calls")
    if named in ("function_call", "tool_call"):
        content, calls = "", _parse_calls(content, where)
    if content is None and calls:
        content = ""
    if what not in item and not calls:
        raise UserError(f"{where} has no '{what}'. Fields found: {', '.join(map(repr, item))}.{nearest(what, item)}")
    if isinstance(content, list):
        content = _parts(content, where)
    if not isinstance(content, str):
        raise UserError(f"{where}: '{what}' must be a string, found {short(content)}.")
    train, weight = None, 1.0
    if len(item) > 2:
        unread = next((key for key in _UNREAD if item.get(key)), None)
        if unread:
            raise UserError(f"{where}: '{unread}' is not read. {_UNREAD[unread]}, or remove the field.")
        if not _MARKS.isdisjoint(item):
            train, weight = _marks(item, where)
    return Message(role, content, train, tool_calls=_tool_calls(calls, where) if calls else (), loss_weight=weight)


def _parts(content: list[object], where: str) -> object:
    """The text of OpenAI's content in parts. A content with other parts stays, for the caller to refuse."""
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    if content and all(isinstance(text, str) for text in texts):
        return "".join(map(str, texts))
    return content


def _marks(item: dict[str, object], where: str) -> tuple[bool | None, float]:
    """Whether the turn is to be learned (None: it does not say), and the weight of its loss."""
    given = {key: item[key] for key in (*_SWITCHES, *_WEIGHTS) if item.get(key) is not None}
    weights = set()
    for key, value in given.items():
        if key in _SWITCHES and not (isinstance(value, (bool, int)) and value in (0, 1)):
            raise UserError(f"{where}: '{key}' must be true or false, found {short(value)}.")
        if key in _WEIGHTS:
            weights.add(_weight(value, f"{where}: '{key}'"))
    switches = {bool(value) for value in given.values()}
    if len(switches) > 1 or len(weights) > 1:
        raise UserError(f"{where}: {' and '.join(map(repr, given))} contradict each other.")
    weight = weights.pop() if weights else 1.0
    return (switches.pop() if switches else None), weight or 1.0


def _weight(value: object, where: str) -> float:
    try:
        weight = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        weight = math.inf
    if not math.isfinite(weight) or weight < 0:
        raise UserError(f"{where} must be a number, 0 or more, found {short(value)}.")
    return weight


# ----------------------------------------------------------------------------------------------------------- tool calls


def _parse_calls(content: object, where: str) -> object:
    """The calls in sharegpt's function_call: JSON text of one call or a list of them."""
    try:
        calls = parse_json(content, where) if isinstance(content, str) else content
    except UserError:
        calls = None
    calls = [calls] if isinstance(calls, dict) else calls
    if not calls:
        expected = 'JSON such as {"name": "f", "arguments": {}}'
        raise UserError(f"{where}: a function call must be {expected}, found {short(content)}.")
    return calls


def _tool_calls(calls: object, where: str) -> tuple[dict[str, object], ...]:
    result: list[dict[str, object]] = []
    for call in as_list(calls, "tool_calls", where):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}: a tool call needs 'name' and 'arguments', found {short(call)}.")
        name, arguments = function["name"], function.get("arguments", {})
        if isinstance(arguments, str):  # OpenAI sends JSON text; templates would quote such a string once more
            try:
                arguments = parse_json(arguments, where)
            except UserError as error:
                raise UserError(f"{where}: the arguments of the call of '{name}' are not JSON: {error}") from None
        result.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return tuple(result)
