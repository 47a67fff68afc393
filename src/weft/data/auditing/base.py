"""The common parts of the checks of an audit: records, findings, and the list of all checks.

A check is a function with a decorator and nothing else: ``@each`` for one that looks at record after record, ``@over``
for one that needs all of them at once.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, TypeVar

from weft.data.auditing.pieces import decode
from weft.data.auditing.stream import Tokens
from weft.data.formats.examples import SFT, Conversation, Judged, Message
from weft.data.rendering.render import Renderer, Sample
from weft.data.rendering.tokens import special_texts
from weft.data.views import Array, Samples, chained, each_answer

Severity = Literal["error", "warning"]
Split = Literal["train", "eval"]
Early = Literal["refuse", "warn"]
_T = TypeVar("_T")
SHORT = 20  # tokens; texts to learn have more
_SHOWN = 160


@dataclass(frozen=True, slots=True)
class Item:
    """A record for the audit: what it says, and its samples or the problem that it has.

    ``problem`` is ``(code of the check, message)`` of a record that training would refuse or leave out. ``length`` is
    in tokens before anything was cut. ``text`` is all that the record says, ``question`` the message before the last
    learned answer, ``prompt`` everything before it, and ``answer`` the last learned answer itself. ``torn``: training
    has some windows of the text; these are the others. ``eval_set`` is the name of the set of evaluation data that the
    record is in, if it has one. ``number`` is the record's place in the order of reading, from 1.
    """

    split: Split
    source: str
    example: SFT | Judged | None = None
    _: KW_ONLY
    samples: tuple[Sample, ...] = ()
    length: int = 0
    label: str | None = None
    problem: tuple[str, str] | None = None
    text: str = ""
    prompt: str = ""
    question: str = ""
    answer: str = ""
    torn: bool = False
    shown: str = ""  # the fields of a record that became nothing
    eval_set: str = ""
    number: int = 0

    @property
    def part(self) -> str:
        """``train``, ``eval``, or ``eval domain`` of the set ``domain``."""
        return f"{self.split} {self.eval_set}".rstrip()

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns of a conversation; none for anything else."""
        return self.example.messages if isinstance(self.example, Conversation) else ()


