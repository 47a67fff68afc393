"""The transcript of a conversation: the text that the chat template writes, and which stretches are learned."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal, get_args

from pydantic import Field

from weft.data.formats.examples import Conversation, Message, PlainText
from weft.data.rendering.sandbox import render_chat
from weft.data.rendering.templates import TemplateSettings
from weft.data.rendering.tokens import Encoder
from weft.errors import UserError, check_word

# Two of Unicode's noncharacters, for ``Turns.contents``.
_BEGIN, _END = "\ufdd2", "\ufdd3"

TrainOn = Literal["answers", "last_answer", "all"]


class TurnSettings(TemplateSettings):
    """The keys that decide what text a conversation becomes and which of it is learned.

    ``train_on``: every assistant turn, the last one, or every token but the first. The ``train`` of a message wins.
    """

    train_on: TrainOn = Field("answers", description="which tokens are learned ([data.md](data.md))")


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of a rendering: what a turn ("turn 2 of 4") adds to its own prompt.

    ``weight`` is None if the turn is not learned.
    """

    start: int
    end: int
    weight: float | None
    turn: str


@dataclass(frozen=True, slots=True)
class Script:
    """The text of an example, before it is tokenised. Outside its ``spans`` every token has the weight ``base``.

    ``plain`` text is learned whole and ends with the end-of-sequence token. ``fixed``: the ids and weights of an
    example that gives them itself and has no text.
    """

    text: str
    spans: tuple[Span, ...]
    base: float
    _: KW_ONLY
    source: str
    plain: bool = False
    fixed: tuple[list[int], list[float]] | None = None

    def pieces(self) -> list[tuple[str, bool]]:
        """What is tokenised apart, with whether it begins the sequence."""
        if self.fixed is not None:
            return []
        if self.plain:
            return [(self.text, True)]
        at, found = 0, []
        for span in self.spans:
            found += [(self.text[at : span.start], at == 0), (self.text[span.start : span.end], span.start == 0)]
            at = span.end
        return [*found, (self.text[at:], at == 0)]


def learned_turns(messages: Sequence[Message]) -> list[int]:
    """The places of assistant turns that follow another turn and are not switched off."""
    return [
        place
        for place, turn in enumerate(messages)
        if place and turn.role == "assistant" and turn.train is not False and turn.loss_weight > 0
    ]


