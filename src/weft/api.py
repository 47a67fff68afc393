"""What a program uses of Weft; ``weft.<name>`` is the same, imported when it is first asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from weft.adapters import Adapters
from weft.cli import common
from weft.cli.progress import not_reached, opening
from weft.cli.session import Session
from weft.core.adapter import MethodConfig
from weft.core.stream import Part
from weft.data import Message, Renderer, register_format
from weft.errors import UserError
from weft.extensions import load_extension
from weft.files.run_folder import read_metrics
from weft.generation import Engine, Limits, Request, generate
from weft.generation.constraint import Constraint
from weft.generation.open import open_target
from weft.generation.rollouts import writer
from weft.generation.sampling import Sampling
from weft.generation.target import Target
from weft.methods import (
    AdaLoraConfig,
    BitFitConfig,
    BottleneckConfig,
    FreezeConfig,
    FullConfig,
    HardPromptConfig,
    IA3Config,
    LlamaProConfig,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    PTuningV2Config,
    TrainableTokensConfig,
    VeraConfig,
    register_method,
)
from weft.models import describe, load_base
from weft.objectives import register_objective
from weft.rewards import register_reward
from weft.training import RunConfig, TrainResult, load_config, make_config
from weft.training.callbacks import Callback, check_hearers, register_callback
from weft.training.config import config_of
from weft.training.loop import Event
from weft.training.run import Setup
from weft.training.run import train as run_training

__all__ = [
    "AdaLoraConfig",
    "Adapters",
    "BitFitConfig",
    "BottleneckConfig",
    "Constraint",
    "Engine",
    "FreezeConfig",
    "FullConfig",
    "HardPromptConfig",
    "IA3Config",
    "LNTuningConfig",
    "Limits",
    "LlamaProConfig",
    "LoraConfig",
    "Message",
    "PTuningConfig",
    "PTuningV2Config",
    "Part",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "Renderer",
    "Request",
    "RunConfig",
    "Sampling",
    "Target",
    "TrainableTokensConfig",
    "UserError",
    "VeraConfig",
    "describe",
    "generate",
    "load_base",
    "load_config",
    "load_extension",
    "make_config",
    "open_target",
    "read_metrics",
    "register_callback",
    "register_format",
    "register_method",
    "register_objective",
    "register_reward",
    "train",
]


def train(
    config: str | os.PathLike[str] | Mapping[str, object] | RunConfig | None = None,
    *,
    model: str | os.PathLike[str] | None = None,
    data: object = None,
    method: str | MethodConfig | Sequence[str | MethodConfig] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite_output_dir: bool = False,
    callbacks: Sequence[str | Callback] = (),
    on_event: Callable[[Event], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = True,
    **settings: object,
) -> TrainResult:
    """Train one or many adapters over one base, as ``weft train`` does; the results lie in ``output_dir``.

    Ctrl-C (in a notebook: interrupt) saves after the step and raises ``KeyboardInterrupt``; ``resume=True`` goes on.

    Args:
        config: A YAML or JSON file; or its keys as a mapping; or the folder of a run, to go on with ``resume=True``.
        model: The base: a Hugging Face folder, a hub id, or an embedded model (``tiny-llama``, ``tiny-bloom``).
        data: A file, a folder, a pattern, a hub's data set, or a list of them.
        method: A method (``"lora"``, or with settings ``LoraConfig(r=4)``), or several, which train at once and take
            the place of the jobs of ``config``.
        output_dir: The folder of the run; default ``runs/weft``.
        resume: Go on from the newest checkpoint in ``output_dir``.
        overwrite_output_dir: Delete the run that is in ``output_dir``.
        callbacks: Names of registered callbacks, or functions like them: called with the run's ``Setup``, each gives
            what hears every event. If that returns True, the run saves and stops.
        on_event: Hears every event, a mapping as in ``metrics.jsonl``.
        should_stop: Asked after every step; True saves and stops.
        progress: Show what is trained and how far it is: a live table on a terminal and in a notebook, else lines.
        **settings: Any key of docs/config.md (``learning_rate=1e-3``, ``epochs=2``, ``r=16``); wins over ``config``,
            in every job that knows it.

    Returns:
        How each job has ended; ``completed`` is False if the run was asked to stop.

    Raises:
        UserError: Something that was given cannot be used; the message says what, and what to do.
        KeyboardInterrupt: It was interrupted. While it was training, all up to there is saved.
    """
    check_hearers(callbacks, on_event, should_stop, progress)
    flags = {"model": model, "data": data, "method": method, "output_dir": output_dir}
    flags |= {"resume": resume or None, "overwrite_output_dir": overwrite_output_dir or None}
    named, callables = _parted(callbacks)
    flags = {key: value for key, value in flags.items() if value is not None}
    found = config_of(config, settings | named, flags=flags, source="weft.train")
    if progress and found.shape == "full":
        common.tell_hub(found.model)
    session = Session(quiet=not progress, in_program=True)

    def show(setup: Setup) -> Callable[[Event], None]:
        if progress:
            print(*opening(setup, not_reached(setup)), sep="\n", flush=True)
        session.begin(setup.jobs)
        return session.event

    with session.open():
        result = run_training(
            found,
            callbacks=[show, *callables],
            on_event=on_event or (lambda event: None),
            writer=writer,
            should_stop=lambda: session.should_stop() or (should_stop is not None and should_stop()),
        )
    if session.received is not None and not result.completed:
        raise KeyboardInterrupt
    return result


def _parted(callbacks: Sequence[str | Callback]) -> tuple[dict[str, object], list[Callback]]:
    """The setting that names some, if any does, and the functions."""
    names = [one for one in callbacks if isinstance(one, str)]
    return {"callbacks": names} if names else {}, [one for one in callbacks if not isinstance(one, str)]
