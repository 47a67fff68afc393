"""``weft eval --harness``: lm_eval's tasks on our engine, for the base and all adapters together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.cli import common, options
from weft.cli.figures import ANSWERS, Progress, tell
from weft.errors import UserError


def evaluate_harness(
    target: str,
    names: Sequence[str],
    how: Mapping[str, Any],
    *,
    adapter: Sequence[str] | None,
    output: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    chat: bool | None,
    chat_template: str | None,
    max_rows: int,
    max_tokens: int,
    idle: Mapping[str, object],
    as_json: bool,
) -> int:
    """Run lm_eval's tasks and tell what was found; ``how`` opens the target, ``idle`` are options that are for ours.

    Raises:
        UserError: lm_eval is not there, a task is not, or an option means nothing to it.
    """
    for option, value in idle.items():
        if value:
            raise UserError(f"--{option} is for --tasks; lm_eval's tasks say it themselves. Leave it out.")
    from weft.evaluate.harness import HarnessSettings, find_tasks, run_harness
    from weft.generation.open import open_target

    settings = HarnessSettings(num_fewshot=num_fewshot, limit=limit, chat_template=bool(chat))
    tasks = find_tasks(names, settings)
    common.tell_hub(how["model"] or target)
    with open_target(target, **how, adapters=adapter, chat_template=options.template_text(chat_template)) as opened:
        for note in opened.notes:
            common.say(note)
        asked = [None, *opened.names] if adapter is None else [opened.adapter(name) for name in adapter]
        answers = None if output is None else output / ANSWERS
        results = run_harness(
            opened, asked, tasks, answers=answers, max_tokens=max_tokens, max_rows=max_rows, on_progress=Progress()
        )
    if output is not None:
        results.write(output)
    tell(results, output, as_json)
    return common.DONE
