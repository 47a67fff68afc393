"""The proof that a merged folder renders messages as training did: by transformers alone, in a process without Weft."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from weft.data import Message, Renderer
from weft.data.rendering.render import Task
from weft.data.rendering.served import message_fields, opening
from weft.data.rendering.tokens import special_texts
from weft.errors import UserError
from weft.export import fresh
from weft.files.whole import writing_temporary
from weft.foreign import parse_json

SECONDS = 600  # to start Python, import transformers and read a tokenizer, on a busy machine too

_SYSTEM = "Answer in one short sentence."
_TALK = ("How many legs has a spider?", "Eight.", "And two spiders,\nwith an ant?", "Twenty-two,\nall in all.", "Why?")

Wanted = list[tuple[list[Message], list[int]]]  # conversations, each with the ids [prompt length] of training
Ids = list[list[int]]


@dataclass(frozen=True)
class Rendering:
    """How messages become ids elsewhere.

    Attributes:
        openings, openings_alike: conversations without an answer, and how many of them gave the ids of training.
        turns, turns_alike: the same of conversations with earlier answers.
    """

    openings: int
    openings_alike: int
    turns: int
    turns_alike: int

    def line(self) -> str:
        """The figures as a line for people."""
        return (
            f"from messages, by transformers alone in a process without weft: the ids of training in "
            f"{self.openings_alike} of {self.openings} questions and in {self.turns_alike} of {self.turns} "
            "conversations of several turns"
        )


def fixed_conversations(texts: Sequence[str]) -> list[list[Message]]:
    """Each text as a question; a question after a system message; several turns, without and with one."""
    system = Message("system", _SYSTEM)
    talk = [Message("assistant" if number % 2 else "user", text) for number, text in enumerate(_TALK)]
    return [*([Message("user", text)] for text in texts), [system, talk[0]], talk[:3], talk, [system, *talk]]


def wanted_ids(renderer: Renderer, task: Task, conversations: Sequence[list[Message]]) -> Wanted:
    """The conversations that a renderer takes, each with its ids [prompt length].

    Text that spells a control token is left out: to Weft it is text, to other tools a command, whatever the template.
    """
    special, found = special_texts(renderer.tokenizer), []
    for messages in conversations:
        if any(text in message.content for message in messages for text in special):
            continue
        try:
            found.append((messages, list(renderer.prompt(messages, task=task).ids)))
        except UserError:  # no system message, or no earlier answers
            continue
    return found


@contextmanager
def fresh_ids(folder: Path, conversations: Sequence[Sequence[Message]]) -> Iterator[Callable[[], Ids]]:
    """Start a process that renders messages by transformers alone, and give a function that waits for its ids.

    Raises:
        UserError: The process fails (raised by the function).
    """
    if not conversations:
        yield list
        return
    asked = {
        "path": [place for place in sys.path if place],
        "folder": str(folder.resolve()),
        "conversations": [message_fields(messages) for messages in conversations],
    }
    with ExitStack() as stack:
        with writing_temporary():
            # Without a buffer, which would be written once more, and refused once more, as the file is closed.
            question = stack.enter_context(tempfile.TemporaryFile(buffering=0))
            answer = stack.enter_context(tempfile.TemporaryFile("w+"))
            question.write(json.dumps(asked).encode())
            question.seek(0)
        # Isolated: no file of the working directory is taken for a library.
        words = [sys.executable, "-I", str(Path(fresh.__file__))]
        process = subprocess.Popen(words, stdin=question, stdout=answer, stderr=subprocess.PIPE, text=True)

        def ids() -> Ids:
            try:
                said = process.communicate(timeout=SECONDS)[1].strip() or f"exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                said = f"no answer in {SECONDS} s"
            if process.returncode != 0:
                raise UserError(f"transformers alone cannot render messages with the merged folder, and nothing is "
                                f"kept: {said.splitlines()[-1]}")  # fmt: skip
            answer.seek(0)
            found: Ids = parse_json(answer.read(), "the answer of a process without weft")
            return found

        try:
            yield ids
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()


def compare_ids(wanted: Wanted, found: Ids, decode: Callable[[list[int]], str]) -> tuple[Rendering, list[str]]:
    """Compare ids of training with those of other tools.

    Returns:
        The figures, and what users of conversations of several turns should know.

    Raises:
        UserError: A conversation without an answer has other ids.
    """

    def tell(ids: list[int], other: list[int]) -> str:
        place, here, there = first_difference(ids, other, decode)
        return f"From token {place} on training sees {here}, and transformers gives {there}"

    rendering, first, turns = count_alike(wanted, found, tell)
    if first:
        raise UserError(
            f"the merged folder's chat template does not give the tokens of training by transformers alone, and "
            f"nothing is kept. {first}. Train with a `chat_template` that transformers renders alike, or serve "
            "the adapter beside its base."
        )
    if not turns:
        return rendering, []
    return rendering, [
        f"warning: in a conversation of several turns other tools give other tokens than training, which no template "
        f"can change: this tokenizer joins or marks text across the end of a turn. {turns}."
    ]


def count_alike(wanted: Wanted, found: Ids, tell: Callable[[list[int], list[int]], str]) -> tuple[Rendering, str, str]:
    """Count the conversations with the same ids, and ``tell`` of the first that differ.

    Returns:
        The figures; the words on the first conversation without an answer that differs, and on the first with one.
    """
    counts, notes = {True: [0, 0], False: [0, 0]}, {True: "", False: ""}
    for (messages, ids), other in zip(wanted, found, strict=True):
        first, same = opening(messages), ids == other
        counts[first][0] += 1
        counts[first][1] += same
        if not same:
            notes[first] = notes[first] or tell(ids, other)
    return Rendering(*counts[True], *counts[False]), notes[True], notes[False]


def first_difference(ids: list[int], other: list[int], decode: Callable[[list[int]], str]) -> tuple[int, str, str]:
    """The place at which two texts' ids first differ, and what each has from there on."""
    shorter = min(len(ids), len(other))
    place = next((at for at in range(shorter) if ids[at] != other[at]), shorter)
    here, there = (repr(decode(one[place : place + 6])) for one in (ids, other))
    return place, here, there
