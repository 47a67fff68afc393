"""A run that is rehearsed without numbers: its own code makes its steps, over a base and adapters without memory."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TypeVar, get_args

import torch
from torch import Tensor, nn

from weft.adapters import Adapters
from weft.base.embeddings import config_of, input_embeddings
from weft.core.layout import Counts
from weft.core.stream import Part, Stream
from weft.data import Sample
from weft.errors import UserError
from weft.machine import resident
from weft.models import Base
from weft.models.load import resolve_device
from weft.models.products import install_products
from weft.models.quantize import Quantization, StoredKind
from weft.models.stored import stored_quantization
from weft.models.tasks import check_job
from weft.objectives.passes import EVALUATION_TOKENS, evaluate, passes
from weft.ops.sixteen_bits import faster_wide_from
from weft.planning.dry_run import Call, DryRun, without_memory
from weft.planning.quantized import empty_weights, swap_linears
from weft.planning.supposed import supposed_passes
from weft.planning.way import ProvedWay, proved_way
from weft.training.checks import check_names
from weft.training.job import Job
from weft.training.judged import evaluate_judged
from weft.training.optimizers.eight_bit import SMALLEST
from weft.training.reader import JobData, Reader
from weft.training.run import blank_adapter
from weft.training.settings import RunConfig
from weft.training.step import train_step

Found = TypeVar("Found")


@dataclass(frozen=True)
class Material:
    """What a run is made of, less the weights: its configuration, the shapes of its base, and its data.

    ``resident``: the bytes that this process held when it had read them.
    """

    config: RunConfig
    sketch: Base
    data: Sequence[JobData]
    _: KW_ONLY
    way: ProvedWay
    resident: int

    @property
    def kept(self) -> Quantization | None:
        """How the linears of the base will be kept: as the run says, or as the checkpoint has them."""
        return self.config.kept or stored_quantization(config_of(self.sketch.model))

    def with_config(self, config: RunConfig) -> Material:
        """The same data and base for a configuration that differs in how the base is kept and the steps are made."""
        return replace(self, config=config, sketch=self.way.on(config.sketch()))


def material(config: RunConfig) -> Material:
    """Read what a run is made of.

    Raises:
        UserError: As ``weft.training.run.prepare``; or the base is kept in words of few bits.
    """
    places = check_names(config)
    sketch = config.sketch()
    check_kind(config, sketch)
    renderer = config.renderer(sketch.tokenizer, sketch.architecture.max_length)
    for job in config.jobs:
        check_job(job.name, job.task, config.model, sketch.architecture)
    read = Reader(config, renderer, sketch.architecture, places, token_rows=sketch.token_rows)
    return material_of(config, sketch, [read.job(job) for job in config.jobs])


def material_of(config: RunConfig, sketch: Base, data: Sequence[JobData]) -> Material:
    """What a run is made of whose data has been read.

    Raises:
        UserError: As ``load_base``; or the base is kept in words of few bits.
    """
    check_kind(config, sketch)
    way = proved_way(config)
    return Material(config, way.on(sketch), data, way=way, resident=resident())


def check_kind(config: RunConfig, sketch: Base) -> None:
    """Refuse bases of which there is no plan.

    Raises:
        UserError: The base is kept in words of few bits.
    """
    stored = stored_quantization(config_of(sketch.model))
    if stored is not None and stored.kind in get_args(StoredKind):
        raise UserError(
            f"{config.model} is kept by {stored.kind}, and there is no plan for such bases yet; weft train takes it."
        )


class _DryAdapters(Adapters):
    """They say what is going on."""

    dry: DryRun

    def run(self, parts: Sequence[Part]) -> tuple[Stream, Tensor]:
        with self.dry.during("forward"):
            return super().run(parts)

    def losses(self, hidden: Tensor, targets: Tensor, rows: Counts) -> Tensor:
        with self.dry.during("logits"):
            return super().losses(hidden, targets, rows)


class _DryJob(Job):
    """It knows which pieces of memory are its gradients and its optimizer's state.

    An optimizer in 8 bits looks at numbers, and its state is whole numbers, which would be real: SGD without a state
    stands for it, what its update makes for a while, and ``further_state`` bytes.
    """

    dry: DryRun
    further_state = 0
    _further: Tensor | None = None
    beside: Sequence[Job] = ()

    def micro_batches(self) -> list[list[Sample]]:
        return supposed_passes(self, self.beside) if self.rolls else super().micro_batches()

    def _make_optimizer(self) -> torch.optim.Optimizer | None:
        own = self.config
        if not own.optimizer.endswith("8bit"):
            return super()._make_optimizer()
        self.further_state = own.optimizer_kind.state_bytes(own, self.parameters)
        plain = own.model_dump(exclude_unset=True) | {"optimizer": "sgd", "momentum": 0.0, "optim_args": {}}
        self.config = type(own).model_validate(plain)
        try:
            made = super()._make_optimizer()
        finally:
            self.config = own
        if made is not None:
            made.register_step_post_hook(self._play_eight_bits)
        return made

    def _witness(self, tensor: Tensor) -> str:
        return ""  # it has no numbers

    def update(self, tokens: int) -> float:
        for parameter in self.parameters:
            if parameter.grad is not None and (piece := self.dry.piece_of(parameter.grad)):
                piece.cause = "gradients"
        begun = self.dry.recording.events
        with self.dry.during("update"):
            found = super().update(tokens)
            if self.further_state and self._further is None:
                self._further = torch.empty(self.further_state // 4)
        for piece in self.dry.recording.pieces:
            if piece.taken >= begun and piece.freed is None:
                piece.cause = "optimizer"
        return found

    def _play_eight_bits(self, *_: object) -> None:
        """The tensors that bitsandbytes' AdamW makes on a CPU, parameter by parameter, besides those of SGD."""
        for parameter in self.parameters:
            if parameter.grad is None or parameter.numel() < SMALLEST or self.dry.device.type != "cpu":
                continue
            first, second = torch.empty_like(parameter.data), torch.empty_like(parameter.data)
            grad = parameter.grad * 1.0
            first.mul_(0.9).add_(grad, alpha=0.1)
            second.mul_(0.9).addcmul_(grad, grad, value=0.1)
            parameter.data.addcdiv_(first, (second.sqrt() / 0.9).add_(1e-8), value=0.0)


