"""The proof of a merge: a folder's plain transformers model against the base with its adapter, on fixed prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from weft.base.embeddings import config_of
from weft.core.adapters import Adapters
from weft.data import Message, Renderer, Sample, unlabelled_sample
from weft.export.figures import Distances, clear_positions, larger, relative_difference, same_tokens
from weft.export.rendering import Rendering
from weft.layouts.encoder_decoder import start_token
from weft.merge.model import check_as_written
from weft.models import gate
from weft.objectives.passes import logits_of

# A model that is written in 32 bits must give the numbers of base and adapter in 32 bits (of a quantised base: of its
# dequantised weights). Written in 16 bits its weights are rounded, and running it rounds every number on the way, which
# alone lets two right answers differ wherever two tokens are about as likely. So what was written is judged in 32 bits:
# it must choose the same token where the dtype's own rounding does not decide, and be about as near to the numbers of
# base and adapter in 32 bits as these are themselves in 16. How it runs in 16 bits is told beside.
LARGEST_DIFFERENCE = 1e-5
# Some bases round more than that by themselves, each machine differently. Then the merged model's own error in 32 bits
# is measured, against itself in 64. Base and adapter compute the same function in another order, with an error of that
# size; rounding each merged weight once weighs no more than rounding each product with it. So two right answers are up
# to three such errors apart, and the largest of many is asked for one more.
ROUNDINGS = 4
LEAST_AGREEMENT = 0.999
MOST_ROUNDING = 1.5
# A tool that rounds a change, and then the sum, rounds twice.
ROUNDED_TWICE = math.sqrt(2)

_TEXT = """
A loom keeps its warp fixed and weaves many wefts through it. Write down what you see from the window,
in three short sentences, and then explain why the sky is blue at noon and red in the evening. How many
apples are left if nine of twenty-three are eaten? Translate into French: the old bridge over the river
was closed yesterday because of the storm. def add(a, b): return a + b # what does this function give
for 2 and 40? 今天天气怎么样？请用一句话回答。 List four animals that live in the sea, one per line, and the colour of
each. "It is late," she said; "we should have left at 7:30, not at a quarter past nine!" Summarise: in
1851 a printer in the north of the country began to sell small books of songs, which soon were known in
every village; his daughter drew the pictures, and after eleven years they moved to a larger house by
the market. {"name": "Ada", "age": 36, "languages": ["en", "fr"]} Is this valid JSON? Which of the two
numbers is larger, 0.125 or 1/9, and by how much? Give a recipe for bread with flour, water, salt and
yeast. Erkläre einem Kind, was ein Schatten ist. The train leaves at 18:05 and takes two hours and fifty
minutes; when does it arrive?
"""
_LENGTHS = (2, 3, 5, 8, 13, 21, 34, 55, 89, 144)


@dataclass(frozen=True)
class Proof:
    """How far a merged model is from the base with its adapter.

    Attributes:
        prompts, positions: what was compared: logits at that many positions of that many prompts.
        routed_difference: from the base as it was in training, with the adapter: the largest difference of two logits
            over the largest logit of its prompt.
        agreement: share of the positions with the same likeliest token as there.
        precise_difference: of the merged model in 32 bits from base and adapter in 32 bits.
        own_rounding: of the merged model in 32 bits from itself in 64; measured only where it decides.
        exact: the merged model was written in 32 bits or more. If not:
        decided: positions whose likeliest token leads by more than the dtype's rounding can move.
        decided_agreement: share of these where the merged model, in 32 bits, chooses the same.
        rounding: its distance (root mean square) from base and adapter in 32 bits, over the distance that base and
            adapter have from there in the dtype that was written.
        divergence: Kullback-Leibler, in nats, of its answers from those of both in 32 bits: the mean over positions.
        explained_divergence: the same of base and adapter in the dtype that was written, where that has fewer bits.
        rendering: how messages become ids elsewhere; None where the merged model takes none.
    """

    prompts: int
    positions: int
    routed_difference: float
    _: KW_ONLY
    agreement: float
    precise_difference: float
    exact: bool
    decided: int | None = None
    decided_agreement: float | None = None
    rounding: float | None = None
    own_rounding: float | None = None
    divergence: float | None = None
    explained_divergence: float | None = None
    rendering: Rendering | None = None

    @property
    def asked(self) -> float:
        """The largest difference that is allowed to a model in 32 bits."""
        # The order matters: a NaN does not widen it.
        return max(LARGEST_DIFFERENCE, ROUNDINGS * (self.own_rounding or 0.0))

    @property
    def holds(self) -> bool:
        """Whether the merge is as close as it must be; never if a number is not finite."""
        if self.exact:
            return self.precise_difference <= self.asked
        assert self.decided_agreement is not None
        assert self.rounding is not None
        return self.decided_agreement >= LEAST_AGREEMENT and self.rounding <= MOST_ROUNDING

    @property
    def bar(self) -> str:
        """The demand, in words."""
        if self.exact:
            return f"a relative difference of at most {self.asked:.2g}"
        return (
            f"{100 * LEAST_AGREEMENT:g} % of the positions where rounding does not decide, and an error of at most "
            f"{MOST_ROUNDING:g} times that of running in this dtype"
        )

    def lines(self) -> list[str]:
        """The figures as lines for people."""
        found = [
            f"against the adapter on its base, {self.prompts} prompts, {self.positions} positions: largest relative "
            f"difference of logits {self.routed_difference:.2g}, same likeliest token at {100 * self.agreement:.4g} %"
        ]
        if self.exact and self.precise_difference != self.routed_difference:
            found.append(f"against both in 32 bits: largest relative difference {self.precise_difference:.2g}")
        if self.asked > LARGEST_DIFFERENCE:
            found.append(f"the merged model's own rounding in 32 bits is {self.own_rounding:.2g}")
        if not self.exact:
            assert self.decided_agreement is not None
            found.append(
                f"what was written, in 32 bits, against both in 32 bits: same likeliest token at "
                f"{100 * self.decided_agreement:.4g} % of the {self.decided} positions where rounding does not decide; "
                f"error {self.rounding:.2f} times that of running in this dtype"
            )
        if self.rendering is not None:
            found.append(self.rendering.line())
        return found


@dataclass(frozen=True)
class Reference:
    """What base and adapter give for one prompt, logits [positions, tokens or classes]: as the base was in training, in
    32 bits, and, if the merged model has fewer, in its dtype."""

    ids: list[int]
    routed: Tensor
    precise: Tensor
    rounded: Tensor | None = None


def fixed_texts() -> list[str]:
    """Questions of 2 to 144 words, two of each length."""
    words = _TEXT.split()
    starts = [(29 * i) % len(words) for i in range(2 * len(_LENGTHS))]
    return [" ".join((words * 3)[start : start + n]) for start, n in zip(starts, _LENGTHS * 2, strict=True)]


def fixed_prompts(adapters: Adapters, name: str, renderer: Renderer) -> list[list[int]]:
    """The fixed texts as adapter ``name`` is asked, cut where the model's positions end."""
    shape, found = adapters.architecture, []
    for text in fixed_texts():
        if adapters.head(name).writes:
            ids = renderer.prompt([Message("user", text)], task=shape.task).ids
        else:
            ids = unlabelled_sample(renderer, [text], "a fixed text", encoder=not shape.writes).input_ids
        found.append(list(ids)[: shape.max_length])
    return found


