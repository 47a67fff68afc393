"""The way from a configuration to the finished folder of a run: load, check, train, save."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch

from weft.adapters import Adapters
from weft.base.checkpointing import check_offload
from weft.core.adapter import Adapter
from weft.data import Problems, Renderer, parse_sources
from weft.data.auditing.audit import audit_before_training
from weft.data.formats.detect import format_named
from weft.data.provenance import Provenance, TokenizerFacts, file_names, template_of
from weft.data.reading.files import Place
from weft.data.rendering.templates import template_text
from weft.data.sources import parse_sets
from weft.data.views import Samples, chained
from weft.errors import UserError
from weft.files.run_folder import LOCK_FILE, RUN_FILE, RunStore
from weft.files.whole import is_part, refilled_folder
from weft.files.writing import WriteError, writing
from weft.foreign import expect
from weft.methods.dense import how_kept
from weft.models import Base
from weft.models.attached import prove_attached
from weft.models.load import check_device, resolve_device, resolve_dtype, resolve_model
from weft.models.offload import check_offload as check_offload_param
from weft.models.tasks import check_job
from weft.models.token_rows import check_tokens
from weft.training.batches import Batches
from weft.training.callbacks import CALLBACKS, Callback, begun, with_callbacks
from weft.training.config import RUN_FORMAT, read_run_config
from weft.training.job import Job
from weft.training.loop import Event, Trainer, TrainResult
from weft.training.reader import JobData, Reader, data_files
from weft.training.room import check_room
from weft.training.same_run import base_fingerprint, check_base, check_same_run, rooted
from weft.training.settings import JobConfig, RunConfig

_BAD_RECORDS = "bad_records.jsonl"
_EMPTY_RUN = {"checkpoints", "adapters", LOCK_FILE, _BAD_RECORDS}

# What looks at a run before weights are loaded (``prepare``).
OnRead = Callable[[RunConfig, Base, Sequence[JobData]], bool]


@dataclass(frozen=True)
class Setup:
    """A run that is ready to begin. ``tight``: its memory may run out, as whoever planned it says."""

    config: RunConfig
    base: Base
    adapters: Adapters
    _: KW_ONLY
    renderer: Renderer
    jobs: list[Job]
    problems: Problems
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
    except UserError as error:
        raise _reported(config, read.problems, error) from None
    audit_before_training(renderer, chained([d.train for d in loaded]), chained([d.held for d in loaded]), config.audit)
    _check(config, sketch, loaded)
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
        jobs = []
        for job, found in zip(config.jobs, loaded, strict=True):
            adapter = adapters.add(
                job.name, job.method_on(base), seed=job.seed, tokenizer=base.tokenizer, head=found.classes
            )
            prove_attached(adapters, job.name)
            jobs.append(Job(job, adapter, found.train, found.held, found.mixture, eval_sizes=found.sizes))
    except BaseException:
        adapters.close()
        raise
    return Setup(config, base, adapters=adapters, renderer=renderer, jobs=jobs, problems=read.problems, tight=tight)


def check_names(config: RunConfig) -> dict[str, Place]:
    """Refuse names that nothing has, and data that is not there. No file of the base and no record is read.

    Returns:
        The places of the data, as ``data_files`` gives them.

    Raises:
        UserError: An objective, a dtype, a device, a format or a template is unknown, activations cannot go where they
            are to, a token to add is none, a method does not go with the quantisation, or a data file is not there.
    """
    resolve_dtype(config.dtype)
    check_device(config.device)
    if config.offload_activations is not None or config.offload_folder is not None:
        check_offload(config.offload_activations, config.offload_folder, resolve_device(config.device))
    if config.offload_param is not None:
        check_offload_param(config.device if config.device != "auto" else resolve_device("auto"), config.kept)
    check_tokens(config.add_tokens)
    if config.chat_template is not None:
        template_text(config.chat_template)
    for job in config.jobs:
        job.own_objective()
        for part in job.method_config().methods():
            part.check_quantization(config.quantization)
        if not job.classifies:
            sets = parse_sets(job.eval_data or config.eval_data)
            for sources in (parse_sources(job.data or config.data), *sets.values()):
                for source in sources:
                    format_named(source.format or config.data_format)
    return data_files(config)


def check_places(config: RunConfig) -> None:
    """Refuse a base, callbacks or places of output that training could not use; changes nothing.

    Raises:
        UserError: The base is not there, a callback is unknown, or the run cannot be written to its folder.
    """
    _check_report(config)
    for name in config.callbacks:
        CALLBACKS.find(name)
    _check_folder(RunStore(config.output_dir), config)
    resolve_model(config.model)


def _reported(config: RunConfig, problems: Problems, error: UserError) -> UserError:
    """Write the report, if one was asked for, before the error ends the run; returns the error with its place."""
    if config.on_bad_record != "report" or error is not problems.ended:
        return error
    path, folder = _report_of(config), Path(config.output_dir)
    if config.bad_records_file is None and (folder / RUN_FILE).is_file():  # its own report stays
        path = folder.with_name(f"{folder.name}.{_BAD_RECORDS}")
    try:
        problems.write(path)
    except UserError as second:
        return UserError(f"{error}\n{second}")
    return UserError(f"{error} All bad records so far are in {path}.")


def _report_of(config: RunConfig) -> Path:
    return Path(config.bad_records_file or Path(config.output_dir) / _BAD_RECORDS)


def _check(config: RunConfig, sketch: Base, loaded: Sequence[JobData]) -> None:
    """Make every adapter without values, and take it away again."""
    adapters = Adapters(sketch.model, sketch.architecture, exact=config.exact)
    try:
        for job, data in zip(config.jobs, loaded, strict=True):
            blank_adapter(adapters, job, data, sketch)
    finally:
        adapters.close()


def blank_adapter(adapters: Adapters, job: JobConfig, data: JobData, sketch: Base) -> Adapter:
    """Add a job's adapter without values.

    Raises:
        UserError: The adapter does not fit the base, the number of steps or the length of the samples.
    """
    adapter = adapters.add(job.name, job.method_on(sketch), tokenizer=sketch.tokenizer, head=data.classes, blank=True)
    adapter.begin_training(
        Batches(job, data.train, virtual=adapter.num_virtual_tokens, mixture=data.mixture).total_steps
    )
    _check_lengths(job.name, adapter.num_learned_tokens, chained([data.train, data.held]), sketch)
    return adapter


def _check_lengths(name: str, learned: int, samples: Samples, base: Base) -> None:
    """Refuse samples that leave no positions for the virtual tokens and learned keys."""
    limit = base.architecture.max_length
    if limit is None or not learned:
        return
    longest = samples[int(samples.lengths()[0].argmax())]
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
) -> TrainResult:
    """Run a configuration to its end; the run's folder then holds the adapters, but for those of jobs that failed.

    ``callbacks`` hear the events beside those that the configuration names. ``on_read`` is called before weights are
    loaded (``prepare``). ``on_ready`` sees the loaded base and the fresh adapters, ``on_trained`` the trained ones
    before they are closed.

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
            config, setup, base, store=store, on_event=on_event, should_stop=should_stop, on_trained=on_trained
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
) -> TrainResult:
    trainer = Trainer(
        setup.adapters,
        setup.jobs,
        store=store,
        logging_steps=config.logging_steps,
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        verify_packing=config.verify_packing,
        fullest_pass_first=setup.tight,
        on_event=on_event,
        should_stop=should_stop,
    )
    if config.resume:
        trainer.resume()
    if not (trainer.over and (store.folder / RUN_FILE).is_file()):
        _write_settings(config, setup, base, store)
    result = trainer.run()
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


