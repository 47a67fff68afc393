"""What ``weft generate`` asks, what answers it, and the rows that come of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from weft.cli.answers import Key, Row
from weft.cli.options import sampling_of

if TYPE_CHECKING:
    from weft.data.queries import Query
    from weft.generation.engine import Engine
    from weft.generation.request import Completion, Request
    from weft.generation.sampling import Sampling
    from weft.generation.target import Target

# Texts that are classified together. Rows stand in the same company when a run goes on.
_CLASSIFIED = 256
# What a log-probability in 32 bits can tell.
_DIGITS = 5


@dataclass(frozen=True)
class AnswerSettings:
    """The options by which all prompts are answered.

    Attributes:
        count: answers per prompt.
        max_rows: of the engine. It changes no answer.
    """

    sampling: Sampling
    max_new_tokens: int | None = None
    _: KW_ONLY
    system: str | None = None
    raw: bool = False
    chat_template: str | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    count: int = 1
    max_rows: int = 64

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> AnswerSettings:
        """Those of the command's options.

        Raises:
            UserError: One of them is out of its range.
        """
        own = {name: given[name] for name in ("system", "raw", "chat_template", "logprobs")}
        return cls(
            sampling_of(given), given["max_new_tokens"], stop=tuple(given["stop"] or ()), count=given["n"],
            max_rows=given["batch_size"], **own,
        )  # fmt: skip

    def recorded(self) -> dict[str, object]:
        """What makes a run another one, by the names of the options."""
        own = {name: getattr(self, name) for name in ("max_new_tokens", "system", "raw", "chat_template", "logprobs")}
        drawn = {name: value for name, value in asdict(self.sampling).items() if name != "logit_bias"}
        return {**own, **drawn, "stop": list(self.stop), "n": self.count}

    def drawn(self, sample: int) -> Sampling:
        """How the answer of this number is drawn: the first with the seed itself, each other with one made of it."""
        from weft.ops.seeds import stable_seed

        return self.sampling if sample == 0 else replace(self.sampling, seed=stable_seed(self.sampling.seed, sample))


@dataclass(frozen=True)
class Questions:
    """The prompts of every adapter that is asked (None: the base), each of them ``count`` times where it writes."""

    opened: Target
    asked: Mapping[str | None, Sequence[Query]]
    settings: AnswerSettings
    _: KW_ONLY
    _writes: Mapping[str | None, bool] = field(init=False)

    def __post_init__(self) -> None:
        heads = self.opened.adapters
        object.__setattr__(self, "_writes", {name: name is None or heads.head(name).writes for name in self.asked})

    def keys(self) -> list[Key]:
        """Which answers there will be: by prompt, of each by adapter, of each by number."""
        found = [
            (query.number, place, sample, name)
            for place, (name, queries) in enumerate(self.asked.items())
            for query in queries
            for sample in range(self.settings.count if self._writes[name] else 1)
        ]
        return [(number, name or "base", sample) for number, _, sample, name in sorted(found, key=lambda one: one[:3])]

    def prompts_hash(self) -> str:
        """The SHA-256 of all prompts as they are asked."""
        digest = hashlib.sha256()
        for name, queries in self.asked.items():
            for query in queries:
                prompt = query.prompt
                one = [name, query.number, list(prompt.input_ids), list(prompt.slots), query.label]
                digest.update(json.dumps(one).encode())
        return digest.hexdigest()

    def requests(self, done: Mapping[Key, Row]) -> list[tuple[Query, int, Request]]:
        """What is still to be written: the prompt, the answer's number, and the request.

        Raises:
            UserError: A prompt leaves no room for an answer.
        """
        from weft.generation import Request

        found, how = [], self.settings
        samplings = [how.drawn(sample) for sample in range(how.count)]
        for name, queries in self.asked.items():
            for query in queries if self._writes[name] else ():
                ids, slots = query.prompt.input_ids, query.prompt.slots
                count = self.opened.room(len(ids), name, how.max_new_tokens, what=query.source)
                found += [
                    (query, sample, Request(
                        ids, name, count, sampling=sampling, slots=slots, stop=how.stop, logprobs=how.logprobs
                    ))
                    for sample, sampling in enumerate(samplings)
                    if (query.number, name or "base", sample) not in done
                ]  # fmt: skip
        # Those of one prompt follow each other, so that what they begin with is computed once.
        return sorted(found, key=lambda one: one[0].number)

    def written(self, engine: Engine, todo: Sequence[tuple[Query, int, Request]]) -> Iterator[Row]:
        """The rows of these requests, in the order in which the answers end."""
        from weft.generation.completed import completed

        for place, done in completed(engine, [request for _, _, request in todo]):
            query, sample, request = todo[place]
            yield {
                "index": query.number,
                "prompt": query.said,
                "adapter": request.adapter or "base",
                **({"sample": sample} if self.settings.count > 1 else {}),
                "text": done.text,
                "finish_reason": done.finish_reason,
                "prompt_tokens": len(request.prompt),
                "tokens": len(done.ids),
                **({"logprobs": self._logprobs(done)} if request.logprobs is not None else {}),
            }

    def _logprobs(self, done: Completion) -> list[dict[str, Any]]:
        def told(token: int, logprob: float | None) -> dict[str, Any]:
            text = self.opened.renderer.tokenizer.decode([token])
            return {"id": token, "token": text, "logprob": None if logprob is None else round(logprob, _DIGITS)}

        return [
            {**told(token.id, token.logprob), **({"top": [told(*one) for one in token.top]} if token.top else {})}
            for token in done.tokens
        ]

    def classified(self, done: Mapping[Key, Row]) -> Iterator[Row]:
        """The class of every text that has none yet, beside the one that its record names."""
        from weft.evaluate.classify import predict

        for name in [name for name in self.asked if not self._writes[name]]:
            assert name is not None
            queries = self.asked[name]
            for start in range(0, len(queries), _CLASSIFIED):
                part = queries[start : start + _CLASSIFIED]
                new = [place for place, query in enumerate(part) if (query.number, name, 0) not in done]
                if not new:
                    continue
                found = predict(self.opened.adapters, name, [query.prompt for query in part])
                shares = found.probabilities.tolist()
                for place in new:
                    query = part[place]
                    yield {
                        "index": query.number,
                        "prompt": query.said,
                        "adapter": name,
                        "text": found.names[found.labels[place]],
                        **({"label": query.label} if query.label is not None else {}),
                        "probabilities": dict(zip(found.names, shares[place], strict=True)),
                        "prompt_tokens": len(query.prompt.input_ids),
                    }
