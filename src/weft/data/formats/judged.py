"""Records with answers that were judged: pairs, verdicts, rankings, and steps that are right or wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence

from weft.data.formats.answers import asked
from weft.data.formats.examples import Conversation, LabelledAnswer, Message, Preference, Ranking, StepLabels
from weft.data.formats.fields import as_list, short, string
from weft.data.formats.turns import EmptyAnswerError, is_silent, message, tools, turns, with_system
from weft.data.reading.records import Record
from weft.errors import UserError

# The prompt of a pair stands in one of these fields. `prompt` goes first: a list of turns beside it often repeats it.
_TURN_LISTS = ("messages", "conversations", "conversation")
_QUESTIONS = ("instruction", "question", "query")
PROMPTS = ("prompt", *_TURN_LISTS, *_QUESTIONS, "input")
_HH = re.compile(r"\n\n(Human|Assistant): ?")  # Anthropic's hh-rlhf writes a dialogue into one string so


def read_preference(record: Record, shape: Sequence[str]) -> Preference:
    """Read ``chosen`` and ``rejected``: strings, messages, or lists of messages that may begin with the prompt."""
    prompt = _prompt(record)
    good, bad = (_whole(prompt, _answer(record, name), f"{record.source}: '{name}'") for name in shape)
    return _preference(record, good, bad, tuple(shape))


def _whole(prompt: list[Message], answer: list[Message], where: str) -> list[Message]:
    """The conversation with this answer, which may repeat the prompt."""
    head = [turn for turn in prompt if turn.role == "system"]
    asked_for = prompt[len(head) :]
    own = answer[:1] if answer[0].role == "system" else []
    repeats = answer[len(own) :][: len(asked_for)] == asked_for
    if not repeats and answer[0].role == "assistant":
        return [*prompt, *answer]
    if not repeats or (head and own and head != own):
        raise UserError(f"{where} neither begins with the prompt nor with an answer to it.")
    return answer if own else [*head, *answer]


def read_rejected(record: Record, shape: Sequence[str]) -> Preference:
    """Read ms-swift's good conversation, and its worse answer or conversation in the last field of ``shape``.

    Raises:
        UserError: The good conversation does not end with an answer.
    """
    good = turns(record, shape[0]) if len(shape) == 2 else [*asked(record, shape[:1]), _said(string(record, shape[1]))]
    name = shape[-1]
    if isinstance(bad := record.fields[name], str):
        if not good or good[-1].role != "assistant":
            raise UserError(f"{record.source}: '{shape[0]}' must end with the good answer, an assistant turn.")
        return _preference(record, good, [*good[:-1], _said(bad)], (shape[0], name))
    return _preference(record, good, turns(record, name), (shape[0], name))


def read_two_responses(record: Record, shape: Sequence[str]) -> Preference:
    """Read a question, the better answer and the worse answer."""
    prompt = asked(record, shape[:1])
    good, bad = ([*prompt, _said(string(record, name))] for name in shape[1:])
    return _preference(record, good, bad, (shape[1], shape[2]))


def _said(text: str) -> Message:
    return Message("assistant", text)


def _prompt(record: Record) -> list[Message]:
    """The messages before both answers, as far as the record has them in a field of their own."""
    fields = record.fields
    if fields.get("prompt") is not None:
        return turns(record, "prompt") if isinstance(fields["prompt"], list) else asked(record, ("prompt",))
    for name in _TURN_LISTS:
        if fields.get(name) is not None:
            return turns(record, name)
    given = [name for name in _QUESTIONS if fields.get(name) is not None]
    if len(given) > 1:
        raise UserError(
            f"{record.source}: {' and '.join(map(repr, given))} could each be the prompt. Name it: "
            f"`columns: {{prompt: {given[0]}}}`."
        )
    if given:
        return asked(record, (given[0], "input"))
    return asked(record, ("input",)) if fields.get("input") is not None else []


def _answer(record: Record, name: str) -> list[Message]:
    value = record.fields[name]
    if isinstance(value, dict):
        return [message(value, f"{record.source}: '{name}'")]
    if not isinstance(value, str):
        messages = turns(record, name)
        if not messages:
            raise EmptyAnswerError(f"{record.source}: '{name}' is empty. Remove the record.")
        return messages
    if not _HH.match(value):
        return [_said(value)]
    parts = _HH.split(value)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Message(roles[who], text) for who, text in zip(parts[::2], parts[1::2], strict=True)]


def _preference(record: Record, good: list[Message], bad: list[Message], names: tuple[str, ...]) -> Preference:
    """Cut two conversations where they part."""
    good, bad = list(with_system(record, good)), list(with_system(record, bad))
    at = next((i for i, (left, right) in enumerate(zip(good, bad, strict=False)) if left != right), None)
    if at is None:
        what = "are the same" if good == bad else "do not part: one is the beginning of the other"
        raise UserError(f"{record.source}: '{names[0]}' and '{names[1]}' {what}. Remove the record.")
    if not any(turn.role == "user" for turn in good[:at]):
        raise UserError(
            f"{record.source}: '{names[0]}' and '{names[1]}' have no prompt in common. Name the field that holds it, "
            "e.g. `columns: {prompt: question}`."
        )
    for name, turn in zip(names, (good[at], bad[at]), strict=True):
        if turn.role != "assistant":
            raise UserError(
                f"{record.source}: '{name}' parts from the other with a turn of the {turn.role}; expected an assistant "
                "turn, which is what is compared."
            )
        if is_silent(turn):
            raise EmptyAnswerError(f"{record.source}: the answer in '{name}' is empty. Remove the record.")
    return Preference(tuple(good[:at]), tuple(good[at:]), tuple(bad[at:]), source=record.source, tools=tools(record))


# --------------------------------------------------------------------------------------------- verdicts, ranks, steps


def verdict(value: object) -> bool | None:
    """The verdict in a value: true or false, also as a word in a table's cell. None: it is something else."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def parted(read: Conversation, record: Record, name: str) -> int:
    """Where the judged answer of a conversation begins: behind the last user turn.

    Raises:
        UserError: No answer follows it, for the field ``name`` to judge.
    """
    places = [number for number, turn in enumerate(read.messages, start=1) if turn.role == "user"]
    at = places[-1] if places else 0
    if not at or not any(turn.role == "assistant" for turn in read.messages[at:]):
        raise UserError(f"{record.source}: an answer after a user turn was expected, for '{name}' to judge.")
    return at


