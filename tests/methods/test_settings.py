"""Settings of the methods that a contract does not reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import kit

from weft.api import Adapters
from weft.core.adapter import BuildContext
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
        ("bitfit", {"add_missing": False}, "add_missing is false"),
        ("bitfit", {"add_missing": True, "target_modules": ["nope"]}, "there are:"),
        ("ia3", {"target_modules": ["k_porj"]}, "matches no linear module"),
        ("ia3", {"target_modules": ["k_proj"], "feedforward_modules": "nope"}, "feedforward_modules 'nope' is none"),
        ("ln_tuning", {"target_modules": ["input_layernrom"]}, "Did you mean 'input_layernorm'"),
        ("ln_tuning", {"target_modules": "nope"}, "finds no norm"),
        ("ln_tuning", {"target_modules": "("}, "no regular expression"),
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


def test_the_first_values_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts: list[BuildContext] = []

    def watched(*args: Any, **keywords: Any) -> BuildContext:
        contexts.append(BuildContext(*args, **keywords))
        return contexts[-1]

    monkeypatch.setattr("weft.core.adapters.BuildContext", watched)
    model = kit.make_model("gpt2")
    adapters = Adapters(model, describe(model))
    drawing = set()
    for method in kit.ALL:
        first = kit.parameters(adapters.add("a", kit.method_config(method), seed=5))
        second = kit.parameters(adapters.add("b", kit.method_config(method), seed=5))
        assert kit.sha256(first.values()) == kit.sha256(second.values())
        if not torch.equal(contexts[-1].generator.get_state(), torch.Generator().manual_seed(5).get_state()):
            drawing.add(method)
            third = kit.parameters(adapters.add("c", kit.method_config(method), seed=6))
            assert kit.sha256(first.values()) != kit.sha256(third.values())
        for name in adapters.names:
            adapters.remove(name)
    assert {"lora", "prompt_tuning", "prefix_tuning", "bottleneck"} <= drawing
    adapters.close()
