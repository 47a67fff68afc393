"""Clean data sets, and bugs to plant into one: each says which check has to find it, and in which record."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.conftest import make_tokenizer
from tests.kit import tokenizers as kit
from tokenizers import AddedToken

from weft.data import Renderer, Sample
from weft.data.auditing.base import Facts, Item, Split
from weft.data.auditing.items import collect
from weft.data.judged import JudgedRecipe, Judgement
from weft.data.pipeline import Recipe, TextRecipe, outcomes

Row = dict[str, Any]
PLACES = ["Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Dakar", "Turin", "Perth", "Kyoto", "Accra", "Sofia", "Minsk"]
FOODS = ["bread soup", "rice and beans", "baked fish", "cold noodles", "goat cheese", "fresh figs", "lentil stew"]
STORIES = ["was founded by sailors who had lost their way", "lies between two rivers that rarely freeze",
           "keeps its oldest library under the town hall", "sells more umbrellas than any town nearby",
           "had a tram until the bridge was closed", "is said to be quietest on market days",
           "paints its doors in the colour of the sea", "builds boats from timber of the hills"]  # fmt: skip
ZH = ["早晨的市场卖新鲜蔬菜", "火车站建在河的北岸", "这里冬天很少下雪", "老图书馆在山脚下", "夏天的夜晚适合散步",
      "博物馆周一不开门", "桥上可以看见大海", "学校旁边有一片树林"]  # fmt: skip


def clean_rows(count: int = 40) -> list[Row]:
    """Questions and answers, no two alike."""
    rows = []
    for n in range(count):
        place, food, story = PLACES[n % 12], FOODS[(n * 3 + n // 12) % 7], STORIES[(n * 5 + n // 8) % 8]
        rows.append({
            "instruction": f"What do people cook in {place} in month {n % 12 + 1}, and why is its part {n} known?",
            "output": f"They cook {food}, {n * 7 + 3} bowls a day. Part {n} {story}.",
        })  # fmt: skip
    return rows


def chinese_rows(count: int = 40) -> list[Row]:
    """The like in Chinese."""
    return [{"instruction": f"请介绍第{n}区的{ZH[n % 8][:4]}，并说说第{n * 7}条街。",
             "output": f"{ZH[n % 8]}。第{n * 7}条街上，{ZH[(n * 3 + n // 8) % 8]}，共{n * 13 + 5}户人家。"}
            for n in range(count)]  # fmt: skip


@dataclass
class DataSet:
    """What an audit is given."""

    tokenizer: Any = field(default_factory=make_tokenizer)
    rows: list[Row] = field(default_factory=clean_rows)
    held: list[Row] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    own_template: str | None = None
    labels: list[str] | None = None
    token_rows: int | None = None
    judgement: Judgement | None = None  # of rows with judged answers
    change: Callable[[list[Item], Any], None] = lambda items, tokenizer: None

    def items(self, folder: Path) -> tuple[list[Item], Facts]:
        """Written to files, read and rendered."""
        renderer = Renderer(self.tokenizer, **self.options)
        unlimited = Renderer(self.tokenizer, **{**self.options, "max_length": None})
        items: list[Item] = []
        splits: list[tuple[Split, list[Row]]] = [("train", self.rows), ("eval", self.held)]
        for split, rows in splits:
            if rows:
                path = folder / f"{split}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
                found = outcomes(path, self.recipe(renderer))
                items += collect(found, renderer, unlimited=unlimited, split=split)[0]
        if self.labels is not None:
            items = [
                replace(item, label=label, samples=tuple(replace(sample, label=0) for sample in item.samples))
                for item, label in zip(items, self.labels, strict=True)
            ]
        self.change(items, self.tokenizer)
        return items, Facts(renderer, own_template=self.own_template)

    def recipe(self, renderer: Renderer) -> Recipe:
        """How the rows are read."""
        if self.judgement is not None:
            return JudgedRecipe(renderer=renderer, judgement=self.judgement, watched=True)
        return TextRecipe(renderer=renderer, token_rows=self.token_rows, watched=True)


@dataclass(frozen=True)
class Bug:
    """``make`` gives the data set; ``where`` are the lines (``train:3``) to be named, "" for all of the data."""

    code: str
    make: Callable[[], DataSet]
    where: tuple[str, ...] = ("train:3",)
    name: str = ""


def more_tokens_than_rows() -> DataSet:
    """A tokenizer with a word more than the model has rows; one record holds it."""
    tokenizer = make_tokenizer()
    rows, added = len(tokenizer), "snowman☃"
    tokenizer.add_tokens([added])
    return DataSet(tokenizer=tokenizer, token_rows=rows, rows=rows_with(output=f"It is a {added} of snow.")().rows)


def rows_with(at: int = 2, **fields: Any) -> Callable[[], DataSet]:
    """The clean rows with other fields in the third (or another)."""

    def make() -> DataSet:
        rows = clean_rows()
        rows[at] = {**rows[at], **fields}
        return DataSet(rows=rows)

    return make


def plus(*more: Row, at: int = 2) -> Callable[[], DataSet]:
    """The clean rows with more put in before the third."""

    def make() -> DataSet:
        rows = clean_rows()
        return DataSet(rows=[*rows[:at], *more, *rows[at:]])

    return make


def on_samples(change: Callable[[Sample, Any], Sample], only: int | None = 2, **options: Any) -> Callable[[], DataSet]:
    """The clean rows, with the sample of the third (None: all) changed as a defect of rendering would."""

    def apply(items: list[Item], tokenizer: Any) -> None:
        for number, item in enumerate(items):
            if only is None or number == only:
                items[number] = replace(item, samples=tuple(change(sample, tokenizer) for sample in item.samples))

    return lambda: DataSet(change=apply, **options)


def pairs(count: int = 40) -> list[Row]:
    """Questions with a better and a worse answer of about the same length, the longer one now here and now there."""
    rows = []
    for n, row in enumerate(clean_rows(count)):
        other = f"They cook {FOODS[(n + 2) % 7]}, {n * 5 + 4} bowls a day. Part {n} {STORIES[(n * 3 + 1) % 8]}."
        more = f" Few know street {n}."
        good, bad = (row["output"] + more, other) if n % 2 else (row["output"], other + more)
        rows.append({"prompt": row["instruction"], "chosen": good, "rejected": bad})
    return rows


def judged(change: Callable[[list[Row]], None]) -> Callable[[], DataSet]:
    """The pairs, changed."""

    def make() -> DataSet:
        rows = pairs()
        change(rows)
        return DataSet(rows=rows, judgement="preference")

    return make


def swapped_again(rows: list[Row]) -> None:
    rows.insert(2, {"prompt": rows[0]["prompt"], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]})


def longer_is_better(rows: list[Row]) -> None:
    for n, row in enumerate(rows):
        if n % 10:
            row["chosen"] = f"{row['chosen']} {row['rejected']}"


def told_by_a_word(rows: list[Row]) -> None:
    for n, row in enumerate(rows):
        row["chosen"] = f"{row['chosen']} Right"
        row["rejected"] = f"{row['rejected']} {PLACES[n % 12]}"


def verdicts() -> DataSet:
    """One bad answer to nine good ones."""
    rows = [{"prompt": r["instruction"], "completion": r["output"], "label": n % 10 > 0}
            for n, r in enumerate(clean_rows())]  # fmt: skip
    return DataSet(rows=rows, judgement="kto")


def weight_of(sample: Sample, places: list[int], weight: float) -> Sample:
    weights = list(sample.weights)
    for place in places:
        weights[place] = weight
    return replace(sample, weights=weights)


def without_end(sample: Sample, tokenizer: Any) -> Sample:
    """The end-of-sequence token is there, but has no weight."""
    ends = [i for i, number in enumerate(sample.input_ids) if number == tokenizer.eos_token_id]
    return weight_of(sample, ends, 0.0)


def dropped_end(sample: Sample, tokenizer: Any) -> Sample:
    """The end-of-sequence token and all behind it is gone."""
    end = max(i for i, number in enumerate(sample.input_ids) if number == tokenizer.eos_token_id)
    return replace(sample, input_ids=sample.input_ids[:end], weights=sample.weights[:end])


def twice_ended(sample: Sample, tokenizer: Any) -> Sample:
    end = max(i for i, number in enumerate(sample.input_ids) if number == tokenizer.eos_token_id)
    ids, weights = list(sample.input_ids), list(sample.weights)
    ids.insert(end, tokenizer.eos_token_id)
    weights.insert(end, 1.0)
    return replace(sample, input_ids=ids, weights=weights)


def padded(sample: Sample, tokenizer: Any) -> Sample:
    more = [tokenizer.pad_token_id] * 5
    return replace(sample, input_ids=[*sample.input_ids, *more], weights=[*sample.weights, *[1.0] * 5])


def inverted(sample: Sample, tokenizer: Any) -> Sample:
    """The mask lies on the question, and on the answer's end."""
    answer = sample.answer or 0
    end = [float(number == tokenizer.eos_token_id and place > answer) for place, number in enumerate(sample.input_ids)]
    return replace(sample, weights=[0.0, 0.0, *[0.0] * (answer - 2), *end[answer:]])


