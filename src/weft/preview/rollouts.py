"""The answers that a run's policies wrote, with their rewards: as text and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from weft.errors import UserError, nearest
from weft.foreign import json_lines
from weft.preview.html import framed

Row = dict[str, Any]


@dataclass(frozen=True)
class Rollouts:
    """The answers that a job wrote before one step."""

    job: str
    step: int
    rows: list[Row]


def read_rollouts(run: Path, job: str | None = None, step: int | None = None) -> Rollouts:
    """The answers in a run's folder; default: the only job's, before its last step that wrote some.

    Raises:
        UserError: The run has none, or there is no such job or step.
    """
    folder = run / "rollouts"
    jobs = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not jobs:
        raise UserError(f"{run} has no rollouts: no job of it learns from answers of its own (grpo, rloo, ppo).")
    if job is None and len(jobs) > 1:
        raise UserError(f"{run} has rollouts of {', '.join(jobs)}; say which: --job {jobs[0]}.")
    job = job or jobs[0]
    if job not in jobs:
        raise UserError(f"{run} has no rollouts of '{job}'.{nearest(job, jobs)} It has: {', '.join(jobs)}.")
    files = {int(path.stem.removeprefix("step-")): path for path in sorted((folder / job).glob("step-*.jsonl"))}
    if not files:
        raise UserError(f"{folder / job} holds no answers yet.")
    if step is not None and step not in files:
        known = f"{min(files)} to {max(files)}" if len(files) > 1 else str(min(files))
        raise UserError(f"job '{job}' wrote no answers for step {step}; it did for {len(files)} steps, {known}.")
    step = max(files) if step is None else step
    return Rollouts(job, step, [dict(row) for row in json_lines(files[step])])


def ordered(rows: Sequence[Row], order: str) -> list[Row]:
    """The rows as they were written, or the ``best`` or ``worst`` first; those without a reward come last."""
    if order == "written":
        return list(rows)
    sign = -1 if order == "best" else 1
    return sorted(rows, key=lambda row: (row.get("reward") is None, sign * (row.get("reward") or 0.0)))


def figures(rows: Sequence[Row]) -> str:
    """One line on all answers of a step."""
    known = [row["reward"] for row in rows if row.get("reward") is not None]
    mean = f"{sum(known) / len(known):.4f}" if known else "unknown"
    ended = sum(bool(row.get("ended")) for row in rows)
    return f"{len(rows)} answers, mean reward {mean}, {ended} with an end token"


def as_text(found: Rollouts, rows: Sequence[Row]) -> Iterator[str]:
    """Lines for a terminal: each prompt once, where answers to it follow each other."""
    yield f"job {found.job}, step {found.step}: {figures(found.rows)}"
    before = None
    for row in rows:
        if row.get("prompt") != before:
            before = row.get("prompt")
            yield ""
            yield f"--- {row.get('source', '')}"
            yield str(before).rstrip()
        yield f"  {_reward(row)}  {_line(row.get('completion'))}{'' if row.get('ended') else '  (no end)'}"


def _reward(row: Row) -> str:
    reward = row.get("reward")
    told = "no reward" if reward is None else f"{reward:+.3f}"
    parts = row.get("rewards") or {}
    if len(parts) > 1:
        told += " (" + ", ".join(f"{k} {'none' if v is None else format(v, '.3g')}" for k, v in parts.items()) + ")"
    return told


def _line(text: object) -> str:
    return str(text).replace("\n", "⏎")


def as_page(found: Rollouts, rows: Sequence[Row]) -> str:
    """A page without a script, which fetches nothing; all text is escaped."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("rewards") or {}))
    heads = "".join(f"<th class=n>{escape(name)}</th>" for name in ("reward", *names, "advantage", "KL", "tokens"))
    lines = []
    for row in rows:
        own = row.get("rewards") or {}
        values = [row.get("reward"), *(own.get(name) for name in names), row.get("advantage"), row.get("kl")]
        cells = "".join(f"<td class=n>{'' if value is None else format(value, '.3f')}</td>" for value in values)
        lines.append(
            f"<tr><td>{escape(str(row.get('prompt', '')).strip())}</td><td>{escape(str(row.get('completion', '')))}"
            f"{'' if row.get('ended') else ' <span class=warning>no end</span>'}</td>{cells}"
            f"<td class=n>{row.get('tokens', '')}</td></tr>"
        )
    body = (
        f"<p class=faint>job {escape(found.job)}, step {found.step}: {escape(figures(found.rows))}</p>"
        f"<div class=wide><table class=list><tr><th>prompt</th><th>answer</th>{heads}</tr>{''.join(lines)}"
        "</table></div>"
    )
    return framed(f"weft rollouts: {found.job}, step {found.step}", body)
