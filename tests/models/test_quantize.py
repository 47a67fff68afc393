"""Adapters over a base in int8 and NF4: the same sites, no code per backend, and neighbours change nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit
from transformers import AutoModelForCausalLM

from weft.api import Adapters
from weft.core.stream import Part
from weft.errors import UserError
from weft.methods import METHODS
from weft.methods.dense import how_kept
from weft.models import load_base
from weft.models.quantize import PACKS, Quantization, num_parameters
from weft.ops import low_rank_rows

OPTIONS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "tokenizer": object()}
FITTING = ["bitfit", "bottleneck", "lora", "prefix_tuning", "prompt_tuning"]


@pytest.fixture(scope="module", params=["nf4", "int8"])
def quantised(request, tmp_path_factory: pytest.TempPathFactory):
    """A width of 64, which is one block of NF4."""
    folder = tmp_path_factory.mktemp("base")
    kit.make_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return load_base(str(folder), quantization=request.param, **OPTIONS)


def test_the_linears_of_the_blocks_are_quantised_and_answer_as_transformers_says(quantised) -> None:
    kinds = {type(quantised.model.get_submodule(path)).__name__ for path in quantised.architecture.linears}
    assert kinds <= {"Linear4bit", "WeightOnlyLinear8bitLt"}
    texts = kit.texts(3)
    with torch.no_grad():
        wanted = [quantised.model(torch.tensor([ids])).logits[0] for ids in texts]
        adapters = Adapters(quantised.model, quantised.architecture)
        found = [
            adapters.logits(h, [(None, len(h))]) for h in kit.hidden_of(adapters, [Part(None, [ids]) for ids in texts])
        ]
        adapters.close()
    assert kit.difference(found, wanted) < 1e-4
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


def test_training_computes_what_evaluation_does(quantised) -> None:
    """To the bit with and without gradients, also with outliers; a text in a batch, alone, and token by token."""
    adapters = Adapters(quantised.model, quantised.architecture)
    kit.randomize(adapters.add("lora", METHODS["lora"](), seed=0), 0)
    table = quantised.model.get_input_embeddings().weight
    kept = table.detach().clone()
    with torch.no_grad():
        table[:, 3] *= 300  # bitsandbytes takes such features of an int8 base out of the product of whole numbers
    texts = kit.texts(3, seed=2)
    with torch.no_grad():
        evaluated = kit.hidden_of(adapters, [Part("lora", texts)])
        alone = [kit.hidden_of(adapters, [Part("lora", [text])])[0] for text in texts]
        begun = kit.hidden_of(adapters, [Part("lora", [text[:1]]) for text in texts])
    trained = kit.hidden_of(adapters, [Part("lora", texts)])
    assert all(hidden.requires_grad for hidden in trained)
    assert all(torch.equal(one, other) for one, other in zip(trained, evaluated, strict=True))
    assert kit.difference(alone, evaluated) < 1e-4
    assert kit.difference(begun, [hidden[:1] for hidden in evaluated]) < 1e-4
    quantised.model.train()  # a module's mode decides nothing
    assert all(torch.equal(*pair) for pair in zip(kit.hidden_of(adapters, [Part("lora", texts)]), trained, strict=True))
    quantised.model.eval()
    with torch.no_grad():
        table.copy_(kept)
    adapters.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its rows are whole blocks, whose numbers transformers by itself gets right everywhere."""
    folder = tmp_path_factory.mktemp("plain")
    kit.make_model("llama", hidden_size=128, intermediate_size=128).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("asked", "recorded"),
    [
        (Quantization("nf4"), {}),
        (Quantization("fp4", double=False, block_size=128),
         {"double_quantization": False, "quantization_block_size": 128}),
        (Quantization("nf4", compute_dtype="bfloat16"), {"quantization_dtype": "bfloat16"}),
        (Quantization("int8"), {}),
    ],
    ids=str,
)  # fmt: skip
def test_choices_are_honoured_recorded_and_stored(
    asked: Quantization, recorded: dict[str, object], plain: Path, tmp_path: Path
) -> None:
    """What is saved has bitsandbytes' storage, which transformers loads by itself, and which is loaded as it is."""
    base = load_base(str(plain), quantization=asked, **OPTIONS)
    assert how_kept(base.model, torch.float32) == {"dtype": "float32", "quantization": asked.kind, **recorded}
    assert Quantization.recorded(asked.record(), "here") == asked
    base.model.save_pretrained(tmp_path)
    ids = torch.tensor([kit.texts(1)[0]])
    with torch.no_grad():
        wanted = base.model(ids).logits
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        for module in model.modules():
            if hasattr(module, PACKS):
                setattr(module, PACKS, False)  # a kernel of its own with other rounding
        alone = model(ids).logits
    # By itself, transformers rounds the inputs of int8 linears.
    kit.measured("transformers alone", kit.difference([alone], [wanted]), 0.3 if asked.kind == "int8" else 1e-4)
    # What is not said of the product follows dtype.
    for said in (None, asked) if asked.compute_dtype is None else (asked,):
        again = load_base(str(tmp_path), quantization=said, **OPTIONS)
        assert how_kept(again.model, torch.float32) == how_kept(base.model, torch.float32)
        with torch.no_grad():
            assert torch.equal(again.model(ids).logits, wanted)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("nf4", r"quantised already \(fp4, double quantization off\), and asked for is nf4, double quantization on"),
        ("int8", "and asked for is int8"),
        (Quantization("fp4", double=False), "in blocks of 128, and quantization_block_size is 64"),
    ],
)
def test_quantised_otherwise_already(asked: Any, message: str, plain: Path, tmp_path: Path) -> None:
    stored = Quantization("fp4", double=False, block_size=128)
    load_base(str(plain), quantization=stored, **OPTIONS).model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        load_base(str(tmp_path), quantization=asked, **OPTIONS)


