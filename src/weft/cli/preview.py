"""``weft preview``: shows what training would see, without training: samples, figures, the audit."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import common, early, options
from weft.errors import UserError
from weft.paths import local_path

if TYPE_CHECKING:
    from weft.data.auditing.base import Item
    from weft.preview.view import View
    from weft.training.settings import RunConfig


def preview(
    config: options.Config = None,
    model: Annotated[str | None, typer.Option(help=options.meaning("model"))] = None,
    data: Annotated[str | None, typer.Option(help=options.meaning("data"))] = None,
    samples: Annotated[int, typer.Option(min=0, help="How many samples to show.")] = 3,
    record: Annotated[
        list[str] | None, typer.Option(help="Show this record: its number, or file:line. May be repeated.")
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also list each sample token by token.")] = False,
    ignore: Annotated[list[str] | None, typer.Option(help="Leave out a check, by its code. May be repeated.")] = None,
    html: Annotated[
        Path | None, typer.Option(parser=local_path, help="Write everything to one HTML page as well.")
    ] = None,
    write_clean: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.jsonl", parser=local_path, help="Write the training records without errors to a file."
        ),
    ] = None,
    as_json: options.Json = False,
) -> int:
    """Show what training would see: tokens with their loss weights, figures, and an audit. Loads no weights.

    weft preview run.yaml --html preview.html

    weft preview --model DIR --data FILE --record train.jsonl:17

    Leaves with code 1 if the audit finds errors.
    """
    begun = time.perf_counter()
    if html is not None and (html.is_dir() or not html.absolute().parent.is_dir()):
        raise UserError(f"--html {html}: {'that is a folder' if html.is_dir() else 'its folder is not there'}.")
    if write_clean is not None:
        _check_clean(write_clean)
    early.refuse(lambda: _check(list(config or []), model, data))
    settings = _check(list(config or []), model, data)
    views = _views(settings, samples, record or (), ignore or ())
    if write_clean is not None:
        _write_clean(write_clean, views)
    if html is not None:
        from weft.data import parse_sources
        from weft.files.whole import write_whole
        from weft.preview.html import page

        named = (source.path for job in settings.jobs for source in parse_sources(job.data or settings.data))
        files = list(dict.fromkeys(named))
        write_whole(html, page(f"{settings.model}, {', '.join(files)}", views), "--html ")
    failed = any(finding.severity == "error" for view in views for finding in view.findings)
    if as_json:
        seconds = round(time.perf_counter() - begun, 2)
        found = [view.json() for view in views]
        common.print_json({"model": settings.model, "ok": not failed, "seconds": seconds, "data": found})
    else:
        from weft.preview.text import show

        for view in views:
            show(view, common.console(), tokens=tokens)
        if html is not None:
            print(f"page -> {shlex.quote(str(html))}")
    return common.AUDIT_FAILED if failed else common.DONE


def _check_clean(path: Path) -> None:
    if path.suffix != ".jsonl":
        raise UserError(f"--write-clean {path}: the file becomes JSON lines; give it a name that ends in .jsonl.")
    if path.exists() or not path.absolute().parent.is_dir():
        raise UserError(f"--write-clean {path}: {'it' if path.exists() else 'its folder'} is "
                        f"{'there already; take another name' if path.exists() else 'not there'}.")  # fmt: skip


def _write_clean(path: Path, views: Sequence[View]) -> None:
    """Write the records that passed, with the fields that they have, in the order in which they were read.

    Raises:
        UserError: Jobs have data of their own, no record passed, or the file cannot be written.
    """
    from weft.files.whole import write_whole

    if len(views) > 1:
        raise UserError("--write-clean is for one data set, and these jobs have several: preview them one by one.")
    (view,) = views
    clean = view.data_set.clean(view.findings)
    if not clean:
        raise UserError(f"--write-clean {path}: every record has an error; nothing was written.")
    write_whole(
        path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in clean), "--write-clean "
    )
    common.say(f"{len(clean):,} of {len(view.data_set.read):,} records -> {path}")


def _check(words: list[str], model: str | None, data: str | None) -> RunConfig:
    """The settings, if what they name is there."""
    from weft.models.load import resolve_model
    from weft.training.checks import check_names

    settings = _settings(words, model, data)
    if not Path(settings.model).is_dir():  # a folder may hold a tokenizer alone
        resolve_model(settings.model)
    check_names(settings)
    return settings


def _settings(words: list[str], model: str | None, data: str | None) -> RunConfig:
    from weft.cli.train import settings_of

    flags: dict[str, Any] = {key: value for key, value in (("model", model), ("data", data)) if value is not None}
    if not words and not flags:
        raise UserError("nothing to preview: give a CONFIG.yaml, or --model and --data.")
    from_file = bool(words) and "=" not in words[0]
    if not from_file and not any(word.startswith(("method=", "jobs=", "jobs.")) for word in words):
        flags["method"] = "lora"  # no method changes what is read; one has to be named
    return settings_of(words, flags)


def _views(settings: RunConfig, samples: int, records: Sequence[str], ignore: Sequence[str]) -> list[View]:
    from weft.data.auditing.audit import audit
    from weft.data.auditing.statistics import statistics
    from weft.preview.data_sets import examine
    from weft.preview.view import View

    if settings.shape == "full":
        common.tell_hub(settings.model)
    views = []
    for data_set in examine(settings):
        findings = audit(data_set.items, data_set.facts, ignore=ignore)
        figures = {}
        for part in dict.fromkeys(item.part for item in data_set.items):
            items = [item for item in data_set.items if item.part == part]
            figures[part] = statistics(items, findings=findings)
        next(iter(figures.values()))["left_out"] = dict(data_set.left_out)
        items = data_set.items if records or not data_set.windows else data_set.windows
        views.append(View(data_set, findings, figures, chosen(items, samples, records)))
    return views


def chosen(items: Sequence[Item], count: int, wanted: Sequence[str]) -> list[Item]:
    """The records to show: those that are named, else ``count`` evenly over the training data."""
    if wanted:
        return [_named(items, name) for name in wanted]
    usable = [item for item in items if item.samples and item.split == "train"] or list(items)
    count = min(count, len(usable))
    return [usable[place * len(usable) // count] for place in range(count)]


def _named(items: Sequence[Item], name: str) -> Item:
    """A record by its number (from 1, in the order of reading), or by ``file:line``."""
    if name.isdecimal():
        if (numbered := next((item for item in items if item.number == int(name)), None)) is None:
            last = max(item.number for item in items)
            raise UserError(f"--record {name}: there are the records 1 to {last}, but for those that are left out.")
        return numbered
    from weft.data.reading.files import lines_in

    path, _, line = name.rpartition(":")
    for item in items:
        if item.source == name or (path and item.source.endswith(f"/{path}:{line}")):
            return item
    mine = [item for item in items if _same_file(item, path)]
    found = {int(item.source.rpartition(":")[2]): item for item in reversed(mine)}
    if not found or not line.isdecimal():
        raise UserError(f"--record {name}: no such record. Give its number, or file:line, such as {items[0].source}.")
    first, last = min(found), max(found)
    if int(line) > max(last, lines_in(found[last].source.rpartition(":")[0])):
        raise UserError(
            f"--record {name}: no such record; the file has {len(mine):,}, the last at {found[last].source}."
        )
    shown = found[max((number for number in found if number <= int(line)), default=first)]
    common.say(f"no record begins at {name}; the one at {shown.source} is shown")
    return shown


def _same_file(item: Item, path: str) -> bool:
    """Whether the record is of this file; a line inside a record means the record that it belongs to."""
    file, _, line = item.source.rpartition(":")
    return line.isdecimal() and bool(path) and (file == path or file.endswith(f"/{path}"))