def judge(read: Conversation, record: Record, name: str) -> LabelledAnswer:
    """Judge a conversation: all that follows the last user turn is good or bad, as the field ``name`` says.

    Raises:
        UserError: The field is neither true nor false, or no answer follows the last user turn.
    """
    label = verdict(record.fields[name])
    if label is None:
        raise UserError(f"{record.source}: '{name}' must be true or false, found {short(record.fields[name])}.")
    at = parted(read, record, name)
    return LabelledAnswer(read.messages[:at], read.messages[at:], label, source=record.source, tools=read.tools)


def read_ranked(record: Record, shape: Sequence[str]) -> Ranking:
    """Read ``instruction``, ``input`` and a list of answers, the best first.

    Raises:
        UserError: An answer is not a string, or there are fewer than two different ones.
        EmptyAnswerError: An answer is empty.
    """
    prompt = with_system(record, asked(record, (shape[0], "input")))
    answers = as_list(record.fields[shape[1]], shape[1], record.source)
    for number, answer in enumerate(answers, start=1):
        if not isinstance(answer, str):
            found = short(answer)
            raise UserError(f"{record.source}: answer {number} of '{shape[1]}' must be a string, found {found}.")
        if not answer.strip():
            raise EmptyAnswerError(f"{record.source}: answer {number} of '{shape[1]}' is empty. Remove it.")
    if len(set(answers)) < 2:
        found = "they are all the same" if len(answers) > 1 else f"found {len(answers)}"
        raise UserError(
            f"{record.source}: '{shape[1]}' must list two different answers or more, the best first; {found}. Remove "
            "the record (a single answer to be learned is written as a string)."
        )
    return Ranking(tuple(prompt), tuple(map(_said, answers)), record.source, tools(record))


def read_steps(record: Record, shape: Sequence[str]) -> StepLabels:
    """Read ``prompt``, the steps in ``completions`` and their verdicts in ``labels``.

    Raises:
        UserError: A step is not a string, or there is not one verdict per step.
    """
    prompt, steps, labels = shape
    texts = as_list(record.fields[steps], steps, record.source)
    verdicts = as_list(record.fields[labels], labels, record.source)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{record.source}: '{steps}' must list the steps, each a string, found {short(texts)}.")
    if not all(isinstance(value, bool) for value in verdicts) or len(verdicts) != len(texts):
        raise UserError(
            f"{record.source}: '{labels}' must hold true or false for each of the {len(texts)} steps, found "
            f"{len(verdicts)} values, {short(verdicts)}."
        )
    question = turns(record, prompt) if isinstance(record.fields[prompt], list) else asked(record, (prompt,))
    return StepLabels(tuple(with_system(record, question)), tuple(texts), tuple(verdicts), record.source)
