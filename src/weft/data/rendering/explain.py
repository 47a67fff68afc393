"""The text, weight and kind of every token of a record, for a reader. Training uses none of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from itertools import groupby
from typing import Literal

from weft.data.formats.examples import SFT, Conversation
from weft.data.rendering.drafts import Drafter
from weft.data.rendering.sample import Draft, Sample
from weft.data.rendering.transcript import Script

Kind = Literal["bos", "template", "prompt", "answer", "text", "eos"]


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a sample. The texts of all tokens, joined, are the rendering.

    ``kind`` is "bos"; "template", written by the chat template; "prompt", contents that are not learned as an answer;
    "answer", a learned answer with what the template puts into it; "text", plain text; or "eos", the end of an answer
    or a text. ``weight`` is that of ``Sample.weights``, whatever the kind.
    """

    id: int
    text: str
    weight: float
    kind: Kind


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring tokens [start, stop) of one kind and weight, and their text."""

    start: int
    stop: int
    text: str
    _: KW_ONLY
    weight: float
    kind: Kind


@dataclass(frozen=True, slots=True)
class Explanation:
    """``sample`` is the result of ``Renderer.sample``. (A text that becomes windows is explained whole.)"""

    sample: Sample
    tokens: tuple[Token, ...]

    def pieces(self) -> list[Piece]:
        """The tokens, joined where kind and weight are equal."""
        found, at = [], 0
        for (kind, weight), group in groupby(self.tokens, key=lambda token: (token.kind, token.weight)):
            tokens = list(group)
            found.append(Piece(at, at + len(tokens), "".join(token.text for token in tokens), weight=weight, kind=kind))
            at += len(tokens)
        return found


def explain(renderer: Drafter, example: SFT) -> Explanation:
    """See ``Renderer.explain``."""
    made_of, script, draft = renderer.drafted(example)
    contents = renderer.turns.contents(script, made_of) if isinstance(made_of, Conversation) else None
    kinds = _Kinds(renderer, script, draft, contents)
    tokens = []
    for index, (text, place) in enumerate(_spelled(renderer, script, draft)):
        kind = kinds.of(index, place)
        tokens.append(Token(draft.ids[index], text, draft.weights[index], kind))
    return Explanation(draft.sample(example.source), tuple(tokens))


class _Kinds:
    """Tells the kind of a token from its place among the tokens and in the rendering."""

    def __init__(self, renderer: Drafter, script: Script, draft: Draft, contents: list[tuple[int, int]] | None) -> None:
        bos = renderer.encoder.bos
        self.head = len(bos) if draft.ids[: len(bos)] == bos else 0
        self.plain, self.contents = script.plain or script.fixed is not None, contents
        ends = [end for _, end in draft.answers] if not script.plain else [len(draft.ids)]
        eos = renderer.tokenizer.eos_token_id
        self.eos = {end - 1 for end in ends if end and draft.ids[end - 1] == eos}
        self.answer = {place for start, end in draft.answers for place in range(start, end)}

    def of(self, index: int, place: int | None) -> Kind:
        if index < self.head:
            return "bos"
        if index in self.eos:
            return "eos"
        if self.plain:
            return "text"
        if index in self.answer:
            return "answer"
        if place is None:
            return "template"
        if self.contents is None or any(start <= place < end for start, end in self.contents):
            return "prompt"
        return "template"


def _spelled(renderer: Drafter, script: Script, draft: Draft) -> Iterator[tuple[str, int | None]]:
    """For every token of the draft: the characters that it adds, and where in the script's text it begins."""
    at = 0
    for origin in draft.origins:
        if origin.start == origin.end:
            for index in range(at, at + origin.count):
                yield str(renderer.tokenizer.decode([draft.ids[index]])), None
        else:
            text = script.text[origin.start : origin.end]
            spelled = renderer.encoder.spell(text, first=origin.start == 0)
            for shown, place in spelled[origin.skip : origin.skip + origin.count]:
                yield shown, origin.start + place
        at += origin.count