def test_an_adapter_that_does_not_say_how_scales_are_kept(plain: Path, tmp_path: Path) -> None:
    """Before there was a choice, its record was silent whatever the checkpoint had."""
    stored = Quantization("fp4", double=False)
    load_base(str(plain), quantization=stored, **OPTIONS).model.save_pretrained(tmp_path)
    again = load_base(str(tmp_path), quantization=Quantization.recorded({"quantization": "fp4"}, "here"), **OPTIONS)
    assert how_kept(again.model, torch.float32)["double_quantization"] is False


def test_without_bitsandbytes_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install \"weft\[quant\]\""):
        Quantization("nf4").config(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", [False, "cheap"])
def test_linears_of_one_input_are_one_node(
    which: Any, dtype: torch.dtype, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients are those of linear by linear, also where the sums are kept and all else made again."""
    base = load_base(str(plain), quantization="nf4", **{**OPTIONS, "dtype": str(dtype).removeprefix("torch.")})
    monkeypatch.setattr("weft.ops.kept.DEAR", 0)
    for name in ("products", "packed"):
        monkeypatch.setattr(f"weft.ops.{name}.faster_wide_from", lambda *_: 1)
    texts, nodes, found = kit.texts(4, high=30), [0], []
    apply = low_rank_rows._LowRankRows.apply
    monkeypatch.setattr(low_rank_rows._LowRankRows, "apply", lambda *a: nodes.append(1) or apply(*a))
    for many in (1 << 20, 1):
        monkeypatch.setattr(low_rank_rows, "MANY", many)
        adapters = Adapters(base.model, base.architecture, checkpointing=which)
        for seed, method in enumerate(("lora", "bitfit", "lora")):
            kit.randomize(adapters.add(f"{method}{seed}", METHODS[method](**kit.SETTINGS.get(method, {}))), seed)
        parts = [Part(name, [ids]) for name, ids in zip(["lora0", None, "bitfit1", "lora2"], texts, strict=True)]
        hidden = torch.cat(kit.hidden_of(adapters, parts))
        weigh = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
        (hidden.float() * weigh).sum().backward()
        found.append([hidden.detach(), *(g for name in adapters.names for g in kit.gradients(adapters[name]).values())])
        adapters.close()
    times = 2 if which else 1
    assert len(nodes) - 1 == 4 * times * len(base.architecture.blocks), "query to value, output, gate and up, down"
    for one, other in zip(*found, strict=True):
        near = 60 * torch.finfo(dtype).eps * float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=near)
