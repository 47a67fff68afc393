"""Drafts: token ids with a loss weight each, before they are a sample.

The tokenizer's chat template renders a conversation to one string. The string is cut at the ends of the learned
answers, and every piece is tokenised on its own. So a learned answer follows exactly the ids that a prompt has at
generation, whatever the tokenizer would have merged across the seam.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weft.data.formats.examples import SFT, Conversation, PlainText
from weft.data.formats.verbatim import token_weights
from weft.data.rendering.sample import Draft, Origin
from weft.data.rendering.templates import find_template
from weft.data.rendering.tokens import SOFT, Encoder, KnownIds
from weft.data.rendering.transcript import Script, Span, Turns, TurnSettings
from weft.data.rendering.truncation import Limit, Truncation, fit, in_todays_words, without_oldest_round
from weft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AFTER_ANSWER = re.compile(f"(?:\\s|{re.escape(SOFT)})*$")


class RenderSettings(Limit, TurnSettings):
    """The keys that decide which tokens an example becomes and which of them are learned."""


class Drafter:
    """Drafts records for one tokenizer. Its state never changes; see docs/data.md.

    ``keys`` are those of ``RenderSettings``, by name. They win over ``settings``. Raises UserError for a value that
    cannot be used, TypeError for an unknown key.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: RenderSettings | None = None, **keys: Any) -> None:
        keys = {key: value for key, value in in_todays_words(keys).items() if value is not None}
        if unknown := keys.keys() - RenderSettings.model_fields.keys():
            raise TypeError(f"a Renderer has no setting {', '.join(sorted(unknown))}")
        self.settings = (settings or RenderSettings()).model_copy(update=keys)
        self.settings.check()
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer)
        self.template = find_template(self.settings, self.encoder)
        self.chat_template = None if self.template.origin == "own" else self.template.text
        self.turns = Turns(self.encoder, self.chat_template, self.settings)

    # -- settings

    @property
    def max_length(self) -> int | None:
        """The longest sample in tokens; None for no limit."""
        return self.settings.max_length

    @property
    def truncation(self) -> Truncation:
        """The policy for longer samples."""
        return self.settings.truncation

    @property
    def eos_token_id(self) -> int:
        """The token that ends an answer.

        Raises:
            UserError: The tokenizer has none. (Only what needs one asks for it.)
        """
        eos = self.tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise UserError(
                "the tokenizer has no end-of-sequence token, so a model could not learn to stop. Set `eos_token` in "
                "its tokenizer_config.json to the token that ends a text (GPT-2: <|endoftext|>)."
            )
        return eos

    def script(self, example: SFT) -> Script:
        """The example as text, with the stretches to learn. ``sample`` tokenises it."""
        if isinstance(example, PlainText):
            return self.turns.plain(example)
        if isinstance(example, Conversation):
            return self.turns.script(example)
        return Script("", (), 0.0, source=example.source, fixed=token_weights(example, self.encoder))

    def drafted(self, example: SFT) -> tuple[SFT, Script, Draft]:
        """The example (shorter where turns were left out), its script and its draft, which ``sample`` finishes."""
        return self._cut(self.script(example), example)

    def _cut(self, script: Script, example: SFT, known: KnownIds | None = None) -> tuple[SFT, Script, Draft]:
        """The draft under the policy for long records, with the example and the script that it comes from."""
        source = example.source
        self.settings.check_text(script, source)
        draft = self._assemble(script, known)
        length = len(draft.ids)
        if not any(draft.weights):
            raise UserError(
                f"{source}: nothing of this record would be learned (train_on: {self.settings.train_on}). It needs an "
                "assistant turn that follows another turn and is not marked as untrained."
            )
        if not self.settings.exceeded(length) or (script.plain and self.settings.documents != "separate"):
            return example, script, draft
        while (
            isinstance(example, Conversation) and self.truncation == "left" and self.settings.exceeded(len(draft.ids))
        ):
            shorter = without_oldest_round(example)
            if shorter is None:
                break
            try:
                script = self.turns.script(shorter)
            except UserError:  # the template does not allow it: take tokens instead
                break
            example, draft = shorter, self._assemble(script)
        draft = replace(draft, cut=length - len(draft.ids))
        fit(draft, self.settings, source, head=self._head(example, script, draft))
        if not any(draft.weights):
            raise UserError(
                f"{source}: cut to max_length {self.max_length}, this record keeps no token to learn: its prompt alone "
                "is that long. Raise `max_length` or remove the record."
            )
        return example, script, draft

    def _head(self, example: SFT, script: Script, draft: Draft) -> int:
        """The number of tokens that open the record and stay: BOS, and a system message that stands apart."""
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

    def _assemble(self, script: Script, known: KnownIds | None = None) -> Draft:
        """Tokenise a script."""
        if script.fixed is not None:
            ids, weights = script.fixed
            return Draft(list(ids), [0.0, *weights[1:]], origins=[Origin(0, 0, 0, len(ids))])
        draft, at, text = Draft(), 0, script.text
        for span in script.spans:
            self._add(draft, text, at, span.start, weight=script.base, known=known)
            if span.weight is None:
                self._add(draft, text, span.start, span.end, weight=0.0, known=known)
            else:
                self._add_answer(draft, script, span, span.weight, known)
            at = span.end
        self._add(draft, text, at, len(text), weight=script.base, known=known)
        if script.plain:
            draft.add([self.eos_token_id], 1.0)
        # Plain text has no template that could have written a BOS.
        draft.open(self.encoder.bos if script.plain else self.encoder.missing_head(draft.ids))
        return draft

    def _add(self, draft: Draft, text: str, start: int, end: int, weight: float, known: KnownIds | None) -> None:
        if end > start:
            ids, slots = self.encoder.encode(text[start:end], first=start == 0, known=known)
            draft.add(ids, weight, slots, (start, end, 0))

    def _add_answer(self, draft: Draft, script: Script, span: Span, weight: float, known: KnownIds | None) -> None:
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
            self._add(draft, script.text, end, stop, weight=base, known=None)
        if inside:
            raise UserError(
                f"{script.source}: the chat template puts {SOFT} inside the answer of {span.turn}, where the model "
                "writes: at generation it would not stand there. Put it before the answer, also under "
                "`add_generation_prompt`."
            )
