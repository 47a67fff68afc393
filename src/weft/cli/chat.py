"""``weft chat``: talk to a run's adapters, to an adapter, or to a model."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from weft.cli import common, early, options
from weft.cli.columns import Columns
from weft.cli.lines import turns
from weft.errors import UserError, nearest
from weft.paths import local_path

if TYPE_CHECKING:
    from weft.data import Message
    from weft.generation.request import Answer, Completion
    from weft.generation.sampling import Sampling
    from weft.generation.target import Target

COMMANDS = {
    "/help": "this list",
    "/adapter NAME": "switch to another adapter, or to 'base'; the conversation goes on",
    "/compare [NAME …]": "from now on these answer side by side (without names: all); /adapter NAME ends it",
    "/system TEXT": "set the system message and begin anew (without TEXT: none)",
    "/reset": "begin a new conversation",
    "/save FILE": "write the conversation as JSON messages (/save --overwrite FILE: also if FILE is there)",
    '"""': 'begins a message of several lines, which ends with the next """; a line may also end with \\',
    "/exit": "leave (so does Ctrl-D)",
}


def chat(
    context: typer.Context,
    target: options.Target,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Adapters of the run to load; the first one answers. 'base' is the base.")
    ] = None,
    model: options.Model = None,
    system: options.System = None,
    chat_template: options.ChatTemplate = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    stop: options.Stop = None,
    seed: options.Seed = 0,
    no_history: Annotated[
        bool,
        typer.Option("--no-history", envvar="WEFT_NO_HISTORY", help="Keep no lines for the next chat, and show none."),
    ] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each answer as one JSON object on a line of stdout, when it is whole.")
    ] = False,
) -> int:
    """Talk to a run's adapters, to an adapter, or to a model. Reads lines from stdin when that is no terminal.

    weft chat runs/weft --adapter lora
    """
    if not temperature:
        options.refuse_idle(context, options.DRAWS, "without --temperature: the likeliest token is taken")
    how: dict[str, Any] = {"model": model, "adapters": adapter, "device": device, "dtype": dtype}
    early.refuse(lambda: (options.sampling_of(context.params), _open(target, how, chat_template)))
    common.tell_hub(model or target)
    opened = _open(target, how, chat_template)
    first, sampling = _first(opened, adapter), options.sampling_of(context.params)
    with (
        Conversation(opened, first, system, sampling, max_new_tokens, stop=stop or (), as_json=as_json) as talk,
        contextlib.closing(turns(not no_history)) as said,
    ):
        for note in (*opened.notes, opened.summary(), talk.introduction()):
            common.say(note)
        for turn in said:
            try:
                if turn.quoted:
                    talk.answer(turn.text)
                elif not talk.take(turn.text):
                    break
            except UserError as error:
                # One bad line does not end a conversation, but a script has to notice it.
                if not sys.stdin.isatty():
                    raise
                common.say(f"error: {error}")
    return common.DONE


def _open(target: str, how: dict[str, Any], chat_template: str | None) -> Target:
    from weft.generation.open import open_target

    return open_target(target, **how, chat_template=options.template_text(chat_template))


def _first(opened: Target, asked: list[str] | None) -> str | None:
    """The adapter that answers first: the first that is asked for, else the first that writes.

    Raises:
        UserError: It classifies, or all do.
    """
    from weft.generation.checks import check_writes

    names: list[str | None] = [opened.adapter(asked[0])] if asked else [*opened.names] or [None]
    first = next((name for name in names if name is None or opened.adapters.head(name).writes), names[0])
    check_writes(opened.adapters, first)
    return first


class Conversation:
    """A conversation with one adapter, or the same with several: each has its own answers behind common questions.

    Attributes:
        lanes: the turns so far of each adapter that answers (None: the base).
    """

    def __init__(
        self,
        opened: Target,
        adapter: str | None,
        system: str | None,
        sampling: Sampling,
        max_new_tokens: int | None,
        *,
        stop: Sequence[str] = (),
        as_json: bool = False,
    ) -> None:
        from weft.generation import Limits

        self.opened, self.system = opened, system
        self.sampling, self.max_new_tokens, self.stop, self.as_json = sampling, max_new_tokens, tuple(stop), as_json
        self.lanes: dict[str | None, list[Message]] = {adapter: []}
        self.reset()
        # One for the whole chat: it knows the keys and values of the turns before.
        self.engine = opened.engine(Limits(max_rows=len(opened.names) + 1))

    def __enter__(self) -> Self:
        self.engine.start()  # so that Ctrl-C never comes into a step
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.engine.close()

    def introduction(self) -> str:
        """The sentence that says who answers, and who else could."""
        names = [name or "base" for name in self.lanes]
        if len(names) > 1:
            return f"{', '.join(names)} answer side by side; /adapter NAME goes on with one. /help lists the commands."
        others = [name for name in (*self.opened.names, "base") if name not in names]
        rest = f" (also there: {', '.join(others)}; /adapter NAME switches)" if self.opened.names and others else ""
        return f"{names[0]} answers{rest}. /help lists the commands."

    def reset(self) -> None:
        """Forget the turns."""
        from weft.data import Message

        self.lanes = {name: [Message("system", self.system)] if self.system else [] for name in self.lanes}

    def take(self, line: str) -> bool:
        """Obey a command or answer a message; False if it was ``/exit``.

        Raises:
            UserError: There is no such command.
        """
        word, _, rest = line.strip().partition(" ")
        if not word.startswith("/"):
            self.answer(line)
            return True
        if word in ("/exit", "/quit"):
            return False
        if word == "/help":
            _help()
        elif word == "/reset":
            self.reset()
            common.say("a new conversation")
        elif word == "/system":
            self.system = rest.strip() or None
            self.reset()
            common.say("a new conversation, with this system message" if self.system else "a new conversation")
        elif word == "/adapter":
            self._answer_with([rest.strip()] if rest.strip() else [])
        elif word == "/compare":
            self._compare(rest.replace(",", " ").split())
        elif word == "/save":
            self._save(rest.strip())
        else:
            known = [command.split()[0] for command in COMMANDS if command.startswith("/")]
            raise UserError(f"there is no command '{word}'.{nearest(word, known)} Commands: {', '.join(known)}.")
        return True

    def _answer_with(self, names: Sequence[str]) -> None:
        """Let these answer from now on. Who has answered goes on with the own answers, others with the first's."""
        from weft.generation.checks import check_writes

        found = list(dict.fromkeys(self.opened.adapter(name) for name in names))
        for name in found:
            check_writes(self.opened.adapters, name)
        common_turns = next(iter(self.lanes.values()))
        if found:
            self.lanes = {name: list(self.lanes.get(name, common_turns)) for name in found}
        common.say(self.introduction())

    def _compare(self, names: Sequence[str]) -> None:
        heads = self.opened.adapters
        everyone = [name for name in self.opened.names if heads.head(name).writes]
        asked = names or list(dict.fromkeys((*everyone, "base")))
        if len({self.opened.adapter(name) for name in asked}) < 2:
            there = ", ".join(dict.fromkeys((*everyone, "base")))
            raise UserError(f"/compare needs two who answer, such as /compare a b; there are: {there}.")
        self._answer_with(asked)

    def _save(self, given: str) -> None:
        """Write a record of messages for each adapter that answers: a file that Weft can read as data."""
        from weft.files.whole import write_whole

        word, _, rest = given.partition(" ")
        overwrite = word == "--overwrite"
        name = rest.strip() if overwrite else given
        if not name:
            raise UserError("/save needs the name of a file, such as /save chat.json.")
        path = local_path(name)
        if path.is_dir() or (path.exists() and not overwrite):
            way = "" if path.is_dir() else f", or /save --overwrite {name}"
            raise UserError(f"{path} is there already; take another name{way}.")
        if not any(message.role == "user" for message in next(iter(self.lanes.values()))):
            raise UserError("there is nothing to save yet: no message was answered.")
        records = [
            {"adapter": lane or "base", "messages": [{"role": one.role, "content": one.content} for one in messages]}
            for lane, messages in self.lanes.items()
        ]
        if path.suffix == ".jsonl":
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        else:
            text = json.dumps(records, ensure_ascii=False, indent=2) + "\n"
        write_whole(path, text, "/save ")
        common.say(f"saved -> {path}")

    def answer(self, text: str) -> None:
        """Answer a message, showing the tokens as they come. Ctrl-C ends the answer, not the program.

        Raises:
            UserError: There is no room left for an answer.
        """
        from weft.data import Message
        from weft.generation import Request

        lanes = {name: [*before, Message("user", text)] for name, before in self.lanes.items()}
        requests = []
        for name, messages in lanes.items():
            prompt = self.opened.prompt(messages)
            what = "the conversation (/reset begins a new one)"
            count = self.opened.room(len(prompt.ids), name, self.max_new_tokens, what=what, clip=True)
            requests.append(
                Request(prompt.ids, name, count, sampling=self.sampling, slots=prompt.slots, stop=self.stop)
            )
        answers = {name: self.engine.submit(request) for name, request in zip(lanes, requests, strict=True)}
        for name, done in self._shown(answers, text).items():
            self.lanes[name] = [*lanes[name], Message("assistant", done.text)]

    def _shown(self, answers: Mapping[str | None, Answer], text: str) -> dict[str | None, Completion]:
        """The completions, which are on stdout now."""
        if self.as_json:
            found = _ended(answers, lambda: None)
            for name, done in found.items():
                common.print_json({
                    "adapter": name, "prompt": text, "answer": done.text, "finish_reason": done.finish_reason,
                    "prompt_tokens": done.prompt_tokens, "cached_tokens": done.cached_tokens, "tokens": len(done.ids),
                }, indent=None)  # fmt: skip
            return found
        console = common.console()
        if len(answers) > 1 and sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal:
            return _side_by_side(answers, Columns([name or "base" for name in answers], console))
        found = {}
        for place, (name, answer) in enumerate(answers.items()):
            if len(answers) > 1:
                print(f"\n[{name or 'base'}]" if place else f"[{name or 'base'}]")
            found |= _one_by_one(name, answer)
        return found


