"""Render conversations to token ids with a loss weight per token.

A conversation is rendered by the tokenizer's chat template to one string, which is cut at the ends of the learned
answers; every piece is tokenised on its own. So a learned answer follows exactly the ids that ``prompt_ids`` gives at
generation time, whatever the tokenizer would have merged across the seam.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from weft.data.formats import Conversation, Message, PlainText
from weft.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["answers", "last_answer", "all"]

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

# Two of Unicode's noncharacters enclose the number of a piece of text that must not become a control token.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_GUARDED = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_ANCHOR = "\n"


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids and, for each, the loss weight of PREDICTING it: ``weights[i]`` scales the loss of ``input_ids[i]``
    given ``input_ids[:i]``. Equal lengths; ``weights[0]`` is 0.0, for nothing predicts the first token."""

    input_ids: list[int]
    weights: list[float]
    source: str
    slots: tuple[int, ...] = ()
    answer: int | None = None
    label: int | None = None
    target_ids: tuple[int, ...] = ()
    token_types: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Span:
    """Characters [start, end) of a rendering: what turn ``turn`` adds to its own generation prompt."""

    start: int
    end: int
    trained: bool


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
        eos = tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise UserError(
                "the tokenizer has no end-of-sequence token, so a model could not learn to stop. Set `eos_token` in "
                "its tokenizer_config.json to the token that ends a text (GPT-2: <|endoftext|>)."
            )
        self.tokenizer = tokenizer
        self.eos_token_id: int = eos
        self.chat_template = chat_template or (None if tokenizer.chat_template else PLAIN_TEMPLATE)
        self.train_on, self.max_length, self.truncate = train_on, max_length, truncate
        self.template_kwargs = dict(template_kwargs or {})
        self._controls = _control_texts(tokenizer)
        self._control = re.compile("|".join(re.escape(text) for text in self._controls))
        bos = tokenizer.bos_token_id
        bare, usual = self._tokens("a"), list(tokenizer("a", verbose=False)["input_ids"])
        # Measured, for `add_bos_token` is False on fast tokenizers whose post-processor adds it all the same.
        self._automatic_bos = [bos] if isinstance(bos, int) and usual[: 1 + len(bare)] == [bos, *bare] else []
        # Sentencepiece-like tokenizers put a space before whatever they are given, which is wrong in mid-text.
        anchor, anchored = self._tokens(_ANCHOR), self._tokens(_ANCHOR + "a")
        prefixes = bool(anchor) and anchored[: len(anchor)] == anchor and anchored[len(anchor) :] != bare
        self._anchor = anchor if prefixes else []

    # -- public

    def prompt_ids(self, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Ids [prompt length] to generate the next assistant turn from. Raises UserError as ``sample`` does."""
        return self._stream(messages, tools, generation=True, source="the conversation")[0]

    def sample(self, example: Conversation | PlainText) -> Sample:
        """Ids and loss weights of one example.

        Raises UserError (naming the example's line) for a template that fails or does not extend its own prompt, for a
        sample longer than ``max_length``, and for one of which nothing would be learned.
        """
        if isinstance(example, PlainText):
            ids = [*self._bos([]), *self._encode(self._guard(example.text), first=True), self.eos_token_id]
            weights = [1.0] * len(ids)
        else:
            ids, weights = self._stream(example.messages, example.tools, generation=False, source=example.source)
        weights[0] = 0.0
        return self._fit(ids, weights, example.source)

    # -- lengths

    def _fit(self, ids: list[int], weights: list[float], source: str) -> Sample:
        if not any(weights):
            raise UserError(
                f"{source}: nothing of this record would be learned (train_on: {self.train_on}). It needs an assistant "
                "turn that follows another turn and is not marked as untrained."
            )
        limit = self.max_length
        if limit is not None and len(ids) > limit:
            if not self.truncate:
                raise UserError(
                    f"{source}: the record is {len(ids)} tokens long, max_length is {limit}. Raise `max_length`, "
                    "set `truncate: true` to cut the end off long records, or remove this one."
                )
            ids, weights = ids[:limit], weights[:limit]
            if not any(weights):
                raise UserError(
                    f"{source}: cut to max_length {limit}, this record keeps no token to learn: its prompt alone is "
                    "that long. Raise `max_length` or remove the record."
                )
        return Sample(ids, weights, source)

    # -- conversations

    def _stream(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, generation: bool, source: str
    ) -> tuple[list[int], list[float]]:
        """The one path of training and generation: equal messages give equal ids up to a learned answer."""
        if not messages:
            raise UserError(f"{source}: there are no messages.")
        turns = [self._turn(message) for message in messages]
        schemas = [self._guard(tool) for tool in tools]
        text = self._render(turns, schemas, generation, source)
        base = 1.0 if self.train_on == "all" else 0.0
        ids: list[int] = []
        weights: list[float] = []

        def add(tokens: list[int], weight: float) -> None:
            ids.extend(tokens)
            weights.extend([weight] * len(tokens))

        at = 0
        for span in self._spans(messages, turns, schemas, text, generation, source):
            add(self._encode(text[at : span.start], first=at == 0), base)
            answer = text[span.start : span.end]
            tokens = self._encode(answer, first=span.start == 0)
            if not span.trained:
                add(tokens, 0.0)
            elif self.eos_token_id in tokens:  # only the template can have written it: contents are guarded
                stop = tokens.index(self.eos_token_id) + 1
                add(tokens[:stop], 1.0)
                add(tokens[stop:], base)
            else:
                body = answer.rstrip()
                add([*self._encode(body, first=False), self.eos_token_id], 1.0)
                add(self._encode(answer[len(body) :], first=False), base)
            at = span.end
        add(self._encode(text[at:], first=at == 0), base)
        bos = self._bos(ids)
        return bos + ids, [0.0] * len(bos) + weights

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
            spans.append(_Span(len(prompt), len(closed), trained))
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
        turn: dict[str, Any] = {"role": message.role, "content": self._guard(message.content)}
        if message.tool_calls:
            turn["tool_calls"] = [self._guard(call) for call in message.tool_calls]
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

    # -- tokens

    def _bos(self, ids: list[int]) -> list[int]:
        """The beginning-of-sequence token, where the tokenizer adds one and ``ids`` does not begin with it already."""
        return [] if ids[:1] == self._automatic_bos else self._automatic_bos

    def _guard(self, value: Any) -> Any:
        """Replace what reads like a control token, at any depth, by a mark that the template passes through."""
        if isinstance(value, str):
            return self._control.sub(lambda found: f"{_OPEN}{self._controls[found[0]]}{_CLOSE}", value)
        if isinstance(value, dict):
            return {self._guard(key): self._guard(item) for key, item in value.items()}
        return [self._guard(item) for item in value] if isinstance(value, list) else value

    def _encode(self, text: str, *, first: bool) -> list[int]:
        """Ids of one piece of a rendering; ``first`` if it begins the sequence. Marks become ordinary tokens again."""
        ids: list[int] = []
        texts = list(self._controls)
        for number, piece in enumerate(_GUARDED.split(text)):
            if not piece:
                continue
            literal = number % 2 == 1
            ids += self._piece(texts[int(piece)] if literal else piece, literal=literal, first=first and not ids)
        return ids

    def _piece(self, text: str, *, literal: bool, first: bool) -> list[int]:
        if self._anchor and not first:
            ids = self._tokens(_ANCHOR + text, literal)
            if ids[: len(self._anchor)] == self._anchor:
                return ids[len(self._anchor) :]
        return self._tokens(text, literal)

    def _tokens(self, text: str, literal: bool = False) -> list[int]:
        options = {"split_special_tokens": True} if literal else {}
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])


def _control_texts(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Texts that the tokenizer would turn into control tokens, numbered, longest first (so that no prefix wins)."""
    texts = {str(text) for text in tokenizer.all_special_tokens}
    texts |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts = {text for text in texts if text} | {_OPEN}
    return {text: number for number, text in enumerate(sorted(texts, key=lambda text: (-len(text), text)))}