def other_prompt(sample: Sample, tokenizer: Any) -> Sample:
    return replace(sample, input_ids=[*sample.input_ids[:4], sample.input_ids[4] + 1, *sample.input_ids[5:]])


def shared_pad() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def split_eos() -> Any:
    """As tokenizers that only know their end token between spaces do it."""
    tokenizer = kit.byte_tokenizer(eos=None, template=kit.CHATML)
    alone = AddedToken("<stop>", special=True, single_word=True, normalized=False)
    tokenizer.backend_tokenizer.add_special_tokens([alone])
    tokenizer.eos_token = alone
    return tokenizer


TWO_BOS = "{{ bos_token + bos_token }}" + kit.CHATML
NO_BOS = kit.CHATML
LABELS = ["good", "bad"]
ASK = "What do people cook in Oslo in month 1, and why is its part 0 known?"


def talk(*contents: str, **more: Any) -> Row:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)], **more}


def tables(count: int, first: str, others: list[str]) -> Callable[[], DataSet]:
    """Classification: the label ``first``, but for the last few records."""
    return lambda: DataSet(rows=clean_rows(count), labels=[*[first] * (count - len(others)), *others])


BUGS = [
    Bug("contrary-verdicts", judged(swapped_again)),
    Bug("length-bias", judged(longer_is_better), ("",)),
    Bug("verdict-in-text", judged(told_by_a_word), ("",)),
    Bug("lopsided-verdicts", verdicts, ("",)),
    Bug("nothing-to-learn", plus({"messages": [{"role": "user", "content": "Hello to you, old town."},
        {"role": "assistant", "content": "Good day.", "loss": False}]}), name="no answer is learned"),
    Bug("nothing-to-learn", lambda: DataSet(rows=[*clean_rows(2), talk("word " * 150, "Yes, 7."), *clean_rows(9)[3:]],
        options={"max_length": 180, "truncate": True}), name="the prompt fills max_length"),
    Bug("nothing-to-learn", on_samples(lambda s, t: replace(s, weights=[0.0] * len(s.weights))), name="mask lost"),
    Bug("eos-never-learned", on_samples(without_end, None), ("",), "weights of no end"),
    Bug("eos-never-learned", on_samples(dropped_end, None), ("",), "no end"),
    Bug("eos-not-learned", on_samples(without_end), name="one end without weight"),
    Bug("eos-not-learned", on_samples(dropped_end), name="one end lost"),
    Bug("eos-not-learned", on_samples(without_end, options={"train_on": "all"}), name="one end, train_on all"),
    Bug("pad-masks-eos", lambda: on_samples(without_end, only=None, tokenizer=shared_pad())(),
        tuple(f"train:{n}" for n in range(1, 41))),
    Bug("answer-cut", lambda: DataSet(rows=[*clean_rows(2), talk("Count.", "and " * 200), *clean_rows(9)[3:]],
        options={"max_length": 180, "truncate": True})),
    Bug("too-long", lambda: DataSet(rows=[*clean_rows(2), talk("Count.", "and " * 200), *clean_rows(9)[3:]],
        options={"max_length": 180})),
    Bug("double-bos", lambda: DataSet(tokenizer=kit.byte_tokenizer(adds_bos=True, template=TWO_BOS)),
        tuple(f"train:{n}" for n in range(1, 41)), "the template writes it twice"),
    Bug("double-eos", on_samples(twice_ended)),
    Bug("pad-learned", on_samples(padded)),
    Bug("prompt-learned", on_samples(lambda s, t: weight_of(s, list(range(1, len(s.weights))), 1.0))),
    Bug("unknown-tokens", lambda: DataSet(tokenizer=kit.space_tokenizer(),
        rows=[talk("a b", "c d"), talk("e", "f g h"), talk("写一首诗吧", "春风又绿江南岸")])),
    Bug("empty-answer", rows_with(output="")),
    Bug("not-read", plus({"instruction": "What?", "result": "x"})),
    Bug("no-row", more_tokens_than_rows),
    Bug("not-rendered", lambda: DataSet(tokenizer=kit.byte_tokenizer(template=kit.FORGETFUL),
        rows=[*clean_rows(2), talk("Is it so?", "It is.", "And this?", "Not at all, no 5.")])),
    Bug("eos-split", lambda: DataSet(tokenizer=split_eos()), ("",)),
    Bug("serve-differs", on_samples(other_prompt)),
    Bug("template-differs", lambda: DataSet(options={"chat_template": kit.LLAMA2.replace("bos_token + ", "")},
        own_template=make_tokenizer().chat_template), tuple(f"train:{n}" for n in range(1, 41))),
    Bug("served-elsewhere", lambda: DataSet(tokenizer=kit.byte_tokenizer(adds_bos=True, template=NO_BOS)),
        tuple(f"train:{n}" for n in range(1, 41)), "the template forgets BOS"),
    *(Bug("served-elsewhere", lambda given=given: DataSet(tokenizer=kit.byte_tokenizer(adds_bos=True), options=given),
        tuple(f"train:{n}" for n in range(1, 41)), f"{name} writes no BOS")
        for name, given in {"plain": {}, "vicuna": {"chat_template": "vicuna"},
                            "chatml": {"chat_template": "chatml"}}.items()),
    Bug("answer-not-learned", on_samples(inverted)),
    Bug("answer-without-words", rows_with(output="?!?")),
    Bug("placeholder-answer", rows_with(output="N/A"), name="N/A"),
    Bug("placeholder-answer", rows_with(output="TODO: ask Mary"), name="TODO"),
    Bug("placeholder-answer", rows_with(output="待补充"), name="Chinese"),
    Bug("refusal", rows_with(output="As an AI language model, I cannot taste bread soup."), name="English"),
    Bug("refusal", rows_with(output="抱歉，作为一个人工智能语言模型，我无法做饭。"), name="Chinese"),
    Bug("template-variable", rows_with(output="I am {{name}}, and I cook fish."), name="{{name}}"),
    Bug("template-variable", rows_with(instruction="Translate into French: {instruction}"), name="{instruction}"),
    Bug("chat-markup", rows_with(output="Fish.<|eot_id|><|start_header_id|>user"), name="Llama 3"),
    Bug("chat-markup", rows_with(instruction="[INST] <<SYS>>Be brief.<</SYS>> Who cooks? [/INST]"), name="Llama 2"),
    Bug("control-token", rows_with(output="They cook fish.<|im_end|>")),
    Bug("broken-characters", rows_with(output="They cook fish in the caf\ufffd."), name="U+FFFD"),
    Bug("broken-characters", rows_with(output="They cook fish in the cafÃ© by the sea."), name="UTF-8 as Latin-1"),
    Bug("broken-characters", rows_with(output="Itâ€™s fish that they cook."), name="UTF-8 as Windows-1252"),
    Bug("broken-characters", rows_with(output="他们吃锟斤拷。"), name="GBK"),
    Bug("control-characters", rows_with(output="They cook \x08fish.")),
    Bug("answer-is-question", rows_with(output=clean_rows()[2]["instruction"].replace(" ", "  "))),
    Bug("answer-repeats-question", rows_with(output=clean_rows()[2]["instruction"] + " They cook fish and figs.")),
    Bug("secret", rows_with(output="Ask maria.lopez82@gmail.com, she cooks.")),
    Bug("duplicate", plus({**clean_rows()[0], "output": clean_rows()[0]["output"].upper()})),
    Bug("near-duplicate", plus({**clean_rows()[0], "output": clean_rows()[0]["output"].replace("bowls", "pots")})),
    Bug("leak", lambda: DataSet(held=[*clean_rows(60)[40:], clean_rows()[4]]), ("train:5",), "the record"),
    Bug("leak", lambda: DataSet(held=[*clean_rows(60)[40:], {**clean_rows()[4], "output": "Nobody knows, 1 says."}]),
        ("train:5",), "the prompt"),
    Bug("leak", lambda: DataSet(held=[*clean_rows(60)[40:],
        {key: text.replace("known", "famed") for key, text in clean_rows()[4].items()}]), ("train:5",), "nearly"),
    Bug("torn-text", lambda: DataSet(change=lambda items, tokenizer: items.append(
        Item("eval", items[2].source, samples=items[2].samples, torn=True)))),
    Bug("contradiction", plus({"instruction": ASK, "output": "They bake nothing at all there; it is closed."})),
    Bug("contradiction", lambda: DataSet(rows=[*clean_rows(20), clean_rows()[0]], labels=[*LABELS * 10, "bad"]),
        ("train:21",), "labels"),
    Bug("common-prompt", lambda: DataSet(rows=[*clean_rows(60), *[{"instruction": "Tell me of a town, please.",
        "output": f"{PLACES[n]} {STORIES[n % 8]} {'abcdefghijkl'[n] * 9}."} for n in range(12)]]), ("",)),
    Bug("common-answer", lambda: DataSet(rows=[*clean_rows(10),
        *[{**row, "output": "Yes, it does."} for row in clean_rows(40)[10:]]]), ("",)),
    Bug("one-class", tables(20, "good", []), ("",)),
    Bug("class-imbalance", tables(200, "good", ["bad"] * 5), ("",), "nearly all"),
    Bug("class-imbalance", lambda: DataSet(rows=clean_rows(300), labels=[*LABELS * 149, "odd", "odd"]), ("",), "rare"),
    Bug("short-texts", lambda: DataSet(rows=[{"text": f"{PLACES[n % 12]} {n}"} for n in range(24)]), ("",)),
    Bug("small-eval", lambda: DataSet(held=clean_rows(45)[42:]), ("",)),
]  # fmt: skip


