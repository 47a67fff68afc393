"""The watch itself: it sees our own deprecated calls, however they travel, and leaves alone what libraries do."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from weft import libraries


def library(body: str, **names: Any) -> Callable[..., Any]:
    """A function ``called`` as if it stood in a package."""
    space: dict[str, Any] = {"warnings": warnings, "log": logging.getLogger("transformers.models"), **names}
    exec(compile(body, "/usr/lib/site-packages/library/module.py", "exec"), space)
    return space["called"]  # type: ignore[no-any-return]


WARNS = "def called(*args):\n    warnings.warn('old', FutureWarning, stacklevel=2)\n"
LOGS = "def called(*args):\n    log.warning('`x` is deprecated')\n"
ONCE = "def called(*args):\n    log.warning_once('`x` is deprecated')\n"


class Through(torch.nn.Module):
    """torch's Module.__call__ stands between us and what we call."""

    def __init__(self, called: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = called


@pytest.mark.parametrize("body", [WARNS, LOGS, ONCE], ids=["warning", "logger", "once"])
def test_ours_fail_every_time(body: str) -> None:
    for called in (library(body), Through(library(body))):
        for _ in range(2):
            with pytest.raises(pytest.fail.Exception, match="makes a deprecated call"):
                called(1)


@pytest.mark.parametrize("body", [WARNS, LOGS, ONCE], ids=["warning", "logger", "once"])
def test_a_librarys_own_do_not(body: str) -> None:
    between = library("def called(*args):\n    return inner(*args)\n", inner=library(body))
    between(1)
    library("def called(*args):\n    return inner(*args)\n", inner=Through(library(body)))(1)


def test_the_old_name_of_the_cache_is_seen(tiny_llama_dir: Any) -> None:
    """As transformers announces it, where it has another name."""
    from transformers import AutoModelForCausalLM

    body: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).base_model
    if libraries.cache_name(body.forward) != "cache":
        pytest.skip("this transformers calls it past_key_values")
    with pytest.raises(pytest.fail.Exception, match=r"test_deprecations\.py makes a deprecated call"):
        body(input_ids=torch.tensor([[1, 2]]), past_key_values=libraries.growing_cache())
    out = body(input_ids=torch.tensor([[1, 2]]), use_cache=True)
    with pytest.raises(pytest.fail.Exception, match="makes a deprecated call"):
        _ = out.past_key_values
