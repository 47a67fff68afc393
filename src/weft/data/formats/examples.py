"""The kinds of example that a record can be, and how people are shown each.

Only four kinds teach a model to write (``SFT``). The others hold good and bad answers side by side, or classes, for
objectives that can tell them apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass

from weft.data.formats.fields import short

IGNORED = -100  # the field's label of a token that is not learned


@dataclass(frozen=True)
class Message:
    """One turn.

    ``role`` is "system", "user", "assistant" or "tool". ``train`` overrides whether the turn is learned (None: as
    ``train_on`` says).
    ``tool_calls`` are ``{"type": "function", "function": {"name": str, "arguments": dict}}``, as chat templates
    expect them. ``loss_weight`` scales the loss of a learned turn.
    """

    role: str
    content: str
    train: bool | None = None
    _: KW_ONLY
    tool_calls: tuple[dict[str, object], ...] = ()
    loss_weight: float = 1.0


@dataclass(frozen=True)
class Conversation:
    """Messages in order, and the tools (JSON schemas) that the template lists."""

    messages: tuple[Message, ...]
    source: str
    tools: tuple[dict[str, object], ...] = ()


@dataclass(frozen=True)
class PlainText:
    """A text that is learned as it stands."""

    text: str
    source: str


@dataclass(frozen=True)
class TokenisedText:
    """Token ids of the data, without padding; ``labels[i]`` is ``input_ids[i]`` where learned, else -100."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class Segments:
    """Pieces of one text, and whether each is learned; control tokens written in them are control tokens."""

    segments: tuple[tuple[str, bool], ...]
    source: str


@dataclass(frozen=True)
class Preference:
    """A better and a worse continuation of one prompt."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    _: KW_ONLY
    source: str
    tools: tuple[dict[str, object], ...] = ()

    @property
    def each(self) -> tuple[tuple[Message, ...], ...]:
        """The answers, the best first."""
        return self.chosen, self.rejected


@dataclass(frozen=True)
class _OneAnswer:
    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    _: KW_ONLY
    source: str
    tools: tuple[dict[str, object], ...] = ()

    @property
    def each(self) -> tuple[tuple[Message, ...], ...]:
        """The one answer."""
        return (self.completion,)


@dataclass(frozen=True)
class LabelledAnswer(_OneAnswer):
    """One continuation of a prompt, judged good (``label`` True) or bad: KTO learns from these."""

    label: bool


@dataclass(frozen=True)
class ScoredAnswer(_OneAnswer):
    """One continuation of a prompt, and the score that somebody gave it."""

    score: float


@dataclass(frozen=True)
class Ranking:
    """Several answers to one prompt, the best first."""

    prompt: tuple[Message, ...]
    answers: tuple[Message, ...]
    source: str
    tools: tuple[dict[str, object], ...] = ()

    @property
    def each(self) -> tuple[tuple[Message, ...], ...]:
        """The answers, the best first."""
        return tuple((answer,) for answer in self.answers)

    def pairs(self) -> tuple[Preference, ...]:
        """A preference for every two unequal answers; the better one is chosen."""
        return tuple(
            Preference(self.prompt, (better,), (worse,), source=self.source, tools=self.tools)
            for index, better in enumerate(self.answers)
            for worse in self.answers[index + 1 :]
            if better != worse
        )


@dataclass(frozen=True)
class StepLabels:
    """The steps of one answer, each judged right or wrong: process reward models learn from these."""

    prompt: tuple[Message, ...]
    completions: tuple[str, ...]
    labels: tuple[bool, ...]
    source: str


@dataclass(frozen=True)
class ClassifiedText:
    """One text or more, and the name of their class."""

    texts: tuple[str, ...]
    label: str
    source: str


SFT = Conversation | PlainText | TokenisedText | Segments
Judged = Preference | LabelledAnswer | ScoredAnswer | Ranking
Example = SFT | Judged | StepLabels | ClassifiedText

# Data may hold characters that move a terminal's cursor or colour it; a preview must not obey them.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def describe(example: Example, *, limit: int | None = None) -> str:
    """Describe any example to people: each turn has its role and its content, cut to ``limit`` characters."""
    return "\n".join(_lines(example, limit))


def _lines(example: Example, limit: int | None) -> Iterable[str]:
    yield f"{type(example).__name__} from {example.source}"
    match example:
        case Conversation():
            yield from _turns(example.messages, limit)
        case PlainText():
            yield _entry("text", example.text, limit)
        case TokenisedText():
            learned = sum(label != IGNORED for label in example.labels)
            yield f"{len(example.input_ids)} tokens, {learned} of them learned"
            yield _entry("input_ids", " ".join(map(str, example.input_ids)), limit)
        case Segments():
            for text, learn in example.segments:
                yield _entry("learned" if learn else "not learned", text, limit)
        case Preference():
            yield from _turns(example.prompt, limit)
            yield from _turns(example.chosen, limit, "chosen ")
            yield from _turns(example.rejected, limit, "rejected ")
        case LabelledAnswer():
            yield from _turns(example.prompt, limit)
            yield from _turns(example.completion, limit, "good " if example.label else "bad ")
        case ScoredAnswer():
            yield from _turns(example.prompt, limit)
            yield from _turns(example.completion, limit, f"scored {example.score:g}, ")
        case Ranking():
            yield from _turns(example.prompt, limit)
            for number, answer in enumerate(example.answers, start=1):
                yield from _turns((answer,), limit, f"answer {number}, ")
        case StepLabels():
            yield from _turns(example.prompt, limit)
            for step, label in zip(example.completions, example.labels, strict=True):
                yield _entry("right step" if label else "wrong step", step, limit)
        case ClassifiedText():
            for text in example.texts:
                yield _entry("text", text, limit)
            yield _entry("class", example.label, limit)
    tools = getattr(example, "tools", ())
    if tools:
        yield _entry("tools", ", ".join(_tool_name(tool) for tool in tools), limit)


def _turns(messages: Iterable[Message], limit: int | None, what: str = "") -> Iterable[str]:
    for message in messages:
        notes = []
        if message.train is not None:
            notes.append("learned" if message.train else "not learned")
        if message.loss_weight != 1.0:
            notes.append(f"weight {message.loss_weight:g}")
        head = what + message.role + (f" ({', '.join(notes)})" if notes else "")
        if message.content or not message.tool_calls:
            yield _entry(head, message.content, limit)
        for call in message.tool_calls:
            yield _entry(f"{head} calls", _call(call), limit)


def _call(call: dict[str, object]) -> str:
    function = call["function"]
    assert isinstance(function, dict)
    try:
        return f"{function['name']} {json.dumps(function['arguments'], ensure_ascii=False)}"
    except RecursionError:
        return f"{function['name']} {short(function['arguments'])}"


def _tool_name(tool: dict[str, object]) -> str:
    """A schema's name, bare or in OpenAI's ``{"type": "function", "function": {...}}``."""
    inner = tool.get("function")
    return str((inner if isinstance(inner, dict) else tool).get("name", "?"))


def _entry(head: str, text: str, limit: int | None) -> str:
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}… ({len(text):,} characters)"
    text = _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    return f"{head}: " + text.replace("\n", "\n  ")
