"""``weft judge``: which of two sets of answers is better, or what answers are worth, as a model says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import common, early, options
from weft.errors import UserError, check_word
from weft.paths import local_path

if TYPE_CHECKING:
    from weft.evaluate.judge.judging import Judge, Pair
    from weft.evaluate.judge.opening import JudgePlace
    from weft.evaluate.judge.prompts import JudgePrompts
    from weft.evaluate.judge.rubric import Rubric
    from weft.evaluate.judge.sides import Side
    from weft.generators.generator import Generator
    from weft.generators.request import GeneratorRequest

_ANSWERS = "RESULTS[#NAME]|FILE.jsonl[#NAME]"
_A = Annotated[
    str | None,
    typer.Argument(
        metavar=f"A: {_ANSWERS}",
        help="Answers that are judged: a folder of `weft eval`, or a file of `weft generate --output`; #NAME is the "
        "contestant, or the adapter, where there are several.",
        show_default=False,
    ),
]
_B = Annotated[
    str | None, typer.Argument(metavar="[B]", help="The answers that A is compared with.", show_default=False)
]


def _file(metavar: str, text: str) -> Any:
    return typer.Option(metavar=metavar, parser=local_path, help=text)


_Judge = Annotated[
    str | None,
    typer.Option(
        "--judge",
        metavar="URL#MODEL|TARGET[#ADAPTER]",
        help="Who judges: a model behind an OpenAI-compatible address (http://127.0.0.1:8000/v1#NAME), or a run, an "
        "adapter or a model on this machine.",
    ),
]
_Output = Annotated[
    Path | None, _file("FOLDER", "Where verdicts, figures and the ledger go; the same command goes on there.")
]
_Prompts = Annotated[
    Path | None, _file("FILE.jsonl", "The questions, if the answers hold none: item (or index), prompt, reference.")
]
_Rubric = Annotated[Path | None, _file("FILE.yaml", "Criteria with a sentence each, and a scale.")]
_Score = Annotated[bool, typer.Option("--score", help="Score every answer by the rubric instead of comparing.")]
_Human = Annotated[Path | None, _file("FILE.jsonl", "What people say: item, and label A, B or tie.")]
_Form = Annotated[str, typer.Option(help="json: verdicts with a reason, held to a schema. letter: one sign alone.")]
_Language = Annotated[str, typer.Option(help="en or zh: of the judge's prompts.")]
_Templates = Annotated[Path | None, _file("FOLDER", "Prompts of your own, as --copy-templates writes them.")]
_Copy = Annotated[Path | None, _file("FOLDER", "Write our prompts there, to be changed, and leave.")]
_KeyEnv = Annotated[str | None, typer.Option(metavar="NAME", help="Environment variable that holds the server's key.")]
_KeyFile = Annotated[Path | None, _file("FILE", "File that holds the server's key, and nothing else.")]
_Money = Annotated[float | None, typer.Option(help="The most that judging may cost, in the currency of the prices.")]
_Tokens = Annotated[int | None, typer.Option(help="The most tokens, of prompts and answers together.")]
_Requests = Annotated[int | None, typer.Option(help="The most requests that go out.")]
_Seconds = Annotated[float | None, typer.Option(help="The longest time of this call.")]
_PricePrompt = Annotated[float, typer.Option(help="Price of a million tokens of prompts.")]
_PriceAnswer = Annotated[float, typer.Option(help="Price of a million tokens of answers.")]
_Concurrency = Annotated[int, typer.Option(min=1, help="Requests that are on their way at once.")]
_Timeout = Annotated[float, typer.Option(help="Seconds for one request.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would cost at most, and ask nobody.")]


def judge(
    context: typer.Context,
    a: _A = None,
    b: _B = None,
    judge: _Judge = None,
    output: _Output = None,
    prompts: _Prompts = None,
    rubric: _Rubric = None,
    score: _Score = False,
    human: _Human = None,
    form: _Form = "json",
    language: _Language = "en",
    templates: _Templates = None,
    copy_templates: _Copy = None,
    api_key_env: _KeyEnv = None,
    api_key_file: _KeyFile = None,
    max_money: _Money = None,
    max_tokens: _Tokens = None,
    max_requests: _Requests = None,
    max_seconds: _Seconds = None,
    price_prompt: _PricePrompt = 0.0,
    price_answer: _PriceAnswer = 0.0,
    concurrency: _Concurrency = 16,
    timeout: _Timeout = 120.0,
    dry_run: _DryRun = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> int:
    """Let a model compare two sets of answers in both orders, or score them; its biases are measured and printed.

    weft judge runs/a/eval#lora runs/a/eval#base --judge http://127.0.0.1:8000/v1#qwen --output judged
    """
    given = context.params
    if copy_templates is not None:
        from weft.evaluate.judge.prompts import copy_prompts

        common.say(f"{', '.join(copy_prompts(copy_templates))} -> {copy_templates}")
        return common.DONE
    _check_words(given)
    early.refuse(lambda: _Asked.of(given).place.try_opening())
    asked = _Asked.of(given)
    with asked.place.opened(asked.ledger()) as generator:
        for note in generator.ledger.notes:
            common.say(note)
        made = asked.judge(generator)
        if dry_run:
            return _tell_estimate(made, asked, as_json)
        try:
            return _judge(made, asked, as_json)
        except KeyboardInterrupt:
            kept = f"{len(generator.ledger):,} verdicts are in {generator.ledger.path}"
            common.say(f"interrupted: {kept}; the same command goes on.")
            return common.INTERRUPTED


def _check_words(given: Mapping[str, Any]) -> None:
    """Refuse what the options themselves show."""
    check_word("--form", given["form"], ("json", "letter"))
    if given["a"] is None:
        raise UserError("give the answers that are to be judged: A, and B to compare it with. See weft judge --help.")
    if given["judge"] is None:
        raise UserError("--judge says who judges: URL#MODEL of a server, or a target on this machine.")
    if given["output"] is None and not given["dry_run"]:
        raise UserError("--output FOLDER is missing: verdicts that are paid for are kept there.")
    if given["score"] and given["rubric"] is None:
        raise UserError("--score needs --rubric FILE.yaml: criteria with a sentence each, and a scale.")
    if given["b"] is None and not given["score"]:
        raise UserError("give B to compare A with, or --score with --rubric to score A alone.")
    if given["human"] is not None and given["score"]:
        raise UserError("--human labels which of two answers is better; it does nothing with --score. Leave it out.")


@dataclass(frozen=True)
class _Asked:
    """All that a command asks, read and checked."""

    sides: tuple[Side, ...]
    pairs: list[Pair]
    place: JudgePlace
    _: KW_ONLY
    prompts: JudgePrompts
    rubric: Rubric | None
    given: Mapping[str, Any]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> _Asked:
        """Read the answers and all else but the judge.

        Raises:
            UserError: Something cannot be used.
        """
        from weft.evaluate.judge.opening import JudgePlace
        from weft.evaluate.judge.prompts import JudgePrompts
        from weft.evaluate.judge.report import check_folder
        from weft.evaluate.judge.rubric import Rubric
        from weft.evaluate.judge.sides import pairs_of, read_labels, read_prompts, read_side
        from weft.generators.budget import Budget, Price
        from weft.generators.server import Patience

        limits = {name: given[f"max_{name}"] for name in ("money", "tokens", "requests", "seconds")}
        place = JudgePlace(
            said=given["judge"],
            key_env=given["api_key_env"],
            key_file=given["api_key_file"],
            budget=Budget(**limits),
            price=Price(prompt=given["price_prompt"], answer=given["price_answer"]),
            patience=Patience(concurrency=given["concurrency"], timeout=given["timeout"]),
            device=given["device"],
        )
        if limits["money"] is not None and not (place.price.prompt or place.price.answer):
            raise UserError("--max-money needs a price: --price-prompt and --price-answer, for a million tokens each.")
        sides = tuple(read_side(one) for one in (given["a"], given["b"]) if one is not None)
        known = None if given["prompts"] is None else read_prompts(given["prompts"])
        pairs = pairs_of(sides[0], sides[1] if len(sides) > 1 else None, known)
        if given["human"] is not None:
            read_labels(given["human"], [pair.item for pair in pairs])
        place.check()
        rubric = None if given["rubric"] is None else Rubric.read(given["rubric"])
        own = JudgePrompts.read(given["language"], given["templates"])
        made = cls(sides, pairs, place, prompts=own, rubric=rubric, given=given)
        if given["output"] is not None:
            check_folder(given["output"], made.recorded())
        return made

    def recorded(self) -> dict[str, object]:
        """What makes this judging another one."""
        told = {name: self.given[name] for name in ("judge", "form", "language", "score")}
        for name in ("rubric", "prompts", "templates"):
            told[name] = None if self.given[name] is None else str(self.given[name])
        answers = {letter: [side.said, side.digest] for letter, side in zip("ab", self.sides, strict=False)}
        return {**answers, **told}

    @property
    def names(self) -> tuple[str, str]:
        """Of A and B, and no two the same."""
        one, other = (side.name for side in self.sides[:2])
        return (one, other) if one != other else (self.sides[0].said, self.sides[1].said)

    def ledger(self) -> Path | None:
        """Where the ledger is; a dry run begins none."""
        from weft.evaluate.judge.report import LEDGER

        if self.given["output"] is None:
            return None
        path: Path = self.given["output"] / LEDGER
        return None if self.given["dry_run"] and not path.exists() else path

    def judge(self, generator: Generator) -> Judge:
        """The judge that this generator is."""
        from weft.evaluate.judge.judging import Judge

        return Judge(generator, self.prompts, rubric=self.rubric, form=self.given["form"])

    def scored(self) -> dict[str, list[Pair]]:
        """Whose answers are scored: those of A, and those of B in A's place."""
        from dataclasses import replace

        if len(self.sides) == 1:
            return {self.sides[0].name: self.pairs}
        return {self.names[0]: self.pairs, self.names[1]: [replace(pair, a=pair.b) for pair in self.pairs]}

    def requests(self, made: Judge) -> list[GeneratorRequest]:
        """All that the judge is asked."""
        if not self.given["score"]:
            return made.comparison_requests(self.pairs)
        return [one for pairs in self.scored().values() for one in made.score_requests(pairs)]


