"""Render conversations to token ids with a loss weight per token.

A conversation is rendered by the tokenizer's chat template to one string, which is cut at the ends of the learned
answers; every piece is tokenised on its own. So a learned answer follows exactly the ids that ``prompt_ids`` gives at
generation time, whatever the tokenizer would have merged across the seam.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from weft.data.examples import SFT, Conversation, Message, PlainText
from weft.data.tokens import SOFT, Encoder
from weft.data.verbatim import token_weights
from weft.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["answers", "last_answer", "all"]
Task = Literal["causal_lm", "seq2seq"]

# For tokenizers without a template of their own: Alpaca's headings, extended to several turns, tools and results.
PLAIN_TEMPLATE = """\
{%- if tools %}{{ '### Tools:' }}{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}{% endif %}
{%- for message in messages %}
{%- if tools or not loop.first %}{{ '\\n\\n' }}{% endif %}
{%- if message.role == 'system' %}{{ message.content }}
{%- elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content }}
{%- elif message.role == 'tool' %}{{ '### Result:\\n' + message.content }}
{%- else %}{{ '### Response:\\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{ '### Call:\\n' + (call.function | tojson) }}{% endfor %}
{{- eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"""

_AFTER_ANSWER = re.compile(f"(?:\\s|{re.escape(SOFT)})*$")


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids and, for each, the loss weight of PREDICTING it: ``weights[i]`` scales the loss of ``input_ids[i]``
    given ``input_ids[:i]``. Equal lengths; ``weights[0]`` is 0.0, for nothing predicts the first token.

    ``slots``: places in ``input_ids`` before which a slot for virtual tokens stands, ascending, several may be equal
    (in a sample without learned tokens also ``len(input_ids)``: after the last).
    ``answer``: the place where the last learned answer begins, None for plain text and where no turn is learned.
    ``label``: the class, and ``token_types`` the segment of each token (empty: all 0), of classification data.
    ``target_ids``: what a sequence-to-sequence model is to write. With either of these, ``weights`` are all 0.0.
    """

    input_ids: list[int]
    weights: list[float]
    source: str
    slots: tuple[int, ...] = ()
    answer: int | None = None
    label: int | None = None
    target_ids: tuple[int, ...] = ()
    token_types: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """What generation starts from: token ids, and the places of slots, each 0 … len(ids), as in ``Sample.slots``."""

    ids: list[int]
    slots: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Span:
    """Characters [start, end) of a rendering: what a turn (named as in "turn 2 of 4") adds to its own prompt."""

    start: int
    end: int
    trained: bool
    turn: str


@dataclass(slots=True)
class _Draft:
    """A sample in the making; ``answers`` are the places where learned answers begin."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)

    def add(self, ids: list[int], weight: float, slots: Iterable[int] = ()) -> None:
        """Append; ``slots`` count from the beginning of ``ids``."""
        self.slots += [len(self.ids) + slot for slot in slots]
        self.ids += ids
        self.weights += [weight] * len(ids)

    def prepend(self, ids: list[int]) -> None:
        self.ids, self.weights = ids + self.ids, [0.0] * len(ids) + self.weights
        self.slots = [slot + len(ids) for slot in self.slots]
        self.answers = [place + len(ids) for place in self.answers]


class Renderer:
    """Renders conversations and text for one tokenizer. Holds no state that changes; see docs/data.md.

    ``chat_template`` (Jinja text) replaces the tokenizer's own; ``template_kwargs`` go to the template as variables.
    ``train_on``: "answers" (every assistant turn), "last_answer", or "all" (every token but the first);
    a message's own ``train`` wins. ``max_length`` is in tokens; longer samples are an error unless ``truncate``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        train_on: TrainOn = "answers",
        max_length: int | None = None,
        truncate: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if train_on not in get_args(TrainOn):
            known = get_args(TrainOn)
            hint = nearest(str(train_on), known)
            raise UserError(f"train_on is {train_on!r}; expected one of {', '.join(known)}.{hint}")
        if max_length is not None and max_length < 2:
            raise UserError(f"max_length is {max_length}; expected 2 tokens or more (the first is never learned).")
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer)
        self.chat_template = chat_template or (None if tokenizer.chat_template else PLAIN_TEMPLATE)
        self.train_on, self.max_length, self.truncate = train_on, max_length, truncate
        self.template_kwargs = dict(template_kwargs or {})
        self._bare = not chat_template and not tokenizer.chat_template

    # -- public

    @property
    def eos_token_id(self) -> int:
        """The token that ends an answer. Raises UserError where there is none (asked for only where one is needed)."""
        eos = self.tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise UserError(
                "the tokenizer has no end-of-sequence token, so a model could not learn to stop. Set `eos_token` in "
                "its tokenizer_config.json to the token that ends a text (GPT-2: <|endoftext|>)."
            )
        return eos

    def prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] = (),
        task: Task = "causal_lm",
        source: str = "the conversation",
    ) -> Prompt:
        """Ids and slots to generate the next assistant turn from. Raises UserError as ``sample`` does."""
        if task == "seq2seq":
            return self._source(messages, tools, source)
        draft = self._stream(messages, tools, generation=True, source=source)
        return Prompt(draft.ids, tuple(draft.slots))

    def prompt_ids(self, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """``prompt(messages).ids`` [prompt length]."""
        return self.prompt(messages, tools=tools).ids

    def seq2seq_prompt(self, messages: Sequence[Message]) -> list[int]:
        """``prompt(messages, task="seq2seq").ids``: the encoder's input."""
        return self.prompt(messages, task="seq2seq").ids

    def text_ids(self, text: str) -> list[int]:
        """Text as it stands, after the tokenizer's BOS if it has one; no end-of-sequence token."""
        ids, _ = self.encoder.encode(self.encoder.guard(text), first=True)
        return [*self.encoder.missing_head([]), *ids]

    def sample(self, example: SFT) -> Sample:
        """Ids and loss weights of one example.

        Raises UserError (naming the example's line) for a template that fails or does not extend its own prompt, for a
        sample longer than ``max_length``, and for one of which nothing would be learned.
        """
        if isinstance(example, PlainText):
            draft = _Draft()
            draft.add([*self.text_ids(example.text), self.eos_token_id], 1.0)
        elif not isinstance(example, Conversation):
            draft = _Draft(*token_weights(example, self.encoder))
        else:
            draft = self._stream(example.messages, example.tools, generation=False, source=example.source)
        draft.weights[0] = 0.0
        return self._fit(draft, example.source)

    def seq2seq(self, example: SFT) -> Sample:
        """The last answer as ``target_ids``, what comes before it as ``input_ids``; see docs/data.md.

        Raises UserError (naming the example's line) for plain text, for an example without a learned answer after
        another turn, and for an input or an answer longer than ``max_length``.
        """
        place = example.source
        if isinstance(example, PlainText):
            raise UserError(f"{place}: plain text has no answer to write; seq2seq needs a question and an answer.")
        if not isinstance(example, Conversation):
            raise UserError(f"{place}: {type(example).__name__} holds no question and answer, which seq2seq needs.")
        messages = example.messages
        learned = [i for i, turn in enumerate(messages) if i and turn.role == "assistant" and turn.train is not False]
        if not learned:
            raise UserError(f"{place}: no assistant turn after another turn is learned, which seq2seq needs.")
        answer = messages[learned[-1]]
        if answer.tool_calls:
            raise UserError(f"{place}: the last answer is a tool call, which seq2seq cannot write. Remove the record.")
        prompt = self._source(messages[: learned[-1]], example.tools, place)
        # Special tokens typed in the answer are split like other text; the tokenizer still adds its own around it.
        options = {"split_special_tokens": True, "verbose": False}
        target = list(self.tokenizer(text_target=answer.content, **options)["input_ids"])
        target += [] if self.eos_token_id in target else [self.eos_token_id]
        ids, slots = self.cut(prompt.ids, place, "the input"), prompt.slots
        if len(ids) < len(prompt.ids):
            kept = len(ids) - len(self.encoder.tail)
            ids, slots = ids[:kept] + self.encoder.tail, tuple(slot for slot in slots if slot < kept)
        target = self.cut(target, place, "the answer")
        return Sample(ids, [0.0] * len(ids), place, slots=slots, target_ids=tuple(target))

    def cut(self, ids: list[int], source: str, what: str = "the record") -> list[int]:
        """``ids`` up to ``max_length``; longer ones are a UserError unless ``truncate``."""
        limit = self.max_length
        if limit is None or len(ids) <= limit:
            return ids
        if not self.truncate:
            raise UserError(
                f"{source}: {what} is {len(ids)} tokens long, max_length is {limit}. Raise `max_length`, "
                "set `truncate: true` to cut the end off long records, or remove this one."
            )
        return ids[:limit]

    # -- lengths

    def _fit(self, draft: _Draft, source: str) -> Sample:
        if not any(draft.weights):
            raise UserError(
                f"{source}: nothing of this record would be learned (train_on: {self.train_on}). It needs an assistant "
                "turn that follows another turn and is not marked as untrained."
            )
        ids = self.cut(draft.ids, source)
        weights = draft.weights[: len(ids)]
        if not any(weights):
            raise UserError(
                f"{source}: cut to max_length {self.max_length}, this record keeps no token to learn: its prompt alone "
                "is that long. Raise `max_length` or remove the record."
            )
        # A slot stands before a token, so one whose token was cut off (or never was) goes too.
        slots = tuple(slot for slot in draft.slots if slot < len(ids))
        return Sample(ids, weights, source, slots, max((at for at in draft.answers if at < len(ids)), default=None))

    # -- conversations

    def _stream(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, generation: bool, source: str
    ) -> _Draft:
        """The one path of training and generation: equal messages give equal ids up to a learned answer."""
        if not messages:
            raise UserError(f"{source}: there are no messages.")
        turns = [self._turn(message) for message in messages]
        schemas = [self.encoder.guard(tool) for tool in tools]
        text = self._render(turns, schemas, generation, source)
        base = 1.0 if self.train_on == "all" else 0.0
        draft, at = _Draft(), 0
        for span in self._spans(messages, turns, schemas, text, generation, source):
            ids, slots = self.encoder.encode(text[at : span.start], first=at == 0)
            draft.add(ids, base, slots)
            if span.trained:
                draft.answers.append(len(draft.ids))
                self._add_answer(draft, text, span, base, source)
            else:
                ids, slots = self.encoder.encode(text[span.start : span.end], first=span.start == 0)
                draft.add(ids, 0.0, slots)
            at = span.end
        ids, slots = self.encoder.encode(text[at:], first=at == 0)
        draft.add(ids, base, slots)
        draft.prepend(self.encoder.missing_head(draft.ids))
        return draft

    def _add_answer(self, draft: _Draft, text: str, span: _Span, base: float, source: str) -> None:
        """Add a learned answer up to its end, and what the template writes after that."""
        answer, eos = text[span.start : span.end], self.eos_token_id
        ids, slots = self.encoder.encode(answer, first=span.start == 0)
        if eos in ids:  # only the template can have written it: contents are guarded
            stop = ids.index(eos) + 1
            inside = [slot for slot in slots if slot < stop]
            draft.add(ids[:stop], 1.0)
            draft.add(ids[stop:], base, [slot - stop for slot in slots])
        else:
            end = _AFTER_ANSWER.search(answer).start()  # type: ignore[union-attr]
            ids, inside = self.encoder.encode(answer[:end], first=False)
            draft.add([*ids, eos], 1.0)
            ids, slots = self.encoder.encode(answer[end:], first=False)
            draft.add(ids, base, slots)
        if inside:
            raise UserError(
                f"{source}: the chat template puts {SOFT} inside the answer of {span.turn}, where the model writes: at "
                "generation it would not stand there. Put it before the answer, also under `add_generation_prompt`."
            )

    def _source(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], source: str) -> Prompt:
        """The input of a sequence-to-sequence model, in the special tokens that its tokenizer puts around a text."""
        if not messages:
            raise UserError(f"{source}: there are no messages.")
        if self._bare:  # such models were trained on bare text, not on headings
            if tools or any(message.tool_calls for message in messages):
                raise UserError(f"{source}: tools need a `chat_template` that renders them; the tokenizer has none.")
            ordered = sorted(messages, key=lambda message: message.role != "system")
            text = self.encoder.guard("\n".join(message.content for message in ordered))
        else:
            turns = [self._turn(message) for message in messages]
            text = self._render(turns, [self.encoder.guard(tool) for tool in tools], True, source)
        ids, slots = self.encoder.encode(text, first=True)
        head = self.encoder.missing_head(ids, bos_only=False)
        return Prompt(head + ids + self.encoder.missing_tail(ids), tuple(slot + len(head) for slot in slots))

    def _spans(
        self,
        messages: Sequence[Message],
        turns: list[dict[str, Any]],
        schemas: list[Any],
        text: str,
        generation: bool,
        source: str,
    ) -> list[_Span]:
        """Where the turns whose weight differs from their surroundings lie in ``text``, in order."""
        spans = []
        for index, trained in self._marked(messages, generation, source):
            turn = f"turn {index + 1} of {len(messages)}"
            prompt = self._render(turns[:index], schemas, True, source) if index else ""
            whole = index + 1 == len(turns) and not generation
            closed = text if whole else self._render(turns[: index + 1], schemas, False, source)
            if not (text.startswith(closed) and closed.startswith(prompt)):
                raise UserError(
                    f"{source}: the chat template is not prefix-preserving at {turn}: the conversation up to there, "
                    "rendered to generate that turn, is not how the whole conversation begins. Training would differ "
                    "from generation. Use `train_on: last_answer`, `template_kwargs` that switch the template's "
                    "thinking mode, or another `chat_template`."
                )
            answer = text[len(prompt) : len(closed)]
            for call in turns[index].get("tool_calls", ()):
                if call["function"]["name"] not in answer:
                    raise UserError(
                        f"{source}: the chat template does not render the tool call of {turn}. Use a `chat_template` "
                        "that supports tools."
                    )
            spans.append(_Span(len(prompt), len(closed), trained, turn))
        return spans

    def _marked(self, messages: Sequence[Message], generation: bool, source: str) -> list[tuple[int, bool]]:
        """Turns to be told apart from the text around them: (index, whether it is learned)."""
        default = self.train_on == "all"
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        last = None if generation or not answers else answers[-1]
        marked = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                if message.train is not None and message.train is not default:
                    raise UserError(
                        f"{source}: turn {index + 1} ({message.role}) asks for `train: {str(message.train).lower()}`; "
                        f"with `train_on: {self.train_on}` only assistant turns can be switched one by one."
                    )
                continue
            trained = message.train
            if trained and index == 0:
                raise UserError(f"{source}: turn 1 is an assistant turn to be trained, but nothing comes before it.")
            if trained is None:  # a greeting has no prompt, so it cannot be an answer
                trained = index > 0 and (self.train_on != "last_answer" or index == last)
                if index == 0:
                    continue
            if trained or default:
                marked.append((index, trained))
        return marked

    def _turn(self, message: Message) -> dict[str, Any]:
        turn: dict[str, Any] = {"role": message.role, "content": self.encoder.guard(message.content)}
        if message.tool_calls:
            turn["tool_calls"] = [self.encoder.guard(call) for call in message.tool_calls]
        return turn

    def _render(self, turns: list[dict[str, Any]], schemas: list[Any], generation: bool, source: str) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                tools=schemas or None,
                chat_template=self.chat_template,
                add_generation_prompt=generation,
                tokenize=False,
                **self.template_kwargs,
            )
        except Exception as error:  # the template is a program of the user's: whatever it raises is about their data
            raise UserError(f"{source}: the chat template refuses this conversation: {error}.") from error
        return str(text)
