"""Turn records of the field's usual formats into conversations (or plain text).

The format is recognised from the names of the fields, or named by the user; ``columns`` renames fields first. Whatever
cannot be learned from as it stands (an empty answer, an unknown role, a preference pair) is an error that says where.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from weft.data.records import Record
from weft.errors import UserError, nearest

ROLES = ("system", "user", "assistant", "tool")


class EmptyAnswerError(UserError):
    """A record whose answer is empty; its own class, so that a caller may decide to skip such records."""


@dataclass(frozen=True)
class Message:
    """One turn. ``role`` is one of ROLES; ``train`` overrides whether the turn is learned (None: as ``train_on`` says).

    ``tool_calls`` are ``{"type": "function", "function": {"name": str, "arguments": dict}}``, as chat templates
    expect them. ``loss_weight`` scales the loss of a learned turn (0: not learned).
    """

    role: str
    content: str
    train: bool | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    loss_weight: float = 1.0


@dataclass(frozen=True)
class Conversation:
    """Messages in order, and the tools (JSON schemas) that the template is to list."""

    messages: tuple[Message, ...]
    source: str
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class PlainText:
    """Text to be learned as it stands."""

    text: str
    source: str


@dataclass(frozen=True)
class Format:
    """What a format's records hold, and how one is read."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Record], Conversation | PlainText]


def to_example(
    record: Record, *, format: str | None = None, columns: Mapping[str, str] | None = None
) -> Conversation | PlainText:
    """Read one record. ``columns`` maps a format's field to the data's own, e.g. ``{"completion": "reply"}``.

    Raises UserError naming the record's line for a record of no known format, a field missing or of the wrong type,
    an unknown role, an empty answer (EmptyAnswerError) or a conversation without an assistant turn.
    """
    if columns:
        record = _renamed(record, columns)
    if format is None:
        return FORMATS[_detect(record)].read(record)
    name = _ALIASES.get(format, format)
    if name not in FORMATS:
        raise UserError(f"format '{format}' is unknown.{nearest(format, FORMATS)} Known formats: {_known()}.")
    missing = [field for field in FORMATS[name].required if record.fields.get(field) is None]
    if missing:
        _no_fit(record, f"the format '{name}' needs the field '{missing[0]}'.{nearest(missing[0], record.fields)}")
    return FORMATS[name].read(record)


def _renamed(record: Record, columns: Mapping[str, str]) -> Record:
    known = _field_names()
    for ours, theirs in columns.items():
        if ours not in known:
            raise UserError(
                f"columns: '{ours}' is a field of no format.{nearest(ours, known)} Write `<field of the format>: "
                f"<field in the data>`. Known formats: {_known()}."
            )
        if theirs not in record.fields:
            _no_fit(record, f"columns: there is no field '{theirs}'.{nearest(theirs, record.fields)}")
    fields = {name: value for name, value in record.fields.items() if name not in columns.values()}
    fields.update({ours: record.fields[theirs] for ours, theirs in columns.items()})
    return replace(record, fields=fields)


def _detect(record: Record) -> str:
    present = dict.fromkeys(name for name, value in record.fields.items() if value is not None).keys()
    if present >= {"chosen", "rejected"}:
        _no_fit(record, "this is a preference pair (chosen, rejected), which supervised training does not read")
    labels = [name for name in ("label", "kto_tag") if isinstance(record.fields.get(name), bool)]
    if labels:
        _no_fit(record, f"'{labels[0]}' marks answers as good or bad, which supervised training does not read")
    for name, entry in FORMATS.items():
        if present >= set(entry.required):
            return name
    unfamiliar = [name for name in present if name not in _field_names()]
    closest = max(FORMATS, key=lambda name: len(present & {*FORMATS[name].required, *FORMATS[name].optional}))
    missing = next(field for field in FORMATS[closest].required if field not in present)
    if present & {*FORMATS[closest].required, *FORMATS[closest].optional}:
        hint = f" The closest is '{closest}', which lacks '{missing}'.{nearest(missing, unfamiliar)}"
    else:
        guesses = (nearest(field, unfamiliar) for field in _field_names())
        hint = next((text for text in guesses if text), "")
    _no_fit(record, f"the record fits no known format.{hint}")


def _field_names() -> list[str]:
    return [field for entry in FORMATS.values() for field in entry.required + entry.optional]


def _known() -> str:
    parts = []
    for name, entry in FORMATS.items():
        optional = f"; optional {', '.join(entry.optional)}" if entry.optional else ""
        parts.append(f"{name} ({', '.join(entry.required)}{optional})")
    return ", ".join(parts)


