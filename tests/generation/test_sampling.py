"""The choice of the next token: fast equals plain, rows do not see each other, and each setting does what it says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.errors import UserError
from weft.generation.sampling import Drawing, Sampling, choose, choose_ref


class Evens:
    """Allows even tokens; a double of a constraint's matcher."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary, self.taken, self.failure, self.ended = vocabulary, list[int](), None, False

    def mask(self) -> Tensor:
        return torch.arange(self.vocabulary) % 2 == 0

    def accept(self, token: int) -> None:
        self.taken.append(token)


@st.composite
def rows(draw: Any, vocabulary: int) -> Drawing:
    token = st.integers(0, vocabulary - 1)
    sampling = Sampling(
        draw(st.sampled_from([0.0, 0.0, 0.7, 1.5])),
        draw(st.sampled_from([0, 1, 7, 10**6])),
        draw(st.sampled_from([0.0, 0.5, 1.0])),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        min_p=draw(st.sampled_from([0.0, 0.1])),
        repetition_penalty=draw(st.sampled_from([1.0, 0.5, 1.3])),
        presence_penalty=draw(st.sampled_from([0.0, -1.0, 2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, -0.5, 1.0])),
        logit_bias=draw(st.dictionaries(token, st.floats(-100, 100, width=16), max_size=3)),
    )
    matcher = Evens(vocabulary) if draw(st.booleans()) else None
    asked = draw(st.sampled_from([None, 0, 3]))
    return Drawing(sampling, draw(st.lists(token, max_size=9)), matcher=matcher, logprobs=asked)


