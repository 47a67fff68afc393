"""Proving a merge: a folder's plain transformers model against the base with its adapter, on fixed prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.core.adapters import Adapters
from weft.core.heads import ClassificationHead
from weft.core.seq2seq import run_seq2seq
from weft.core.stream import Part
from weft.data import Message, Renderer, Sample, unlabelled_sample
from weft.train.step import logits_of

# The bars: in 32 bits and more, of the largest difference; where numbers are rounded or quantised, of the likeliest
# tokens, for there the differences are those of rounding.
LARGEST_DIFFERENCE = 1e-5
LEAST_AGREEMENT = 0.999

_TEXT = """
A loom keeps its warp fixed and weaves many wefts through it. Write down what you see from the window, in three short
sentences, and then explain why the sky is blue at noon and red in the evening. How many apples are left if nine of
twenty-three are eaten? Translate into French: the old bridge over the river was closed yesterday because of the
storm. def add(a, b): return a + b # what does this function give for 2 and 40? 今天天气怎么样？请用一句话回答。 List four
animals that live in the sea, one per line, and the colour of each. "It is late," she said; "we should have left at 7:30, not
at a quarter past nine!" Summarise: in 1851 a printer in the north of the country began to sell small books of songs,
which soon were known in every village; his daughter drew the pictures, and after eleven years they moved to a larger
house by the market. {"name": "Ada", "age": 36, "languages": ["en", "fr"]} Is this valid JSON? Which of the two
numbers is larger, 0.125 or 1/9, and by how much? Give a recipe for bread with flour, water, salt and yeast. Erkläre
einem Kind, was ein Schatten ist. The train leaves at 18:05 and takes two hours and fifty minutes; when does it
arrive?
"""
_LENGTHS = (2, 3, 5, 8, 13, 21, 34, 55, 89, 144)


@dataclass(frozen=True)
class Proof:
    """How far a merged model is from the base with its adapter.

    Attributes:
        prompts, positions: what was compared: logits at that many positions of that many prompts.
        relative_difference: the largest difference of two logits over the largest logit of its prompt.
        agreement: share of the positions whose likeliest token is the same (or was as likely).
        exact: whether the differences themselves must be small (nothing in either is below 32 bits).
    """

    prompts: int
    positions: int
    relative_difference: float
    agreement: float
    exact: bool

    @property
    def holds(self) -> bool:
        """Whether the merge is as close as it must be; never if a number is not finite."""
        return self.relative_difference <= LARGEST_DIFFERENCE if self.exact else self.agreement >= LEAST_AGREEMENT

    @property
    def bar(self) -> str:
        """What is asked for, in words."""
        if self.exact:
            return f"relative difference at most {LARGEST_DIFFERENCE:.0e}"
        return f"likeliest tokens alike at {100 * LEAST_AGREEMENT:g} % of the positions or more"

    def __str__(self) -> str:
        return (
            f"{self.prompts} prompts, {self.positions} positions: largest relative difference of logits "
            f"{self.relative_difference:.2g}, likeliest tokens alike {100 * self.agreement:.4g} %"
        )

    def as_json(self) -> dict[str, Any]:
        """For weft.json."""
        return asdict(self)


def fixed_texts() -> list[str]:
    """Questions of 2 to 144 words, two of each length."""
    words = _TEXT.split()
    starts = [(29 * i) % len(words) for i in range(2 * len(_LENGTHS))]
    return [" ".join((words * 3)[start : start + n]) for start, n in zip(starts, _LENGTHS * 2, strict=True)]


@torch.no_grad()
def routed_logits(adapters: Adapters, name: str, renderer: Renderer) -> list[tuple[list[int], Tensor]]:
    """Token ids and logits [positions, tokens or classes] of the fixed texts, of the base with adapter ``name``."""
    shape, found = adapters.architecture, []
    classifies = isinstance(adapters[name].head, ClassificationHead)
    for text in fixed_texts():
        if classifies:
            ids = unlabelled_sample(renderer, [text], "a fixed text", encoder=shape.bidirectional).input_ids
        else:
            ids = renderer.prompt([Message("user", text)], task=shape.task).ids
        ids = list(ids)[: shape.max_length]
        if classifies:
            logits = logits_of(adapters, name, [Sample(ids, [0.0] * len(ids), "a fixed text")])
        elif shape.task == "seq2seq":
            _, hidden = run_seq2seq(adapters, [Part(name, [ids])], [ids])
            logits = adapters.logits(hidden, [(name, len(hidden))])
        else:
            hidden = adapters.forward(adapters.stream([Part(name, [ids])]))
            logits = adapters.logits(hidden, [(name, len(hidden))])
        found.append((ids, logits.cpu()))
    return found


@torch.no_grad()
def compare(folder: Path, routed: Sequence[tuple[list[int], Tensor]], device: torch.device, *, exact: bool) -> Proof:
    """Load what lies in ``folder`` with transformers alone and run it on the same ids."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype="auto").to(device).eval()
    largest, same, positions = 0.0, 0, 0
    for ids, wanted in routed:
        inputs = torch.tensor([ids], device=device)
        more = {}
        if config.is_encoder_decoder:
            start = torch.full((1, 1), _start(model), device=device)
            more = {"decoder_input_ids": torch.cat([start, inputs[:, :-1]], dim=1)}
        logits = model(input_ids=inputs, **more).logits.cpu()
        logits = logits[0] if logits.dim() == 3 else logits
        a, b = wanted.double(), logits.double()
        relative = float((a - b).abs().max() / a.abs().max())
        largest = relative if relative != relative or relative > largest else largest
        # In 16 bits several tokens may be equally likely, and which of them comes first means nothing.
        chosen = a.gather(-1, b.argmax(-1, keepdim=True))
        same += int((chosen >= a.max(-1, keepdim=True).values).sum())
        positions += len(a)
    return Proof(len(routed), positions, largest, same / positions, exact)


def _start(model: Any) -> int:
    from weft.core.seq2seq import start_token

    return start_token(model)
