"""The requests of an evaluation, answered for several contestants together.

A request is a text, the same for every contestant. The first contestant that asks for something lets all of them
answer it, in the same passes of the base; the others find their answers there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from weft.data.rendering.sandbox import render_chat
from weft.errors import UserError
from weft.evaluate.encoding import encode, prefix_token, split
from weft.evaluate.kept_answers import KeptAnswers, contestant_mark, key_of, target_mark
from weft.evaluate.questions import Continuation
from weft.evaluate.scoring import fit, room, score, score_texts
from weft.generation.limits import limits_for
from weft.generation.request import Request
from weft.generation.sampling import Sampling
from weft.generation.target import Target
from weft.generation.text import decode
from weft.objectives.passes import EVALUATION_TOKENS
from weft.ops.seeds import stable_seed

# Continuations, or texts, of each contestant between two times that answers are kept.
_AT_ONCE = 1024
# Where neither a base nor its tokenizer says how long texts may be, as in lm_eval.
_USUAL_LENGTH = 2048
_NEW_TOKENS = 256  # of an answer whose task sets no limit, as in lm_eval
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")
_TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

# (places of requests, who answers them) -> (who, place, answer), in any order.
Ask = Callable[[Sequence[int], Sequence[str | None]], Iterator[tuple[str | None, int, Any]]]


class Together:
    """Several adapters of a target, and the base (None), which answer the same requests together.

    Attributes:
        marks: of each contestant a hash of all that it answers by.
        cut: of each contestant, how many contexts were cut from the left, because the base reads no more at once.

    Args:
        names: The contestants.
        folder: Where answers are kept, a file for each contestant; None: in memory alone.
        max_tokens: Rows of a pass.
        max_rows: Answers that are written at once.
        on_progress: Hears, of each kind of request, how many answers there are and how many there will be.

    Raises:
        UserError: There is no such adapter, or a kept answer is damaged.
    """

    def __init__(
        self,
        target: Target,
        names: Sequence[str | None],
        *,
        folder: Path | None = None,
        max_tokens: int = EVALUATION_TOKENS,
        max_rows: int = 64,
        on_progress: Callable[[str, int, int], None] = lambda kind, done, total: None,
    ) -> None:
        self.target, self.names = target, list(dict.fromkeys(names))
        self.tokenizer = target.renderer.tokenizer
        self.max_tokens, self.max_rows, self.on_progress = max_tokens, max_rows, on_progress
        self.cut: Counter[str | None] = Counter()
        mark = target_mark(target)
        self.marks = {name: contestant_mark(target, name, mark) for name in self.names}
        self._kept = {
            name: KeptAnswers(None if folder is None else folder / f"{mark}.jsonl") for name, mark in self.marks.items()
        }
        self._encode = lru_cache(maxsize=4096)(self._encoded)

    @property
    def max_length(self) -> int:
        """The tokens that the base reads at once."""
        return self.target.adapters.architecture.max_length or _USUAL_LENGTH

    # What is asked.

    def loglikelihoods(self, name: str | None, asked: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each (context, continuation), log p and whether every token was the likeliest.

        Raises:
            UserError: A continuation adds no token, or is longer than what the base reads.
        """
        apart = self.target.adapters.layout.writes_apart

        def piece(place: int) -> Continuation:
            return split(self.tokenizer, *asked[place], apart=apart, encoded=self._encode)

        return self._scores(name, [key_of("choice", *pair) for pair in asked], piece)

    def scores(self, name: str | None, asked: Sequence[Continuation]) -> list[tuple[float, bool]]:
        """The same of continuations that are tokens already.

        Raises:
            UserError: A continuation is longer than what the base reads.
        """
        keys = [key_of("tokens", list(one.context), list(one.ids)) for one in asked]
        return self._scores(name, keys, asked.__getitem__)

    def _scores(
        self, name: str | None, keys: Sequence[str], piece_at: Callable[[int], Continuation]
    ) -> list[tuple[float, bool]]:
        """Contexts are cut from the left where they must be."""

        def answer(places: Sequence[int], names: Sequence[str | None]) -> Iterator[tuple[str | None, int, Any]]:
            pieces = [piece_at(place) for place in places]
            wanted = {one: [fit(self.target.adapters, one, whole) for whole in pieces] for one in names}
            found = score(self.target.adapters, wanted, max_tokens=self.max_tokens)
            for one, own in wanted.items():
                self.cut[one] += sum(len(a.context) < len(b.context) for a, b in zip(own, pieces, strict=True))
                for place, scored, piece in zip(places, found[one], own, strict=True):
                    yield one, place, [scored.logprob, scored.greedy, len(piece.context), len(piece.ids)]

        return [(logprob, greedy) for logprob, greedy, *_ in self._answers("choices", name, keys, answer)]

    def text_logprobs(self, name: str | None, asked: Sequence[str]) -> list[float]:
        """log p of whole texts, in windows of what the base reads at once.

        Raises:
            UserError: The tokenizer has no token that begins texts.
        """
        prefix = prefix_token(self.tokenizer)

        def answer(places: Sequence[int], names: Sequence[str | None]) -> Iterator[tuple[str | None, int, Any]]:
            ids = [self._encode(asked[place]) for place in places]
            found = score_texts(
                self.target.adapters, dict.fromkeys(names, ids), prefix,
                max_length=self.max_length, max_tokens=self.max_tokens,
            )  # fmt: skip
            for one, logprobs in found.items():
                for place, logprob, own in zip(places, logprobs, ids, strict=True):
                    yield one, place, [logprob, 1, len(own)]

        keys = [key_of("text", text, self.max_length) for text in asked]
        return [float(one[0]) for one in self._answers("texts", name, keys, answer)]

    def texts(self, name: str | None, asked: Sequence[tuple[str, Mapping[str, object]]]) -> list[str]:
        """What is written after each context, with the settings of lm_eval's ``generation_kwargs``.

        Raises:
            UserError: A setting is not known, or leaves no room for the context.
        """
        counts: Counter[str] = Counter()
        keys = []
        for context, settings in asked:
            key = key_of("write", context, dict(settings))
            counts[key] += 1
            keys.append(key if counts[key] == 1 else key_of(key, counts[key]))  # the same one, to be drawn again

        def answer(places: Sequence[int], names: Sequence[str | None]) -> Iterator[tuple[str | None, int, Any]]:
            asks = [(one, place) for place in places for one in names]
            requests = [self._request(*asked[place], name=one, key=keys[place]) for one, place in asks]
            adapters = self.target.adapters
            with self.target.engine(limits_for(adapters, requests, self.max_rows)) as engine:
                answers = [engine.submit(request) for request in requests]
                for (one, place), request, coming in zip(asks, requests, answers, strict=True):
                    done = coming.result()
                    text = decode(self.tokenizer, done.ids)  # also bytes that are no character, as lm_eval has it
                    for stop in request.stop:
                        text = text.split(stop)[0]
                    yield one, place, [text, done.prompt_tokens, len(done.ids)]

        return [str(one[0]) for one in self._answers("answers", name, keys, answer, at_once=len(keys))]

    def cost(self, name: str | None, asked: Sequence[Sequence[Any]]) -> tuple[int, int]:
        """The tokens that an item's requests read before its answers, and those of the answers; 0 if not known.

        ``asked``: the arguments of each request. Those with the same context count it once.
        """
        read: dict[object, int] = {}
        written = 0
        for arguments in asked:
            kind = "text" if len(arguments) == 1 else "choice" if isinstance(arguments[1], str) else "write"
            more = (self.max_length,) if kind == "text" else ()
            key = key_of(kind, *arguments, *more)
            if key in self._kept[name]:
                *_, before, after = self._kept[name][key]
                read[arguments[0]], written = before, written + after
        return sum(read.values()), written

    # How it is asked.

    def _encoded(self, text: str, special: bool | None = None) -> list[int]:
        return encode(self.tokenizer, text, special=special)

    def _request(self, context: str, settings: Mapping[str, object], *, name: str | None, key: str) -> Request:
        new_tokens, stops, sampling = generation_settings(settings, stable_seed(0, key))
        adapters, ids = self.target.adapters, self._encode(context)
        limit = room(adapters, name)
        keep = None if limit is None else limit - (0 if adapters.layout.writes_apart else new_tokens)
        if keep is not None and keep < 1:
            raise UserError(
                f"the task asks for answers of {new_tokens} tokens, and the base reads {limit} at once: that leaves no "
                "room for the question. Give the task a smaller max_gen_toks (generation_kwargs)."
            )
        if keep is not None and len(ids) > keep:
            self.cut[name] += 1
            ids = ids[-keep:]
        return Request(ids or [prefix_token(self.tokenizer)], name, new_tokens, sampling=sampling, stop=stops)

    def _answers(
        self, kind: str, name: str | None, keys: Sequence[str], ask: Ask, *, at_once: int = _AT_ONCE
    ) -> list[Any]:
        """The answers of ``name`` to the requests of these keys. What is not known yet is asked of all together."""
        wanted: dict[tuple[str | None, ...], list[int]] = {}  # who still has to answer -> places
        seen: set[str] = set()
        for place, key in enumerate(keys):
            names = tuple(one for one in self.names if key not in self._kept[one])
            if names and key not in seen:
                wanted.setdefault(names, []).append(place)
            seen.add(key)
        done, total = 0, sum(len(places) * len(names) for names, places in wanted.items())
        for names, places in wanted.items():
            for begin in range(0, len(places), at_once):
                for one, place, answer in ask(places[begin : begin + at_once], names):
                    self._kept[one].add({keys[place]: answer})
                    done += 1
                    self.on_progress(kind, done, total)
        return [self._kept[name][key] for key in keys]

    # What the template writes.

    def chat(self, messages: Sequence[Mapping[str, object]], *, generation: bool = True) -> str:
        """The conversation as the chat template writes it; without ``generation`` it ends with the last message's text,
        which an answer goes on with.

        Raises:
            UserError: No template is known, or it refuses the conversation.
        """
        renderer = self.target.renderer
        if renderer.template.origin == "fallback":
            raise UserError(
                f"{self.target.base.name} has no chat template, and none was named: a score by another one would say "
                "nothing of it. Give --chat-template, or ask without a template."
            )
        try:
            text = render_chat(
                self.tokenizer, messages, chat_template=renderer.chat_template, add_generation_prompt=generation,
                **renderer.settings.template_kwargs,
            )  # fmt: skip
        except UserError:
            raise
        except Exception as error:  # the template is a program of the user
            raise UserError(f"the chat template refuses a conversation of the task: {error}.") from error
        last = str(messages[-1]["content"]).strip()
        return text if generation else text[: text.rindex(last) + len(last)]


def generation_settings(settings: Mapping[str, object], seed: int) -> tuple[int, tuple[str, ...], Sampling]:
    """Most new tokens, stop strings and sampling of lm_eval's ``generation_kwargs``.

    Raises:
        UserError: A setting is not known.
    """
    left: dict[str, Any] = {key: value for key, value in settings.items() if value is not None}
    limits = [int(left.pop(key)) for key in _TOKEN_LIMITS if key in left]
    until = left.pop("until", ())
    stops = tuple(one for one in ((until,) if isinstance(until, str) else until) if one)
    temperature, draws = float(left.pop("temperature", 0.0)), left.pop("do_sample", None)
    if draws is False:
        temperature = 0.0
    elif draws and not temperature:
        temperature = 1.0
    chosen = {key: left.pop(key) for key in _SAMPLING if key in left}
    if left:
        raise UserError(
            f"generation_kwargs has {', '.join(map(repr, left))}, which Weft does not know; it knows until, do_sample, "
            f"temperature, {', '.join((*_SAMPLING, *_TOKEN_LIMITS))}."
        )
    return limits[0] if limits else _NEW_TOKENS, stops, Sampling(temperature, seed=seed, **chosen)
