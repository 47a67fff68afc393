"""The measures of a fine-tuned adapter on the embedded bases: exact answers, and the base's forgetting."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weft.assets import base_text_path, instructions_path
from weft.core.adapters import Adapters
from weft.evaluate.exact_match import Answer, answer_questions, read_questions
from weft.evaluate.forgetting import read_documents, text_loss, text_samples
from weft.objectives.passes import Work, forward_losses
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
        self.text_losses |= {name: text_loss(setup.adapters, name, samples) for name in names}
        self.seconds[what] = time.monotonic() - begun


def saved_bytes(adapters: Adapters, work: Work) -> int:
    """The bytes that one forward pass keeps for its backward pass without parameters: the activations of one step."""
    own = {p.untyped_storage().data_ptr() for p in adapters.model.parameters()}
    if work.adapter is not None:
        own |= {p.untyped_storage().data_ptr() for p in adapters[work.adapter].parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # held, so that no other tensor gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        (loss,) = forward_losses(adapters, [work])
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def training_bytes(setup: Setup, name: str, samples: int = 16) -> int:
    """The memory that training one job adds to the base's: its numbers, gradients and two moments, and one step's
    activations, for the first ``samples`` samples."""
    job = next(job for job in setup.jobs if job.name == name)
    trained = sum(p.numel() * p.element_size() for p in job.parameters)
    batch = list(job.samples[:samples])
    work = Work(name, batch, 1, divisor=sum(map(job.adapter.head.loss_weight, batch)))
    return 4 * trained + (saved_bytes(setup.adapters, work) if trained else 0)
