"""Sites that change inputs, and several methods at one site."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit
from torch import Tensor

from weft.api import Adapters
from weft.core.adapter import Adapter, InputFunction, MethodConfig, SiteFunction
from weft.core.route import Segment
from weft.core.stream import Part
from weft.methods.combined import CombinedConfig
from weft.models import describe
from weft.training import Job, JobConfig, Trainer


class Scaled(Adapter):
    """Multiplies the inputs of some modules, as IA3 does."""

    def __init__(self, paths: tuple[str, ...], factor: float) -> None:
        super().__init__(kit.method_config("lora"), "it")
        self.paths, self.factor = paths, factor

    def input_sites(self) -> Mapping[str, InputFunction]:
        return dict.fromkeys(self.paths, self.change)

    def change(self, x: Tensor, segment: Segment) -> Tensor:
        assert segment.adapter == self.name
        return x * self.factor


class Config(MethodConfig):
    """Gives the adapter that ``make`` makes."""

    make: Any

    def __init__(self, make: Any) -> None:
        super().__init__(make=make)

    def methods(self) -> tuple[Any, ...]:
        return ()

    def build(self, name: str, context: Any) -> Adapter:
        adapter: Adapter = self.make()
        adapter.name = name
        return adapter


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"padded": True}, {"checkpointing": True}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "opt"])
def test_inputs_are_changed_for_their_own_rows(kind: str, options: dict[str, bool]) -> None:
    """Against a model whose weights of that module are scaled (the bias is not)."""
    from tests.models.test_facts import make

    model = make("opt").double() if kind == "opt" else kit.make_model(kind, torch.float64)
    shape = describe(model)
    adapters = Adapters(model, shape, **options)
    paths = shape.mlp_output
    for name, factor in (("twice", 2.0), ("half", 0.5)):
        adapters.add(name, Config(lambda factor=factor: Scaled(paths, factor)))  # type: ignore[arg-type]
    texts = [kit.texts(2 + i, seed=i) for i in range(4)]
    names = ["half", None, "twice", None]
    with torch.no_grad():
        found = kit.hidden_of(adapters, [Part(n, t) for n, t in zip(names, texts, strict=True)])
    adapters.close()
    wanted = []
    for name, own in zip(names, texts, strict=True):
        factor = {"half": 0.5, "twice": 2.0, None: 1.0}[name]
        with torch.no_grad():
            for path in paths:
                model.get_submodule(path).weight.mul_(factor)
            plain = Adapters(model, shape, padded=options.get("padded"))
            wanted += kit.hidden_of(plain, [Part(None, own)])
            plain.close()
            for path in paths:
                model.get_submodule(path).weight.div_(factor)
    kit.measured(f"{kind} {options} inputs", kit.difference(found, wanted), 1e-4 if options.get("padded") else 1e-10)


@pytest.mark.parametrize("exact", [False, True], ids=["normal", "exact"])
def test_a_site_function_sees_the_changed_input(exact: bool) -> None:
    model = kit.make_model("llama", torch.float64)
    path = describe(model).linears[0]
    adapters = Adapters(model, describe(model), exact=exact)
    seen: list[Tensor] = []

    def look(x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        seen.append(x)
        return y

    class Looking(Scaled):
        def sites(self) -> Mapping[str, SiteFunction]:
            return {path: look}

    adapter = Looking((path,), 3.0)
    adapters.add("it", Config(lambda: adapter))  # type: ignore[arg-type]
    texts = kit.texts(2)
    kit.hidden_of(adapters, [Part(None, texts), Part("it", texts)])
    adapter.factor = 1.0
    kit.hidden_of(adapters, [Part("it", texts)])
    kit.measured("a site's input", kit.difference(seen[:1], [3 * seen[1]]), 1e-12)
    adapters.close()


PAIRS = [("lora", "bitfit"), ("bitfit", "lora"), ("bottleneck", "full"), ("full", "bitfit"), ("freeze", "bitfit")]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_methods_in_one_job_are_both_applied(kind: str, first: str, second: str, tmp_path: Path) -> None:
    """In the order they are named in: against putting both functions at the sites by hand. And with one of them at its
    beginning the job is the other alone; saved and loaded it is the same."""
    model = kit.make_model(kind, torch.float64)
    adapters = Adapters(model, describe(model))
    texts = kit.texts(3)
    alone = {
        name: kit.randomize(adapters.add(name, kit.method_config(name)), i) for i, name in enumerate((first, second))
    }
    both: Any = adapters.add("both", CombinedConfig(parts=(kit.method_config(first), kit.method_config(second))))
    with torch.no_grad():
        for turn in (0, 1):
            copy(alone[(first, second)[turn]], both.parts[turn])
            if turn == 0:
                one, job = (kit.hidden_of(adapters, [Part(name, texts)]) for name in (first, "both"))
                kit.measured(f"{kind} {first} and a fresh {second} - {first}", kit.difference(one, job), 1e-12)
        found = kit.hidden_of(adapters, [Part("both", texts), Part(None, texts)])[:3]
        by_hand = adapters.add("hand", kit.method_config(first))
        copy(alone[first], by_hand)
        from weft.core.site import attach

        for path, function in alone[second].sites().items():
            site = attach(model.get_submodule(path), path, adapters.router)
            site.functions.setdefault("hand", []).append(function)
        wanted = kit.hidden_of(adapters, [Part("hand", texts)])
        kit.measured(f"{kind} {first}+{second} - by hand", kit.difference(found, wanted), 1e-12)
        for name in (first, second):
            assert kit.difference(found, kit.hidden_of(adapters, [Part(name, texts)])) > 1e-3
        adapters.save("both", tmp_path)
        adapters.load("again", tmp_path)
        again = kit.hidden_of(adapters, [Part("again", texts), Part(None, texts)])[:3]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert [p.config.method for p in adapters["again"].parts] == [first, second]  # type: ignore[attr-defined]
    adapters.close()


def copy(source: Adapter, target: Adapter) -> None:
    for value, parameter in zip(source.parameters(), target.parameters(), strict=True):
        parameter.copy_(value)


def test_both_methods_of_a_job_learn() -> None:
    model = kit.make_model("gpt2")
    adapters = Adapters(model, describe(model))
    job = JobConfig(name="both", method="lora+bitfit", steps=3)
    adapter: Any = adapters.add("both", job.method_config())
    before = [kit.sha256(part.parameters()) for part in adapter.parts]
    Trainer(adapters, [Job(job, adapter, kit.samples(8))]).run()
    assert all(kit.sha256(part.parameters()) != was for part, was in zip(adapter.parts, before, strict=True))
    adapters.close()
