"""``weft generate``: answers to many prompts from many adapters in one batch."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import common, early, options
from weft.cli.answer_progress import make_progress
from weft.cli.answering import AnswerSettings, Questions
from weft.cli.answers import AnswerFile, Key, Row, key_of
from weft.errors import UserError
from weft.paths import local_path

if TYPE_CHECKING:
    from weft.data.queries import Query
    from weft.generation.target import Target


_Prompts = Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")]
_Input = Annotated[
    Path | None,
    typer.Option(
        "--input",
        metavar="FILE",
        parser=local_path,
        help="Prompts: data as the adapter learned it, of which the answers are left out and the labels scored; a "
        ".txt with one per line; records with prompt, instruction (and input), question, text or messages.",
    ),
]
_Adapters = Annotated[
    list[str] | None,
    typer.Option(help="Adapter that answers; may be repeated. 'base' is the base. Default: the first."),
]
_Everyone = Annotated[bool, typer.Option("--all-adapters", help="Every adapter of the run answers.")]
_Output = Annotated[
    Path | None,
    typer.Option(metavar="FILE.jsonl", parser=local_path, help="Write one JSON line per answer, as they come."),
]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin anew if the output file is there.")]
_Raw = Annotated[bool, typer.Option("--raw", help="Continue the text as it is: no chat template.")]
_Count = Annotated[int, typer.Option("--n", min=1, help="Answers per prompt, each drawn with a seed of its own.")]
_Logprobs = Annotated[
    int | None, typer.Option(min=0, metavar="K", help="Log-probability of each token and of the K likeliest.")
]
_Rows = Annotated[int, typer.Option("--batch-size", "--concurrency", min=1, help="Answers that are written at once.")]


def generate(
    context: typer.Context,
    target: options.Target,
    prompt: _Prompts = None,
    input_file: _Input = None,
    adapter: _Adapters = None,
    all_adapters: _Everyone = False,
    output: _Output = None,
    overwrite: _Overwrite = False,
    raw: _Raw = False,
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
    n: _Count = 1,
    logprobs: _Logprobs = None,
    batch_size: _Rows = 64,
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
    early.refuse(lambda: _check_files(context.params, how_opened))
    how, file = _begin(context.params)
    common.tell_hub(model or target)
    opened = _open(target, input_file, {**how_opened, "chat_template": options.template_text(chat_template)})
    who = _who(opened, adapter, all_adapters)
    if not opened.names:
        options.refuse_idle(context, ["all_adapters"], "for a model, which has no adapters")
    if not any(name is None or opened.adapters.head(name).writes for name in who):
        options.refuse_idle(context, [*options.WRITES, "n", "logprobs", "batch_size"], "for adapters that classify")
    questions = Questions(opened, _asked(opened, input_file or list(prompt or ()), who, how), how)
    try:
        rows = _answer(questions, file)
    except KeyboardInterrupt:
        _tell_interrupted(file, len(questions.keys()), overwrite)
        return common.INTERRUPTED
    _tell(target, rows, output, as_json)
    return common.DONE


def _begin(given: Mapping[str, Any]) -> tuple[AnswerSettings, AnswerFile | None]:
    """What the options say of the answers and of their file, which is not changed yet."""
    how, output = AnswerSettings.of(given), given["output"]
    return how, None if output is None else AnswerFile(output, how.recorded(), overwrite=given["overwrite"])


def _open(target: str, input_file: Path | None, how: dict[str, Any]) -> Target:
    from weft.data.queries import check_readable
    from weft.generation.open import leaves_out_bad_records, open_target

    if input_file is not None and not leaves_out_bad_records(target):
        check_readable(input_file)  # which is told before weights are loaded
    opened = open_target(target, **how)
    for note in opened.notes:
        common.say(note)
    return opened


def _answer(questions: Questions, file: AnswerFile | None) -> list[Row]:
    """All rows, in the order of the prompts. A file takes each as it comes."""
    order = questions.keys()
    rows: dict[Key, Row] = {}
    if file is not None:
        from weft.generation.contents import contents

        file.open(contents(questions.opened, list(questions.asked)), questions.prompts_hash())
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
    if not file.rows:
        common.say(f"interrupted before an answer came; {file.path} is as it was.")
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


def _check_files(given: Mapping[str, Any], how: dict[str, Any]) -> None:
    """Refuse settings, files and folders that cannot be used. Where it needs torch, this ends."""
    from weft.data.reading.files import find_files
    from weft.generation.open import open_target

    _begin(given)
    if given["input_file"] is not None:
        find_files(given["input_file"])
    open_target(given["target"], **how, chat_template=options.template_text(given["chat_template"]))


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