class Rehearsal:
    """The jobs of a run over a base without memory. Use it inside ``rehearsed`` only.

    Attributes:
        weight_bytes: what the base's weights take in memory; ``scale_bytes``: the scales of those that are quantised.
        adapter_bytes: what the adapters' tensors take.
    """

    def __init__(self, made: Material, dry: DryRun, device: torch.device) -> None:
        self.made, self.dry, self.device = made, dry, device
        config, base = made.config, made.sketch
        self.dtype = input_embeddings(base.model).weight.dtype
        if made.kept is not None:
            swap_linears(base.model, made.kept, self.dtype)
        with torch.no_grad():
            self.scale_bytes = empty_weights(base.model, dry.empty)
        self.adapters = _DryAdapters(
            base.model, base.architecture, exact=config.exact, checkpointing=config.gradient_checkpointing
        )
        self.adapters.dry = dry
        # The weights have no device yet. Methods that copy blocks copy the classes too.
        install_products(base.model, self.adapters.router, device)
        adapters = [
            blank_adapter(self.adapters, job, data, base) for job, data in zip(config.jobs, made.data, strict=True)
        ]
        own = [module for adapter in adapters for module in adapter.modules()]
        self.adapter_bytes = _bytes(own)
        self.weight_bytes = _bytes(set(base.model.modules()) - set(own))
        if config.offload_param is not None:  # of the blocks one is in memory at a time
            blocks = [_bytes(list(base.model.get_submodule(path).modules())) for path in base.architecture.blocks]
            self.weight_bytes -= sum(blocks) - max(blocks, default=0)
        without_memory([*base.model.modules(), *own], dry.empty)
        with dry:
            self.jobs = [
                _DryJob(
                    job, adapter, data.train, data.held, data.mixture, eval_sizes=data.sizes,
                    shares_rows=self.adapters.layout.shares_rows,
                )
                for job, adapter, data in zip(config.jobs, adapters, made.data, strict=True)
            ]
        for job in self.jobs:
            job.dry, job.beside = dry, self.jobs

    @property
    def total_steps(self) -> int:
        """The steps of the longest job."""
        return max(job.total_steps for job in self.jobs)

    def sizes(self) -> list[int]:
        """The tokens of each step of the first epoch, of all jobs together."""
        found = [self.step_sizes(job) for job in self.jobs if job.parameters]
        return [sum(one) for one in itertools.zip_longest(*found, fillvalue=0)]

    def step_sizes(self, job: Job, *, virtual: bool = True) -> list[int]:
        """The tokens of each of a job's steps in its first epoch, with the virtual ones or without."""
        left_out = 0 if virtual else job.adapter.num_virtual_tokens
        steps = range(min(job.total_steps, job.batches.steps_in(0)))
        return [sum(job.batches.tokens(micro) - left_out * len(micro) for micro in job.batches[step]) for step in steps]

    def calls_of(self, step: int) -> list[Call]:
        """Make a step of the run; returns the operators that it calls, where they are recorded."""
        active = [job for job in self.jobs if job.parameters and step < job.total_steps]
        for job in active:
            job.progress.step, job.progress.ended = step, None
        begun = len(self.dry.recording.calls)
        with self.dry, self.dry.during("backward"):
            train_step(self.adapters, active)
        return self.dry.recording.calls[begun:]

    def evaluation(self) -> None:
        """Make the largest pass of each job's evaluations."""
        for job in self.jobs:
            if job.eval_samples and not job.rolls:
                largest = max(passes(job.eval_samples, EVALUATION_TOKENS), key=lambda some: sum(s.size for s in some))
                with self.dry, self.dry.during("evaluation"):
                    if job.judged is not None:
                        evaluate_judged(self.adapters, job, largest)
                    else:
                        evaluate(self.adapters, job.name, largest)


def _bytes(modules: Sequence[nn.Module] | set[nn.Module]) -> int:
    """The bytes of the modules' own parameters and buffers; those of a tensor that several share, once."""
    tensors = {id(t): t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def rehearsed(made: Material, use: Callable[[Rehearsal], Found], *, record: bool = True) -> Found:
    """What ``use`` finds in a rehearsal of the run, of which the sketch is used up.

    It has a thread of its own, because code keeps memory for the next call by thread, which must be real.

    Raises:
        UserError: As ``weft.training.run.prepare``.
    """
    device = resolve_device(made.config.device)
    for kind in (torch.bfloat16, torch.float16):
        faster_wide_from(device, kind)  # it asks the machine, where there is one
    found: list[Found] = []
    raised: list[BaseException] = []

    def act() -> None:
        try:
            found.append(use(Rehearsal(made, DryRun(device, record=record), device)))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=act, name="rehearsal")
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return found[0]
