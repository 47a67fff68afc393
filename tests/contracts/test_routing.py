"""Beginning as the identity, keeping sequences apart, leaving no trace, saving and loading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit
from torch import nn

from weft.api import Adapters
from weft.core.stream import Part
from weft.data import Sample
from weft.errors import UserError
from weft.files.adapter_folder import read_tensors
from weft.models import describe
from weft.objectives.passes import Work, forward_losses
from weft.training import Job, JobConfig, Trainer

KINDS = ["llama", "gpt2", "bloom"]


@pytest.mark.parametrize("kind", [*KINDS, "falcon"])
@pytest.mark.parametrize("method", sorted(set(kit.ALL) - kit.NOT_IDENTITY))
def test_begins_as_the_identity(kind: str, method: str) -> None:
    adapters = Adapters(model := kit.make_model(kind), describe(model))
    adapters.add(method, kit.method_config(method), seed=3)
    texts = kit.texts(4)
    changed = kit.hidden_of(adapters, [Part(method, texts)])
    plain = kit.hidden_of(adapters, [Part(None, texts)])
    assert all(torch.equal(a, b) for a, b in zip(changed, plain, strict=True))
    kit.randomize(adapters[method])
    assert not torch.equal(kit.hidden_of(adapters, [Part(method, texts)])[0], plain[0])


@pytest.fixture(scope="module", params=KINDS)
def opened(request: Any) -> Iterator[tuple[str, list[Adapters]]]:
    """A model with all methods, and another in exact mode."""
    found = [kit.open_with_all(kit.make_model(request.param), exact=exact) for exact in (False, True)]
    yield request.param, found
    for adapters in found:
        adapters.close()


@pytest.mark.parametrize("method", kit.ALL)
def test_in_a_mixed_batch_as_alone(opened: tuple[str, list[Adapters]], method: str) -> None:
    """Values in float32 within rounding, in exact mode to the bit."""
    kind, both = opened
    for adapters in both:
        own = kit.texts(3, seed=1)
        alone = kit.hidden_of(adapters, [Part(method, own)])
        others = [Part(n, kit.texts(2, high=25, seed=i)) for i, n in enumerate([*kit.ALL, None]) if n != method]
        mixed = kit.hidden_of(adapters, [others[0], Part(method, own), *others[1:]])[2:5]
        if adapters.exact:
            assert all(torch.equal(a, b) for a, b in zip(alone, mixed, strict=True))
        else:
            kit.measured(f"{kind} {method} mixed - alone", kit.difference(alone, mixed), 1e-5)


@pytest.mark.parametrize("neighbours", [3, pytest.param(len(kit.ALL), marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_exact_mode_beside_any_neighbours(dtype: torch.dtype, neighbours: int) -> None:
    """Widths that are no multiple of a cache line, so that every row count gives another alignment: the loss and all
    gradients are the same bits whatever stands before."""
    widths = {"hidden_size": 44, "intermediate_size": 52, "head_dim": 12}
    model = kit.make_model("llama", dtype, **widths)
    adapters = kit.open_with_all(model, dropout=True, exact=True)
    own = {name: kit.samples(3, seed=i) for i, name in enumerate(kit.ALL)}
    for index, name in enumerate(kit.ALL):
        found = []
        # Each method is a neighbour of as many others.
        step = len(kit.ALL) // neighbours
        for seed in (None, *((index + 1 + step * i) % len(kit.ALL) for i in range(neighbours))):
            others = kit.ALL if seed is not None else []
            before = [Work(n, kit.samples(1 + seed % 3, seed=seed), 3) for n in others[seed or 0 :][:1] if n != name]
            *_, loss = forward_losses(adapters, [*before, Work(name, own[name], 5)])
            if name not in kit.UNTRAINED:
                loss.backward()
            found.append(kit.sha256([loss, *kit.gradients(adapters[name]).values()]))
        assert len(set(found)) == 1, name
    adapters.close()


def picture(model: nn.Module) -> dict[str, Any]:
    """All that must be as it was."""
    return {
        "classes": [(path, type(module)) for path, module in model.named_modules()],
        "attributes": [(path, sorted(module.__dict__)) for path, module in model.named_modules()],
        "keys": list(model.state_dict()),
        "requires_grad": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "training": [(path, module.training) for path, module in model.named_modules()],
        "attention": model.config._attn_implementation,
        "tensors": kit.sha256(model.state_dict().values()),
        "gradients": [name for name, p in model.named_parameters() if p.grad is not None],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    }


@pytest.mark.parametrize(
    ("kind", "options"),
    kit.in_turn([*KINDS, "falcon"], [{}, {"exact": True}, {"checkpointing": "cheap"}, {"padded": True}], take=2),
)
def test_after_close_the_model_is_what_it_was(kind: str, options: dict[str, bool]) -> None:
    """After training every method, in whatever state of flags the model came."""
    if kind == "falcon" and options.get("exact"):
        with pytest.raises(UserError, match="exact mode needs the packed stream"):
            Adapters(model := kit.make_model(kind), describe(model), exact=True)
        return
    model = kit.make_model(kind)
    next(model.parameters()).requires_grad_(False)
    model.train()
    model.get_submodule(describe(model).blocks[0]).eval()
    before = picture(model)
    ids = torch.tensor([kit.texts(1, 9, 9)[0]])
    model.eval()
    plain = model(ids).logits
    model.train()
    model.get_submodule(describe(model).blocks[0]).eval()
    architecture = describe(model)

    adapters = Adapters(model, architecture, **options)
    base = picture(model)["tensors"]
    jobs = []
    for method in kit.ALL:
        settings = {**kit.SETTINGS.get(method, {}), **kit.DROPOUT.get(method, {})}
        config = JobConfig(name=method, method=method, method_settings=settings, steps=2, batch_size=2)
        jobs.append(Job(config, adapters.add(method, config.method_config()), kit.samples(6)))
    Trainer(adapters, jobs).run()
    assert picture(model)["tensors"] == base
    assert picture(model)["keys"] == before["keys"]
    adapters.close()

    after = picture(model)
    for key, value in before.items():
        assert after[key] == value, key
    model.eval()
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_remove_gives_modules_their_class_back(kind: str) -> None:
    model = kit.make_model(kind)
    with Open(model) as adapters:
        bare = picture(model)
        texts = kit.texts(3)
        plain = kit.hidden_of(adapters, [Part(None, texts)])
        for method in kit.ALL:
            kit.randomize(adapters.add(method, kit.method_config(method)))
        kept = kit.hidden_of(adapters, [Part(kit.ALL[0], texts)])
        for method in kit.ALL[1:]:
            adapters.remove(method)
        assert all(
            torch.equal(a, b) for a, b in zip(kept, kit.hidden_of(adapters, [Part(kit.ALL[0], texts)]), strict=True)
        )
        adapters.remove(kit.ALL[0])
        assert picture(model) == bare
        assert all(torch.equal(a, b) for a, b in zip(plain, kit.hidden_of(adapters, [Part(None, texts)]), strict=True))
        assert adapters.names == []


class Open:
    """``Adapters`` that are closed at the end."""

    def __init__(self, model: nn.Module, **options: bool) -> None:
        self.adapters = Adapters(model, describe(model), **options)

    def __enter__(self) -> Adapters:
        return self.adapters

    def __exit__(self, *error: object) -> None:
        self.adapters.close()


@pytest.mark.parametrize(("method", "kind"), kit.in_turn(kit.ALL, KINDS))
def test_saved_is_what_was_trained_and_loads_exactly(kind: str, method: str, tmp_path: Path) -> None:
    model = kit.make_model(kind)
    texts = kit.texts(3)
    with Open(model) as adapters:
        config = JobConfig(
            name="one", method=method, method_settings=kit.SETTINGS.get(method, {}), steps=3, batch_size=2
        )
        adapter = adapters.add("one", config.method_config())
        Trainer(adapters, [Job(config, adapter, kit.samples(6))]).run()
        adapters.save("one", tmp_path / "a", base_name="base")
        # Every trained number is in the file (of a method that trains an encoder, in the encoder's); what else is there
        # are the adapter's frozen tensors.
        weights = adapter.config.weights_file
        stored, trained = read_tensors(tmp_path / "a" / weights), adapter.file_tensors()
        assert set(stored) == set(trained)
        whole = {} if method in kit.UNTRAINED else adapter.extra_tensors() or trained
        assert {id(p) for p in adapter.parameters() if p.requires_grad} == {
            id(t) for t in whole.values() if not any(t is frozen for frozen in adapter.buffers())
        }
        assert all(torch.equal(stored[key], trained[key]) for key in stored)
        wanted = kit.hidden_of(adapters, [Part("one", texts)])
        adapters.remove("one")
        adapters.load("one", tmp_path / "a")
        assert all(
            torch.equal(a, b) for a, b in zip(wanted, kit.hidden_of(adapters, [Part("one", texts)]), strict=True)
        )
        adapters.save("one", tmp_path / "b", base_name="base")
    for name in (weights, "adapter_config.json", "weft.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_second_adapters_on_an_open_model_is_refused() -> None:
    model = kit.make_model("llama")
    with Open(model), pytest.raises(UserError, match="already carries"):
        Adapters(model, describe(model))
    with Open(model) as adapters:
        assert adapters.names == []


def test_a_module_that_cannot_become_a_site_leaves_nothing_half_attached() -> None:
    model = kit.make_model("llama")
    texts = kit.texts(2)
    with Open(model) as adapters:
        module = model.get_submodule(describe(model).linears[-1])
        module.forward = type(module).forward.__get__(module)  # what accelerate's hooks do
        with pytest.raises(UserError, match="forward of its own"):
            adapters.add("one", kit.method_config("lora"))
        del module.forward
        kit.randomize(adapters.add("one", kit.method_config("lora")), scale=0.3)
        first = kit.hidden_of(adapters, [Part("one", texts)])
    with Open(model) as adapters:
        kit.randomize(adapters.add("one", kit.method_config("lora")), scale=0.3)
        assert torch.equal(first[0], kit.hidden_of(adapters, [Part("one", texts)])[0])


def test_the_model_outside_a_route_says_so() -> None:
    model = kit.make_model("llama")
    with Open(model), pytest.raises(RuntimeError, match="outside a route"):
        model(torch.tensor([[1, 2, 3]]))


def test_a_sample_alone_has_the_loss_of_plain_cross_entropy() -> None:
    """The loss of the step, from the head to the weights, against torch's own."""
    model = kit.make_model("gpt2", torch.float64)
    sample = Sample([5, 6, 7, 8, 9], [0.0, 0.0, 1.0, 0.5, 1.0], "s")
    with torch.no_grad():
        logits = model(torch.tensor([sample.input_ids])).logits[0]
        wanted = sum(
            w * nn.functional.cross_entropy(logits[t - 1], torch.tensor(i))
            for t, (i, w) in enumerate(zip(sample.input_ids, sample.weights, strict=True)) if w
        )  # fmt: skip
        with Open(model) as adapters:
            (loss,) = forward_losses(adapters, [Work(None, [sample], divisor=2.5)])
    kit.measured("loss - cross entropy", abs(float(loss - wanted / 2.5)), 1e-12)
