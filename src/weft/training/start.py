"""A job that begins with the values of a trained adapter (``start_from``)."""

from __future__ import annotations

from pathlib import Path

import torch

from weft.core.adapter import Adapter
from weft.core.adapters import Adapters
from weft.errors import UserError
from weft.files.adapter_folder import is_adapter, load_tensors, read, stored_head, trained_on
from weft.files.peft_config import without_tables
from weft.heads.reward import OwnHead
from weft.models import Base
from weft.training.same_run import other_base, other_base_in_files


def check_start(folder: str) -> None:
    """Refuse a folder that holds no adapter. Reads nothing of it.

    Raises:
        UserError: It holds none.
    """
    if not is_adapter(Path(folder)):
        raise UserError(f"start_from: {folder} is no folder of an adapter (a run has them under adapters/NAME).")


def check_trained_on(what: str, folder: str, sketch: Base, *, unknown: bool) -> None:
    """Refuse an adapter's folder that was trained on another base, as far as that shows before weights are loaded.

    ``what`` asks for it. The tensors of a base that is quantised, or made anew, are ``unknown`` until it is loaded.

    Raises:
        UserError: It was, or it is no such folder.
    """
    if not is_adapter(Path(folder)):
        raise UserError(f"{what}: {folder} is no folder of an adapter (a run has them under adapters/NAME).")
    recorded = trained_on(Path(folder)) or {}
    if not unknown and (difference := other_base_in_files(sketch, recorded)) is not None:
        raise UserError(f"{what}: {folder} was trained on another base ({difference}).")


@torch.no_grad()
def take_start(adapters: Adapters, adapter: Adapter, folder: str, base: Base, head: OwnHead | None) -> None:
    """Give a fresh adapter the values in ``folder``; its head stays fresh where the folder has none.

    Raises:
        UserError: It was trained on another base, or answers with another head, or its tensors do not fit.
    """
    if (difference := other_base(base, trained_on(Path(folder)) or {})) is not None:
        raise UserError(f"start_from: {folder} was trained on another base ({difference}).")
    _, tensors, task = read(Path(folder), adapters.model)
    if task is not None and task != head:
        told = f"has the outputs {list(head.labels)}" if head else "writes text"
        raise UserError(f"start_from: {folder} has a head with the outputs {list(task.labels)}, and this job {told}.")
    if task is None:
        tensors = {**tensors, **stored_head(adapter)}
    load_tensors(adapter, without_tables(adapter, tensors, adapters.model, adapters.architecture))
