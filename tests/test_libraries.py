"""Both spellings of transformers' cache, whichever of them is installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests import kit

from weft import libraries
from weft.errors import UserError


def old(hidden: Any, past_key_values: Any = None, use_cache: bool = False) -> None: ...


def new(hidden: Any, cache: Any = None, use_cache: bool = False, **kwargs: Any) -> None: ...


def neither(hidden: Any, **kwargs: Any) -> None: ...


@dataclass
class Old:
    past_key_values: Any = None


@dataclass
class New:
    cache: Any = None

    @property
    def past_key_values(self) -> Any:
        raise AssertionError("deprecated")


def test_the_argument_is_called_as_the_forward_calls_it() -> None:
    assert libraries.cache_name(old) == "past_key_values"
    assert libraries.cache_name(new) == "cache"
    assert libraries.cache_name(neither) is None
    assert libraries.cache_arguments(old, 5) == {"past_key_values": 5, "use_cache": True}
    assert libraries.cache_arguments(new, 5) == {"cache": 5, "use_cache": True}
    assert libraries.cache_arguments(neither, None) == {"use_cache": False}
    with pytest.raises(UserError, match="neither takes no cache"):
        libraries.cache_arguments(neither, 5)


def test_the_output_and_the_arguments_of_a_call() -> None:
    assert libraries.output_cache(Old(1)) == libraries.output_cache(New(1)) == 1
    assert libraries.given_cache({"past_key_values": 1}) == libraries.given_cache({"cache": 1}) == 1
    assert libraries.given_cache({"cache": None, "use_cache": True}) is None


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_a_fixed_cache_is_what_the_text_before_it_would_be(kind: str) -> None:
    """With the installed transformers: keys and values read out of one pass, given to another, twice."""
    body = kit.make_model(kind, torch.float64).base_model
    ids = torch.tensor(kit.texts(1, 9, 9, seed=1))
    with torch.no_grad():
        whole = body(input_ids=ids).last_hidden_state[:, 4:]
        pairs = libraries.keys_values(libraries.output_cache(body(input_ids=ids[:, :4], use_cache=True)))
        fixed = libraries.fixed_cache(pairs)
        for _ in range(2):
            out = body(input_ids=ids[:, 4:], **libraries.cache_arguments(body.forward, fixed)).last_hidden_state
            # float64; the sums over keys come in another order.
            assert (out - whole).abs().max() <= 1e-12 * whole.abs().max()
        grown = libraries.growing_cache(pairs)
        body(input_ids=ids[:, 4:], **libraries.cache_arguments(body.forward, grown))
    assert [len(k[0, 0]) for k, _ in libraries.keys_values(fixed)] == [4] * len(pairs)
    assert [len(k[0, 0]) for k, _ in libraries.keys_values(grown)] == [9] * len(pairs)