@given(st.data(), st.sampled_from([1, 5, 256, 300]), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
@settings(max_examples=60, deadline=None)
def test_a_choice_is_that_of_the_reference(data: st.DataObject, vocabulary: int, dtype: torch.dtype) -> None:
    """Over several steps, so that the rows' own state counts; the same rows are given to both."""
    seed = data.draw(st.integers(0, 2**31))
    made = data.draw(st.lists(rows(vocabulary), min_size=1, max_size=6))
    states = [one.generator.get_state() for one in made]
    steps = 3 * torch.randn(4, len(made), vocabulary, generator=torch.Generator().manual_seed(seed)).to(dtype)
    plain = [Drawing(o.sampling, o.seen.ids.tolist() if o.seen else (), matcher=o.matcher and Evens(vocabulary),
                     logprobs=o.logprobs) for o in made]  # fmt: skip
    for logits in steps:
        before = logits.clone()
        fast, slow = choose(logits, made), choose_ref(logits, plain)
        assert torch.equal(logits, before)
        assert fast.tokens == slow.tokens
        assert fast.failures == slow.failures == {}
        for row in range(len(made)):
            assert (fast.logprobs[row] is None) == (made[row].logprobs is None)
            assert fast.logprobs[row] == pytest.approx(slow.logprobs[row], abs=2e-5)
            assert [token for token, _ in fast.top[row]] == [token for token, _ in slow.top[row]]
    for one, other, state in zip(made, plain, states, strict=True):
        drawn = one.sampling.temperature > 0
        assert torch.equal(one.generator.get_state(), state) != drawn
        assert torch.equal(one.generator.get_state(), other.generator.get_state())


def test_what_a_row_draws_depends_on_no_neighbour() -> None:
    """Alone, among others, in another order and beside rows of other kinds: the same tokens and log-probabilities."""
    sampling = [
        Sampling(),
        Sampling(1.0, seed=1),
        Sampling(1.2, 30, seed=2),
        Sampling(0.9, 0, 0.8, seed=3),
        Sampling(0.8, 1200, 0.95, seed=4, min_p=0.01, presence_penalty=1.0),
        Sampling(logit_bias={5: 9.0}),
    ]
    logits = torch.randn(12, len(sampling), 3001, generator=torch.Generator().manual_seed(0)).bfloat16()

    def answers(order: list[int]) -> dict[int, list[Any]]:
        drawings = [Drawing(sampling[i], [1, 2], logprobs=i) for i in order]
        steps = [choose(step[order], drawings) for step in logits]
        return {i: [(c.tokens[row], c.logprobs[row], c.top[row]) for c in steps] for row, i in enumerate(order)}

    together = answers(list(range(len(sampling))))
    torch.manual_seed(5)  # the global generator plays no part
    assert answers([4, 0, 5, 3, 1, 2]) == together
    for i in range(len(sampling)):
        assert answers([i])[i] == together[i]
    assert len({tuple(token for token, *_ in answer) for answer in together.values()}) == len(sampling)


@pytest.mark.parametrize("what", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_penalties_are_those_of_transformers_and_openai(what: str) -> None:
    """Seen from the likeliest token of many rows, in which the tokens of the text have the largest logits."""
    from transformers import RepetitionPenaltyLogitsProcessor

    prompt, answer, value = [3, 4, 4, 5], [7, 8, 8, 8], 1.7
    logits = torch.randn(300, 9, generator=torch.Generator().manual_seed(3))
    logits[:, 3:9] += 1
    drawings = [Drawing(Sampling(**{what: value}), prompt) for _ in logits]
    for drawing in drawings:
        for token in answer:
            drawing.accept(token)
    wanted = logits.clone()
    if what == "repetition_penalty":
        wanted = RepetitionPenaltyLogitsProcessor(value)(torch.tensor([prompt + answer]).expand(300, -1), wanted)
    for token in set(answer):
        wanted[:, token] -= {"presence_penalty": value, "frequency_penalty": value * answer.count(token)}.get(what, 0)
    assert choose(logits, drawings).tokens == wanted.argmax(-1).tolist()
    assert choose(logits, drawings).tokens != logits.argmax(-1).tolist()


def test_log_probabilities_are_of_the_whole_vocabulary_before_everything() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(4))
    sampling = Sampling(0.5, 1, 0.1, min_p=0.9, repetition_penalty=2.0, presence_penalty=1.0, logit_bias={9: 100.0})
    choice = choose(logits, [Drawing(sampling, [9, 3], logprobs=50)])
    wanted = (logits[0] / 0.5).log_softmax(-1)
    assert choice.tokens == [9]
    assert choice.logprobs[0] == pytest.approx(float(wanted[9]), abs=1e-5)
    assert [token for token, _ in choice.top[0]] == wanted.argsort(descending=True).tolist()
    assert sum(math.exp(p) for _, p in choice.top[0]) == pytest.approx(1, abs=1e-5)


def test_a_small_bias_counts_in_sixteen_bits() -> None:
    logits = torch.ones(1, 2, dtype=torch.bfloat16)
    assert choose(logits, [Drawing(Sampling(logit_bias={1: 1e-3}))]).tokens == [1]


def test_a_row_without_a_number_fails_alone() -> None:
    logits = torch.zeros(4, 8)
    logits[1, 3] = math.nan
    logits[2, ::2] = -math.inf
    drawings = [
        Drawing(Sampling(1.0)),
        Drawing(Sampling(1.0)),
        Drawing(Sampling(), matcher=Evens(8)),
        Drawing(Sampling()),
    ]
    for chooser in (choose, choose_ref):
        choice = chooser(logits, drawings)
        assert set(choice.failures) == {1, 2}
        assert "not finite" in choice.failures[1]
        assert "allows no token" in choice.failures[2]
        assert choice.tokens[3] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 2**63}, "does not fit into 64 bits"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"logit_bias": [(1, 2.0)]}, "as a mapping"),
        ({"logit_bias": {"1": 2.0}}, "has the key '1'"),
        ({"logit_bias": {-1: 2.0}}, "has the key -1"),
        ({"logit_bias": {1: math.inf}}, "logit_bias of token 1 is inf"),
    ],
)
def test_what_is_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


def test_a_bias_of_no_token_and_a_negative_count_are_refused() -> None:
    Sampling(logit_bias={7: 1.0}).check_vocabulary(8)
    with pytest.raises(UserError, match="names token 8; the model's vocabulary has 8"):
        Sampling(logit_bias={8: 1.0}).check_vocabulary(8)
    with pytest.raises(UserError, match="logprobs is -1"):
        Drawing(Sampling(), logprobs=-1)
    assert hash(Sampling(logit_bias={7: 1.0})) == hash(Sampling(logit_bias={7: 1.0}))
