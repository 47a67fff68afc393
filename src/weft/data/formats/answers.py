"""Records of one question and one answer, and of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from weft.data.formats.examples import ClassifiedText, Conversation, Message, PlainText
from weft.data.formats.fields import as_list, short, string
from weft.data.formats.labels import label_name, texts_of
from weft.data.formats.turns import conversation, turns
from weft.data.reading.records import Record
from weft.errors import UserError


def read_pair(record: Record, shape: Sequence[str]) -> Conversation:
    """Read a question from ``shape[0]``, its answer from ``shape[1]`` and earlier exchanges from ``history``."""
    question = asked(record, shape[:1])
    return conversation(record, [*question, Message("assistant", string(record, shape[1]))])


def read_alpaca(record: Record, shape: Sequence[str]) -> Conversation:
    """Read ``instruction``, its material in ``input``, and the answer in ``shape[1]``."""
    question = asked(record, (shape[0], "input"))
    return conversation(record, [*question, Message("assistant", string(record, shape[1]))])


def read_instruct(record: Record, shape: Sequence[str]) -> Conversation:
    """Read ``instruction``, its material in ``context`` (Dolly) or ``input``, and the answer in ``response``.

    Raises:
        UserError: Both ``context`` and ``input`` hold text.
    """
    given = [name for name in ("context", "input") if string(record, name, optional=True).strip()]
    if len(given) > 1:
        raise UserError(
            f"{record.source}: both 'context' and 'input' hold text. Say what the question is, e.g. "
            '`columns: {prompt: "{instruction}\\n{context}\\n{input}", completion: response}`.'
        )
    question = asked(record, ("instruction", *given))
    return conversation(record, [*question, Message("assistant", string(record, "response"))])


def asked(record: Record, names: Sequence[str]) -> list[Message]:
    """The turns of ``history``, then the question: the text of the named fields, one line each.

    All fields but the first may be absent.

    Raises:
        UserError: The first field is empty.
    """
    messages = history(record) if record.fields.get("history") else []
    text = string(record, names[0])
    more = [string(record, name, optional=True) for name in names[1:]]
    question = "\n".join(part for part in (text, *more) if part.strip()) if any(more) else text
    if not question.strip():
        raise UserError(_empty(record, f"'{names[0]}'"))
    messages.append(Message("user", question))
    return messages


def _empty(record: Record, what: str) -> str:
    return f"{record.source}: {what} is empty. (To learn text without a prompt, use the format 'text'.)"


def history(record: Record) -> list[Message]:
    """``history``: pairs of a question and its answer, the oldest first.

    Raises:
        UserError: An entry is not a pair of strings, or its question is empty.
    """
    messages: list[Message] = []
    for number, turn in enumerate(as_list(record.fields["history"], "history", record.source), start=1):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise UserError(
                f"{record.source}: entry {number} of 'history' must be a pair of strings [question, answer], "
                f"found {short(turn)}."
            )
        if not turn[0].strip():
            raise UserError(_empty(record, f"the question of entry {number} of 'history'"))
        messages += [Message("user", turn[0]), Message("assistant", turn[1])]
    return messages


def read_prompt_completion(record: Record, shape: Sequence[str]) -> Conversation:
    """Read two strings or two lists of messages. The loss is on the completion alone, whatever the prompt holds.

    Raises:
        UserError: The completion holds no assistant turn, or one is a string and the other is not.
    """
    prompt, completion = record.fields["prompt"], record.fields["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return read_pair(record, shape)
    if isinstance(prompt, list) and isinstance(completion, list):
        before = [
            replace(message, train=False) if message.role == "assistant" and message.train is None else message
            for message in turns(record, "prompt")
        ]
        answer = turns(record, "completion")
        if not any(message.role == "assistant" for message in answer):
            raise UserError(f"{record.source}: 'completion' holds no assistant turn, so there is nothing to learn.")
        return conversation(record, before + answer)
    raise UserError(
        f"{record.source}: 'prompt' and 'completion' must both be strings or both be lists of messages; found "
        f"{short(prompt)} and {short(completion)}."
    )


def read_text(record: Record, shape: Sequence[str]) -> PlainText:
    """Read a text that is learned as it stands.

    Raises:
        UserError: It is empty.
    """
    text = string(record, shape[0])
    if not text.strip():
        raise UserError(f"{record.source}: '{shape[0]}' is empty. Remove the record.")
    return PlainText(text, record.source)


def read_classified(record: Record, shape: Sequence[str]) -> ClassifiedText:
    """Read one text or two, and their class in the last field of ``shape``.

    Raises:
        UserError: The text is empty.
    """
    return ClassifiedText(texts_of(record, shape[:-1]), label_name(record, shape[-1]), record.source)
