"""The way from a configuration to the finished folder of a run: load, check, train, save."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from weft.adapters import Adapters
from weft.core.adapter import Adapter
from weft.data import Problems, Renderer
from weft.data.auditing.audit import audit_before_training
from weft.data.provenance import Provenance, TokenizerFacts, file_names, template_of
from weft.data.views import Samples, chained
from weft.errors import UserError
from weft.files.run_folder import RUN_FILE, RunStore
from weft.files.whole import refilled_folder
from weft.files.writing import WriteError, writing
from weft.foreign import expect
from weft.methods.dense import how_kept
from weft.models import Base
from weft.models.attached import prove_attached
from weft.models.load import resolve_model
from weft.models.stored import stored_quantization
from weft.models.tasks import check_job
from weft.objectives.rollouts import RolloutObjective
from weft.training.batches import Batches
from weft.training.callbacks import CALLBACKS, Callback, begun, with_callbacks
from weft.training.checks import BAD_RECORDS, check_names, check_places
from weft.training.config import RUN_FORMAT
from weft.training.forgetting import Forgetting, text_to_measure
from weft.training.job import Job
from weft.training.judged import add_reference
from weft.training.loop import Event, Trainer, TrainResult
from weft.training.reader import JobData, Reader
from weft.training.rolled import Write
from weft.training.rollouts import Roller, check_reward_adapters, rollers_of
from weft.training.room import check_room
from weft.training.rungs import Rungs
from weft.training.same_run import base_fingerprint, check_base, rooted
from weft.training.settings import JobConfig, RunConfig
from weft.training.start import check_trained_on, take_start
from weft.training.trackers.reports import Reports

# What looks at a run before weights are loaded (``prepare``).
OnRead = Callable[[RunConfig, Base, Sequence[JobData]], bool]


@dataclass(frozen=True)
class Setup:
    """A run that is ready to begin.

    ``general`` is the text that was read to measure forgetting on. ``tight``: its memory may run out, as whoever
    planned it says.
    """

    config: RunConfig
    base: Base
    adapters: Adapters
    _: KW_ONLY
    renderer: Renderer
    jobs: list[Job]
    problems: Problems
    rollers: list[Roller] = field(default_factory=list)
    general: Samples | None = None
    tight: bool = False


def prepare(config: RunConfig, *, base: Base | None = None, on_read: OnRead | None = None) -> Setup:
    """Load base and data and make every job's adapter. Writes nothing but the report of bad records that end the run.

    ``on_read`` sees the data and a sketch of the base before weights are loaded, and may use the sketch up. It tells
    whether memory may run out.

    Raises:
        UserError: anything in the configuration, the data or the model that cannot work.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    places = check_names(config)
    # What can be refused is refused before weights are loaded, which may take minutes.
    sketch = base or config.sketch()
    renderer = config.renderer(sketch.tokenizer, sketch.architecture.max_length)
    for job in config.jobs:
        check_job(job.name, job.task, config.model, sketch.architecture)
    read = Reader(config, renderer, sketch.architecture, places, token_rows=sketch.token_rows)
    try:
        loaded = [read.job(job) for job in config.jobs]
        general = read.general()
    except UserError as error:
        raise _reported(config, read.problems, error) from None
    # Of prompts nothing is learned as they are.
    told = [data for job, data in zip(config.jobs, loaded, strict=True) if not job.rolls]
    if told:
        audit_before_training(renderer, chained([d.train for d in told]), chained([d.held for d in told]), config.audit)
    _check(config, sketch, loaded, general)
    if base is None:
        _check_adapters(config, sketch)
    tight = False
    if base is None:
        tight = on_read is not None and on_read(config, sketch, loaded)
        base = config.base(sketch.tokenizer)
    adapters = Adapters(
        base.model,
        base.architecture,
        exact=config.exact,
        checkpointing=config.gradient_checkpointing,
        offload=config.offload_activations,
        offload_folder=config.offload_folder,
        original_weight=base.original_weight,
        offload_param=config.offload_param,
    )
    try:
        jobs = [_job(adapters, job, found, base) for job, found in zip(config.jobs, loaded, strict=True)]
        rollers = rollers_of(jobs, adapters, base)
    except BaseException:
        adapters.close()
        raise
    return Setup(
        config,
        base,
        adapters=adapters,
        renderer=renderer,
        jobs=jobs,
        problems=read.problems,
        rollers=rollers,
        general=general,
        tight=tight,
    )