def _tell_estimate(made: Judge, asked: _Asked, as_json: bool) -> int:
    """Say what judging will cost at most."""
    found = made.estimate(asked.requests(made))
    if as_json:
        common.print_json(vars(found))
    else:
        print(f"{found.answers:,} verdicts, of which {found.cached:,} are in the ledger; for the others at most "
              f"{found.prompt_tokens:,} tokens of prompts and {found.answer_tokens:,} of answers, "
              f"{found.money:,.4g} at the prices given")  # fmt: skip
    return common.DONE


def _judge(made: Judge, asked: _Asked, as_json: bool) -> int:
    from weft.cli.answer_progress import make_progress
    from weft.evaluate.judge.report import costs

    for side in asked.sides:
        if empty := sum(not one.text.strip() for one in side.answers.values()):
            common.say(f"{side.said}: {empty:,} of {len(side.answers):,} answers are empty; they are judged as such")
    before = made.estimate(asked.requests(made))
    cached, wanted = before.cached, before.answers
    if cached:
        common.say(f"{cached:,} of {wanted:,} verdicts are in {made.generator.ledger.path} already")
    progress = make_progress(wanted, 0, lambda: made.generator.account.spent.tokens)
    with progress if wanted > 1 else nullcontext():
        lines, entries = (_score if asked.given["score"] else _compare)(made, asked, progress.advance)
    spent = costs(made.generator, cached)
    lines.append(f"  cost: {spent['requests']:,} requests, {spent['tokens']:,} tokens, {spent['money']:,.4g}")
    if as_json:
        common.print_json({**entries, "cost": spent, "output": str(asked.given["output"])})
    else:
        print("\n".join(lines))
        common.say(f"verdicts, figures and the ledger -> {asked.given['output']}")
    return common.DONE