@torch.no_grad()
def routed_logits(adapters: Adapters, name: str, prompts: Sequence[list[int]]) -> list[Tensor]:
    """The logits [positions, tokens or classes] of token ids that the base with adapter ``name`` gives."""
    # The text itself stands for what an encoder-decoder would write.
    samples = [Sample(ids, [0.0] * len(ids), "a fixed text", target_ids=tuple(ids)) for ids in prompts]
    return [logits_of(adapters, name, [sample]).cpu() for sample in samples]


@torch.no_grad()
def compare(folder: Path, expected: Sequence[Reference], device: torch.device) -> Proof:
    """Load what lies in ``folder`` with transformers alone and run it on the same ids.

    Raises:
        UserError: it loads other tensors than are written there.
    """
    import transformers

    config = gate.load_config(folder)
    assert config.architectures is not None
    auto = getattr(transformers, config.architectures[0])
    model = nn.Module.to(gate.load_weights(auto, folder, config, dtype="auto"), device).eval()
    check_as_written(model, folder)
    exact = expected[0].rounded is None
    as_run = [plain_logits(model, one.ids, device) for one in expected]
    found = as_run
    if not exact:
        nn.Module.to(model, torch.float32)
        found = [plain_logits(model, one.ids, device) for one in expected]

    def own_rounding() -> float | None:
        known = model.dtype == torch.float32
        return _own_rounding(model, [one.ids for one in expected], device) if known else None

    return judge(expected, found, as_run=as_run, own_rounding=own_rounding)