def many_turns() -> DataSet:
    """Conversations of several turns with a system message, and a tool that is called."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    rows: list[Row] = []
    for n in range(12):
        place, story = PLACES[n], STORIES[n % 8]
        call = {"function": {"name": "weather", "arguments": {"place": place}}}
        rows.append({"tools": [tool], "messages": [
            {"role": "system", "content": f"You are guide number {n} of {place}."},
            {"role": "user", "content": f"Is it warm at gate {n * 3} today?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": f"{n + 9} degrees, wind {n * 2}"},
            {"role": "assistant", "content": f"{n + 9} degrees at gate {n * 3}: take coat {n}."},
            {"role": "user", "content": f"And what is there to see after {n + 1} o'clock?"},
            {"role": "assistant", "content": f"{place} {story}; gate {n * 3} closes at {n + 2}."}]})  # fmt: skip
    return DataSet(tokenizer=kit.byte_tokenizer(), rows=rows)


def programs() -> DataSet:
    """Code, whose braces are no left-over variables."""
    code = '```python\ndef add_%d(count):\n    return f"{count + %d}"\n```\n`{{ %s }}`'
    rows = [{"instruction": f"Write a Jinja line and a function that adds {n} to {PLACES[n]}'s count.",
             "output": code % (n, n, PLACES[n].lower())} for n in range(12)]  # fmt: skip
    return DataSet(rows=rows)


CLEAN: dict[str, Callable[[], DataSet]] = {
    "questions, with an evaluation": lambda: DataSet(held=clean_rows(60)[40:]),
    "Chinese": lambda: DataSet(rows=chinese_rows()),
    "Chinese, Llama 2's template and BOS": lambda: DataSet(
        tokenizer=kit.byte_tokenizer(adds_bos=True, template=kit.LLAMA2), rows=chinese_rows()),
    "pad is EOS, all is learned": lambda: DataSet(tokenizer=shared_pad(), options={"train_on": "all"}),
    "turns and tools": many_turns,
    "programs": programs,
    "judged answers": lambda: DataSet(rows=pairs(), judgement="preference"),
    "plain text": lambda: DataSet(rows=[{"text": f"{row['output']} {story}"} for row, story in zip(
        clean_rows(40), [STORIES[n % 8] for n in range(40)], strict=True)]),
    "plain text, cut into windows": lambda: DataSet(rows=[{"text": row["output"] * 1} for row in clean_rows(12)],
        options={"max_length": 30, "truncate": True}),
    "classes": lambda: DataSet(rows=clean_rows(60), labels=LABELS * 30),
    "short answers": lambda: DataSet(rows=[{"instruction": f"Is it true that {PLACES[n]} {STORIES[n % 8]}?",
        "output": "Yes" if n % 2 else "No"} for n in range(12)]),
}  # fmt: skip