def _facts(made: Judge, asked: _Asked) -> dict[str, object]:
    from weft.evaluate.judge.report import costs

    return {"asked": asked.recorded(), "judge": made.generator.said, "model": asked.place.model,
            "cost": costs(made.generator, 0)}  # fmt: skip


def _compare(made: Judge, asked: _Asked, advance: Any) -> tuple[list[str], dict[str, object]]:
    from weft.evaluate.judge.figures import compare_figures
    from weft.evaluate.judge.report import comparison_lines, comparison_record
    from weft.evaluate.judge.sides import read_labels

    judged = made.compare(asked.pairs, advance)
    human = asked.given["human"]
    labels = None if human is None else read_labels(human, [pair.item for pair in asked.pairs])
    models = [side.model for side in asked.sides]
    own = next((letter for letter, model in zip("ab", models, strict=True) if model == asked.place.model), None)
    found = compare_figures(judged, labels=labels, own=own)  # type: ignore[arg-type]
    comparison_record(judged, found, asked.names, _facts(made, asked)).write(asked.given["output"])
    _tell_unasked(found.unasked, found.items)
    return comparison_lines(found, asked.names), {"a": asked.names[0], "b": asked.names[1], **found.entries()}


def _score(made: Judge, asked: _Asked, advance: Any) -> tuple[list[str], dict[str, object]]:
    from weft.evaluate.judge.report import score_lines, score_record

    scored = {name: made.score(pairs, advance) for name, pairs in asked.scored().items()}
    lost = Counter({name: sum(one.scores is None for one in rows) for name, rows in scored.items()})
    assert made.rubric is not None
    record, rates = score_record(scored, made.rubric, _facts(made, asked))
    record.write(asked.given["output"])
    unasked = sum(one.failure == "budget" for rows in scored.values() for one in rows)
    _tell_unasked(unasked, sum(map(len, scored.values())))
    told = {name: {key: rate.entries() for key, rate in own.items()} for name, own in rates.items()}
    return score_lines(rates, lost), {"scores": told, "unscored": dict(lost)}


def _tell_unasked(unasked: int, total: int) -> None:
    if unasked:
        common.say(
            f"the budget is used up: {unasked:,} of {total:,} are not judged, and the figures are of the others. The "
            "same command with a larger budget goes on."
        )