def _job(adapters: Adapters, config: JobConfig, data: JobData, base: Base) -> Job:
    """Make a job's adapter, with the values that it begins with, and what it is compared with."""
    head = data.classes
    adapter = adapters.add(config.name, config.method_on(base), seed=config.seed, tokenizer=base.tokenizer, head=head)
    prove_attached(adapters, config.name)
    if config.start_from is not None:
        take_start(adapters, adapter, config.start_from, base, head)
    values = config.judged is not None and config.judged.per_token  # they are judged by what comes, not by data
    return Job(
        config,
        adapter,
        data.train,
        () if values else data.held,
        data.mixture,
        eval_sizes={} if values else data.sizes,
        reference=add_reference(adapters, config, adapter, base, fresh=config.start_from is None),
        shares_rows=adapters.layout.shares_rows,
    )


def _reported(config: RunConfig, problems: Problems, error: UserError) -> UserError:
    """Write the report, if one was asked for, before the error ends the run; returns the error with its place."""
    if config.on_bad_record != "report" or error is not problems.ended:
        return error
    path, folder = _report_of(config), Path(config.output_dir)
    if config.bad_records_file is None and (folder / RUN_FILE).is_file():  # its own report stays
        path = folder.with_name(f"{folder.name}.{BAD_RECORDS}")
    try:
        problems.write(path)
    except UserError as second:
        return UserError(f"{error}\n{second}")
    return UserError(f"{error} All bad records so far are in {path}.")


def _report_of(config: RunConfig) -> Path:
    return Path(config.bad_records_file or Path(config.output_dir) / BAD_RECORDS)


def _check(config: RunConfig, sketch: Base, loaded: Sequence[JobData], general: Samples | None) -> None:
    """Make every adapter without values, and take it away again. ``general`` text has to fit beside each."""
    if config.forgetting_eval is not None and not sketch.architecture.writes:
        raise UserError(f"forgetting_eval: {config.model} is an encoder and writes no text; it has no loss of one.")
    if general is not None and not general.columns().weights.any():
        raise UserError(
            f"forgetting_eval: {general[0].source} and the others: in no text does anything follow the first token. "
            "Give longer ones."
        )
    adapters = Adapters(sketch.model, sketch.architecture, exact=config.exact)
    try:
        for job, data in zip(config.jobs, loaded, strict=True):
            adapter = blank_adapter(adapters, job, data, sketch)
            if general is not None and adapter.head.writes:
                _check_lengths(job.name, adapter.num_learned_tokens, general, sketch)
    finally:
        adapters.close()


def _check_adapters(config: RunConfig, sketch: Base) -> None:
    """Refuse trained adapters that jobs begin with or are rewarded by, if they are another base's."""
    stored = stored_quantization(cast(Any, sketch.model).config)
    unknown = config.kept is not None or config.shape == "tiny" or stored is not None or config.hub != "huggingface"
    for job in config.jobs:
        if job.start_from is not None:
            check_trained_on("start_from", job.start_from, sketch, unknown=unknown)
        if isinstance(job.judged, RolloutObjective):
            check_reward_adapters(job.judged, sketch, unknown=unknown)


def blank_adapter(adapters: Adapters, job: JobConfig, data: JobData, sketch: Base) -> Adapter:
    """Add a job's adapter without values.

    Raises:
        UserError: The adapter does not fit the base, the number of steps or the length of the samples.
    """
    adapter = adapters.add(job.name, job.method_on(sketch), tokenizer=sketch.tokenizer, head=data.classes, blank=True)
    adapter.begin_training(
        Batches(job, data.train, virtual=adapter.num_virtual_tokens, mixture=data.mixture).total_steps
    )
    more = int(getattr(job.judged, "max_completion_length", 0))
    _check_lengths(job.name, adapter.num_learned_tokens, chained([data.train, data.held]), sketch, more)
    return adapter


