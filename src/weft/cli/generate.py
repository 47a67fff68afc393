"""``weft generate``: answers to many prompts from many adapters in one batch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import common, early, options
from weft.errors import UserError
from weft.paths import local_path

if TYPE_CHECKING:
    from weft.data.queries import Query
    from weft.generation.sampling import Sampling
    from weft.generation.target import Target

# An answer of an adapter to a query, as JSON holds it.
Row = dict[str, Any]


def generate(
    context: typer.Context,
    target: options.Target,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE",
            parser=local_path,
            help="Prompts: data as the adapter learned it, of which the answers are left out and the labels scored; a "
            ".txt with one per line; records with prompt, instruction (and input), question, text or messages.",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Adapter that answers; may be repeated. 'base' is the base. Default: the first."),
    ] = None,
    all_adapters: Annotated[bool, typer.Option("--all-adapters", help="Every adapter of the run answers.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", parser=local_path, help="Write one JSON line per answer.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it is there.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is: no chat template.")] = False,
    model: options.Model = None,
    system: options.System = None,
    chat_template: options.ChatTemplate = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    seed: options.Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that decode together.")] = 64,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> int:
    """Answer prompts with one or many adapters, all in one batch; a classification adapter answers with the label.

    weft generate runs/weft --prompt "What is a loom?" --all-adapters
    """
    _refuse_idle(context)
    _check(prompt, input_file, adapter, all_adapters, output=output, overwrite=overwrite)
    how_opened: dict[str, Any] = {"model": model, "adapters": adapter, "device": device, "dtype": dtype}
    early.refuse(lambda: _check_files(target, input_file, how_opened, chat_template))
    from weft.data.queries import check_readable
    from weft.generation.open import leaves_out_bad_records, open_target
    from weft.generation.sampling import Sampling

    if input_file is not None and not leaves_out_bad_records(target):
        check_readable(input_file)  # which is told before weights are loaded
    common.tell_hub(model or target)
    template = options.template_text(chat_template)
    opened = open_target(target, **how_opened, chat_template=template)
    for note in opened.notes:
        common.say(note)
    who = _who(opened, adapter, all_adapters)
    if not opened.names:
        options.refuse_idle(context, ["all_adapters"], "for a model, which has no adapters")
    if not any(name is None or opened.adapters.head(name).writes for name in who):
        options.refuse_idle(context, [*options.WRITES, "batch_size"], "for adapters that classify")
    sampling = Sampling(temperature, top_k, top_p, seed=seed)
    how = _AnswerSettings(
        system=system, max_new_tokens=max_new_tokens, sampling=sampling, raw=raw, batch_size=batch_size
    )
    asked = _asked(opened, input_file or list(prompt or ()), who, how)
    _tell(target, asked, _answer(opened, asked, how), output, as_json)
    return common.DONE


def _tell(
    target: str,
    asked: Mapping[str | None, Sequence[Query]],
    answers: Mapping[str | None, list[Row]],
    output: Path | None,
    as_json: bool,
) -> None:
    """Write and print the answers, and the scores of classes."""
    # Adapters that read a file in two ways may leave out different records of it.
    pairs = [pair for name in asked for pair in zip(asked[name], answers[name], strict=True)]
    results = [row for _, row in sorted(pairs, key=lambda pair: pair[0].number)]
    scores = {name or "base": found for name, rows in answers.items() if (found := _scores(rows))}
    from weft.preview.text import count_of

    if output is not None:
        _write(output, results)
    if as_json:
        common.print_json({"target": target, "results": results, **({"scores": scores} if scores else {})})
        return
    if output is None:
        _show(results)
    else:
        common.say(f"{count_of(len(results), 'answer')} -> {output}")
    for name, found in scores.items():
        told = f"accuracy {found['accuracy']:.4f}, macro-F1 {found['macro_f1']:.4f}, MCC {found['mcc']:.4f}"
        print(f"{name}: {told} ({found['records']:,} records with a label)")


def _refuse_idle(context: typer.Context) -> None:
    """Refuse options that do nothing beside others."""
    given = context.params
    if given["raw"]:
        options.refuse_idle(context, ["system", "chat_template"], "with --raw, which takes no chat template")
    if not given["temperature"]:
        options.refuse_idle(context, options.DRAWS, "without --temperature: the likeliest token is taken")
    if given["output"] is None:
        options.refuse_idle(context, ["overwrite"], "without --output")


def _check(
    prompt: list[str] | None,
    input_file: Path | None,
    adapter: list[str] | None,
    all_adapters: bool,
    output: Path | None,
    overwrite: bool,
) -> None:
    """Refuse what can be refused before a model is loaded."""
    if bool(prompt) == (input_file is not None):
        raise UserError("give the prompts by --prompt TEXT (may be repeated) or by --input FILE, one of the two.")
    if output is not None and output.is_dir():
        raise UserError(f"--output {output} is a folder, not a file.")
    if output is not None and output.exists() and not overwrite:
        raise UserError(f"{output} is there already; take another name or --overwrite.")
    if output is not None and not output.absolute().parent.is_dir():
        raise UserError(f"there is no folder {output.absolute().parent} for {output.name}.")
    if all_adapters and adapter:
        raise UserError("--all-adapters and --adapter exclude each other.")


def _check_files(target: str, input_file: Path | None, how: dict[str, Any], chat_template: str | None) -> None:
    """Refuse files and folders that are not there. Where it needs torch, this ends."""
    from weft.data.reading.files import find_files
    from weft.generation.open import open_target

    if input_file is not None:
        find_files(input_file)
    open_target(target, **how, chat_template=options.template_text(chat_template))


def _who(opened: Target, adapter: list[str] | None, everyone: bool) -> list[str | None]:
    if adapter:
        return list(dict.fromkeys(opened.adapter(name) for name in adapter))
    if everyone or len(opened.names) < 2:
        return list(opened.names) or [None]
    first, *others = opened.names
    common.say(f"{first} answers; also there: {', '.join(others)} (--adapter NAME, --all-adapters)")
    return [first]


@dataclass(frozen=True, kw_only=True)
class _AnswerSettings:
    """The settings by which all prompts are answered."""

    system: str | None
    max_new_tokens: int | None
    sampling: Sampling
    raw: bool
    batch_size: int


def _asked(
    opened: Target, source: Path | Sequence[str], who: Sequence[str | None], how: _AnswerSettings
) -> dict[str | None, list[Query]]:
    """The prompts of every adapter. What is left out of them is logged."""
    from weft.data.problems import Problems

    problems = Problems("skip")
    asked = {name: opened.queries(source, name, problems=problems, system=how.system, raw=how.raw) for name in who}
    problems.check(str(source))
    return asked


def _answer(
    opened: Target, asked: Mapping[str | None, Sequence[Query]], how: _AnswerSettings
) -> dict[str | None, list[Row]]:
    """A row of every adapter for every prompt."""
    writers = {name: found for name, found in asked.items() if name is None or opened.adapters.head(name).writes}
    texts = _continue(opened, writers, how) if writers else {}
    return {
        name: texts[name] if name in texts else _classify(opened, found, str(name)) for name, found in asked.items()
    }


def _continue(
    opened: Target, asked: Mapping[str | None, Sequence[Query]], how: _AnswerSettings
) -> dict[str | None, list[Row]]:
    """Let the adapters write, all in the same batches."""
    from weft.generation import Request
    from weft.generation import generate as run
    from weft.generation.text import decode

    requests, owners = [], []
    for name, queries in asked.items():
        for query in queries:
            ids = query.prompt.input_ids
            count = opened.room(len(ids), name, how.max_new_tokens, what=query.source)
            requests.append(Request(ids, name, count, sampling=how.sampling, slots=query.prompt.slots))
            owners.append(query)
    completions = run(opened.adapters, requests, stop_ids=opened.stop_ids, batch_size=how.batch_size)
    rows: dict[str | None, list[Row]] = {name: [] for name in asked}
    for query, request, done in zip(owners, requests, completions, strict=True):
        rows[request.adapter].append({
            "prompt": query.said,
            "adapter": request.adapter or "base",
            "text": decode(opened.renderer.tokenizer, done.ids),
            "finish_reason": done.finish_reason,
            "prompt_tokens": len(request.prompt),
            "tokens": len(done.ids),
        })  # fmt: skip
    return rows


def _classify(opened: Target, queries: Sequence[Query], name: str) -> list[Row]:
    """The class of every text, beside the one that its record names."""
    from weft.evaluate.classify import predict

    found = predict(opened.adapters, name, [query.prompt for query in queries])
    return [
        {
            "prompt": query.said,
            "adapter": name,
            "text": found.names[label],
            **({"label": query.label} if query.label is not None else {}),
            "probabilities": dict(zip(found.names, row, strict=True)),
            "prompt_tokens": len(query.prompt.input_ids),
        }
        for query, label, row in zip(queries, found.labels, found.probabilities.tolist(), strict=True)
    ]


def _scores(rows: Sequence[Row]) -> dict[str, float]:
    """How well the classes fit the labels, where records have some."""
    from weft.objectives import class_metrics

    labelled = [row for row in rows if "label" in row]
    if not labelled:
        return {}
    number = {name: index for index, name in enumerate(labelled[0]["probabilities"])}
    pairs = [[number[row[key]] for row in labelled] for key in ("text", "label")]
    return {**class_metrics(*pairs), "records": len(labelled)}


def _write(path: Path, results: Sequence[dict[str, object]]) -> None:
    from weft.files.whole import write_whole

    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in results), "--output ")


def _show(results: Sequence[Row]) -> None:
    """Print the text alone if there is one answer, else each under a heading."""
    if len(results) == 1:
        print(results[0]["text"])
        return
    before = None
    for row in results:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        if prompt != before:
            print(f"\n# {prompt}" if before is not None else f"# {prompt}")
            before = prompt
        print(f"[{row['adapter']}] {row['text']}")
