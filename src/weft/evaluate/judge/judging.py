"""A judge: a generator that is asked which of two answers is better, in both orders, or what an answer is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

from weft.errors import UserError
from weft.evaluate.judge.prompts import JudgePrompts
from weft.evaluate.judge.rubric import Rubric
from weft.evaluate.judge.verdicts import (
    Form,
    Place,
    comparison_schema,
    read_comparison,
    read_scores,
    score_schema,
)
from weft.generators import Estimate, Failure, Generator, GeneratorRequest
from weft.generators.generator import Outcome

Winner = Literal["a", "b", "tie"]


@dataclass(frozen=True)
class Pair:
    """Two answers to one question. ``reference`` is a right answer, where one is known."""

    item: str
    question: str
    a: str
    _: KW_ONLY
    b: str = ""
    reference: str = ""


@dataclass(frozen=True)
class Compared:
    """What a judge says of a pair.

    Attributes:
        verdicts: by place in the prompt: with A first, with B first; None: no verdict.
        said: what the judge wrote, or why it wrote nothing.
        failures: of either, the failure's kind; "unparsed" where something was written that is no verdict; "".
    """

    pair: Pair
    verdicts: tuple[Place | None, Place | None]
    said: tuple[str, str]
    failures: tuple[str, str] = ("", "")

    @property
    def winner(self) -> Winner | None:
        """Who wins in both orders; a tie where they disagree, and None where a verdict is missing."""
        one, other = self.verdicts
        if one is None or other is None:
            return None
        votes = {{"first": "a", "second": "b", "tie": "tie"}[one], {"first": "b", "second": "a", "tie": "tie"}[other]}
        if votes == {"a"}:
            return "a"
        return "b" if votes == {"b"} else "tie"


@dataclass(frozen=True)
class Scored:
    """What a judge says of the answer A of a pair: the score of each criterion, or None."""

    pair: Pair
    scores: dict[str, int] | None
    said: str
    failure: str = ""

    @property
    def mean(self) -> float | None:
        """Of all criteria."""
        return None if self.scores is None else sum(self.scores.values()) / len(self.scores)


@dataclass(frozen=True)
class Judge:
    """Who judges, and how it is asked.

    Args:
        generator: Answers. Its ledger keeps every verdict, and its budget is the most that judging may cost.
        prompts: The templates.
        rubric: Criteria; a judge that scores needs one.
        form: ``json``, held to a schema, or ``letter``: one sign and nothing else.
        max_tokens: Of one verdict.

    Raises:
        UserError: The generator cannot be held to a schema, and the form is ``json``.
    """

    generator: Generator
    prompts: JudgePrompts = field(default_factory=JudgePrompts.read)
    _: KW_ONLY
    rubric: Rubric | None = None
    form: Form = "json"
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if self.form == "json" and not self.generator.keeps_schemas:
            raise UserError(
                'verdicts as JSON need llguidance: pip install "weft[constrain]", or take the form "letter".'
            )

    def compare(self, pairs: Sequence[Pair], on_verdict: Callable[[], object] | None = None) -> list[Compared]:
        """Compare the two answers of each pair in both orders.

        Args:
            pairs: What is compared.
            on_verdict: Is called whenever a verdict has come or failed.

        Raises:
            UserError: A prompt cannot be rendered.
            GeneratorError: The judge cannot be asked now.
        """
        found = self._ask(self.comparison_requests(pairs), on_verdict)
        judged = []
        for pair, one, other in zip(pairs, found[::2], found[1::2], strict=True):
            read = [self._verdict(outcome) for outcome in (one, other)]
            (first, said, wrong), (second, said_too, wrong_too) = read
            judged.append(Compared(pair, (first, second), (said, said_too), (wrong, wrong_too)))
        return judged

    def comparison_requests(self, pairs: Sequence[Pair]) -> list[GeneratorRequest]:
        """What is asked of pairs: of each with A first, then with B first, so that a budget ends between pairs.

        Raises:
            UserError: A prompt cannot be rendered.
        """
        criteria = [] if self.rubric is None else self.rubric.listed()
        schema = comparison_schema() if self.form == "json" else None
        asked = []
        for pair in pairs:
            for first, second in ((pair.a, pair.b), (pair.b, pair.a)):
                variables = {"question": pair.question, "reference": pair.reference, "first": first, "second": second,
                             "criteria": criteria, "form": self.form}  # fmt: skip
                asked.append(self._request(self.prompts.render("compare", variables), schema))
        return asked

    def score(self, pairs: Sequence[Pair], on_verdict: Callable[[], object] | None = None) -> list[Scored]:
        """Score the answer A of each pair by the rubric.

        Args:
            pairs: What is scored.
            on_verdict: As in ``compare``.

        Raises:
            UserError: There is no rubric, or a prompt cannot be rendered.
            GeneratorError: The judge cannot be asked now.
        """
        rubric = self._rubric()
        outcomes = self._ask(self.score_requests(pairs), on_verdict)
        parts = self._parts(rubric)
        judged = []
        for place, pair in enumerate(pairs):
            own = outcomes[place * len(parts) : (place + 1) * len(parts)]
            scores: dict[str, int] = {}
            wrong = ""
            for names, outcome in zip(parts, own, strict=True):
                read = None if isinstance(outcome, Failure) else read_scores(outcome.text, self.form, rubric, names)
                scores |= read or {}
                if read is None:
                    wrong = wrong or (outcome.kind if isinstance(outcome, Failure) else "unparsed")
            said = "\n".join(_said(outcome) for outcome in own)
            judged.append(Scored(pair, None if wrong else scores, said, wrong))
        return judged

    def score_requests(self, pairs: Sequence[Pair]) -> list[GeneratorRequest]:
        """What is asked to score pairs: one request for each, in the letter form one for each criterion.

        Raises:
            UserError: There is no rubric, or a prompt cannot be rendered.
        """
        rubric = self._rubric()
        schema = score_schema(rubric) if self.form == "json" else None
        asked = []
        for pair in pairs:
            for names in self._parts(rubric):
                variables = {"question": pair.question, "reference": pair.reference, "answer": pair.a,
                             "criteria": [one for one in rubric.listed() if one["name"] in names],
                             "scale": list(rubric.scale), "form": self.form}  # fmt: skip
                asked.append(self._request(self.prompts.render("score", variables), schema))
        return asked

    def estimate(self, requests: Sequence[GeneratorRequest]) -> Estimate:
        """What requests will cost at most; asks nobody."""
        return self.generator.estimate(requests)

    def _rubric(self) -> Rubric:
        if self.rubric is None:
            raise UserError("a judge that scores needs a rubric: a scale, and criteria with a sentence each.")
        return self.rubric

    def _parts(self, rubric: Rubric) -> list[list[str]]:
        """The criteria that are scored together."""
        return [list(rubric.criteria)] if self.form == "json" else [[name] for name in rubric.criteria]

    def _request(self, prompt: str, schema: dict[str, object] | None) -> GeneratorRequest:
        # A sign alone may stand before a limit that the model would not have kept.
        limit = self.max_tokens if schema is not None else min(self.max_tokens, 16)
        return GeneratorRequest(prompt, max_tokens=limit, schema=schema, keep_cut=schema is None)

    def _ask(self, requests: Sequence[GeneratorRequest], on_verdict: Callable[[], object] | None) -> list[Outcome]:
        def hear(place: int, sample: int, outcome: Outcome) -> None:
            if on_verdict is not None:
                on_verdict()

        return [row[0] for row in self.generator.generate_all(requests, on_result=hear)]

    def _verdict(self, outcome: Outcome) -> tuple[Place | None, str, str]:
        """The verdict, what was said, and what is wrong."""
        if isinstance(outcome, Failure):
            return None, outcome.message, outcome.kind
        place = read_comparison(outcome.text, self.form)
        return place, outcome.text, "" if place is not None else "unparsed"


def _said(outcome: Outcome) -> str:
    return outcome.message if isinstance(outcome, Failure) else outcome.text
