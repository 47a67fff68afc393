"""The renderer: conversations and text become samples, which are token ids with a loss weight each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

from weft.data.formats.examples import SFT, Conversation
from weft.data.formats.turns import Turn, as_messages
from weft.data.rendering.drafts import Drafter
from weft.data.rendering.explain import Explanation, explain
from weft.data.rendering.fingerprint import fingerprint
from weft.data.rendering.sample import Prompt, Sample, TooLongError
from weft.data.rendering.seq2seq import seq2seq_sample, seq2seq_source
from weft.data.rendering.tokens import KnownIds
from weft.data.rendering.transcript import Script
from weft.data.rendering.truncation import joined, windows
from weft.errors import UserError

Task = Literal["causal_lm", "seq2seq"]
Example = SFT
RenderResult = tuple[Sample, ...] | UserError  # of one example: its samples (none if it was dropped), or its error

_CHUNK = 512


class Renderer(Drafter):
    """Renders conversations and text for one tokenizer. ``Drafter`` says how to make one; see docs/data.md."""

    def explain(self, example: Example) -> Explanation:
        """The example's sample, with the text, the weight and the kind of every token. Raises as ``sample`` does."""
        return explain(self, example)

    def fingerprint(self) -> dict[str, Any]:
        """All that decides the tokens of a record and which of them are learned, as JSON holds it.

        It has readable fields, and SHA-256 sums of the template, of the tokenizer and of everything (``sha256``). Equal
        sums mean equal samples.
        """
        return fingerprint(self)

    # -- prompts

    def prompt(
        self,
        messages: Sequence[Turn],
        *,
        tools: Sequence[dict[str, Any]] = (),
        task: Task = "causal_lm",
        source: str = "the conversation",
    ) -> Prompt:
        """The ids and slots from which the next assistant turn is generated. Raises UserError as ``sample`` does."""
        example = Conversation(as_messages(messages, source), source, tuple(tools))
        if task == "seq2seq":
            return seq2seq_source(self, example)
        draft = self._assemble(self.turns.script(example, generation=True))
        return Prompt(draft.ids, tuple(draft.slots))

    def prompt_ids(self, messages: Sequence[Turn], *, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """``prompt(messages).ids`` [prompt length]."""
        return self.prompt(messages, tools=tools).ids

    def text_ids(self, text: str) -> list[int]:
        """The ids of a text after the BOS, if the tokenizer has one. No end-of-sequence token follows."""
        ids, _ = self.encoder.encode(self.encoder.guard(text), first=True)
        return [*self.encoder.missing_head([]), *ids]

    # -- samples

    def sample(self, example: Example) -> Sample:
        """The ids and loss weights of one example.

        ``samples`` is for text that becomes several windows.

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
        """``sample`` (or ``seq2seq``) of each example, in order, and several times as fast.

        ``truncation: drop`` leaves long ones out. ``documents: windows`` gives several samples for a long text. Raises
        the UserError of the first bad example; ``outcomes`` gives all of them.
        """
        found: list[Sample] = []
        for outcome in self.outcomes(examples, task):
            if isinstance(outcome, UserError):
                raise outcome
            found += outcome
        return found

    def outcomes(self, examples: Iterable[Example], task: Task = "causal_lm") -> Iterator[RenderResult]:
        """For each example in order: its samples, none if it was dropped, or the UserError that says what is wrong.

        It reads some hundred examples ahead and gives them to the tokenizer at once. ``join`` does what ``documents:
        joined`` asks for.
        """
        remaining = iter(examples)
        while chunk := list(islice(remaining, _CHUNK)):
            scripts = [self._try(self.script, example) if task == "causal_lm" else None for example in chunk]
            short = (one for one in scripts if isinstance(one, Script) and not self.settings.hopeless(one))
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
        """With ``documents: joined``, plain texts end to end in windows of ``max_length``; otherwise the samples
        themselves."""
        if self.settings.documents != "joined":
            return iter(samples)
        return joined(samples, self.settings, bos=self.encoder.bos)

    def seq2seq(self, example: Example) -> Sample:
        """A sample with the last answer as ``target_ids`` and all before it as ``input_ids``; see docs/data.md.

        Raises UserError (with the example's line) for plain text, for an example without a learned answer after another
        turn, and for an input or an answer longer than ``max_length``.
        """
        return seq2seq_sample(self, example)

    # -- steps

    def _try(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError as error:
            return error

    def _dropped(self, error: UserError) -> RenderResult:
        return () if isinstance(error, TooLongError) and self.truncation == "drop" else error

    def _finish(self, script: Script, example: Example, known: KnownIds | None = None) -> tuple[Sample, ...]:
        _, script, draft = self._cut(script, example, known)
        sample = draft.sample(example.source)
        if script.plain and self.settings.documents == "windows":
            return tuple(windows(sample, self.settings))
        return (sample,)
