"""What can be refused of a run before a file of the base or a record is read."""

from __future__ import annotations

import os
from pathlib import Path

from weft.base.checkpointing import check_offload
from weft.data import parse_sources
from weft.data.formats.detect import format_named
from weft.data.reading.files import Place
from weft.data.rendering.templates import template_text
from weft.data.sources import parse_sets
from weft.errors import UserError
from weft.files.run_folder import LOCK_FILE, RUN_FILE, RunStore
from weft.files.whole import is_part
from weft.models.load import check_device, resolve_device, resolve_dtype, resolve_model
from weft.models.offload import check_offload as check_offload_param
from weft.models.token_rows import check_tokens
from weft.objectives.ppo import PPO, Value
from weft.training.callbacks import CALLBACKS
from weft.training.config import read_run_config
from weft.training.forgetting import OWN_TEXT_FILE
from weft.training.judged import check_judged
from weft.training.reader import data_files, general_sources
from weft.training.same_run import check_same_run
from weft.training.settings import RunConfig
from weft.training.start import check_start
from weft.training.trackers.names import FOLDER, check_installed

BAD_RECORDS = "bad_records.jsonl"
_EMPTY_RUN = {"checkpoints", "adapters", LOCK_FILE, BAD_RECORDS, FOLDER, OWN_TEXT_FILE}


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
        check_judged(job)
        if isinstance(job.judged, Value) and not any(
            isinstance(one.judged, PPO) and one.name == job.judged.of for one in config.jobs
        ):
            raise UserError(
                f"job '{job.name}': objective value belongs to a job of objective ppo, which brings its own; there is "
                f"none named '{job.judged.of}'."
            )
        if job.judged is not None and config.documents != "separate":
            raise UserError(
                f"job '{job.name}': documents: {config.documents} cuts plain text, and objective {job.objective} "
                "learns from answers to prompts. Leave it out."
            )
        if job.start_from is not None:
            check_start(job.start_from)
        for part in job.method_config().methods():
            part.check_quantization(config.quantization)
        if not job.classifies:
            sets = parse_sets(job.eval_data or config.eval_data)
            for sources in (parse_sources(job.data or config.data), *sets.values(), general_sources(config)):
                for source in sources:
                    format_named(source.format or config.data_format)
    return data_files(config)


def check_places(config: RunConfig) -> None:
    """Refuse a base, callbacks or places of output that training could not use; changes nothing.

    Raises:
        UserError: The base is not there, a callback is unknown, the package of a tracker is not installed, or the run
            cannot be written to its folder.
    """
    _check_report(config)
    check_installed(config.report_to)
    for name in config.callbacks:
        CALLBACKS.find(name)
    _check_folder(RunStore(config.output_dir), config)
    resolve_model(config.model)


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
