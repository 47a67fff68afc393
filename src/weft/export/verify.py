"""The round-trip gate of `weft verify`: whether two models answer alike, as far as their number formats allow.

Both compute in 32 bits with the weights that they keep. What rounding explains is measured on them, on this machine:
where both keep their weights in 32 bits, by one of them against itself in 64; where one keeps them in fewer bits, by a
model whose weights are moved as far as that format moves them. Weights are compared tensor by tensor where both have
them, tokenizers and chat templates by the ids that they give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor

from weft.data.auditing.pieces import decode
from weft.errors import UserError
from weft.export.figures import at_answer, clear_positions, larger, relative_difference
from weft.export.proof import MOST_ROUNDING, ROUNDED_TWICE, Proof, Reference, fixed_texts, judge
from weft.export.sides import ModelHere, PlainModel
from weft.export.tokens import TokenFindings, compare_tokens
from weft.export.verdict import ModelFacts, Verdict
from weft.export.weights import TensorFindings, Weights, compare_weights, explained_errors
from weft.models.complete import named

# So many of the shortest prompts are answered, with so many tokens each; then both sides are asked about the whole.
_ANSWERED, _ANSWER = 6, 8


@dataclass(frozen=True)
class Greedy:
    """The greedy answers of A, and how many of their tokens B chooses too after the same text."""

    tokens: int
    same: int


@dataclass(frozen=True)
class ModelsVerdict(Verdict):
    """How two models on this machine compare.

    Attributes:
        proof: the figures of their logits.
    """

    proof: Proof
    _: KW_ONLY
    greedy: Greedy
    tokens: TokenFindings
    weights: TensorFindings | None

    def lines(self) -> list[str]:
        """The figures as lines for people."""
        found = [*super().lines(), *self.tokens.lines()]
        if self.weights is not None:
            found += self.weights.lines()
        return [*found, *_logit_lines(self.proof, self.greedy)]


def verify_models(a: ModelHere, b: ModelHere, texts: Sequence[str] = ()) -> ModelsVerdict:
    """Compare two models on this machine.

    Args:
        texts: the prompts; default: fixed ones.

    Raises:
        UserError: One of them writes and the other names classes.
    """
    if a.writes != b.writes:
        raise UserError(f"{a.name} is a {a.kind} and {b.name} a {b.kind}: one writes, and the other names classes.")
    texts = list(texts) or fixed_texts()
    tokens = compare_tokens(a, b, texts)
    one, other = a.weights("A"), b.weights("B")
    weights = None if one is None or other is None else compare_weights(one, other)
    prompts, answers = _prompts(a, b, texts)
    expected, found, proof = _compare_logits(a, b, prompts, one, other)
    greedy = _count_greedy(answers, found)
    differences = list(tokens.differences)
    if weights is not None and weights.different:
        differences.append(weights.different)
    if not _holds(proof):
        if weights is not None:
            differences += [f"{named(w)} only in {s}" for s, w in (("A", weights.only_a), ("B", weights.only_b)) if w]
        differences.append(_logits_differ(a, proof, expected, found))
    return ModelsVerdict(
        ModelFacts.of(a),
        ModelFacts.of(b),
        proof,
        greedy=greedy,
        tokens=tokens,
        weights=weights,
        differences=tuple(differences),
        notes=(*a.notes, *b.notes, *tokens.notes),
    )


def _prompts(a: ModelHere, b: ModelHere, texts: Sequence[str]) -> tuple[list[list[int]], dict[int, list[int]]]:
    """The ids of each prompt, some with A's greedy answer behind them, and those answers by the prompt's number.

    A prompt with a token for which one side has no row is left out: the comparison of the tokenizers tells of it.

    Raises:
        UserError: There is no other.
    """
    room = min((side.max_length for side in (a, b) if side.max_length is not None), default=None)
    rows = min(side.token_rows for side in (a, b))
    prompts = [ids for text in texts if max(ids := a.text(text)[:room], default=rows) < rows]
    if not prompts:
        raise UserError(f"every prompt of {a.name} has tokens beyond the {rows} rows that both models have.")
    answers = {}
    if a.continues:
        shortest = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))[:_ANSWERED]
        answers = {number: a.greedy(prompts[number], _ANSWER) for number in sorted(shortest)}
        # Behind a token that one side lacks the two would go on after other texts.
        answers = {number: list(takewhile(lambda i: i < rows, found)) for number, found in answers.items()}
    return [ids + answers.get(number, []) for number, ids in enumerate(prompts)], answers


def _compare_logits(
    a: ModelHere, b: ModelHere, prompts: Sequence[list[int]], one: Weights | None, other: Weights | None
) -> tuple[list[Reference], list[Tensor], Proof]:
    """The logits of both sides on the prompts, and the figures."""
    wanted, found = ([side.logits(ids) for ids in prompts] for side in (a, b))
    width = min(wanted[0].shape[-1], found[0].shape[-1])
    wanted, found = ([logits[:, :width] for logits in many] for many in (wanted, found))
    expected = [Reference(ids, logits, logits) for ids, logits in zip(prompts, wanted, strict=True)]
    errors = explained_errors(one, other) if one is not None and other is not None else {}
    # An adapter's own numbers are exact, so that where there are errors one side is a plain model.
    plain, its = (b, found) if isinstance(b, PlainModel) else (a, wanted)
    if errors and isinstance(plain, PlainModel):
        with plain.moved(errors):
            moved = [plain.logits(ids)[:, :width] for ids in prompts]
        expected = [
            replace(reference, rounded=reference.precise + ROUNDED_TWICE * (after - before))
            for reference, after, before in zip(expected, moved, its, strict=True)
        ]
    rounding = partial(_own_rounding, plain, prompts, its)
    return expected, found, judge(expected, found, as_run=found, own_rounding=rounding)


def _own_rounding(side: ModelHere, prompts: Sequence[list[int]], single: Sequence[Tensor]) -> float:
    """The largest relative difference of a side's logits in 32 bits, one per prompt, from its own in 64."""
    worst = 0.0
    with side.computing_in(torch.float64):
        for ids, logits in zip(prompts, single, strict=True):
            worst = larger(worst, relative_difference(side.logits(ids)[:, : logits.shape[-1]], logits))
    return worst