def _check_lengths(name: str, learned: int, samples: Samples, base: Base, more: int = 0) -> None:
    """Refuse samples that leave no positions for virtual tokens and learned keys, or an answer of ``more`` tokens."""
    limit = base.architecture.max_length
    if limit is None or not (learned or more):
        return
    longest = samples[int(samples.lengths()[0].argmax())]
    if longest.branches:
        longest = max((one for sample in samples for one in sample.each), key=lambda one: len(one.input_ids))
    if more and len(longest.input_ids) + learned + more > limit:
        raise UserError(
            f"{longest.source}: the prompt's {len(longest.input_ids)} tokens"
            + f", the {learned} learned ones of job '{name}'" * bool(learned)
            + f" and max_completion_length: {more} exceed the model's {limit} positions. Set max_completion_length: "
            f"{max(1, limit - learned - len(longest.input_ids))} or less, or a max_length for prompts."
        )
    if len(longest.input_ids) + learned > limit:
        raise UserError(
            f"{longest.source}: {len(longest.input_ids)} tokens and the {learned} learned ones of job '{name}' exceed "
            f"the model's {limit} positions. "
            + (f"Set max_length: {limit - learned} (with truncation: right to cut) or " if learned < limit - 1 else "")
            + "fewer num_virtual_tokens."
        )


def train(
    config: RunConfig,
    *,
    callbacks: Sequence[Callback] = (),
    on_event: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    on_read: OnRead | None = None,
    on_ready: Callable[[Setup], None] = lambda setup: None,
    on_trained: Callable[[Setup], None] = lambda setup: None,
    writer: Callable[[Adapters, Renderer], Write] | None = None,
    rungs: Rungs | None = None,
) -> TrainResult:
    """Run a configuration to its end; the run's folder then holds the adapters, but for those of jobs that failed.

    ``callbacks`` hear the events beside those that the configuration names. ``on_read`` is called before weights are
    loaded (``prepare``). ``on_ready`` sees the loaded base and the fresh adapters, ``on_trained`` the trained ones
    before they are closed. ``writer`` makes what writes the answers of jobs that learn from their own
    (``weft.generation.rollouts.writer``). ``rungs`` says where jobs are compared, and which of them leave.

    Raises:
        UserError: before anything is written, if the configuration, the data or the folder cannot be used; later, if
            the machine refuses to write. Then the message says from which step the run can go on.
    """
    check_places(config)
    callbacks = [*(CALLBACKS.find(name) for name in config.callbacks), *callbacks]
    setup = prepare(config, on_read=on_read)
    # From here on code of the user's runs, which may change to another folder.
    config = rooted(config)
    store = RunStore(config.output_dir)
    try:
        check_room(config, store, setup.jobs)
        base, known = base_fingerprint(setup.base), (store.folder / RUN_FILE).is_file()
        if config.resume and known:
            check_base(setup.base, expect(store.read_run().get("base", {}), dict, f"{store.folder / RUN_FILE}: base"))
        # The caller hears of it before the folder is touched: then a signal may stop the run only where it can go on.
        on_ready(setup)
        on_event, should_stop = with_callbacks([begun(one, setup) for one in callbacks], on_event, should_stop)
        store.prepare(overwrite=config.overwrite_output_dir, resume=config.resume or not known)
        return _train(
            config,
            setup,
            base,
            store=store,
            on_event=on_event,
            should_stop=should_stop,
            on_trained=on_trained,
            writer=writer,
            rungs=rungs,
        )
    except WriteError as error:
        raise UserError(f"{error} {_way_on(store)}") from error
    finally:
        store.release()
        setup.adapters.close()


def _way_on(store: RunStore) -> str:
    """The sentence on what is saved of a run that could not write, and how it goes on."""
    if not (store.folder / RUN_FILE).is_file():
        return "The run had not begun: then start it again."
    step, again = store.last_step(), f"weft train {shlex.quote(str(store.folder))} --resume"
    if step is None:
        return f"No step was saved yet: then {again} begins again, at step 0."
    return f"All up to step {step} is saved: then {again} goes on from there."