class Turns:
    """Renders messages by one chat template, in ``rendering.sandbox``. Its state never changes."""

    def __init__(self, encoder: Encoder, template: str | None, settings: TurnSettings) -> None:
        check_word("train_on", settings.train_on, get_args(TrainOn))
        self.encoder, self.template, self.settings = encoder, template, settings
        self.tokenizer = encoder.tokenizer

    def plain(self, example: PlainText) -> Script:
        """The script of a plain text."""
        return Script(self.encoder.guard(example.text), (), 1.0, source=example.source, plain=True)

    def script(self, example: Conversation, *, generation: bool = False) -> Script:
        """The script of a conversation, for training and generation: equal messages give equal text up to a learned
        answer.

        Raises:
            UserError: There are no messages.
        """
        messages, source = example.messages, example.source
        if not messages:
            raise UserError(f"{source}: there are no messages.")
        marked = self._marked(messages, generation, source)
        turns = [self._turn(message) for message in messages]
        schemas = [self.encoder.guard(tool) for tool in example.tools]
        text = self._render(turns, schemas, generation, source)
        base = 1.0 if self.settings.train_on == "all" else 0.0
        spans = self._spans(marked, turns, schemas, text, generation=generation, source=source)
        return Script(text, tuple(spans), base, source=source)

    def contents(self, script: Script, example: Conversation) -> list[tuple[int, int]] | None:
        """Where in the script's text the contents of messages are; None if the template hides that.

        A second rendering puts a mark before and after each. Without the marks it must equal the script's text.
        """
        marked = []
        for message in example.messages:
            bare = message.content.strip()
            before, _, after = message.content.partition(bare) if bare else ("", "", message.content)
            marked.append(replace(message, content=f"{before}{_BEGIN}{bare}{_END}{after}"))
        try:
            text = self.text(replace(example, messages=tuple(marked)), generation=False)
        except UserError:
            return None
        places: list[tuple[int, int]] = []
        bare_text, began = "", 0
        for part in re.split(f"({_BEGIN}|{_END})", text):
            if part == _BEGIN:
                began = len(bare_text)
            elif part == _END:
                places.append((began, len(bare_text)))
            else:
                bare_text += part
        return places if bare_text == script.text else None

    def text(self, example: Conversation, *, generation: bool) -> str:
        """The rendering alone."""
        turns = [self._turn(message) for message in example.messages]
        return self._render(turns, [self.encoder.guard(tool) for tool in example.tools], generation, example.source)

    def _spans(
        self,
        marked: list[tuple[int, float | None]],
        turns: list[dict[str, Any]],
        schemas: list[Any],
        text: str,
        generation: bool,
        source: str,
    ) -> list[Span]:
        """The places in ``text`` of turns whose weight differs from their surroundings, in order."""
        spans = []
        for index, weight in marked:
            turn = f"turn {index + 1} of {len(turns)}"
            prompt = self._render(turns[:index], schemas, True, source) if index else ""
            whole = index + 1 == len(turns) and not generation
            closed = text if whole else self._render(turns[: index + 1], schemas, False, source)
            if not (text.startswith(closed) and closed.startswith(prompt)):
                raise UserError(
                    f"{source}: the chat template is not prefix-preserving at {turn}: the conversation up to there, "
                    "rendered to generate that turn, is not how the whole conversation begins. Training would differ "
                    "from generation. Use `train_on: last_answer`, `template_kwargs` that switch the template's "
                    "thinking mode, or another `chat_template`."
                )
            answer = text[len(prompt) : len(closed)]
            for call in turns[index].get("tool_calls", ()):
                if call["function"]["name"] not in answer:
                    raise UserError(
                        f"{source}: the chat template does not render the tool call of {turn}. Use a `chat_template` "
                        "that supports tools."
                    )
            spans.append(Span(len(prompt), len(closed), weight, turn))
        return spans

    def _marked(self, messages: Sequence[Message], generation: bool, source: str) -> list[tuple[int, float | None]]:
        """The turns to tell apart from the text around them: (index, its weight if it is learned)."""
        default = self.settings.train_on == "all"
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        last = None if generation or not answers else answers[-1]
        marked: list[tuple[int, float | None]] = []
        for index, message in enumerate(messages):
            scale = message.loss_weight
            if not 0 <= scale < math.inf:
                raise UserError(
                    f"{source}: turn {index + 1} has the loss weight {scale}; expected 0 or a number above."
                )
            if message.role != "assistant":
                asked = "" if message.train in (None, default) else f"`train: {str(message.train).lower()}`"
                if scale != 1.0:
                    asked = f"the loss weight {scale:g}"
                if asked:
                    raise UserError(
                        f"{source}: turn {index + 1} ({message.role}) asks for {asked}; with `train_on: "
                        f"{self.settings.train_on}` only assistant turns can be switched one by one."
                    )
                continue
            trained = message.train
            if trained and index == 0:
                raise UserError(f"{source}: turn 1 is an assistant turn to be trained, but nothing comes before it.")
            if trained is None:  # a greeting has no prompt, so it cannot be an answer
                trained = index > 0 and (self.settings.train_on != "last_answer" or index == last)
                if index == 0:
                    continue
            trained = trained and scale > 0
            if trained or default:
                marked.append((index, scale if trained else None))
        return marked

    def _turn(self, message: Message) -> dict[str, Any]:
        turn: dict[str, Any] = {"role": message.role, "content": self.encoder.guard(message.content)}
        if message.tool_calls:
            turn["tool_calls"] = [self.encoder.guard(call) for call in message.tool_calls]
        return turn

    def _render(self, turns: list[dict[str, Any]], schemas: list[Any], generation: bool, source: str) -> str:
        try:
            return render_chat(
                self.tokenizer,
                turns,
                tools=schemas or None,
                chat_template=self.template,
                add_generation_prompt=generation,
                **self.settings.template_kwargs,
            )
        except UserError as error:
            raise UserError(f"{source}: {error}.") from error
        except Exception as error:  # the template is a program of the user: whatever it raises is about their data
            raise UserError(f"{source}: the chat template refuses this conversation: {error}.") from error