@dataclass(frozen=True)
class Facts:
    """What checks need to know besides the records."""

    renderer: Renderer
    task: str = "causal_lm"
    _: KW_ONLY
    own_template: str | None = None  # the tokenizer's, where the configuration names another
    skips_bad_records: bool = False
    prompts: bool = False  # the records are prompts that are to be answered

    @property
    def max_length(self) -> int | None:
        """The renderer's."""
        return self.renderer.max_length

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The renderer's."""
        return self.renderer.tokenizer

    def special(self, name: Literal["eos", "bos", "pad", "unk"]) -> int | None:
        """The id of a special token, if the tokenizer has it."""
        number = getattr(self.tokenizer, f"{name}_token_id", None)
        return number if isinstance(number, int) else None

    @functools.cached_property
    def control_pattern(self) -> re.Pattern[str] | None:
        """A pattern for the tokenizer's control tokens in a text."""
        # Byte and reserved tokens of one or two characters would be found everywhere.
        texts = [text for text in special_texts(self.tokenizer) if len(text) > 2]
        return re.compile("|".join(map(re.escape, texts))) if texts else None

    def decode(self, ids: Iterable[int]) -> str:
        """Tokens as text, special ones included."""
        return decode(self.tokenizer, ids)

    def show(self, ids: Iterable[int]) -> str:
        """Tokens as text in one line."""
        return short(self.decode(ids))


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: of the record at ``source``, the ``number``-th that was read, or ("", 0) of all the data."""

    code: str
    severity: Severity
    source: str
    _: KW_ONLY
    number: int
    split: Split | None
    message: str
    shown: str
    mend: str


@dataclass(frozen=True, slots=True)
class Hit:
    """The result of a check: the record (None for all of them), what is wrong, and the text to show."""

    item: Item | None
    message: str
    shown: str = ""


@dataclass(frozen=True, slots=True)
class Ends:
    """How answers end, in all the data.

    ``samples`` is the number of samples. ``learned``: one of them learns the end-of-sequence token. If none does,
    ``first`` is the end of the first learned stretch (None if nothing is learned).
    """

    samples: int
    learned: bool
    first: str | None


@dataclass(frozen=True, slots=True)
class Texts:
    """How many samples are plain text, and how many of them are ``short`` of SHORT tokens."""

    count: int = 0
    short: int = 0

    def plus(self, other: Texts) -> Texts:
        """Those of two parts of the data."""
        return Texts(self.count + other.count, self.short + other.short)


class Records:
    """All records of an audit, and what several checks make of them.

    ``samples`` (to train on, to evaluate on) stand alone where their records are not at hand. ``ends`` and ``texts``
    are those of all the data, where these records are a part of it.
    """

    def __init__(
        self,
        items: Sequence[Item],
        facts: Facts,
        samples: tuple[Sequence[Sample], Sequence[Sample]] = ((), ()),
        ends: Ends | None = None,
        texts: Texts | None = None,
    ) -> None:
        self.items, self.facts, self.samples = items, facts, samples
        self._shared: dict[Callable[[Records], object], Any] = {}
        if ends is not None:
            self.ends = ends
        if texts is not None:
            self.texts = texts

    def shared(self, make: Callable[[Records], _T]) -> _T:
        """What ``make`` gives of these records. It is called once, for all checks that need it."""
        if make not in self._shared:
            self._shared[make] = make(self)
        found: _T = self._shared[make]
        return found

    @functools.cached_property
    def tokens(self) -> Tokens:
        """The tokens of all samples end to end; of judged answers each is one, after its prompt."""
        return Tokens(self._each[0])

    @functools.cached_property
    def _each(self) -> tuple[Samples, Array]:
        return each_answer(chained((*self.samples, [sample for item in self.items for sample in item.samples])))

    @functools.cached_property
    def ends(self) -> Ends:
        """Whether and where answers end."""
        eos, tokens = self.facts.special("eos"), self.tokens
        learned = eos is not None and bool((tokens.learned & (tokens.ids == eos)).any())
        if learned or not len(places := tokens.stretches()[0]):
            return Ends(len(tokens.samples), learned, None)
        return Ends(len(tokens.samples), False, self.facts.show(tokens.around(int(places[0]))))

    @functools.cached_property
    def texts(self) -> Texts:
        """The plain texts: samples that learn everything and hold no answer."""
        tokens = self.tokens
        plain = tokens.writes & ~tokens.answers & (tokens.count(tokens.learned) + 1 >= tokens.lengths)
        return Texts(int(plain.sum()), int((plain & (tokens.lengths < SHORT)).sum()))

    def owner(self, number: int) -> Item:
        """The record of a sample in ``tokens``."""
        of_each = number
        number = int(self._each[1][number])
        train, held = self.samples
        if number >= len(train) + len(held):
            return self._owners[number - len(train) - len(held)]
        # Made only for findings: 50,000 of them would cost more than the checks.
        sample = self.tokens.samples[of_each]
        return Item("train" if number < len(train) else "eval", sample.source, samples=(sample,))

    @functools.cached_property
    def _owners(self) -> list[Item]:
        return [item for item in self.items for _ in item.samples]

    def of(self, split: Split) -> list[Item]:
        """The records of one split."""
        return [item for item in self.items if item.split == split]

    def spread(self, count: int) -> list[Item]:
        """Up to ``count`` rendered conversations, evenly over the data, for checks that cost too much."""
        fitting = [item for item in self.items if item.messages and item.samples]
        step = max(1, len(fitting) // count)
        return fitting[::step][:count]


@dataclass(frozen=True)
class Check:
    """One check. ``early``: ``weft train`` makes it before its first step, and refuses to go on or warns.

    An early check sees one part of the data after the other. It finds faults of single records, or (``once``) of all
    the data; then its first finding is all.
    """

    code: str
    severity: Severity
    mend: str
    _: KW_ONLY
    run: Callable[[Records], Iterator[Hit]]
    about: str
    early: Early | None = None
    once: bool = False


CHECKS: dict[str, Check] = {}
_Run = Callable[[Records], Iterator[Hit]]
_Look = Callable[[Item, Facts], tuple[str, str] | None]


def over(
    code: str, severity: Severity, mend: str, *, early: Early | None = None, once: bool = False
) -> Callable[[_Run], _Run]:
    """Register a check of all records at once. The first line of its docstring says what it finds."""

    def register(run: _Run) -> _Run:
        assert code not in CHECKS, code
        about = (run.__doc__ or "").strip().split("\n")[0]
        CHECKS[code] = Check(code, severity, mend, run=run, about=about, early=early, once=once)
        return run

    return register


def each(code: str, severity: Severity, mend: str) -> Callable[[_Look], _Look]:
    """Register a check of one record after the other. It returns ``(what is wrong, text to show)``, or None."""

    def register(look: _Look) -> _Look:
        def run(records: Records) -> Iterator[Hit]:
            for item in records.items:
                found = look(item, records.facts)
                if found is not None:
                    yield Hit(item, *found)

        run.__doc__ = look.__doc__
        over(code, severity, mend)(run)
        return look

    return register


def short(text: str, around: int | None = None) -> str:
    """Text to show in one line: its beginning, or what is around a place."""
    start = 0 if around is None else max(0, around - _SHOWN // 3)
    part = text[start : start + _SHOWN].replace("\n", "⏎")
    return f"{'…' * (start > 0)}{part}{'…' * (start + _SHOWN < len(text))}"