def _write_settings(config: RunConfig, setup: Setup, base: Mapping[str, object], store: RunStore) -> None:
    """Write all that stands in the run's folder before its first step."""
    labels = {job.name: job.adapter.head.labels for job in setup.jobs if job.adapter.head.labels}
    values = config.model_dump(mode="json")
    store.write_run({"format": RUN_FORMAT, "config": values, "base": base, "labels": labels})
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


def _check_report(config: RunConfig) -> None:
    """Refuse a place where the report of bad records cannot be written."""
    if config.bad_records_file is None:
        return
    path = Path(config.bad_records_file)
    above = next(folder for folder in path.absolute().parents if folder.exists())
    wrong = "is a folder" if path.is_dir() else "" if above.is_dir() else f"cannot be written: {above} is a file"
    if wrong or not os.access(above, os.W_OK):
        raise UserError(f"bad_records_file {path} {wrong or f'cannot be written: no access to {above}'}.")


def _check_folder(store: RunStore, config: RunConfig) -> None:
    """Refuse a folder where the run cannot be written; changes nothing."""
    folder = store.folder
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"output_dir {folder}: {existing} is a file, not a folder.")
    if not os.access(existing, os.W_OK):
        raise UserError(f"output_dir {folder}: {existing} cannot be written to.")
    if existing is not folder:
        return
    if (folder / RUN_FILE).is_file():
        if config.resume:
            check_same_run(config, read_run_config(folder))
        elif not config.overwrite_output_dir:
            raise UserError(
                f"{folder} already holds a run. Go on with it (resume: true, or --resume), take another output_dir, or "
                "delete it (overwrite_output_dir: true, or --overwrite-output-dir)."
            )
    # A run that ended before it had written run.json leaves these, and they may be taken over.
    elif foreign := sorted(name for name in {path.name for path in folder.iterdir()} - _EMPTY_RUN if not is_part(name)):
        raise UserError(
            f"{folder} is no run's folder, but holds {', '.join(foreign[:3])}{' …' * (len(foreign) > 3)}; "
            "it is left alone. Take another output_dir."
        )
