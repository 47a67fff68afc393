"""The comparison of two sides' tokenizers and chat templates: the same ids for the same texts and conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial

from weft.data import Message
from weft.data.auditing.pieces import decode
from weft.data.provenance import TokenizerFacts
from weft.data.rendering.tokens import special_texts
from weft.errors import UserError, reason_of
from weft.export.rendering import Rendering, Wanted, count_alike, first_difference, fixed_conversations
from weft.export.sides import ModelHere


@dataclass(frozen=True)
class TokenFindings:
    """How two sides turn text into ids.

    Attributes:
        texts, texts_alike: texts, and how many of them became the same ids.
        rendering: the same of conversations; None where one side takes none.
        differences: what differs, in words.
        notes: what no template can change.
    """

    texts: int
    texts_alike: int
    _: KW_ONLY
    rendering: Rendering | None
    differences: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The figures as lines for people."""
        found = [f"tokenizers: the same ids in {self.texts_alike} of {self.texts} texts"]
        if (one := self.rendering) is not None:
            found.append(
                f"chat templates: the same ids in {one.openings_alike} of {one.openings} questions and in "
                f"{one.turns_alike} of {one.turns} conversations of several turns"
            )
        return found


def compare_tokens(a: ModelHere, b: ModelHere, texts: Sequence[str]) -> TokenFindings:
    """Compare the tokenizers and the chat templates of two sides on these texts and some fixed conversations."""
    differences, notes = [], []
    pairs = [(a.plain(text), b.plain(text)) for text in texts]
    alike = sum(one == other for one, other in pairs)
    facts = [TokenizerFacts.of(side.tokenizer) for side in (a, b)]
    said = facts[0].differences(facts[1])
    if alike < len(pairs) or a.vocabulary() != b.vocabulary():
        differences.append(f"the tokenizer of B is another: {'; '.join(said) or 'the ids of texts are others'}")
    elif a.tokenizer.eos_token != b.tokenizer.eos_token:
        differences.append(f"answers end with {a.tokenizer.eos_token!r} in A and {b.tokenizer.eos_token!r} in B")
    elif said:
        notes.append(f"the files of the two tokenizers differ ({'; '.join(said)}), but their ids are the same")
    rendering = None
    if a.continues and b.continues:
        rendering, different, told = _compare_templates(a, b, fixed_conversations(texts))
        differences += different
        notes += told
    return TokenFindings(
        len(pairs), alike, rendering=rendering, differences=tuple(differences), notes=tuple(notes)
    )  # fmt: skip


def _compare_templates(
    a: ModelHere, b: ModelHere, conversations: Sequence[list[Message]]
) -> tuple[Rendering | None, list[str], list[str]]:
    asked = conversations[0]
    lost = [name for name, side in (("A", a), ("B", b)) if _ids(side, asked)[0] is None]
    if len(lost) == 2:
        return None, [], ["neither side has a chat template"]
    if lost:
        return None, [f"{lost[0]} has no chat template, and the other side has one"], []
    wanted: Wanted = []
    found: list[list[int]] = []
    refused = ""
    for messages in conversations:
        if _spells_control(a, messages):
            continue
        ids, _ = _ids(a, messages)
        other, why = _ids(b, messages)
        if ids is None:
            continue  # no system message, or no earlier answers
        if other is None:
            refused = refused or why
            continue
        wanted.append((messages, ids))
        found.append(other)
    rendering, first, turns = count_alike(wanted, found, partial(_tell, a))
    different = [f"the chat template of B refuses what that of A renders: {refused}"] if refused else []
    if first:
        different.append(f"the chat templates differ: {first}")
    elif turns and type(a) is type(b):
        different.append(f"the chat templates differ in conversations of several turns: {turns}")
    elif turns:
        return (
            rendering,
            different,
            [
                f"in a conversation of several turns the two give other tokens: {turns}. A tokenizer that joins text "
                "across the end of a turn does so, and no template can change it"
            ],
        )
    return rendering, different, []


def _ids(side: ModelHere, messages: Sequence[Message]) -> tuple[list[int] | None, str]:
    """The ids of a conversation, or None and the reason."""
    try:
        return side.prompt(messages), ""
    except UserError as error:
        return None, reason_of(error)


def _spells_control(side: ModelHere, messages: Sequence[Message]) -> bool:
    """Whether a text spells a control token: to Weft it is text, to other tools a command, whatever the template."""
    return any(text in message.content for message in messages for text in special_texts(side.tokenizer))


def _tell(side: ModelHere, ids: list[int], other: list[int]) -> str:
    place, here, there = first_difference(ids, other, partial(decode, side.tokenizer))
    return f"from token {place} on A gives {here}, and B {there}"
