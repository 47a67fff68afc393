"""``weft generate``: answers to many prompts from many adapters in one batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import common, early, options
from weft.errors import UserError
from weft.paths import local_path

if TYPE_CHECKING:
    from weft.data import Message, Record
    from weft.data import Prompt as Rendered
    from weft.generation.open import Target
    from weft.generation.sampling import Sampling


@dataclass(frozen=True)
class Prompt:
    """A text or a conversation, and where it comes from."""

    content: str | list[Message]
    source: str

    def shown(self) -> object:
        """The content as JSON."""
        if isinstance(self.content, str):
            return self.content
        return [{"role": message.role, "content": message.content} for message in self.content]


def generate(
    target: options.Target,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE",
            parser=local_path,
            help="Prompts: a .txt with one per line, or .json/.jsonl/.csv records with prompt, instruction (and "
            "input), question, text or messages; answers in them are left out.",
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
    _check(prompt, input_file, adapter, all_adapters, output=output, overwrite=overwrite)
    how_opened: dict[str, Any] = {"model": model, "adapters": adapter, "device": device, "dtype": dtype}
    early.refuse(lambda: _check_files(target, input_file, how_opened, chat_template))
    from weft.generation.open import open_target
    from weft.generation.sampling import Sampling

    prompts = _read(input_file) if input_file else [Prompt(text, "--prompt") for text in prompt or ()]
    common.tell_hub(model or target)
    template = options.template_text(chat_template)
    opened = open_target(target, **how_opened, chat_template=template)
    for note in opened.notes:
        common.say(note)
    who = _who(opened, adapter, all_adapters)
    sampling = Sampling(temperature, top_k, top_p, seed)
    how = _AnswerSettings(
        system=system, max_new_tokens=max_new_tokens, sampling=sampling, raw=raw, batch_size=batch_size
    )
    results = _answer(opened, prompts, who, how)
    if output is not None:
        _write(output, results)
    if as_json:
        common.print_json({"target": target, "results": results})
    elif output is None:
        _show(results)
    else:
        common.say(f"{len(results)} answers -> {output}")
    return common.DONE


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


def _answer(
    opened: Target, prompts: Sequence[Prompt], who: Sequence[str | None], how: _AnswerSettings
) -> list[dict[str, Any]]:
    """A row for every prompt and, of each, for every adapter."""
    labels = {n: _classify(opened, prompts, n) for n in who if n is not None and not opened.adapters.head(n).writes}
    writers = [name for name in who if name not in labels]
    texts = iter(_continue(opened, prompts, writers, how) if writers else ())
    return [labels[name][i] if name in labels else next(texts) for i in range(len(prompts)) for name in who]


def _continue(
    opened: Target, prompts: Sequence[Prompt], who: Sequence[str | None], how: _AnswerSettings
) -> list[dict[str, Any]]:
    """Let the adapters write, all in the same batches."""
    from weft.generation import Request
    from weft.generation import generate as run
    from weft.generation.text import decode

    requests, owners = [], []
    for prompt in prompts:
        rendered = _rendered(opened, prompt, how.system, how.raw)
        for name in who:
            count = opened.room(len(rendered.ids), name, how.max_new_tokens, what=prompt.source)
            requests.append(Request(rendered.ids, name, count, sampling=how.sampling, slots=rendered.slots))
            owners.append(prompt)
    completions = run(opened.adapters, requests, stop_ids=opened.stop_ids, batch_size=how.batch_size)
    return [
        {
            "prompt": prompt.shown(),
            "adapter": request.adapter or "base",
            "text": decode(opened.renderer.tokenizer, done.ids),
            "finish_reason": done.finish_reason,
            "prompt_tokens": len(request.prompt),
            "tokens": len(done.ids),
        }
        for prompt, request, done in zip(owners, requests, completions, strict=True)
    ]


def _classify(opened: Target, prompts: Sequence[Prompt], name: str) -> list[dict[str, Any]]:
    """The class of every prompt; two texts have a tab between them."""
    from weft.evaluate.classify import predict, text_sample

    samples = []
    for prompt in prompts:
        if not isinstance(prompt.content, str):
            raise UserError(f"{prompt.source}: adapter '{name}' classifies texts; this is a conversation.")
        samples.append(text_sample(opened.adapters, opened.renderer, prompt.content, prompt.source))
    found = predict(opened.adapters, name, samples)
    return [
        {
            "prompt": prompt.shown(),
            "adapter": name,
            "text": found.names[label],
            "probabilities": dict(zip(found.names, row, strict=True)),
            "prompt_tokens": len(sample.input_ids),
        }
        for prompt, sample, label, row in zip(prompts, samples, found.labels, found.probabilities.tolist(), strict=True)
    ]


def _rendered(opened: Target, prompt: Prompt, system: str | None, raw: bool) -> Rendered:
    """Ids and slots of a prompt."""
    from weft.data import Message

    content = prompt.content
    if raw:
        if not isinstance(content, str):
            raise UserError(f"{prompt.source}: a conversation needs the chat template; --raw continues texts only.")
        rendered = opened.prompt(content, raw=True)
    else:
        messages = [Message("user", content)] if isinstance(content, str) else content
        rendered = opened.prompt([*([Message("system", system)] if system else []), *messages])
    if not rendered.ids:
        raise UserError(f"{prompt.source}: a prompt without a single token cannot be continued.")
    return rendered


def _read(path: Path) -> list[Prompt]:
    from weft.data.pipeline import read_all

    prompts = read_all(path, _prompt)
    if not prompts:
        raise UserError(f"{path} holds no prompts.")
    return prompts


def _prompt(record: Record) -> Prompt:
    """The question of a record; what it holds of an answer is left out."""
    from weft.data import Message

    fields = record.fields
    turns = fields.get("messages")
    if isinstance(turns, list):
        if not all(isinstance(t, dict) and isinstance(t.get("content"), str) and "role" in t for t in turns):
            raise UserError(f"{record.source}: messages must be a list of objects with role and content, both text.")
        messages = [Message(str(turn["role"]), turn["content"]) for turn in turns]
        while messages and messages[-1].role == "assistant":
            messages.pop()
        return Prompt(messages, record.source)
    names = ("prompt", "instruction", "question", "text")
    for name in names:
        if isinstance(text := fields.get(name), str):
            extra = fields.get("input") if name == "instruction" else None
            return Prompt(f"{text}\n{extra}" if extra else text, record.source)
    other = next((name for name in names if fields.get(name) is not None), None)
    if other is not None:
        value = json.dumps(fields[other], ensure_ascii=False, default=str)
        raise UserError(f"{record.source}: {other} is {value[:80]}; expected text, in quotes.")
    raise UserError(
        f"{record.source}: no prompt in this record. It needs a field prompt, instruction, question, text or messages; "
        f"it has {', '.join(map(repr, fields)) or 'none'}."
    )


def _write(path: Path, results: Sequence[dict[str, object]]) -> None:
    from weft.files.whole import write_whole

    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in results), "--output ")


def _show(results: Sequence[dict[str, Any]]) -> None:
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
