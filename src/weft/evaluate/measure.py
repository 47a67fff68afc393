"""Measures of a fine-tuned adapter on the embedded bases: exact answers, and the base's forgetting."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from weft.assets import base_text_path, instructions_path
from weft.evaluate.exact_match import Answer, answer_questions, read_questions
from weft.evaluate.forgetting import read_documents, text_samples
from weft.objectives.passes import evaluate_loss
from weft.training.run import Setup


@dataclass
class Measure:
    """Held-out questions and base text, asked before training (``None``: the plain base) and after."""

    answers: dict[str | None, list[Answer]] = field(default_factory=dict)
    text_losses: dict[str | None, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.questions = read_questions(instructions_path("eval"))
        self.documents = read_documents(base_text_path())

    def before(self, setup: Setup) -> None:
        """Measure the plain base."""
        self._ask(setup, [None], "evaluation before")

    def after(self, setup: Setup) -> None:
        """Measure every trained adapter, all in the same batches."""
        self.parameters = {job.name: job.adapter.num_trainable() for job in setup.jobs}
        self._ask(setup, [job.name for job in setup.jobs], "evaluation after")

    def _ask(self, setup: Setup, names: Sequence[str | None], what: str) -> None:
        begun = time.monotonic()
        self.answers |= answer_questions(setup.adapters, setup.renderer, self.questions, names)
        samples = text_samples(setup.renderer, self.documents)
        self.text_losses |= {name: evaluate_loss(setup.adapters, name, samples) for name in names}
        self.seconds[what] = time.monotonic() - begun
