"""Settings of the methods that a contract does not reach."""

from __future__ import annotations

from typing import Any

import pytest
from tests.contracts import kit

from weft.core.adapters import Adapters
from weft.errors import UserError
from weft.models import describe


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("lora", {"target_modules": ["q_porj"]}, "Did you mean 'q_proj'"),
        ("lora", {"target_modules": "no_such_thing"}, "matches no linear module"),
        ("lora", {"layers_to_transform": [99]}, "there is no layer 99"),
        ("bottleneck", {"leave_out": [3]}, "layers are 0 to 2"),
        ("bottleneck", {"leave_out": [-1]}, "layers are 0 to 2"),
        ("bottleneck", {"leave_out": [0, 1, 2]}, "nothing to tune"),
        ("bottleneck", {"mh_adapter": False, "output_adapter": False}, "nothing to tune"),
        ("bitfit", {}, "add_missing: true"),
        ("bitfit", {"add_missing": True, "target_modules": ["nope"]}, "there are:"),
        ("prompt_tuning", {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x"}, "needs the tokenizer"),
        ("prefix_tuning", {"prefix_init_text": "x"}, "needs the tokenizer"),
    ],
)
def test_what_cannot_be_built_says_why(method: str, settings: dict[str, Any], message: str) -> None:
    model = kit.make_model("llama")
    adapters = Adapters(model, describe(model))
    with pytest.raises(UserError, match=message):
        adapters.add("one", kit.METHODS[method](**settings))
    assert adapters.names == []
    adapters.add("one", kit.method_config(method))
    adapters.close()


def test_the_first_values_depend_on_the_seed_alone() -> None:
    model = kit.make_model("gpt2")
    adapters = Adapters(model, describe(model))
    for method in kit.ALL:
        first = kit.parameters(adapters.add("a", kit.method_config(method), seed=5))
        second = kit.parameters(adapters.add("b", kit.method_config(method), seed=5))
        assert kit.sha256(first.values()) == kit.sha256(second.values())
        if method not in ("bitfit", "full", "freeze", "llama_pro"):  # all begin at zero, or as the base
            third = kit.parameters(adapters.add("c", kit.method_config(method), seed=6))
            assert kit.sha256(first.values()) != kit.sha256(third.values())
        for name in adapters.names:
            adapters.remove(name)
    adapters.close()
