"""lm_eval's tasks on Weft's engine: all contestants answer each request together, and lm_eval scores each.

Its tasks, prompts, extraction of answers and figures are its own; only what a model computes is ours. lm_eval is an
optional library (``pip install "weft[harness]"``). Its tasks name data sets of Hugging Face's hub, which it downloads.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from weft.errors import UserError, nearest
from weft.evaluate.results import Contestant, Item, Results, Score, TaskKind, TaskRecord
from weft.evaluate.together import Together
from weft.generation.target import BASE, Target
from weft.objectives.passes import EVALUATION_TOKENS

_KINDS: dict[str, TaskKind] = {"multiple_choice": "multiple_choice", "generate_until": "generation"}
_SHOWN = 400  # characters of a prompt's end
_FEWSHOT_SEED = 1234  # lm_eval's


@dataclass(frozen=True, kw_only=True)
class HarnessSettings:
    """How lm_eval asks.

    Attributes:
        num_fewshot: examples before each question; None: as each task says. A task that says 0 keeps it, as in lm_eval.
        limit: items of each task, or a share of them below 1; None: all.
        chat_template: whether prompts go through the target's chat template.
        multiturn: whether examples are then turns of the conversation, and not one message.
        system: a message before all.
        bootstrap: samples for the standard errors of figures that have no formula.
        include: a folder with task files of the user's own. They may name Python functions, which then run.
    """

    num_fewshot: int | None = None
    limit: float | None = None
    chat_template: bool = False
    multiturn: bool = True
    system: str | None = None
    bootstrap: int = 1000
    include: Path | None = None


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks that were found, before data or a model is loaded."""

    names: Sequence[str | dict[str, Any]]
    settings: HarnessSettings
    _: KW_ONLY
    manager: Any

    def load(self) -> dict[str, Any]:
        """The tasks with their data, as lm_eval's ``TaskManager.load`` gives them.

        Raises:
            UserError: lm_eval cannot load one.
        """
        try:
            loaded: dict[str, Any] = self.manager.load(list(self.names))
        except Exception as error:  # of data sets, YAML files and the hub: each has its own
            shown = ", ".join(one if isinstance(one, str) else str(one.get("task")) for one in self.names)
            raise UserError(
                f"lm_eval cannot load {shown}: {type(error).__name__}: {error}. Its tasks read data sets of the hub; "
                "offline, write a task file with dataset_path: json and data_files, and name its folder."
            ) from error
        for task in loaded["tasks"].values():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(
                    f"task {task.config.task} runs code that the model writes. Weft runs none; leave it out."
                )
            wanted, own = self.settings.num_fewshot, task.get_config("num_fewshot")
            if own is None or (wanted is not None and own != 0):
                task.set_config(key="num_fewshot", value=wanted or 0)
        return loaded