def judge(
    expected: Sequence[Reference],
    found: Sequence[Tensor],
    *,
    as_run: Sequence[Tensor],
    own_rounding: Callable[[], float | None],
) -> Proof:
    """Judge logits [positions, tokens], in 32 bits, by what was expected of each prompt.

    Args:
        expected: with ``rounded`` for every prompt, or for none.
        as_run: the logits in the dtype that the model has.
        own_rounding: measures the model's own rounding in 32 bits, where that decides; None: it cannot be measured.
    """
    exact = expected[0].rounded is None
    routed, precise = Distances(), Distances()
    for one, run, logits in zip(expected, as_run, found, strict=True):
        precise.add(one.precise, logits)
        if one.routed is not one.precise or run is not logits:
            routed.add(one.routed, run)
    if not routed.positions:
        routed = precise
    proof = Proof(
        len(expected),
        precise.positions,
        routed.largest,
        agreement=routed.same / routed.positions,
        precise_difference=precise.largest,
        exact=exact,
        divergence=precise.divergence / precise.positions,
    )
    if not exact:
        return _beside_rounding(proof, expected, found, precise)
    if LARGEST_DIFFERENCE < precise.largest < math.inf:
        proof = replace(proof, own_rounding=own_rounding())
    return proof


def _beside_rounding(proof: Proof, expected: Sequence[Reference], found: Sequence[Tensor], apart: Distances) -> Proof:
    """The proof with what rounding explains: ``found`` lies ``apart`` from what was expected in 32 bits."""
    decided = same = 0
    rounding = Distances()
    for one, logits in zip(expected, found, strict=True):
        assert one.rounded is not None
        rounding.add(one.precise, one.rounded)
        clear = clear_positions(one.precise, float((one.rounded.double() - one.precise.double()).abs().max()))
        decided += int(clear.sum())
        same += same_tokens(one.precise[clear], logits[clear])
    return replace(
        proof,
        decided=decided,
        decided_agreement=same / decided if decided else 0.0,
        rounding=math.sqrt(apart.squares / rounding.squares) if rounding.squares else math.inf,
        explained_divergence=rounding.divergence / rounding.positions,
    )


def _own_rounding(model: nn.Module, prompts: Sequence[list[int]], device: torch.device) -> float:
    """The largest relative difference of a model's logits in 32 bits from its own in 64. Changes the model's dtype."""
    single = [plain_logits(model, ids, device) for ids in prompts]
    model.to(torch.float64)
    found = 0.0
    for ids, logits in zip(prompts, single, strict=True):
        found = larger(found, relative_difference(plain_logits(model, ids, device), logits))
    return found


@torch.no_grad()
def plain_logits(model: nn.Module, ids: Sequence[int], device: torch.device) -> Tensor:
    """The logits [positions, tokens or classes] of a transformers model, by its own forward."""
    inputs = torch.tensor([list(ids)], device=device)
    more = {}
    if config_of(model).is_encoder_decoder:
        start = torch.full((1, 1), start_token(model), device=device)
        more = {"decoder_input_ids": torch.cat([start, inputs[:, :-1]], dim=1)}
    logits: Tensor = model(input_ids=inputs, **more).logits.cpu()
    return logits[0] if logits.dim() == 3 else logits
