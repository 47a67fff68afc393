"""A running server as a side of `weft verify`: its greedy tokens and log-probabilities, by OpenAI's HTTP interface.

A server shows neither weights nor all logits. Each prompt goes to it as token ids, and what it answers is compared with
the model on this machine, token by token, as long as both write the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from weft.data import Message
from weft.data.rendering.served import message_fields
from weft.errors import UserError, nearest, reason_of
from weft.export.figures import at_answer, larger, relative_difference
from weft.export.proof import LARGEST_DIFFERENCE, MOST_ROUNDING, ROUNDED_TWICE, ROUNDINGS, fixed_texts
from weft.export.rendering import fixed_conversations
from weft.export.sides import ModelHere
from weft.export.verdict import ModelFacts, Verdict
from weft.foreign import entry, expect, parse_json
from weft.generation.text import decode

if TYPE_CHECKING:
    import httpx

_ANSWER = 8  # tokens of an answer
_TOP = 5  # log-probabilities of each
_LOOKED_AT = 50  # likeliest tokens here, among which a text must be the only one of its kind
_SECONDS = 120.0
_CONVERSATIONS = 3  # questions whose rendering is compared, beside those of several turns


@dataclass(frozen=True)
class Step:
    """A token that a server wrote: its text and log-probability, and those of the likeliest ones."""

    text: str
    logprob: float
    top: Mapping[str, float]


class Server:
    """An OpenAI-compatible server, asked for one of its models."""

    def __init__(self, address: str, *, key: str | None = None) -> None:
        """Connect, and find the model: ``#NAME`` in the address, or the only one.

        Raises:
            UserError: httpx is not installed, the server does not answer, or the model is not clear.
        """
        try:
            import httpx
        except ImportError:
            raise UserError('a server is asked by a package: pip install "weft[client]".') from None
        self.address, _, name = address.partition("#")
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._client: httpx.Client = httpx.Client(headers=headers, timeout=_SECONDS, follow_redirects=False)
        try:
            self.model = self._model(name)
        except BaseException:
            self._client.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()

    def _model(self, name: str) -> str:
        where = f"{self.address}/models"
        rows = expect(entry(self._ask("GET", "models"), "data", list, where), list, where)
        names = [entry(expect(row, dict, where), "id", str, where) for row in rows]
        if not name and len(names) == 1:
            return names[0]
        if name in names:
            return name
        said = f"has no model '{name}'.{nearest(name, names)}" if name else "has several models."
        raise UserError(f"{self.address} {said} Name one in the address: {self.address}#NAME. There are: "
                        f"{', '.join(names) or 'none'}.")  # fmt: skip

    def steps(self, ids: Sequence[int]) -> list[Step]:
        """The greedy answer to a prompt of token ids.

        Raises:
            UserError: The server refuses it, or gives no log-probabilities.
        """
        where = f"{self.address}/completions"
        body = {"model": self.model, "prompt": list(ids), "max_tokens": _ANSWER, "temperature": 0, "logprobs": _TOP}
        choice = self._choice(self._ask("POST", "completions", body), where)
        told = choice.get("logprobs")
        if not isinstance(told, dict):
            raise UserError(f"{where} gives no log-probabilities (logprobs), which the comparison needs.")
        tokens, chosen, top = (entry(told, key, list, where) for key in ("tokens", "token_logprobs", "top_logprobs"))
        if not len(tokens) == len(chosen) == len(top):
            raise UserError(f"{where} gives {len(tokens)} tokens, {len(chosen)} log-probabilities and {len(top)} lists "
                            "of the likeliest; one of each belongs to a token.")  # fmt: skip
        found = []
        for text, logprob, others in zip(tokens, chosen, top, strict=True):
            likely = {key: float(expect(value, (int, float), where)) for key, value in
                      expect(others or {}, dict, where).items()}  # fmt: skip
            found.append(Step(expect(text, str, where), float(expect(logprob, (int, float), where)), likely))
        return found

    def prompt_tokens(self, messages: Sequence[Message]) -> int | None:
        """The number of tokens that the server makes of messages; None if it refuses them or does not tell."""
        body = {"model": self.model, "messages": message_fields(messages), "max_tokens": 1, "temperature": 0}
        try:
            usage = self._ask("POST", "chat/completions", body).get("usage")
        except _RefusalError:
            return None
        count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        return count if isinstance(count, int) else None

    def _choice(self, answer: Mapping[str, object], where: str) -> dict[str, object]:
        choices = entry(answer, "choices", list, where)
        if not choices:
            raise UserError(f"{where} answers without a choice.")
        found: dict[str, object] = expect(choices[0], dict, where)
        return found

    def _ask(self, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, object]:
        import httpx

        where = f"{self.address.rstrip('/')}/{path}"
        try:
            answer = self._client.request(method, where, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UserError(f"{where} does not answer: {reason_of(error)}. Is the server running?") from None
        if answer.status_code != 200:
            raise _RefusalError(f"{where} answers with status {answer.status_code}: {answer.text[:300]}")
        found: dict[str, object] = expect(parse_json(answer.content, where), dict, where)
        return found


class _RefusalError(UserError):
    """A server refuses a request."""


@dataclass(frozen=True)
class ServerVerdict(Verdict):
    """How a server compares with a model on this machine.

    Attributes:
        prompts, tokens: what was compared: answers to that many prompts, with that many tokens in all.
        same: tokens that both wrote.
        difference: the largest difference of two log-probabilities; ``asked``: the largest that rounding explains.
        renderings, renderings_alike: conversations, and how many became as many tokens there as here.
    """

    prompts: int
    _: KW_ONLY
    tokens: int
    same: int
    difference: float
    asked: float
    renderings: int
    renderings_alike: int

    def lines(self) -> list[str]:
        """The figures as lines for people."""
        return [
            *super().lines(),
            f"chat template: as many tokens in {self.renderings_alike} of {self.renderings} conversations",
            f"greedy answers to {self.prompts} prompts: the same token in {self.same} of {self.tokens} places",
            f"log-probabilities: largest difference {self.difference:.2g}, explained by rounding {self.asked:.2g}",
        ]


def verify_server(side: ModelHere, server: Server, texts: Sequence[str] = (), *, server_is_a: bool) -> ServerVerdict:
    """Compare a server with a model on this machine, which says what rounding explains.

    Raises:
        UserError: The model does not write text that goes on, or the server does not answer.
    """
    if not side.continues:
        raise UserError(f"{side.name} is a {side.kind}, and a server is compared by the text that it writes.")
    texts = list(texts) or fixed_texts()
    renderings, alike, differences, notes = _compare_renderings(side, server, texts)
    room = None if side.max_length is None else side.max_length - _ANSWER
    prompts = [side.text(text)[:room] for text in texts]
    answers = [side.greedy(ids, _ANSWER) for ids in prompts]
    precise = [at_answer(side.logits(ids + answer), answer) for ids, answer in zip(prompts, answers, strict=True)]
    asked = _explained(side, prompts, answers, precise)
    tokens = same = 0
    worst, first = 0.0, ""
    for number, (ids, answer, logits) in enumerate(zip(prompts, answers, precise, strict=True), 1):
        counted, equal, apart, told = _compare_answer(side, answer, logits, server.steps(ids), asked)
        tokens, same, worst = tokens + counted, same + equal, larger(worst, apart)
        first = first or (told and f"at prompt {number}, {told}")
    if first:
        differences.append(f"answers differ: {first}")
    elif not worst <= asked:
        differences.append(f"log-probabilities differ by {worst:.2g}, where rounding explains {asked:.2g}")
    here, there = ModelFacts.of(side), ModelFacts(server.address, f"server, model {server.model}", "not known")
    return ServerVerdict(
        there if server_is_a else here,
        here if server_is_a else there,
        len(prompts),
        tokens=tokens,
        same=same,
        difference=worst,
        asked=asked,
        renderings=renderings,
        renderings_alike=alike,
        differences=tuple(differences),
        notes=(*side.notes, *notes),
    )


def _compare_renderings(side: ModelHere, server: Server, texts: Sequence[str]) -> tuple[int, int, list[str], list[str]]:
    """Count the conversations, and those that become as many tokens; what differs, and what is not known."""
    count = alike = refused = 0
    differences: list[str] = []
    for messages in fixed_conversations(texts[:_CONVERSATIONS]):
        try:
            ids = side.prompt(messages)
        except UserError:
            continue
        if ids is None:
            return 0, 0, [], ["the model here has no chat template, so that of the server is not compared"]
        there = server.prompt_tokens(messages)
        if there is None:
            refused += 1
            continue
        count += 1
        alike += there == len(ids)
        if there != len(ids) and not differences:
            text = messages[-1].content
            differences.append(
                f"the chat templates differ: {text[:60]!r} becomes {len(ids)} tokens here and {there} on the server"
            )
    notes = [f"the server refuses {refused} conversations that the model here renders"] if refused else []
    return count, alike, differences, notes


def _explained(
    side: ModelHere, prompts: Sequence[list[int]], answers: Sequence[list[int]], precise: Sequence[Tensor]
) -> float:
    """How far rounding may move a log-probability: that of the side's own dtype, in which a server runs it.

    In 32 bits it is measured against 64 bits; in fewer against 32. The log-probability of a token moves at most by
    twice what a logit does.
    """
    narrow = side.dtype.itemsize < 4
    worst = scale = 0.0
    with side.computing_in(side.dtype if narrow else torch.float64):
        for ids, answer, logits in zip(prompts, answers, precise, strict=True):
            again = at_answer(side.logits(ids + answer), answer)
            worst = larger(worst, relative_difference(logits, again))
            scale = max(scale, float(logits.nan_to_num(0.0, 0.0, 0.0).abs().max()))
    relative = MOST_ROUNDING * ROUNDED_TWICE * worst if narrow else max(LARGEST_DIFFERENCE, ROUNDINGS * worst)
    return 2 * relative * scale


def _compare_answer(
    side: ModelHere, answer: Sequence[int], logits: Tensor, steps: Sequence[Step], asked: float
) -> tuple[int, int, float, str]:
    """Compare an answer with that of the server, up to the first token that differs.

    Returns:
        The tokens that were compared, those that are the same, the largest difference of log-probabilities, and words
        on a token that differs by more than rounding explains.
    """
    worst = 0.0
    chances = logits.double().log_softmax(-1)
    for at, token in enumerate(answer):
        text = decode(side.tokenizer, [token])
        best, second = chances[at].topk(2).values.tolist()
        clear = best - second > 2 * asked
        if at >= len(steps):
            # It has ended. A token that ends an answer has no text, and a server does not write it.
            ended = f"token {at + 1}: the server ends, and the model here says {text!r}"
            return at, at, worst, ended if text and clear else ""
        step = steps[at]
        apart = abs(float(chances[at, token]) - step.logprob)
        # A part of a character has no text of its own, and each server writes it in its way.
        if step.text != text and text.isprintable() and "�" not in text:
            told = f"token {at + 1}: the model here says {text!r}, the server {step.text!r}"
            return at + 1, at, worst, told if clear or not apart <= asked else ""
        worst = larger(worst, apart)
        for other, chance in _named(side, chances[at]).items():
            there = step.top.get(other)
            worst = worst if there is None else larger(worst, abs(chance - there))
    return len(answer), len(answer), worst, ""


def _named(side: ModelHere, chances: Tensor) -> dict[str, float]:
    """The likeliest tokens of log-probabilities [tokens] by their texts, which a server has for names.

    Several tokens may have one text: control tokens none, parts of characters the same sign.
    """
    best = chances.topk(min(_LOOKED_AT, len(chances)))
    texts = [decode(side.tokenizer, [token]) for token in best.indices.tolist()]
    likely = zip(texts, best.values.tolist(), strict=True)
    return {text: chance for text, chance in likely if text and "�" not in text and texts.count(text) == 1}