def find_tasks(names: Sequence[str | dict[str, Any]], settings: HarnessSettings = HarnessSettings()) -> HarnessTasks:
    """lm_eval's tasks and groups of these names (or configurations, as its files hold them).

    Raises:
        UserError: lm_eval is not installed, or it has no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f'--harness needs lm_eval ({error.name} is missing): pip install "weft[harness]".') from None
    if settings.include is not None and not settings.include.is_dir():
        raise UserError(f"{settings.include} is no folder; name the one with your task files (*.yaml).")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every setting that was asked for
    by_name = [name for name in names if isinstance(name, str)]
    include = None if settings.include is None else str(settings.include)
    # The index of its own tasks takes seconds, and only names ask for it.
    manager = TaskManager(include_path=include) if by_name else TaskManager(include_defaults=False)
    if not hasattr(manager, "load"):
        raise UserError('--harness needs lm_eval 0.4.13 or newer: pip install --upgrade "weft[harness]".')
    for name in by_name:
        if name not in manager.task_index and not Path(name).is_file():
            raise UserError(f"lm_eval has no task {name!r}.{nearest(name, manager.all_tasks)}")
    if not names:
        raise UserError("no task is named; `lm_eval ls tasks` lists those of lm_eval.")
    return HarnessTasks(names, settings, manager=manager)


def run_harness(
    target: Target,
    names: Sequence[str | None],
    tasks: HarnessTasks,
    *,
    answers: Path | None = None,
    max_tokens: int = EVALUATION_TOKENS,
    max_rows: int = 64,
    on_progress: Callable[[str, int, int], None] = lambda kind, done, total: None,
) -> Results:
    """Evaluate adapters of a target, and its base (None), on lm_eval's tasks.

    Args:
        answers: A folder where answers are kept, a file for each contestant, from which a later run takes them.
        max_tokens: Rows of a pass.
        max_rows: Answers that are written at once.
        on_progress: Hears, of each kind of request, how many answers there are and how many there will be.

    Raises:
        UserError: A task cannot be loaded, or the target cannot answer it.
    """
    from lm_eval.evaluator import evaluate

    from weft.evaluate.harness_model import WeftLM, without_bars

    together = Together(
        target, names, folder=answers, max_tokens=max_tokens, max_rows=max_rows, on_progress=on_progress
    )
    if tasks.settings.chat_template:
        together.chat([{"role": "user", "content": "?"}])  # refused before any data is loaded
    loaded, settings = tasks.load(), tasks.settings
    found: dict[str | None, dict[str, Any]] = {}
    for name in together.names:
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)  # every contestant gets the same examples
        with without_bars():
            found[name] = evaluate(
                lm=WeftLM(together, name), task_dict=loaded, limit=settings.limit, bootstrap_iters=settings.bootstrap,
                system_instruction=settings.system, apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.multiturn,
            )  # fmt: skip
    return _results(target, together, settings, found, loaded["tasks"])


def _results(
    target: Target,
    together: Together,
    settings: HarnessSettings,
    found: Mapping[str | None, Mapping[str, Any]],
    tasks: Mapping[str, Any],
) -> Results:
    import lm_eval

    contestants = [
        Contestant(
            name=name or BASE,
            kind="base" if name is None else "adapter",
            facts={"mark": together.marks[name], "cut_contexts": together.cut[name]},
        )
        for name in together.names
    ]
    items = [
        item
        for name, one in found.items()
        for task, samples in one["samples"].items()
        for item in _items(together, name, samples, tasks[task])
    ]
    scores = [
        score
        for name, one in found.items()
        for task in tasks
        for score in _scores(name or BASE, task, one["results"][task])
    ]
    first = next(iter(found.values()))
    groups = {name or BASE: _plain(one.get("groups", {})) for name, one in found.items()}
    facts = {
        "base": target.base.name,
        "lm_eval": lm_eval.__version__,
        "chat_template": settings.chat_template,
        "system": settings.system,
        "limit": settings.limit,
        **({"groups": groups} if any(groups.values()) else {}),
    }
    records = [_record(name, task, first, settings) for name, task in tasks.items()]
    return Results(contestants=contestants, tasks=records, items=items, scores=scores, facts=facts)


def _record(name: str, task: Any, found: Mapping[str, Any], settings: HarnessSettings) -> TaskRecord:
    metric, filters = next(iter(task.config.metric_list or [{"metric": "acc"}]))["metric"], _filters(task)
    facts = {
        "by": "lm_eval",
        "version": found["versions"].get(name),
        "num_fewshot": found["n-shot"].get(name),
        "output_type": task.OUTPUT_TYPE,
        "chat_template": settings.chat_template,
        "config": _plain(found["configs"].get(name, {})),
    }
    return TaskRecord(
        name=name,
        kind=_KINDS.get(task.OUTPUT_TYPE, "perplexity"),
        metric=_metric(metric, filters[0], filters),
        higher_is_better=bool(task.higher_is_better().get(metric, True)),
        facts=facts,
    )


def _items(together: Together, name: str | None, samples: Sequence[Mapping[str, Any]], task: Any) -> Iterator[Item]:
    """An item for each document; where a task extracts answers in several ways, with the scores of each."""
    filters, aggregations = _filters(task), task.aggregation()
    by_document: dict[Any, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_document.setdefault(sample["doc_id"], []).append(sample)
    for number, several in by_document.items():
        scores: dict[str, float] = {}
        for sample in several:
            for metric in sample["metrics"]:
                value = _value(sample[metric], aggregations.get(metric))
                if value is not None:
                    scores[_metric(metric, sample["filter"], filters)] = value
        first = several[0]
        read, written = together.cost(name, first["arguments"])
        yield Item(
            contestant=name or BASE,
            task=task.config.task,
            item=str(number),
            scores=scores,
            output=_shown(first["resps"] if task.OUTPUT_TYPE == "generate_until" else first["filtered_resps"]),
            reference=_shown(first["target"]),
            asked=str(first["arguments"][0][0])[-_SHOWN:],
            prompt_tokens=read,
            answer_tokens=written,
        )


def _value(found: object, aggregation: Callable[[list[object]], object] | None) -> float | None:
    """The value of one item alone: a number, or what the figure would be over this item only; None: neither is one."""
    if isinstance(found, (bool, int, float)):
        return float(found)
    try:
        value = aggregation([found]) if aggregation is not None else None
    except (ArithmeticError, IndexError, TypeError, ValueError):
        return None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _scores(contestant: str, task: str, figures: Mapping[str, Any]) -> Iterator[Score]:
    kept = {key: value for key, value in figures.items() if "," in key and isinstance(value, (int, float))}
    filters = list(dict.fromkeys(key.partition(",")[2] for key in kept))
    for key, value in kept.items():
        metric, _, how = key.partition(",")
        if metric.endswith("_stderr"):
            continue
        error = figures.get(f"{metric}_stderr,{how}")
        stderr = float(error) if isinstance(error, (int, float)) and math.isfinite(error) else None
        n = int(figures.get("sample_len", 0))
        name = _metric(metric, how, filters)
        yield Score(contestant=contestant, task=task, metric=name, value=float(value), stderr=stderr, n=n)


def _filters(task: Any) -> list[str]:
    return [one.name for one in getattr(task, "_filters", [])] or ["none"]


def _metric(metric: str, how: str, filters: Sequence[str]) -> str:
    """A figure's name, with the way of extraction where a task has several."""
    return metric if len(filters) < 2 else f"{metric},{how}"


def _shown(value: object) -> str:
    while isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _plain(value: Any) -> Any:
    """What JSON can hold: functions and other objects of a task's configuration become their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
