"""A panel: adapters of a target, and its base, who answer together; what they answered once is kept.

An answer is kept under a hash of all that was asked and of the code that computed it, in a file named by a hash of the
adapter's content, the base and the template. So another adapter under an old name finds nothing, and a metric may
change without anything being computed again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import weft
from weft.data import Sample
from weft.evaluate.classify import predict
from weft.evaluate.kept_answers import KeptAnswers, contestant_mark, key_of, target_mark
from weft.evaluate.questions import Continuation
from weft.evaluate.scoring import score, score_texts
from weft.generation.completed import completed
from weft.generation.limits import limits_for
from weft.generation.request import Request
from weft.generation.target import Target
from weft.objectives.passes import EVALUATION_TOKENS

# The parts of Weft by which an answer could be another one; metrics only look at answers.
_COMPUTING = ("base", "core", "layouts", "heads", "methods", "models", "ops", "generation", "evaluate/kinds")

# (place of what was asked, answer as JSON holds it), in any order.
Answers = Iterator[tuple[int, Any]]


@dataclass(frozen=True)
class Ask:
    """What is asked of an adapter (None: the base); ``what`` is the question, ``key`` its hash."""

    adapter: str | None
    key: str
    what: Any


@dataclass
class Spent:
    """What was computed, and not taken from what is kept: seconds, tokens that were read and that were written."""

    _: KW_ONLY
    seconds: float = 0.0
    read: int = 0
    written: int = 0


class Panel:
    """Asks adapters together.

    Attributes:
        marks: of each adapter a hash of all that it answers by.
        spent: what was computed.

    Args:
        names: Those who are asked.
        folder: Where answers are kept; None: in memory alone.
        max_rows: Answers that are written at once.
        max_tokens: Rows of a pass that scores.

    Raises:
        UserError: A kept answer is damaged.
    """

    def __init__(
        self,
        target: Target,
        names: Sequence[str | None],
        *,
        folder: Path | None = None,
        max_rows: int = 64,
        max_tokens: int = EVALUATION_TOKENS,
    ) -> None:
        self.target, self.max_rows, self.max_tokens = target, max_rows, max_tokens
        mark = target_mark(target)
        self.marks = {name: contestant_mark(target, name, mark) for name in dict.fromkeys(names)}
        self._kept = {
            name: KeptAnswers(None if folder is None else folder / f"{mark}.jsonl") for name, mark in self.marks.items()
        }
        self.spent = Spent()

    def known(self, ask: Ask) -> bool:
        """Whether the answer is kept."""
        return ask.key in self._kept[ask.adapter]

    def _answers(self, asks: Sequence[Ask], compute: Callable[[Sequence[Ask]], Answers]) -> Answers:
        """The kept answers, then those that ``compute`` gives of the others; what is asked twice is computed once."""
        todo: dict[tuple[str | None, str], list[int]] = {}
        for place, ask in enumerate(asks):
            if self.known(ask):
                yield place, self._kept[ask.adapter][ask.key]
            else:
                todo.setdefault((ask.adapter, ask.key), []).append(place)
        if not todo:
            return
        groups, begun = list(todo.values()), time.perf_counter()
        for number, answer in compute([asks[places[0]] for places in groups]):
            first = asks[groups[number][0]]
            self._kept[first.adapter].add({first.key: answer})
            self.spent.seconds += time.perf_counter() - begun
            yield from ((place, answer) for place in groups[number])
            begun = time.perf_counter()

    # What can be asked.

    def write(self, asks: Sequence[Ask]) -> Answers:
        """The texts that follow prompts; ``what`` is a ``Request``. An answer is [text, tokens read, tokens written].

        Raises:
            UserError: A request cannot be answered.
        """

        def compute(some: Sequence[Ask]) -> Answers:
            requests = [ask.what for ask in some]
            with self.target.engine(limits_for(self.target.adapters, requests, self.max_rows)) as engine:
                for place, done in completed(engine, requests):
                    self.spent.read += done.prompt_tokens
                    self.spent.written += len(done.ids)
                    yield place, [done.text, done.prompt_tokens, len(done.ids)]

        return self._answers(asks, compute)

    def choose(self, asks: Sequence[Ask]) -> Answers:
        """The log-probabilities of choices; ``what`` is a list of ``Continuation``s. An answer has one for each.

        Raises:
            UserError: A continuation is longer than what the base reads.
        """

        def compute(some: Sequence[Ask]) -> Answers:
            asked: dict[str | None, list[Continuation]] = {}
            for ask in some:
                asked.setdefault(ask.adapter, []).extend(ask.what)
                self.spent.read += len(ask.what[0].context) + sum(len(one.ids) for one in ask.what)
            found = {name: iter(own) for name, own in self._scored(asked).items()}
            for place, ask in enumerate(some):
                yield place, [next(found[ask.adapter]).logprob for _ in ask.what]

        return self._answers(asks, compute)

    def _scored(self, asked: dict[str | None, list[Continuation]]) -> Any:
        return score(self.target.adapters, asked, max_tokens=self.max_tokens)

    def weigh(self, asks: Sequence[Ask], prefix: int, max_length: int | None) -> Answers:
        """The log-probabilities of whole texts; ``what`` is their ids. An answer is a number.

        Raises:
            UserError: ``max_length`` is less than 1.
        """

        def compute(some: Sequence[Ask]) -> Answers:
            asked: dict[str | None, list[Sequence[int]]] = {}
            for ask in some:
                asked.setdefault(ask.adapter, []).append(ask.what)
                self.spent.read += len(ask.what)
            scored = score_texts(self.target.adapters, asked, prefix, max_length=max_length, max_tokens=self.max_tokens)
            found = {name: iter(own) for name, own in scored.items()}
            for place, ask in enumerate(some):
                yield place, next(found[ask.adapter])

        return self._answers(asks, compute)

    def classify(self, asks: Sequence[Ask]) -> Answers:
        """The classes of texts; ``what`` is a ``Sample``. An answer is the name of the class.

        Raises:
            UserError: An adapter has no classes, or a text is too long.
        """

        def compute(some: Sequence[Ask]) -> Answers:
            for name in dict.fromkeys(ask.adapter for ask in some):
                places = [place for place, ask in enumerate(some) if ask.adapter == name]
                samples: list[Sample] = [some[place].what for place in places]
                self.spent.read += sum(len(sample.input_ids) for sample in samples)
                found = predict(self.target.adapters, str(name), samples, max_tokens=self.max_tokens)
                for place, label in zip(places, found.labels, strict=True):
                    yield place, found.names[label]

        return self._answers(asks, compute)


def request_key(request: Request) -> str:
    """The hash of a request to be written, whoever is asked."""
    asked = (list(request.prompt), list(request.slots), request.max_new_tokens, list(request.stop))
    return key_of("panel.write", code_mark(), *asked)


@lru_cache(maxsize=1)
def code_mark() -> str:
    """A hash of the code by which an answer could be another one."""
    root = Path(weft.__file__).parent
    digest = hashlib.sha256()
    files = [path for part in _COMPUTING for path in (root / part).rglob("*.py")]
    for path in sorted([*files, *(root / "evaluate").glob("*.py")]):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
