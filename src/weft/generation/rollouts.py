"""The engine as training asks it for answers (``weft.training.rollouts``)."""

from __future__ import annotations

from collections.abc import Sequence

from weft.core.adapters import Adapters
from weft.data import Renderer
from weft.generation.engine import generate
from weft.generation.request import Completion, Request
from weft.generation.sampling import Sampling
from weft.generation.target import stop_ids
from weft.training.rolled import Ask, Write, Written

_ROWS = 128  # that are written at once


def writer(adapters: Adapters, renderer: Renderer) -> Write:
    """What writes answers with these adapters as they are at the time, each with its tokens' log-probabilities.

    Every call has a cache of its own, for the adapters change between two calls.
    """
    ends, tokenizer = stop_ids(adapters, renderer), renderer.tokenizer

    def written(completion: Completion) -> Written:
        tokens = [*completion.tokens, *([completion.end] if completion.end is not None else [])]
        text = str(tokenizer.decode(completion.ids, skip_special_tokens=True))
        logprobs = tuple(float(token.logprob or 0.0) for token in tokens)
        return Written(tuple(token.id for token in tokens), logprobs, completion.finish_reason == "stop", text)

    def write(asks: Sequence[Ask]) -> list[Written]:
        requests = [
            Request(
                ask.prompt,
                ask.adapter,
                ask.max_new_tokens,
                sampling=Sampling(ask.temperature, ask.top_k, ask.top_p, seed=ask.seed),
                slots=ask.slots,
                logprobs=0,
            )
            for ask in asks
        ]
        return [written(one) for one in generate(adapters, requests, stop_ids=ends, batch_size=_ROWS)]

    return write