def _holds(proof: Proof) -> bool:
    """Whether the logits are as near as they must be. Where rounding decides everywhere, the error alone is judged."""
    if proof.holds:
        return True
    return not proof.exact and not proof.decided and proof.rounding is not None and proof.rounding <= MOST_ROUNDING


def _count_greedy(answers: dict[int, list[int]], found: Sequence[Tensor]) -> Greedy:
    """Count the tokens of A's answers that B, asked about the same text, finds the likeliest."""
    same = 0
    for number, answer in answers.items():
        same += int((at_answer(found[number], answer).argmax(-1) == torch.tensor(answer)).sum())
    return Greedy(sum(map(len, answers.values())), same)


def _logits_differ(a: ModelHere, proof: Proof, expected: Sequence[Reference], found: Sequence[Tensor]) -> str:
    """Where the logits first differ, and by how much."""
    number, at = _first_place(proof, expected, found)
    one, wanted, logits = expected[number], expected[number].precise[at], found[number][at]
    if not a.writes:
        return f"logits differ: at prompt {number + 1}; {_apart(proof)}"
    tokens = [repr(decode(a.tokenizer, [int(best.argmax())])) for best in (wanted, logits)]
    says = f"both say {tokens[0]}" if tokens[0] == tokens[1] else f"A says {tokens[0]}, B {tokens[1]}"
    text = decode(a.tokenizer, one.ids[max(0, at - 7) : at + 1])
    return f"logits differ: first at prompt {number + 1}, token {at + 1}, after {text!r}: {says}; {_apart(proof)}"


def _apart(proof: Proof) -> str:
    if proof.exact:
        return f"largest relative difference {proof.precise_difference:.2g}, explained by rounding {proof.asked:.2g}"
    return (
        f"the error is {proof.rounding:.3g} times what the format explains (at most {MOST_ROUNDING:g}), and where "
        f"rounding does not decide {100 * (proof.decided_agreement or 0):.4g} % of {proof.decided} tokens agree"
    )


def _first_place(proof: Proof, expected: Sequence[Reference], found: Sequence[Tensor]) -> tuple[int, int]:
    """The prompt and the position at which the two first differ by more than rounding explains."""
    worst = (0, 0, -1.0)
    for number, (one, logits) in enumerate(zip(expected, found, strict=True)):
        apart = (one.precise.double() - logits.double()).abs().nan_to_num(math.inf, math.inf).amax(-1)
        if one.rounded is None:
            beyond = apart > proof.asked * one.precise.double().abs().max()
        else:
            moved = float((one.rounded.double() - one.precise.double()).abs().max())
            beyond = clear_positions(one.precise, moved) & (one.precise.argmax(-1) != logits.argmax(-1))
        if bool(beyond.any()):
            return number, int(beyond.nonzero()[0])
        if float(apart.max()) > worst[2]:
            worst = (number, int(apart.argmax()), float(apart.max()))
    return worst[:2]


def _logit_lines(proof: Proof, greedy: Greedy) -> list[str]:
    found = [
        f"logits in 32 bits, {proof.prompts} prompts, {proof.positions} positions: largest relative difference "
        f"{proof.precise_difference:.2g}, KL {proof.divergence:.2g} nats, same likeliest token at "
        f"{100 * proof.agreement:.4g} %"
    ]
    if proof.exact:
        found.append(f"explained by rounding: a relative difference of {proof.asked:.2g}")
    else:
        found.append(
            f"explained by the format: error {proof.rounding:.2f} times that of its rounding (at most "
            f"{MOST_ROUNDING:g}), KL {proof.explained_divergence:.2g} nats; same likeliest token at "
            f"{100 * (proof.decided_agreement or 0):.4g} % of the {proof.decided} positions where it does not decide"
        )
    if greedy.tokens:
        found.append(f"greedy answers: the same token in {greedy.same} of {greedy.tokens} places")
    return found
