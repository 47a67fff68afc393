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
    opening: Mapping[str, Any],
    asked: Mapping[str, Any],
    sizes: Mapping[str, int],
    *,
    idle: Mapping[str, object],
    output: Path | None,
    as_json: bool,
) -> int:
    """Run lm_eval's tasks and tell what was found.

    Args:
        opening: How the target is opened.
        asked: ``HarnessSettings``.
        sizes: Of passes.
        idle: Options that are for our own tasks, with what was given.

    Raises:
        UserError: lm_eval is not there, a task is not, or an option means nothing to it.
    """
    for option, value in idle.items():
        if value:
            raise UserError(f"--{option} is for --tasks; lm_eval's tasks say it themselves. Leave it out.")
    from weft.evaluate.harness import HarnessSettings, find_tasks, run_harness
    from weft.generation.open import open_target

    tasks = find_tasks(names, HarnessSettings(**asked))
    adapters, template = opening["adapters"], options.template_text(opening["chat_template"])
    common.tell_hub(opening["model"] or target)
    with open_target(target, **{**opening, "chat_template": template}) as opened:
        for note in opened.notes:
            common.say(note)
        who = [None, *opened.names] if adapters is None else [opened.adapter(name) for name in adapters]
        answers = None if output is None else output / ANSWERS
        results = run_harness(opened, who, tasks, answers=answers, on_progress=Progress(), **sizes)
    if output is not None:
        results.write(output)
    tell(results, output, as_json)
    return common.DONE
