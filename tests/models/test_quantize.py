"""Adapters over a base in int8 and NF4: the same sites, no code per backend, and neighbours change nothing."""

from __future__ import annotations

import sys

import pytest
import torch
from tests import kit

from weft.api import Adapters
from weft.core.stream import Part
from weft.errors import UserError
from weft.methods import METHODS
from weft.models import load_base
from weft.models.quantize import num_parameters, quantization_config

FITTING = ["bitfit", "bottleneck", "lora", "prefix_tuning", "prompt_tuning"]


@pytest.fixture(scope="module", params=["nf4", "int8"])
def quantised(request, tmp_path_factory: pytest.TempPathFactory):
    """A width of 64, which is one block of NF4."""
    folder = tmp_path_factory.mktemp("base")
    kit.make_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    options = {"dtype": "float32", "device": "cpu", "tokenizer": object()}
    return load_base(str(folder), quantization=request.param, **options)


def test_the_linears_of_the_blocks_are_quantised_and_answer_as_transformers_says(quantised) -> None:
    kinds = {type(quantised.model.get_submodule(path)).__name__ for path in quantised.architecture.linears}
    assert kinds <= {"Linear4bit", "Linear8bitLt"}
    texts = kit.texts(3)
    with torch.no_grad():
        wanted = [quantised.model(torch.tensor([ids])).logits[0] for ids in texts]
        adapters = Adapters(quantised.model, quantised.architecture)
        found = [
            adapters.logits(h, [(None, len(h))]) for h in kit.hidden_of(adapters, [Part(None, [ids]) for ids in texts])
        ]
        adapters.close()
    # LLM.int8 rounds its input to fp16 and then to 127 steps of each row's largest number.
    assert kit.difference(found, wanted) < 2e-2
    assert max(float(w.abs().max()) for w in wanted) > 0.3


@pytest.mark.parametrize("method", FITTING)
def test_alone_as_beside_others(quantised, method: str) -> None:
    adapters = Adapters(quantised.model, quantised.architecture)
    for index, name in enumerate(FITTING):
        kit.randomize(adapters.add(name, METHODS[name](**kit.SETTINGS.get(name, {})), seed=index), index)
    # Not the tensors: bitsandbytes lays them out anew when it likes.
    before = kit.sha256(kit.hidden_of(adapters, [Part(None, kit.texts(2))]))
    own = kit.texts(3, seed=1)
    alone = kit.hidden_of(adapters, [Part(method, own)])
    others = [Part(n, kit.texts(2, high=25, seed=i)) for i, n in enumerate(FITTING) if n != method]
    mixed = kit.hidden_of(adapters, [others[0], Part(method, own), *others[1:]])[2:5]
    kit.measured(f"{method} mixed - alone", kit.difference(alone, mixed), 1e-4)
    sum(h.square().sum() for h in mixed).backward()
    assert any(p.grad is not None and p.grad.any() for p in adapters[method].parameters())
    assert kit.sha256(kit.hidden_of(adapters, [Part(None, kit.texts(2))])) == before
    adapters.close()


def test_parameters_are_counted_as_they_stand_for(quantised) -> None:
    plain = kit.make_model("llama", hidden_size=64, intermediate_size=128)
    assert num_parameters(quantised.model) == sum(p.numel() for p in plain.parameters())


def test_without_bitsandbytes_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install \"weft\[quant\]\""):
        quantization_config("nf4", torch.bfloat16)