def _train(
    config: RunConfig,
    setup: Setup,
    base: Mapping[str, object],
    *,
    store: RunStore,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
    on_trained: Callable[[Setup], None],
    writer: Callable[[Adapters, Renderer], Write] | None,
    rungs: Rungs | None,
) -> TrainResult:
    if setup.rollers and writer is None:
        names = ", ".join(roller.job.name for roller in setup.rollers)
        raise UserError(f"{names}: answers are to be written, and nothing was given that writes them (writer).")
    for roller in setup.rollers:
        roller.folder = store.folder / "rollouts" / roller.job.name
    reports = Reports(config, setup.jobs, on_event)
    forgetting = _forgetting(config, setup, store, writer)
    trainer = Trainer(
        setup.adapters,
        setup.jobs,
        store=store,
        logging_steps=config.logging_steps,
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        verify_packing=config.verify_packing,
        fullest_pass_first=setup.tight,
        rollers=setup.rollers,
        write=writer(setup.adapters, setup.renderer) if setup.rollers and writer is not None else None,
        rungs=rungs,
        forgetting=forgetting,
        on_event=reports.hear,
        should_stop=should_stop,
    )
    if config.resume:
        trainer.resume()
    if not (trainer.over and (store.folder / RUN_FILE).is_file()):
        _write_settings(config, setup, base, store, {} if forgetting is None else forgetting.facts())
    with reports.open() as ends:
        result = trainer.run()
        ends(result.completed)
    if result.completed:
        tokenizer = TokenizerFacts.of(setup.base.tokenizer)
        kept = how_kept(setup.adapters.model, setup.adapters.dtype) | {k: v for k, v in base.items() if k != "model"}
        for job in setup.jobs:
            if job.progress.ended == "failed":
                shutil.rmtree(store.adapters / job.name, ignore_errors=True)
                continue
            job.adapter.record_origin(_provenance(setup, job, tokenizer).model_dump(mode="json"), dict(kept))
            setup.adapters.save(job.name, store.adapters / job.name, base_name=resolve_model(config.model))
        on_trained(setup)
    return result


def _forgetting(
    config: RunConfig, setup: Setup, store: RunStore, writer: Callable[[Adapters, Renderer], Write] | None
) -> Forgetting | None:
    """What measures the jobs' forgetting, on the text that the run began with."""
    known = store.read_run().get("forgetting_eval") if (store.folder / RUN_FILE).is_file() else None
    return text_to_measure(
        config,
        setup.adapters,
        setup.renderer,
        given=setup.general,
        folder=store.folder,
        writer=None if writer is None else partial(writer, setup.adapters, setup.renderer),
        recorded=known if isinstance(known, dict) else None,
    )


def _write_settings(
    config: RunConfig, setup: Setup, base: Mapping[str, object], store: RunStore, general: Mapping[str, object]
) -> None:
    """Write all that stands in the run's folder before its first step. ``general``: facts of its general text."""
    labels = {job.name: job.adapter.head.labels for job in setup.jobs if job.adapter.head.labels}
    values = config.model_dump(mode="json")
    beside = {"forgetting_eval": general} if general else {}
    store.write_run({"format": RUN_FORMAT, "config": values, "base": base, "labels": labels, **beside})
    if config.on_bad_record == "report":
        setup.problems.write(_report_of(config))
    with refilled_folder(store.tokenizer) as part, writing(part):
        setup.base.tokenizer.save_pretrained(part)


def _provenance(setup: Setup, job: Job, tokenizer: TokenizerFacts) -> Provenance:
    """The record of how the job's data was read and rendered, which travels in the adapter's folder."""
    own, run = job.config, setup.config
    return Provenance(
        **template_of(setup.renderer),
        tokenizer=tokenizer,
        task=own.task,
        settings=file_names(run.data_settings(own)) | {"max_length": setup.renderer.max_length},
        sha256=job.fingerprint,
        records=len(job.samples),
        eval_records=len(job.eval_samples),
        batch_size=None if own.batch_tokens else own.batch_size,
        batch_tokens=own.batch_tokens,
    )
