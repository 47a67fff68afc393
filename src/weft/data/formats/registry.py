"""Every format of a record: its fields, what they mean, what it is for, who reads it, and an example.

A new format is an entry here and its reader. Extensions add theirs by ``weft.register_format``. ``detect.py`` finds the
entry that fits a record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from weft.data.formats import answers, judged, turns, verbatim
from weft.data.formats.examples import Conversation, Example, LabelledAnswer
from weft.data.formats.labels import LABELS, TEXTS
from weft.data.reading.records import Record
from weft.extensions import Registry

Purpose = Literal["sft", "preference", "kto", "ranked", "steps", "classification", "any"]
# The purposes of formats that a caller with a purpose accepts.
ACCEPTS: dict[Purpose, tuple[Purpose, ...]] = {
    "sft": ("sft",),
    "preference": ("preference", "ranked"),
    "kto": ("kto",),
    "ranked": ("ranked",),
    "steps": ("steps",),
    "classification": ("classification",),
    "any": ("sft", "preference", "kto", "ranked", "steps", "classification"),
}
TRAINING = {
    "sft": "supervised training",
    "preference": "preference training (DPO and its kin, reward models)",
    "kto": "training on single labels (KTO)",
    "ranked": "preference training on ranked answers",
    "steps": "process reward models",
    "classification": "classification (`task: sequence_classification`)",
}

# Takes the record and the shape that fits.
Reader = Callable[[Record, tuple[str, ...]], Example]


@dataclass(frozen=True)
class Format:
    """A record is of this format if it has all fields of one of ``shapes``; the lowest ``tier`` that fits wins.

    ``read`` takes the record and the shape that fits. ``judge``, of a mark on any conversation, also takes the
    conversation. ``when`` looks at values where fields alone cannot tell. ``copies`` are fields that often repeat the
    record in another form, and are passed over. ``fields`` is printed in place of the list of shapes.
    """

    tier: int
    purpose: Purpose
    shapes: tuple[tuple[str, ...], ...]
    _: KW_ONLY
    optional: tuple[str, ...]
    what: str
    example: dict[str, object]
    read: Reader | None = None
    judge: Callable[[Conversation, Record, str], LabelledAnswer] | None = None
    when: Callable[[Mapping[str, object], tuple[str, ...]], bool] | None = None
    copies: tuple[str, ...] = ()
    fields: str = ""

    @property
    def required(self) -> tuple[str, ...]:
        """The fields of the most usual shape."""
        return self.shapes[0]

    def names(self) -> tuple[str, ...]:
        """Every field of the format, each once."""
        return tuple(dict.fromkeys([*(name for shape in self.shapes for name in shape), *self.optional]))

    def listed(self) -> str:
        """The fields as text: ``instruction, output; optional input``."""
        text = self.fields or " or ".join(", ".join(shape) for shape in self.shapes)
        return f"{text}; optional {', '.join(self.optional)}" if self.optional else text


TURNS, PAIRS = 4, 5  # the tiers of conversations
_SYSTEM = ("system", "system_prompt")
_LISTED = ("tools", *_SYSTEM)
_PAIR = ("history", "tools", *_SYSTEM)
_QUESTIONS = (
    ("question", "answer"), ("question", "response"), ("question", "solution"), ("query", "response"),
    ("query", "answer"), ("prompt", "response"), ("prompt", "answer"), ("prompt", "output"), ("input", "output"),
    ("input", "response"), ("input", "answer"), ("input", "target"), ("problem", "solution"), ("problem", "answer"),
    ("ask", "answer"), ("q", "a"), ("content", "summary"), ("text", "summary"), ("document", "summary"),
    ("dialogue", "summary"), ("article", "highlights"),
)  # fmt: skip
_USER, _GOOD, _BAD = (
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "assistant", "content": "3"},
)


# A corpus often names the kind of its texts. In these columns that is no class.
_METADATA = {"category", "class", "target", "quality", "类别"}
_CORPORA = (("text",), ("content",), ("文本",))
_CLASSES = tuple(
    (*texts, label) for texts in TEXTS for label in LABELS if not (texts in _CORPORA and label in _METADATA)
)


def _is_verdict(fields: Mapping[str, object], shape: tuple[str, ...]) -> bool:
    return shape == ("kto_tag",) or judged.verdict(fields[shape[0]]) is not None


def _is_list(fields: Mapping[str, object], shape: tuple[str, ...]) -> bool:
    return isinstance(fields[shape[1]], list)


def _is_class(fields: Mapping[str, object], shape: tuple[str, ...]) -> bool:
    return isinstance(fields[shape[-1]], (str, int, float)) and all(isinstance(fields[x], str) for x in shape[:-1])


_OWN: dict[str, Format] = {
    # -- the record itself says which tokens are learned
    "tokenised": Format(
        tier=0, purpose="sft", shapes=(("input_ids", "labels"),), optional=("attention_mask",),
        what="token ids as they stand; learned where the label is the id, not where it is -100",
        example={"input_ids": [1, 5, 9, 2], "labels": [-100, -100, 9, 2]},
        read=verbatim.read_tokenised,
    ),
    "segments": Format(
        tier=0, purpose="sft", shapes=(("segments",),), optional=(),
        what="axolotl's: pieces of text, learned where `label` is true; control tokens in the text count",
        example={"segments": [{"label": False, "text": "1+1?"}, {"label": True, "text": "2</s>"}]},
        read=verbatim.read_segments,
    ),
    # -- answers were judged; supervised training never reads these
    "steps": Format(
        tier=1, purpose="steps", shapes=(("prompt", "completions", "labels"),), optional=_SYSTEM,
        what="the steps of an answer, each right or wrong",
        example={"prompt": "1+1+1?", "completions": ["1+1=2", "2+1=4"], "labels": [True, False]},
        read=judged.read_steps,
    ),
    "preference": Format(
        tier=1, purpose="preference", shapes=(("chosen", "rejected"),), optional=(*judged.PROMPTS, *_PAIR),
        what="a better and a worse answer: text, a message, or messages that may begin with the prompt; hh-rlhf's "
        "dialogues in one text",
        example={"prompt": "1+1?", "chosen": "2", "rejected": "3"},
        read=judged.read_preference,
    ),
    "rejected_response": Format(
        tier=1, purpose="preference", optional=_PAIR,
        shapes=(
            ("messages", "rejected_response"), ("messages", "rejected_messages"),
            ("query", "response", "rejected_response"),
        ),
        what="ms-swift's: a good conversation, and a worse end of it",
        example={"messages": [_USER, _GOOD], "rejected_response": "3"},
        read=judged.read_rejected,
    ),
    "two_responses": Format(
        tier=1, purpose="preference", shapes=(("question", "response_j", "response_k"),), optional=_PAIR,
        what="stack_exchange_paired: the first response is the better one",
        example={"question": "1+1?", "response_j": "2", "response_k": "3"},
        read=judged.read_two_responses,
    ),
    "kto": Format(
        tier=2, purpose="kto", shapes=(("label",), ("kto_tag",)), optional=(),
        fields="label or kto_tag, beside the fields of a conversation",
        what="a conversation of any format whose end is good (true) or bad (false)",
        example={"prompt": "1+1?", "completion": "3", "label": False},
        judge=judged.judge, when=_is_verdict,
    ),
    "ranked": Format(
        tier=3, purpose="ranked", shapes=(("instruction", "output"),), optional=("input", *_PAIR),
        what="alpaca with a list of answers, the best first",
        example={"instruction": "1+1?", "output": ["2", "3"]},
        read=judged.read_ranked, when=_is_list,
    ),
    # -- lists of turns
    "messages": Format(
        tier=TURNS, purpose="sft", shapes=(("messages",),), optional=_LISTED,
        what="turns of `role`, `content`, `tool_calls`?; `train`/`loss`/`weight`/`loss_scale`? say whether, and with "
        "what weight, a turn is learned",
        example={"messages": [_USER, _GOOD]},
        read=turns.read_turns,
    ),
    "sharegpt": Format(
        tier=TURNS, purpose="sft", shapes=(("conversations",),), optional=_LISTED,
        what="turns of `from`, `value`; `function_call` becomes an assistant's tool call",
        example={"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
        read=turns.read_turns,
    ),
    "conversation": Format(
        tier=TURNS, purpose="sft", shapes=(("conversation",),), optional=_LISTED,
        what="ms-swift's exchanges of `human`, `assistant` (XTuner: `input`, `output`)",
        example={"conversation": [{"human": "1+1?", "assistant": "2"}]},
        read=turns.read_turns,
    ),
    # -- one question, one answer; `history` holds earlier ones, `[["question", "answer"], ...]`
    "alpaca": Format(
        tier=PAIRS, purpose="sft", shapes=(("instruction", "output"), ("instruction", "target")),
        optional=("input", *_PAIR), copies=("text", "prompt"),
        what="`instruction` + newline + `input`, after the history's turns",
        example={"instruction": "Add.", "input": "1+1", "output": "2"},
        read=answers.read_alpaca,
    ),
    "dolly": Format(
        tier=PAIRS, purpose="sft", shapes=(("instruction", "context", "response"),),
        optional=("input", *_PAIR), copies=("text", "prompt"),
        what="`instruction` + newline + `context`",
        example={"instruction": "Add.", "context": "1+1", "response": "2"},
        read=answers.read_instruct,
    ),
    "instruct": Format(
        tier=PAIRS, purpose="sft", shapes=(("instruction", "response"),),
        optional=("context", "input", *_PAIR), copies=("text", "prompt"),
        what="torchtune's: `instruction` + newline + `input`",
        example={"instruction": "1+1?", "response": "2"},
        read=answers.read_instruct,
    ),
    "prompt_completion": Format(
        tier=PAIRS, purpose="sft", shapes=(("prompt", "completion"),), optional=_PAIR, copies=("text",),
        what="both text, or both lists of messages; answers inside the prompt are not learned",
        example={"prompt": "1+1?", "completion": "2"},
        read=answers.read_prompt_completion,
    ),
    "question_answer": Format(
        tier=PAIRS, purpose="sft", shapes=_QUESTIONS, optional=_PAIR,
        fields="question, answer (or " + ", ".join("/".join(pair) for pair in _QUESTIONS[1:]) + ")",
        what="one question, one answer",
        example={"question": "1+1?", "answer": "2"},
        read=answers.read_pair,
    ),
    # -- texts
    "classification": Format(
        tier=6, purpose="classification", shapes=_CLASSES, optional=(),
        fields="a text or a pair of texts, and a label; see Classification",
        what="a text and its class; `load_labelled` reads whole files",
        example={"sentence": "Splendid.", "label": "positive"},
        read=answers.read_classified, when=_is_class,
    ),
    "text": Format(
        tier=7, purpose="sft", shapes=(("text",),), optional=(),
        what="text to learn as it stands", example={"text": "1+1=2"}, read=answers.read_text,
    ),
}  # fmt: skip
FORMATS: Registry[Format] = Registry("format", _OWN)

# Other toolkits' names of formats.
ALIASES = {
    "openai": "messages",
    "chat": "messages",
    "chatml": "messages",
    "swift": "conversation",
    "firefly": "conversation",
    "xtuner": "conversation",
    "prompt/completion": "prompt_completion",
    "question/answer": "question_answer",
    "gsm8k": "question_answer",
    "query/response": "question_answer",
    "input_output": "segments",
    "template_free": "segments",
    "tokenized": "tokenised",
    "pretokenized": "tokenised",
    "dpo": "preference",
    "hh_rlhf": "preference",
    "stack_exchange_paired": "two_responses",
    "prm": "steps",
    "pretrain": "text",
    "completion": "text",
}

# Other spellings of fields. A record with two spellings of one field is refused.
SPELLINGS = {
    "指令": "instruction",
    "输入": "input",
    "输出": "output",
    "问题": "question",
    "提问": "question",
    "问": "question",
    "回答": "answer",
    "答案": "answer",
    "答": "answer",
    "内容": "content",
    "摘要": "summary",
    "文本": "text",
    "标签": "label",
    "对话": "conversations",
    "历史": "history",
}

# These fields change what a record means. If its format does not read one that holds something, the record is refused
# with this advice.
_MEDIA = "Weft reads text only. Remove the field, or the records that need it."
_LEAVE_OUT = ", or name the format to leave it out (`data_format: {format}`)."
_TO_PROMPT = (
    'It seems to belong to the question. Write `columns: {{prompt: "{{{name}}}\\n{{{question}}}", completion: '
    "{answer}}}`" + _LEAVE_OUT
)
_AFTER = _TO_PROMPT.replace("{{{name}}}\\n{{{question}}}", "{{{question}}}\\n{{{name}}}")
_CHOICES = (
    'The choices seem to belong to the question. Write `columns: {{prompt: "{{{question}}}\\nA. {{A}}\\nB. {{B}}", '
    "completion: {answer}}}` with all of them" + _LEAVE_OUT
)
_WORSE = (
    "It holds answers that were found worse, but the record fits no format of pairs. To learn the other answers alone, "
    "name the format (`data_format: {format}`)."
)
_VERDICT = (
    "If it marks answers as good or bad, write true or false, and train on such labels (KTO); if it is something else, "
    "name the format (`data_format: {format}`)."
)
UNREAD = {
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), _MEDIA),
    "chat_template_kwargs": "Variables of the template are not read from records. Remove the field.",
    **dict.fromkeys(("instruction", "context", "passage"), _TO_PROMPT),
    **dict.fromkeys(("choices", "options"), _AFTER),
    "B": _CHOICES,
    **dict.fromkeys(("rejected", "rejected_response", "rejected_messages"), _WORSE),
    "label": _VERDICT,
}


def known_formats(purpose: Purpose = "any") -> str:
    """List the formats that a caller with this purpose reads, one a line: name, fields, meaning."""
    chosen = {name: entry for name, entry in FORMATS.items() if entry.purpose in ACCEPTS[purpose]}
    return "\n".join(f"  {name} ({entry.listed()}): {entry.what}" for name, entry in chosen.items())


def formats_table() -> str:
    """The same as a table for docs/data.md: ``python -c "from weft.data import formats_table as t; print(t())"``."""
    rows = ["| format | for | fields | what |", "|---|---|---|---|"]
    for name, entry in FORMATS.items():
        rows.append(f"| `{name}` | {entry.purpose} | {entry.listed()} | {entry.what} |")
    return "\n".join(rows)
