"""``weft generate``: answers to many prompts from many adapters in one batch."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import common, early, options
from weft.cli.answer_progress import make_progress
from weft.cli.answering import AnswerSettings, Questions, contents
from weft.cli.answers import AnswerFile, Key, Row, key_of
from weft.errors import UserError
from weft.paths import local_path

if TYPE_CHECKING:
    from weft.data.queries import Query
    from weft.generation.target import Target


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
        Path | None,
        typer.Option(metavar="FILE.jsonl", parser=local_path, help="Write one JSON line per answer, as they come."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew if the output file is there.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is: no chat template.")] = False,
    model: options.Model = None,
    system: options.System = None,
    chat_template: options.ChatTemplate = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    stop: options.Stop = None,
    seed: options.Seed = 0,
    n: Annotated[int, typer.Option("--n", min=1, help="Answers per prompt, each drawn with a seed of its own.")] = 1,
    logprobs: Annotated[
        int | None, typer.Option(min=0, metavar="K", help="Log-probability of each token and of the K likeliest.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--concurrency", min=1, help="Answers that are written at once.")
    ] = 64,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> int:
    """Answer prompts with one or many adapters, all in one batch; a classification adapter answers with the label.

    An --output file that this same command has begun is continued.

    weft generate runs/weft --prompt "What is a loom?" --all-adapters
    """
    _refuse_idle(context)
    _check(prompt, input_file, adapter, all_adapters)
    how_opened: dict[str, Any] = {"model": model, "adapters": adapter, "device": device, "dtype": dtype}
    sampled: dict[str, Any] = {
        "seed": seed, "min_p": min_p, "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty,
    }  # fmt: skip
    answered: dict[str, Any] = {
        "system": system, "raw": raw, "chat_template": chat_template, "stop": tuple(stop or ()),
        "logprobs": logprobs, "count": n, "max_rows": batch_size,
    }  # fmt: skip

    def settings() -> AnswerSettings:
        from weft.generation.sampling import Sampling
        from weft.generation.text import StopStrings

        StopStrings(answered["stop"])
        return AnswerSettings(Sampling(temperature, top_k, top_p, **sampled), max_new_tokens, **answered)

    def check_files() -> None:
        how = settings()
        if output is not None:
            AnswerFile(output, how.recorded(), overwrite=overwrite)
        _check_files(target, input_file, how_opened, chat_template)

    early.refuse(check_files)
    from weft.data.queries import check_readable
    from weft.generation.open import leaves_out_bad_records, open_target

    how = settings()
    file = None if output is None else AnswerFile(output, how.recorded(), overwrite=overwrite)
    if input_file is not None and not leaves_out_bad_records(target):
        check_readable(input_file)  # which is told before weights are loaded
    common.tell_hub(model or target)
    opened = open_target(target, **how_opened, chat_template=options.template_text(chat_template))
    for note in opened.notes:
        common.say(note)
    who = _who(opened, adapter, all_adapters)
    if not opened.names:
        options.refuse_idle(context, ["all_adapters"], "for a model, which has no adapters")
    if not any(name is None or opened.adapters.head(name).writes for name in who):
        options.refuse_idle(context, [*options.WRITES, "n", "logprobs", "batch_size"], "for adapters that classify")
    questions = Questions(opened, _asked(opened, input_file or list(prompt or ()), who, how), how)
    try:
        rows = _answer(questions, file, who)
    except KeyboardInterrupt:
        _tell_interrupted(file, len(questions.keys()), overwrite)
        return common.INTERRUPTED
    _tell(target, rows, output, as_json)
    return common.DONE


def _answer(questions: Questions, file: AnswerFile | None, who: Sequence[str | None]) -> list[Row]:
    """All rows, in the order of the prompts. A file takes each as it comes."""
    order = questions.keys()
    rows: dict[Key, Row] = {}
    if file is not None:
        file.open(contents(questions.opened, who), questions.prompts_hash())
        file.check_keys(order)
        rows = file.rows
        if rows:
            common.say(f"{len(rows):,} of {len(order):,} answers are in {file.path} already")
    todo = questions.requests(rows)
    with contextlib.ExitStack() as stack:
        engine, opened = None, questions.opened
        if todo:
            from weft.generation.limits import limits_for

            limits = limits_for(opened.adapters, [one for _, _, one in todo], questions.settings.max_rows)
            engine = stack.enter_context(opened.engine(limits))
        came = itertools.chain(() if engine is None else questions.written(engine, todo), questions.classified(rows))
        told = make_progress(len(order), len(rows), lambda: 0 if engine is None else engine.stats().tokens)
        progress = stack.enter_context(told)
        for row in came:
            if file is not None:
                file.add(row)
            else:
                rows[key_of(row)] = row
            progress.advance()
    return [rows[key] for key in order] if file is None else file.close(order)


def _tell_interrupted(file: AnswerFile | None, total: int, overwrite: bool) -> None:
    """Say what is kept, and how to go on."""
    if file is None:
        common.say("interrupted; no answer is kept. With --output FILE they are, and the same command goes on.")
        return
    again = "the same command without --overwrite" if overwrite else "the same command"
    common.say(f"interrupted: {len(file.rows):,} of {total:,} answers are in {file.path}; {again} goes on.")


def _tell(target: str, results: Sequence[Row], output: Path | None, as_json: bool) -> None:
    """Print the answers, and the scores of classes."""
    names = dict.fromkeys(row["adapter"] for row in results)
    of = {name: [row for row in results if row["adapter"] == name] for name in names}
    scores = {name: found for name, rows in of.items() if (found := _scores(rows))}
    from weft.preview.text import count_of

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
        options.refuse_idle(context, [*options.DRAWS, "n"], "without --temperature: the likeliest token is taken")
    if given["output"] is None:
        options.refuse_idle(context, ["overwrite"], "without --output")


def _check(prompt: list[str] | None, input_file: Path | None, adapter: list[str] | None, all_adapters: bool) -> None:
    """Refuse what can be refused before a model is loaded."""
    if bool(prompt) == (input_file is not None):
        raise UserError("give the prompts by --prompt TEXT (may be repeated) or by --input FILE, one of the two.")
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


def _asked(
    opened: Target, source: Path | Sequence[str], who: Sequence[str | None], how: AnswerSettings
) -> dict[str | None, list[Query]]:
    """The prompts of every adapter. What is left out of them is logged."""
    from weft.data.problems import Problems

    problems = Problems("skip")
    asked = {name: opened.queries(source, name, problems=problems, system=how.system, raw=how.raw) for name in who}
    problems.check(str(source))
    return asked


def _scores(rows: Sequence[Row]) -> dict[str, float]:
    """How well the classes fit the labels, where records have some."""
    from weft.objectives import class_metrics

    labelled = [row for row in rows if "label" in row]
    if not labelled:
        return {}
    number = {name: index for index, name in enumerate(labelled[0]["probabilities"])}
    pairs = [[number[row[key]] for row in labelled] for key in ("text", "label")]
    return {**class_metrics(*pairs), "records": len(labelled)}


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
