"""Processes for tests that begin with the libraries loaded: loading them costs each of them six seconds of a core."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import BaseContext
from types import SimpleNamespace

import pytest

PRELOADED = (
    "tests.training.ledger", "tests.training.recipe", "weft.training", "weft.data.workers",
    "transformers.models.qwen2.modeling_qwen2",
)  # fmt: skip


def forkserver() -> BaseContext:
    """One process that has loaded everything, of which the others are copies; the same for all tests of a run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def quick_workers(patch: pytest.MonkeyPatch) -> None:
    """The workers that read data begin as such copies, too. What they are sent is the same as with ``spawn``."""
    context = forkserver()
    patch.setattr("weft.data.workers.multiprocessing", SimpleNamespace(get_context=lambda method: context))
