"""One contestant as lm_eval sees a model. This module needs lm_eval; ``weft.evaluate.harness`` is the way to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.api import task as harness_task
from lm_eval.api.model import TemplateLM

from weft.evaluate.encoding import encode, prefix_token
from weft.evaluate.questions import Continuation
from weft.evaluate.together import Together


class WeftLM(TemplateLM):
    """An adapter of a target, or its base (None), for ``lm_eval.simple_evaluate(model=WeftLM(...))``.

    What it is asked, all contestants of ``together`` answer in the same passes.
    """

    def __init__(self, together: Together, name: str | None) -> None:
        super().__init__()
        self.together, self.name, self.tokenizer = together, name, together.tokenizer
        self.backend = "seq2seq" if together.target.adapters.layout.writes_apart else "causal"

    @property
    def eot_token_id(self) -> int:
        """The token that ends texts."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that begins texts."""
        return prefix_token(self.tokenizer)

    @property
    def max_length(self) -> int:
        """The tokens that the base reads at once."""
        return self.together.max_length

    @property
    def tokenizer_name(self) -> str:
        """A hash of how texts become tokens."""
        return str(self.together.target.renderer.fingerprint()["sha256"])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the template; a name is none of lm_eval's, for the target has one template."""
        return self.together.target.renderer.template.text if chat_template else None

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, object]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the target's template writes it."""
        return self.together.chat(chat_history, generation=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text."""
        return encode(self.tokenizer, string, special=add_special_tokens)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each request's continuation, log p and whether it is what greedy search writes."""
        return self.together.loglikelihoods(self.name, [request.args for request in requests])

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        return self.together.scores(self.name, [Continuation(context, ids) for _, context, ids in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each request's text."""
        return self.together.text_logprobs(self.name, [request.args[0] for request in requests])

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What is written after each request's context, up to a stop string."""
        return self.together.texts(self.name, [request.args for request in requests])


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep lm_eval from drawing a bar for each task and contestant while it builds requests."""
    shown = harness_task.tqdm
    harness_task.tqdm = lambda rows, **_: rows
    try:
        yield
    finally:
        harness_task.tqdm = shown
