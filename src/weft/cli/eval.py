"""``weft eval``: the base and all adapters of a target answer tasks together, and every answer is scored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import common, early, options
from weft.cli.figures import ANSWERS, Progress, tell
from weft.errors import UserError, check_word
from weft.paths import local_path

if TYPE_CHECKING:
    from weft.evaluate.entrants import Entrant
    from weft.evaluate.tasks import Named, Task
    from weft.generation.target import Target

_NOT_IN_NAMES = r"[^\w.+-]+"
_EVALUATION = "evaluation"  # in the folder of a run

_Tasks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TASK|FILE.yaml[=DATA],…",
        help="What is asked: built-in tasks and files of your own, with commas between them; behind = where the data "
        "lies. May be repeated.",
    ),
]
_Harness = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TASK,…",
        help="Tasks of lm_eval instead, by its names or files: its prompts and figures, our engine. It needs "
        "weft[harness].",
    ),
]
_Data = Annotated[str | None, typer.Option(metavar="FILE|FOLDER|ZIP", help="Data of the one task that names none.")]
_FewShotData = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[TASK=]FILE|FOLDER|same", help="Where examples come from, instead of where the task says; repeatable."
    ),
]
_Output = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        parser=local_path,
        help="Write results here; the same command goes on with what is there. Of a run: RUN/evaluation/TASKS.",
    ),
]
_Adapters = Annotated[
    list[str] | None,
    typer.Option(help="Who answers; may be repeated. 'base' is the base. Default: the base and all adapters."),
]
_Limit = Annotated[int | None, typer.Option(min=1, help="Items of each task; of groups, such as subjects, in turn.")]
_FewShot = Annotated[int | None, typer.Option(min=0, help="Examples before each question, instead of the task's.")]
_Chat = Annotated[
    bool | None,
    typer.Option(
        "--apply-chat-template/--no-apply-chat-template",
        help="Whether questions go through the chat template, instead of what the task says.",
    ),
]
_MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer, instead of the task's.")]
_Rows = Annotated[int, typer.Option(min=1, help="Answers that are written at once.")]
_PassTokens = Annotated[int, typer.Option(min=1, help="Tokens of a pass that scores choices or texts.")]
_Quantization = Annotated[
    str | None, typer.Option(help="nf4, fp4 or int8: how the base is kept, if otherwise than before.")
]
_Prompting = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HOW",
        help="The base once more, asked otherwise: first:K, random:K or similar:K examples, instruction:TEXT, or "
        "search:K (the base proposes K instructions; the best one on other questions is taken). Repeatable.",
    ),
]
_Seed = Annotated[int, typer.Option(help="Seed of examples that are drawn, and of bootstraps.")]


def eval(
    target: options.Target,
    tasks: _Tasks = None,
    harness: _Harness = None,
    data: _Data = None,
    fewshot_data: _FewShotData = None,
    output: _Output = None,
    adapter: _Adapters = None,
    limit: _Limit = None,
    num_fewshot: _FewShot = None,
    apply_chat_template: _Chat = None,
    prompting: _Prompting = None,
    chat_template: options.ChatTemplate = None,
    max_new_tokens: _MaxNewTokens = None,
    batch_size: _Rows = 64,
    pass_tokens: _PassTokens = 4096,
    model: options.Model = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantization: _Quantization = None,
    seed: _Seed = 0,
    as_json: options.Json = False,
) -> int:
    """Let the base and every adapter answer tasks in the same passes, and score them, with standard errors.

    What was answered is kept in the folder of the results and never computed again.

    weft eval runs/weft --tasks embedded,my_task.yaml
    """
    if quantization is not None:
        check_word("--quantization", quantization, ("nf4", "fp4", "int8"))
    if bool(tasks) == bool(harness):
        raise UserError("say what is asked: either --tasks TASK,… (docs/evaluation.md) or --harness TASK,… of lm_eval.")
    words = [word for one in tasks or harness or () for word in one.split(",") if word]
    changes: dict[str, Any] = {"apply_chat_template": apply_chat_template, "max_new_tokens": max_new_tokens}
    how: dict[str, Any] = {"model": model, "device": device, "dtype": dtype, "quantization": quantization}
    if harness:
        from weft.cli.harness import evaluate_harness

        idle = {"data": data, "fewshot-data": fewshot_data, "prompting": prompting, "max-new-tokens": max_new_tokens}
        asked = {"num_fewshot": num_fewshot, "limit": limit, "chat_template": bool(apply_chat_template)}
        sizes = {"max_rows": batch_size, "max_tokens": pass_tokens}
        opening = how | {"chat_template": chat_template, "adapters": adapter}
        return evaluate_harness(target, words, opening, asked, sizes, idle=idle, output=output, as_json=as_json)
    named_by = {"data": data, "fewshot_data": fewshot_data or []}
    told: dict[str, Any] = {"output": output, "chat_template": chat_template, "prompting": prompting or ()}
    early.refuse(lambda: _check(target, words, named_by, how, **told))
    from weft.evaluate.running import EvaluationSettings, evaluate_entrants
    from weft.generation.open import open_target

    settings = EvaluationSettings(limit=limit, max_rows=batch_size, max_tokens=pass_tokens, seed=seed)
    named = [one.changed(**changes) for one in _named(words, named_by)]
    loaded = [one.load(num_fewshot=num_fewshot, seed=seed) for one in named]
    ways = {"shot": num_fewshot, "limit": limit, "chat": apply_chat_template, "by": "+".join(adapter or ()),
            "prompting": "+".join(prompting or ())}  # fmt: skip
    folder, answers = _places(target, output, loaded, ways)
    common.tell_hub(model or target)
    with open_target(target, **how, adapters=adapter, chat_template=options.template_text(chat_template)) as opened:
        for note in opened.notes:
            common.say(note)
        try:
            entrants = _entrants(opened, adapter, prompting or (), named=named, tasks=loaded, seed=seed)
            results = evaluate_entrants(
                opened, entrants, loaded, settings, folder=folder, answers=answers, on_progress=Progress(),
                on_note=common.say,
            )  # fmt: skip
        except KeyboardInterrupt:
            return _interrupted(answers or folder)
    tell(results, folder, as_json)
    return common.DONE


def _interrupted(kept: Path | None) -> int:
    common.say(
        "interrupted; nothing is kept. With --output FOLDER answers are, and the same command goes on."
        if kept is None
        else f"interrupted: what was answered is kept in {kept}; the same command goes on."
    )
    return common.INTERRUPTED


def _entrants(
    target: Target, adapters: Sequence[str] | None, prompting: Sequence[str], *, named: Sequence[Named],
    tasks: Sequence[Task], seed: int,
) -> list[Entrant]:  # fmt: skip
    """The base and the adapters, and the base as it is asked otherwise."""
    from weft.evaluate.baselines import pools_of, prompting_entrants, wanted_of
    from weft.evaluate.entrants import entrants_of

    wanted = [wanted_of(word) for word in prompting]
    pools = pools_of(wanted, named, seed)
    return [
        *entrants_of(target, adapters),
        *prompting_entrants(target, wanted, tasks, pools, seed=seed, on_note=common.say),
    ]


def _named(words: Sequence[str], given: Mapping[str, Any]) -> list[Named]:
    from weft.evaluate.tasks import find_tasks

    found = find_tasks(words, **given)
    for one in found:
        one.check()
    return found


def _check(
    target: str,
    words: Sequence[str],
    given: Mapping[str, Any],
    how: Mapping[str, Any],
    *,
    output: Path | None,
    chat_template: str | None,
    prompting: Sequence[str],
) -> None:
    """Refuse tasks, files and folders that cannot be used. Where it needs torch, this ends."""
    from weft.evaluate.baselines.wanted import wanted_of
    from weft.generation.open import open_target

    for word in prompting:
        wanted_of(word)
    _named(words, given)
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is no folder.")
    open_target(target, **how, chat_template=options.template_text(chat_template))


def _places(
    target: str, output: Path | None, tasks: Sequence[Task], ways: Mapping[str, object]
) -> tuple[Path | None, Path | None]:
    """Where results go, and where answers are kept, if not in the same folder. ``ways``: options that are told by the
    folder's name in a run."""
    from weft.files.run_folder import RUN_FILE

    if output is not None:
        return output, None
    run = local_path(target)
    if not (run / RUN_FILE).is_file():
        return None, None
    name = "-".join(task.name for task in tasks)[:100]
    given = {key: str(value).lower() for key, value in ways.items() if value is not None}
    said = {key: re.sub(_NOT_IN_NAMES, "_", value)[:60] for key, value in given.items()}
    told = [f"{key}={value}" for key, value in said.items() if value]
    return run / _EVALUATION / "-".join([name, *told]), run / _EVALUATION / ANSWERS