def _no_fit(record: Record, what: str) -> NoReturn:
    found = ", ".join(map(repr, record.fields)) or "none"
    raise UserError(
        f"{record.source}: {what}{'' if what[-1] in '.?' else '.'} Fields found: {found}. Known formats: {_known()}. "
        "Fields of other names can be renamed, e.g. `columns: {prompt: question, completion: reply}`."
    )


# ------------------------------------------------------------------------------------------------------ field by field


def _string(record: Record, name: str, *, optional: bool = False) -> str:
    """The text of a field; of an optional one that is absent or null, the empty string."""
    value = record.fields.get(name)
    if isinstance(value, str):
        return value
    if value is None and optional:
        return ""
    raise UserError(f"{record.source}: '{name}' must be a string, found {_short(value)}.")


def _list(value: Any, name: str, source: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{source}: '{name}' must be a list, found {_short(value)}.")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _tools(record: Record) -> tuple[dict[str, Any], ...]:
    """``tools``: a list of schemas, or the same as a JSON string (as sharegpt data has it)."""
    value = record.fields.get("tools")
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise UserError(f"{record.source}: 'tools' is a string that is not JSON: {error}.") from None
    if value is None:
        return ()
    tools = _list(value, "tools", record.source)
    if not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{record.source}: every entry of 'tools' must be an object (a JSON schema of one function).")
    return tuple(tools)


def _conversation(record: Record, messages: Sequence[Message]) -> Conversation:
    """Put the record's ``system`` text first and check what every conversation must have."""
    system = _string(record, "system", optional=True)
    held = next((message.content for message in messages if message.role == "system"), None)
    if system.strip() and held is None:
        messages = [Message("system", system), *messages]
    elif system.strip() and held != system:
        raise UserError(f"{record.source}: the field 'system' and the system message of the turns differ: keep one.")
    if not any(message.role == "assistant" for message in messages):
        raise UserError(
            f"{record.source}: no assistant turn, so there is nothing to learn. Expected one answer or more."
        )
    for number, message in enumerate(messages, start=1):
        silent = not message.content.strip() and not message.tool_calls
        if message.role == "assistant" and silent and message.train is not False:
            raise EmptyAnswerError(
                f"{record.source}: the answer (turn {number} of {len(messages)}) is empty. Remove the record, give it "
                "an answer, or have such records left out (`empty_answers: skip`)."
            )
    return Conversation(tuple(messages), record.source, _tools(record))


# ----------------------------------------------------------------------------------------------------------- messages

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
_TRAIN_KEYS = ("train", "loss", "training", "weight")


def _message(item: Any, where: str) -> Message:
    """One turn in OpenAI's (role, content) or sharegpt's (from, value) keys; ``where`` names the line and the turn."""
    if not isinstance(item, dict):
        expected = "an object with 'role' and 'content' (or 'from' and 'value')"
        raise UserError(f"{where} must be {expected}, found {_short(item)}.")
    who, what = ("from", "value") if "from" in item else ("role", "content")
    if who not in item:
        found = ", ".join(map(repr, item)) or "none"
        raise UserError(f"{where} has no 'role' (or 'from'). Fields found: {found}.{nearest('role', item)}")
    named = item[who]
    role = _ROLE_OF.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        hint = nearest(str(named), _ROLE_OF)
        raise UserError(f"{where} has the unknown role {named!r}.{hint} Known: {', '.join(_ROLE_OF)}.")
    content, calls = item.get(what), item.get("tool_calls")
    if named in ("function_call", "tool_call"):
        content, calls = "", _parse_calls(content, where)
    if content is None and calls:
        content = ""
    if what not in item and not calls:
        raise UserError(f"{where} has no '{what}'. Fields found: {', '.join(map(repr, item))}.{nearest(what, item)}")
    if not isinstance(content, str):
        raise UserError(f"{where}: '{what}' must be a string, found {_short(content)}.")
    return Message(role, content, _train(item, where), _tool_calls(calls, where) if calls else ())


def _train(item: dict[str, Any], where: str) -> bool | None:
    if item.get("loss_scale") not in (None, 1):
        raise UserError(f"{where}: 'loss_scale' is not read; write `\"loss\": true` or false.")
    given = {key: item[key] for key in _TRAIN_KEYS if item.get(key) is not None}
    if any(value not in (0, 1) for value in given.values()):  # True == 1; OpenAI's `weight` is 0 or 1
        raise UserError(f"{where}: {' and '.join(map(repr, given))} must be true or false, found {_short(given)}.")
    values = {bool(value) for value in given.values()}
    if len(values) > 1:
        raise UserError(f"{where}: {' and '.join(map(repr, given))} contradict each other.")
    return values.pop() if values else None


def _parse_calls(content: Any, where: str) -> Any:
    """sharegpt's function_call: the call (or a list of them) as JSON text."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        calls = None
    calls = [calls] if isinstance(calls, dict) else calls
    if not calls:
        expected = 'JSON such as {"name": "f", "arguments": {}}'
        raise UserError(f"{where}: a function call must be {expected}, found {_short(content)}.")
    return calls


def _tool_calls(calls: Any, where: str) -> tuple[dict[str, Any], ...]:
    result = []
    for call in _list(calls, "tool_calls", where):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}: a tool call needs 'name' and 'arguments', found {_short(call)}.")
        name, arguments = function["name"], function.get("arguments", {})
        if isinstance(arguments, str):  # OpenAI sends JSON text; templates would quote such a string once more
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise UserError(f"{where}: the arguments of the call of '{name}' are not JSON: {error}.") from None
        result.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return tuple(result)


def _turns(record: Record, name: str) -> list[Message]:
    items = _list(record.fields[name], name, record.source)
    return [_message(item, f"{record.source}: turn {number} of '{name}'") for number, item in enumerate(items, start=1)]


def _read_messages(record: Record) -> Conversation:
    return _conversation(record, _turns(record, "messages"))


def _read_sharegpt(record: Record) -> Conversation:
    return _conversation(record, _turns(record, "conversations"))


# ------------------------------------------------------------------------------------------------ questions and answers


def _pair(record: Record, question: str, answer: str, what: str) -> list[Message]:
    if not question.strip():
        raise UserError(f"{record.source}: {what} is empty. (To learn text without a prompt, use the format 'text'.)")
    return [Message("user", question), Message("assistant", answer)]


def _read_alpaca(record: Record) -> Conversation:
    history = record.fields.get("history")
    messages: list[Message] = []
    for number, turn in enumerate(_list([] if history is None else history, "history", record.source), start=1):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise UserError(
                f"{record.source}: entry {number} of 'history' must be a pair of strings [question, answer], "
                f"found {_short(turn)}."
            )
        messages += _pair(record, turn[0], turn[1], f"the question of entry {number} of 'history'")
    parts = [_string(record, "instruction"), _string(record, "input", optional=True)]
    question = "\n".join(part for part in parts if part.strip())
    messages += _pair(record, question, _string(record, "output"), "'instruction'")
    return _conversation(record, messages)


def _read_prompt_completion(record: Record) -> Conversation:
    """Strings, or lists of messages; the loss is on the completion alone, whatever the prompt holds."""
    prompt, completion = record.fields["prompt"], record.fields["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _conversation(record, _pair(record, prompt, completion, "'prompt'"))
    if isinstance(prompt, list) and isinstance(completion, list):
        before = [
            replace(message, train=False) if message.role == "assistant" and message.train is None else message
            for message in _turns(record, "prompt")
        ]
        answer = _turns(record, "completion")
        if not any(message.role == "assistant" for message in answer):
            raise UserError(f"{record.source}: 'completion' holds no assistant turn, so there is nothing to learn.")
        return _conversation(record, before + answer)
    raise UserError(
        f"{record.source}: 'prompt' and 'completion' must both be strings or both be lists of messages; found "
        f"{_short(prompt)} and {_short(completion)}."
    )


def _read_question_answer(record: Record) -> Conversation:
    return _conversation(record, _pair(record, _string(record, "question"), _string(record, "answer"), "'question'"))


def _read_text(record: Record) -> PlainText:
    text = _string(record, "text")
    if not text.strip():
        raise UserError(f"{record.source}: 'text' is empty. Remove the record.")
    return PlainText(text, record.source)


FORMATS: dict[str, Format] = {  # in the order in which they are tried: data sets often carry a rendered `text` as well
    "messages": Format(("messages",), ("tools", "system"), _read_messages),
    "sharegpt": Format(("conversations",), ("tools", "system"), _read_sharegpt),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history", "tools"), _read_alpaca),
    "prompt_completion": Format(("prompt", "completion"), ("system", "tools"), _read_prompt_completion),
    "question_answer": Format(("question", "answer"), ("system",), _read_question_answer),
    "text": Format(("text",), (), _read_text),
}
_ALIASES = {
    "openai": "messages",
    "chat": "messages",
    "prompt/completion": "prompt_completion",
    "question/answer": "question_answer",
    "gsm8k": "question_answer",
}
