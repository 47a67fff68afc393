"""The search for an instruction, as APE does it (Zhou et al. 2023, arXiv 2211.01910): propose, score, keep the best.

The base proposes: it reads some questions with their answers and writes what was asked for. Instructions of ours, in
English and Chinese, stand beside its own, for a small base proposes little of use. Each is scored on exercises that are
neither shown nor evaluated. Having no instruction takes part, so that the search never does worse there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from weft.assets import ROOT
from weft.data.rendering.sandbox import render_template
from weft.errors import UserError
from weft.evaluate.baselines.wanted import PROPOSALS
from weft.evaluate.entrants import Entrant
from weft.evaluate.running import EvaluationSettings, evaluate_entrants
from weft.evaluate.tasks import Exercise, Frame, Task
from weft.foreign import read_text
from weft.generation.limits import limits_for
from weft.generation.request import Request
from weft.generation.sampling import Sampling
from weft.generation.target import Target
from weft.ops.seeds import stable_seed

_FOLDER = ROOT / "prompts"
_LONGEST = 400  # characters of an instruction


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How an instruction is looked for.

    Attributes:
        proposals: how many the base writes.
        shown: questions that it reads for each.
        held_out: exercises on which each instruction is scored.
        seed: of what is drawn.
        instructions: a file with instructions of the user's own, one in a line, in place of ours.
    """

    proposals: int = PROPOSALS
    shown: int = 4
    held_out: int = 48
    seed: int = 0
    instructions: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Searched:
    """What the search found.

    Attributes:
        instruction: the best one; "": having none is best.
        tried: every instruction with its score on the held-out exercises, the best first.
        tokens: that the search read and wrote.
    """

    instruction: str
    tried: Sequence[tuple[str, float]]
    metric: str
    tokens: int

    def entries(self) -> dict[str, object]:
        """It as JSON holds it."""
        tried = [{"instruction": text, self.metric: score} for text, score in self.tried]
        return {"instruction": self.instruction, "tried": tried, "tokens": self.tokens}


def searched(
    target: Target,
    task: Task,
    pool: Sequence[Exercise],
    settings: SearchSettings = SearchSettings(),
    *,
    on_note: Callable[[str], None] = lambda note: None,
) -> Searched:
    """The instruction with the best first metric of ``task`` on exercises of ``pool``; of equal ones the shortest.

    Raises:
        UserError: There are too few exercises beside those that are evaluated, or the base cannot be asked.
    """
    asked = {one.prompts for one in task.exercises}
    free = [one for one in pool if one.prompts not in asked]
    if len(free) < settings.shown + 2:
        raise UserError(
            f"--prompting search: task {task.name} has {len(free)} examples beside its questions; "
            f"{settings.shown + 2} are needed. Give more with --fewshot-data."
        )
    random.Random(stable_seed(settings.seed, task.name, "search")).shuffle(free)
    held, shown = free[: settings.held_out], free[settings.held_out :]
    if len(shown) < settings.shown:
        held, shown = free[settings.shown :], free[: settings.shown]
    proposed, tokens = _proposals(target, task, shown, settings)
    candidates = list(dict.fromkeys(["", *_given(settings), *proposed]))
    entrants = [
        Entrant(text or "no instruction", None, "prompt", frame=_With(text)) for text in candidates
    ]
    beside = replace(task, exercises=_numbered(held))
    found = evaluate_entrants(target, entrants, [beside], EvaluationSettings(seed=settings.seed))
    entry, metric = task.metrics[0]
    by_name = {one.contestant: one.value for one in found.scores if one.metric == entry.called}
    scored = [(text, by_name[text or "no instruction"]) for text in candidates]
    scored.sort(key=lambda pair: (-pair[1] if metric.higher_is_better else pair[1], len(pair[0])))
    tokens += sum(item.prompt_tokens + item.answer_tokens for item in found.items)
    best = scored[0][0]
    on_note(
        f"task {task.name}: of {len(candidates)} instructions, scored on {len(held)} other questions, the best is "
        + (f"{best!r}" if best else "none at all")
    )
    return Searched(instruction=best, tried=scored, metric=entry.called, tokens=tokens)


@dataclass(frozen=True)
class _With:
    instruction: str

    def __call__(self, task: Task, exercise: Exercise) -> Frame:
        return replace(task.frame(exercise), instruction=self.instruction or exercise.instruction)


def _numbered(exercises: Sequence[Exercise]) -> list[Exercise]:
    """Exercises of several files may have the same item."""
    return [replace(one, item=str(number)) for number, one in enumerate(exercises)]


def _given(settings: SearchSettings) -> list[str]:
    path = settings.instructions or _FOLDER / "instructions.txt"
    lines = [line.strip() for line in read_text(path).splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise UserError(f"{path} holds no instruction; write one in each line.")
    return found


def _proposals(
    target: Target, task: Task, shown: Sequence[Exercise], settings: SearchSettings
) -> tuple[list[str], int]:
    """What the base takes for the instruction behind some answers, and the tokens that it read and wrote."""
    template, rng = read_text(_FOLDER / "propose.jinja"), random.Random(settings.seed)
    requests = []
    for number in range(settings.proposals):
        pairs = [(one.prompts[0], one.answer) for one in rng.sample(shown, settings.shown)]
        text = render_template(template, {"pairs": pairs})
        prompt = target.prompt(text, raw=not task.settings.chat)
        drawn = Sampling(temperature=1.0, seed=stable_seed(settings.seed, task.name, number))
        room = target.room(len(prompt.ids), None, 48, what="the search's prompt", clip=True)
        requests.append(Request(prompt.ids, None, room, sampling=drawn, slots=prompt.slots, stop=("\n",)))
    with target.engine(limits_for(target.adapters, requests, 64)) as engine:
        done = engine.generate(requests)
    said = [one.text.strip().strip("\"'“”「」").strip()[:_LONGEST] for one in done]
    return [one for one in said if one], sum(one.prompt_tokens + len(one.ids) for one in done)