def _help() -> None:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for command, meaning in COMMANDS.items():
        table.add_row(f"  {command}", meaning)
    common.console(stderr=True).print(table)


def _one_by_one(name: str | None, answer: Answer) -> dict[str | None, Completion]:
    """The completion of an answer that is printed as it comes."""
    shown = 0

    def show(text: str) -> None:
        nonlocal shown
        shown += len(text)
        print(common.printable(text) if sys.stdout.isatty() else text, end="", flush=True)

    def follow() -> None:
        for token in answer:
            show(token.text)

    found = _ended({name: answer}, follow)
    show(found[name].text[shown:] + "\n")
    return found


def _side_by_side(answers: Mapping[str | None, Answer], columns: Columns) -> dict[str | None, Completion]:
    """The completions of answers that grow side by side."""

    def grow(column: int, answer: Answer) -> None:
        with contextlib.suppress(UserError):  # who waits for the end hears of it
            for token in answer:
                columns.add(column, token.text)

    threads = [threading.Thread(target=grow, args=pair, daemon=True) for pair in enumerate(answers.values())]
    with columns:
        for thread in threads:
            thread.start()
        found = _ended(answers, lambda: None)
        for column, done in enumerate(found.values()):
            threads[column].join()
            columns.add(column, done.tail)
            columns.feet[column] = _foot(done)
    return found


def _foot(done: Completion) -> str:
    ends = {"length": ", cut off at the limit", "cancelled": ", ended by you"}
    return f"{len(done.ids)} tokens{ends.get(done.finish_reason, '')}"


def _ended(answers: Mapping[str | None, Answer], follow: Callable[[], None]) -> dict[str | None, Completion]:
    """The completions; on a terminal Ctrl-C ends the answers."""
    try:
        follow()
        return {name: answer.result() for name, answer in answers.items()}
    except KeyboardInterrupt:
        for answer in answers.values():
            answer.cancel()
        if not sys.stdin.isatty():
            raise
        return {name: answer.result() for name, answer in answers.items()}
