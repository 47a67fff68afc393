"""``weft chat``: talk to a run's adapters, to an adapter, or to a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import common, early, options
from weft.errors import UserError, nearest

if TYPE_CHECKING:
    from weft.data import Message
    from weft.generation.sampling import Sampling
    from weft.generation.target import Target

COMMANDS = {
    "/help": "this list",
    "/adapter NAME": "switch to another adapter, or to 'base'; the conversation goes on",
    "/system TEXT": "set the system message and begin anew (without TEXT: none)",
    "/reset": "begin a new conversation",
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
    seed: options.Seed = 0,
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
    early.refuse(lambda: _open(target, how, chat_template))
    common.tell_hub(model or target)
    from weft.generation.sampling import Sampling

    opened = _open(target, how, chat_template)
    sampling = Sampling(temperature, top_k, top_p, seed=seed)
    talk = Conversation(opened, _first(opened, adapter), system, sampling, max_new_tokens, as_json=as_json)
    for note in (*opened.notes, opened.summary(), talk.introduction()):
        common.say(note)
    for line in _lines():
        try:
            if not talk.take(line):
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
    from weft.generation.engine import check_writes

    names: list[str | None] = [opened.adapter(asked[0])] if asked else [*opened.names] or [None]
    first = next((name for name in names if name is None or opened.adapters.head(name).writes), names[0])
    check_writes(opened.adapters, first)
    return first


def _lines() -> Iterator[str]:
    """The lines that the user types, or those of stdin."""
    if not sys.stdin.isatty():
        for number, line in enumerate(sys.stdin, 1):
            if any("\ud800" <= character <= "\udfff" for character in line):
                raise UserError(f"line {number} of stdin is not UTF-8.")
            if line.strip():
                yield line.rstrip("\r\n")
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its editing and history)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip():
            yield line


class Conversation:
    """A conversation: its turns so far, and the adapter that answers."""

    def __init__(
        self,
        opened: Target,
        adapter: str | None,
        system: str | None,
        sampling: Sampling,
        max_new_tokens: int | None,
        as_json: bool = False,
    ) -> None:
        self.opened, self.adapter, self.system = opened, adapter, system
        self.sampling, self.max_new_tokens, self.as_json = sampling, max_new_tokens, as_json
        self.messages: list[Message] = []
        self.reset()

    def introduction(self) -> str:
        """The sentence that says who answers, and who else could."""
        others = [name for name in (*self.opened.names, "base") if name != (self.adapter or "base")]
        rest = f" (also there: {', '.join(others)}; /adapter NAME switches)" if self.opened.names and others else ""
        return f"{self.adapter or 'base'} answers{rest}. /help lists the commands."

    def reset(self) -> None:
        """Forget the turns."""
        from weft.data import Message

        self.messages = [Message("system", self.system)] if self.system else []

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
            for command, meaning in COMMANDS.items():
                common.say(f"  {command:<15} {meaning}")
        elif word == "/reset":
            self.reset()
            common.say("a new conversation")
        elif word == "/system":
            self.system = rest.strip() or None
            self.reset()
            common.say("a new conversation, with this system message" if self.system else "a new conversation")
        elif word == "/adapter":
            self._switch(rest.strip())
        else:
            known = [command.split()[0] for command in COMMANDS]
            raise UserError(f"there is no command '{word}'.{nearest(word, known)} Commands: {', '.join(known)}.")
        return True

    def _switch(self, name: str) -> None:
        from weft.generation.engine import check_writes

        if name:
            found = self.opened.adapter(name)
            check_writes(self.opened.adapters, found)
            self.adapter = found
        common.say(self.introduction())

    def answer(self, text: str) -> None:
        """Answer a message, printing the tokens as they come. Ctrl-C ends the answer, not the program."""
        from weft.data import Message
        from weft.generation import Request, generate
        from weft.generation.text import TextStream

        messages = [*self.messages, Message("user", text)]
        prompt = self.opened.prompt(messages)
        what = "the conversation (/reset begins a new one)"
        count = self.opened.room(len(prompt.ids), self.adapter, self.max_new_tokens, what=what, clip=True)
        stream = TextStream(self.opened.renderer.tokenizer)
        said: list[str] = []

        def show(index: int, token: int) -> None:
            said.append(stream.push(token))
            if not self.as_json:
                print(said[-1], end="", flush=True)

        request = Request(prompt.ids, self.adapter, count, sampling=self.sampling, slots=prompt.slots)
        reason = "interrupted"
        try:
            (done,) = generate(self.opened.adapters, [request], stop_ids=self.opened.stop_ids, on_token=show)
            reason = done.finish_reason
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        said.append(stream.flush())
        if self.as_json:
            whole = {"adapter": self.adapter, "prompt": text, "answer": "".join(said), "finish_reason": reason}
            common.print_json(whole, indent=None)
        else:
            print(said[-1], flush=True)
        self.messages = [*messages, Message("assistant", "".join(said))]
