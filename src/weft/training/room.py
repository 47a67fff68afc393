"""The room that a run's checkpoints need on the disk, compared before the first step with the room that there is."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from weft.errors import UserError
from weft.files.run_folder import RunStore
from weft.training.job import Job
from weft.training.optimizers import tensor_bytes
from weft.training.settings import RunConfig

TEXTS = 1 << 16  # bytes of a checkpoint's and an adapter's JSON, per job
logger = logging.getLogger(__name__)


def check_room(config: RunConfig, store: RunStore, jobs: Sequence[Job]) -> None:
    """Compare the room for two checkpoints and the adapters with what the disk has free; changes nothing.

    A run that keeps more than that is told so, and begins.

    Raises:
        UserError: The disk has less.
    """
    if not config.check_disk_space:
        return
    checkpoint, adapters = room_of(jobs)
    there = store.checkpoint_bytes()
    goes_on = config.resume and bool(there)
    # What an earlier run takes is free once it has been deleted; of one that goes on, a checkpoint is there already.
    free = _free(store.folder) + (0 if config.resume else sum(there))
    needed = (2 - goes_on) * checkpoint + adapters
    if free < needed:
        raise UserError(
            f"output_dir {store.folder}: {_size(free)} are free on this disk, and the run needs {_size(needed)}: "
            f"{'another checkpoint' if goes_on else 'two checkpoints'} of {_size(checkpoint)} and {_size(adapters)} "
            "for the adapters. Free some space, take another output_dir, or set check_disk_space: false."
        )
    # The new one is written before the oldest goes.
    most = (config.save_total_limit + 1 - (len(there) if goes_on else 0)) * checkpoint + adapters
    if config.save_steps is not None and free < most:
        logger.warning(
            "output_dir %s: %s are free on this disk, and save_total_limit: %d needs up to %s; the run may end when "
            "the disk is full",
            store.folder, _size(free), config.save_total_limit, _size(most),
        )  # fmt: skip


class Room(NamedTuple):
    """The bytes of a checkpoint and of the finished adapters."""

    checkpoint: int
    adapters: int


def room_of(jobs: Sequence[Job]) -> Room:
    """The room that the jobs need on a disk."""
    adapters = sum(tensor_bytes(job.adapter.parameters()) + TEXTS for job in jobs)
    return Room(sum(job.checkpoint_bytes() + TEXTS for job in jobs), adapters)


def _free(folder: Path) -> int:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
