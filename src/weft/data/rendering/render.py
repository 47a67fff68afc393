"""Render conversations to token ids with a loss weight per token.

A conversation is rendered by the tokenizer's chat template to one string, which is cut at the ends of the learned
answers; every piece is tokenised on its own. So a learned answer follows exactly the ids that ``prompt_ids`` gives at
generation time, whatever the tokenizer would have merged across the seam.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, get_args

from weft.data.formats.examples import SFT, Conversation, Message, PlainText
from weft.data.formats.verbatim import token_weights
from weft.data.rendering.explain import Explanation, explain
from weft.data.rendering.fingerprint import fingerprint
from weft.data.rendering.sample import Draft, Origin, Prompt, Sample, TooLongError
from weft.data.rendering.seq2seq import seq2seq_sample, seq2seq_source
from weft.data.rendering.templates import find_template
from weft.data.rendering.tokens import SOFT, Encoder, Known
from weft.data.rendering.transcript import Script, Span, TrainOn, Turns
from weft.data.rendering.truncation import Documents, Limit, Truncation, fit, joined, windows, without_oldest_round
from weft.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Task = Literal["causal_lm", "seq2seq"]
Example = SFT
Outcome = tuple[Sample, ...] | UserError  # of one example: its samples (none if it was dropped), or what is wrong

_AFTER_ANSWER = re.compile(f"(?:\\s|{re.escape(SOFT)})*$")
_CHUNK = 512


class Renderer:
    """Renders conversations and text for one tokenizer. Holds no state that changes; see docs/data.md.

    ``chat_template`` (a name, a ``.jinja`` file or Jinja text) replaces the tokenizer's own; ``template_kwargs`` go to
    it as variables. ``train_on``: "answers" (every assistant turn), "last_answer", or "all" (every token but the
    first); a message's own ``train`` wins. ``max_length`` is in tokens; ``truncation`` says what becomes of longer
    samples (``truncate=True`` is "right"), ``documents`` and ``window_overlap`` what becomes of long plain text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        allow_unknown_markers: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        train_on: TrainOn = "answers",
        max_length: int | None = None,
        truncation: Truncation = "refuse",
        truncate: bool | None = None,
        documents: Documents = "separate",
        window_overlap: int = 1,
    ) -> None:
        if train_on not in get_args(TrainOn):
            known = get_args(TrainOn)
            hint = nearest(str(train_on), known)
            raise UserError(f"train_on is {train_on!r}; expected one of {', '.join(known)}.{hint}")
        if truncate is not None:
            if truncation not in ("refuse", "right"):
                raise UserError(f"truncate is an older word for truncation, which is {truncation!r}. Drop `truncate`.")
            truncation = "right" if truncate else truncation
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer)
        self.template = find_template(chat_template, tokenizer, self.encoder, allow_unknown_markers)
        self.chat_template = None if self.template.origin == "own" else self.template.text
        self.template_kwargs = dict(template_kwargs or {})
        self.train_on = train_on
        self.limit = Limit(max_length, truncation, documents, window_overlap)
        self.turns = Turns(tokenizer, self.encoder, self.chat_template, self.template_kwargs, train_on)

    # -- what it is set to

    @property
    def max_length(self) -> int | None:
        """The longest sample in tokens; None: any."""
        return self.limit.max_length

    @property
    def truncation(self) -> Truncation:
        """What becomes of longer samples."""
        return self.limit.truncation

    @property
    def eos_token_id(self) -> int:
        """The token that ends an answer; callers ask only where they need one.

        Raises:
            UserError: There is none.
        """
        eos = self.tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise UserError(
                "the tokenizer has no end-of-sequence token, so a model could not learn to stop. Set `eos_token` in "
                "its tokenizer_config.json to the token that ends a text (GPT-2: <|endoftext|>)."
            )
        return eos

    def explain(self, example: Example) -> Explanation:
        """The example's sample with the text, the weight and the kind of every token. Raises as ``sample`` does."""
        return explain(self, example)

    def fingerprint(self) -> dict[str, Any]:
        """What decides which tokens a record becomes and which are learned: readable fields, with SHA-256 sums of the
        template, the tokenizer and all of it (``sha256``). JSON can hold it. Equal sums mean equal samples."""
        return fingerprint(self)

    # -- prompts

    def prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] = (),
        task: Task = "causal_lm",
        source: str = "the conversation",
    ) -> Prompt:
        """Ids and slots to generate the next assistant turn from. Raises UserError as ``sample`` does."""
        example = Conversation(tuple(messages), source, tuple(tools))
        if task == "seq2seq":
            return seq2seq_source(self, example)
        draft = self._assemble(self.turns.script(example, generation=True))
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

    # -- samples

    def sample(self, example: Example) -> Sample:
        """Ids and loss weights of one example.

        Text that becomes several windows is for ``samples``.

        Raises:
            UserError: The template fails or does not extend its own prompt, or nothing would be learned; the message
                names the example's line.
            TooLongError: The sample is longer than ``max_length`` and ``truncation`` does not cut it.
        """
        found = self._finish(self.script(example), example)
        if len(found) == 1:
            return found[0]
        raise TooLongError(f"{example.source}: this text becomes {len(found)} windows; Renderer.samples gives them.")

    def samples(self, examples: Sequence[Example], task: Task = "causal_lm") -> list[Sample]:
        """``sample`` (or ``seq2seq``) of each, in order, several times as fast.

        ``truncation: drop`` leaves long ones out, and ``documents: windows`` gives several for a long text. Raises the
        first example's UserError; ``outcomes`` tells all.
        """
        found: list[Sample] = []
        for outcome in self.outcomes(examples, task):
            if isinstance(outcome, UserError):
                raise outcome
            found += outcome
        return found

    def outcomes(self, examples: Iterable[Example], task: Task = "causal_lm") -> Iterator[Outcome]:
        """For each example in order its samples, none if it was dropped, or the UserError that tells what is wrong.

        Reads ahead by a few hundred examples, which the tokenizer gets at once. ``documents: joined`` is not done
        here: see ``join``.
        """
        remaining = iter(examples)
        while chunk := list(islice(remaining, _CHUNK)):
            scripts = [self._try(self.script, example) if task == "causal_lm" else None for example in chunk]
            short = (one for one in scripts if isinstance(one, Script) and not self.limit.hopeless(one))
            known = self.encoder.learn(piece for one in short for piece in one.pieces())
            for example, script in zip(chunk, scripts, strict=True):
                if isinstance(script, UserError):
                    yield script
                elif script is None:
                    outcome = self._try(self.seq2seq, example)
                    yield (outcome,) if isinstance(outcome, Sample) else self._dropped(outcome)
                else:
                    whole = self._try(self._finish, script, example, known)
                    yield self._dropped(whole) if isinstance(whole, UserError) else whole

    def join(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """With ``documents: joined`` plain texts end to end in windows of ``max_length``; else ``samples`` as is."""
        if self.limit.documents != "joined":
            return iter(samples)
        return joined(samples, self.limit, bos=self.encoder.bos)

    def seq2seq(self, example: Example) -> Sample:
        """The last answer as ``target_ids``, what comes before it as ``input_ids``; see docs/data.md.

        Raises UserError (naming the example's line) for plain text, for an example without a learned answer after
        another turn, and for an input or an answer longer than ``max_length``.
        """
        return seq2seq_sample(self, example)

    # -- in between

    def script(self, example: Example) -> Script:
        """The example as text, with the stretches to be learned; what ``sample`` tokenises."""
        if isinstance(example, PlainText):
            return self.turns.plain(example)
        if isinstance(example, Conversation):
            return self.turns.script(example)
        return Script("", (), 0.0, example.source, fixed=token_weights(example, self.encoder))

    def drafted(self, example: Example) -> tuple[Example, Script, Draft]:
        """What the example's sample is made of: the example (shorter where turns were left out), script and draft."""
        return self._cut(self.script(example), example)

    def _try(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError as error:
            return error

    def _dropped(self, error: UserError) -> Outcome:
        return () if isinstance(error, TooLongError) and self.truncation == "drop" else error

    def _finish(self, script: Script, example: Example, known: Known | None = None) -> tuple[Sample, ...]:
        _, script, draft = self._cut(script, example, known)
        sample = draft.sample(example.source)
        if script.plain and self.limit.documents == "windows":
            return tuple(windows(sample, self.limit))
        return (sample,)

    def _cut(self, script: Script, example: Example, known: Known | None = None) -> tuple[Example, Script, Draft]:
        """The draft under the policy for long records, and the example and the script it is of."""
        source = example.source
        self.limit.check_text(script, source)
        draft = self._assemble(script, known)
        length = len(draft.ids)
        if not any(draft.weights):
            raise UserError(
                f"{source}: nothing of this record would be learned (train_on: {self.train_on}). It needs an assistant "
                "turn that follows another turn and is not marked as untrained."
            )
        if not self.limit.exceeded(length) or (script.plain and self.limit.documents != "separate"):
            return example, script, draft
        while isinstance(example, Conversation) and self.truncation == "left" and self.limit.exceeded(len(draft.ids)):
            shorter = without_oldest_round(example)
            if shorter is None:
                break
            try:
                script = self.turns.script(shorter)
            except UserError:  # the template does not allow it: take tokens instead
                break
            example, draft = shorter, self._assemble(script)
        draft.cut = length - len(draft.ids)
        fit(draft, self.limit, source, head=self._head(example, script, draft))
        draft.weights[0] = 0.0
        if not any(draft.weights):
            raise UserError(
                f"{source}: cut to max_length {self.max_length}, this record keeps no token to learn: its prompt alone "
                "is that long. Raise `max_length` or remove the record."
            )
        return example, script, draft

    def _head(self, example: Example, script: Script, draft: Draft) -> int:
        """How many tokens open the record and stay: the BOS, and a system message that the template puts apart."""
        bos = len(self.encoder.bos) if draft.ids[: len(self.encoder.bos)] == self.encoder.bos else 0
        if not isinstance(example, Conversation) or example.messages[0].role != "system":
            return bos
        try:
            opening = self.turns.text(Conversation(example.messages[:1], "", example.tools), generation=False)
        except UserError:
            return bos
        ids, _ = self.encoder.encode(opening, first=True)
        ids = self.encoder.missing_head(ids) + ids
        return len(ids) if script.text.startswith(opening) and draft.ids[: len(ids)] == ids else bos

    def _assemble(self, script: Script, known: Known | None = None) -> Draft:
        """Tokenise a script."""
        if script.fixed is not None:
            ids, weights = script.fixed
            return Draft(list(ids), [0.0, *weights[1:]], origins=[Origin(0, 0, 0, len(ids))])
        draft, at, text = Draft(), 0, script.text
        for span in script.spans:
            self._add(draft, text, at, span.start, script.base, known)
            if span.weight is None:
                self._add(draft, text, span.start, span.end, 0.0, known)
            else:
                self._add_answer(draft, script, span, span.weight, known)
            at = span.end
        self._add(draft, text, at, len(text), script.base, known)
        if script.plain:
            draft.add([self.eos_token_id], 1.0)
        # What is plain cannot have written a BOS itself.
        draft.prepend(self.encoder.bos if script.plain else self.encoder.missing_head(draft.ids))
        if draft.weights:
            draft.weights[0] = 0.0
        return draft

    def _add(self, draft: Draft, text: str, start: int, end: int, weight: float, known: Known | None) -> None:
        if end > start:
            ids, slots = self.encoder.encode(text[start:end], first=start == 0, known=known)
            draft.add(ids, weight, slots, (start, end, 0))

    def _add_answer(self, draft: Draft, script: Script, span: Span, weight: float, known: Known | None) -> None:
        """Add a learned answer up to its end, and what the template writes after that."""
        start, stop, base = span.start, span.end, script.base
        answer, eos, began = script.text[start:stop], self.eos_token_id, len(draft.ids)
        ids, slots = self.encoder.encode(answer, first=start == 0, known=known)
        if eos in ids:  # only the template can have written it: contents are guarded
            end = ids.index(eos) + 1
            inside = [slot for slot in slots if slot < end]
            draft.add(ids[:end], weight, (), (start, stop, 0))
            draft.answers.append((began, len(draft.ids)))
            draft.add(ids[end:], base, [slot - end for slot in slots], (start, stop, end))
        else:
            end = start + _AFTER_ANSWER.search(answer).start()  # type: ignore[union-attr]
            ids, inside = self.encoder.encode(script.text[start:end], first=False)
            draft.add(ids, weight, (), (start, end, 0))
            draft.add([eos], weight, (), (end, end, 0))
            draft.answers.append((began, len(draft.ids)))
            self._add(draft, script.text, end, stop, base, None)
        if inside:
            raise UserError(
                f"{script.source}: the chat template puts {SOFT} inside the answer of {span.turn}, where the model "
                "writes: at generation it would not stand there. Put it before the answer, also under "
                "`add_generation_prompt`."
            )
