"""Adapters come, go, combine and stack while the model is in memory; the base never changes by a bit."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import kit
from tests.contracts.test_routing import picture
from torch import Tensor

from weft.api import Adapters
from weft.core.stream import Part
from weft.errors import UserError
from weft.generation import Request, generate
from weft.methods.combined import Combined, CombinedConfig
from weft.models import describe
from weft.training import Job, JobConfig, Trainer
from weft.training.method_settings import method_of

TEXTS = kit.texts(3, seed=4)


def hidden(adapters: Adapters, name: str | None) -> list[Tensor]:
    with torch.no_grad():
        return kit.hidden_of(adapters, [Part(name, TEXTS)])


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def opened(kind: str = "llama", dtype: torch.dtype = torch.float64, **options: bool) -> Adapters:
    model = kit.make_model(kind, dtype)
    adapters = Adapters(model, describe(model), **options)
    for index, method in enumerate(kit.ALL):
        kit.randomize(adapters.add(method, kit.method_config(method), seed=index), index)
    return adapters


@pytest.mark.parametrize(
    ("kind", "padded"),
    kit.in_turn(["llama", "gpt2", "bloom"], [pytest.param(False, id="packed"), pytest.param(True, id="padded")]),
)
def test_a_stack_is_one_after_the_other(kind: str, padded: bool) -> None:
    """As a combined adapter with the same values, for every pair and for all at once; nothing is copied."""
    adapters = opened(kind, padded=padded)
    alone = {name: hidden(adapters, name) for name in (None, *kit.ALL)}
    # Learned keys do not go with blocks that the base does not have.
    prefixed = {name for name in kit.ALL if adapters[name].num_prefix_tokens}
    inserting = {name for name in kit.ALL if adapters[name].inserted_blocks()}
    if prefixed and inserting:
        with pytest.raises(UserError, match="no keys and values"):
            adapters.stack("wrong", [*inserting, *prefixed])
        assert "wrong" not in adapters
    pairs = [
        pair for pair in itertools.pairwise([*kit.ALL, kit.ALL[0]]) if not (prefixed & {*pair} and inserting & {*pair})
    ]
    # What replaces a norm's weights can stand in a stack once; the others go together.
    stacks = [*pairs, tuple(name for name in kit.ALL if name not in inserting)]
    for number, names in enumerate(stacks):
        stack = adapters.stack(f"s{number}", names)
        assert {id(p) for p in stack.parameters()} == {id(p) for name in names for p in adapters[name].parameters()}
        configs = tuple(adapters[name].config for name in names)
        copy = adapters.add(f"c{number}", CombinedConfig(parts=configs))
        with torch.no_grad():
            for mine, theirs in zip(copy.parameters(), stack.parameters(), strict=True):
                mine.copy_(theirs)
        found = hidden(adapters, f"s{number}")
        assert same(found, hidden(adapters, f"c{number}"))
        assert kit.difference(found, alone[None]) > 1e-4
    # All in one batch, each row its own route.
    names = [None, *adapters.names]
    with torch.no_grad():
        mixed = kit.hidden_of(adapters, [Part(name, TEXTS) for name in names])
    for number, name in enumerate(names):
        own = mixed[number * len(TEXTS) : (number + 1) * len(TEXTS)]
        # transformers computes BLOOM's softmax in float32.
        limit = 1e-6 if (kind, padded) == ("bloom", True) else 1e-9
        kit.measured(f"{kind} {name} mixed - alone", kit.difference(own, hidden(adapters, name)), limit)
    assert all(same(hidden(adapters, name), alone[name]) for name in alone)


def test_a_stack_follows_its_parts_and_generates() -> None:
    adapters = opened()
    adapters.stack("both", ["lora", "prefix_tuning"])
    before = hidden(adapters, "both")
    kit.randomize(adapters["lora"], 9)
    assert not same(before, hidden(adapters, "both"))
    asked = [Request(ids, name, 5) for name in ("both", "lora", None) for ids in kit.texts(2, 3, 9)]
    answers = [c.ids for c in generate(adapters, asked, stop_ids=())]
    for request, answer in zip(asked, answers, strict=True):
        (states,) = kit.hidden_of(adapters, [Part(request.adapter, [[*request.prompt, *answer]])])
        logits = adapters.logits(states, [(request.adapter, len(states))])
        assert logits.argmax(-1)[len(request.prompt) - 1 : -1].tolist() == answer


def test_a_stack_saves_as_one_and_trains_its_parts(tmp_path: Path) -> None:
    adapters = opened()
    adapters.stack("both", ["bitfit", "bottleneck"])
    adapters.save("both", tmp_path / "both")
    adapters.load("again", tmp_path / "both")
    assert same(hidden(adapters, "both"), hidden(adapters, "again"))
    before = {name: kit.parameters(adapters[name]) for name in adapters.names}
    config = JobConfig(name="both", method="bitfit+bottleneck", steps=2, batch_size=2)
    Trainer(adapters, [Job(config, adapters["both"], kit.samples(4))]).run()
    moved = {
        name for name in kit.ALL if any((p != before[name][key]).any() for key, p in adapters[name].named_parameters())
    }
    assert moved == {"bitfit", "bottleneck"}


def test_refusals() -> None:
    adapters = opened()
    adapters.stack("both", ["lora", "bitfit"])
    adapters.stack("deep", ["both", "prompt_tuning"])
    for name, message in (("lora", "part of the stack 'both'"), ("both", "part of the stack 'deep'")):
        with pytest.raises(UserError, match=message):
            adapters.remove(name)
    for names, message in (
        (["lora", "lora"], "each once"), ([], "needs adapters"), (["lora", "nobody"], "no adapter named 'nobody'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            adapters.stack("new", names)
    with pytest.raises(UserError, match="already an adapter"):
        adapters.stack("lora", ["bitfit"])
    with pytest.raises(UserError, match="is no name"):
        adapters.stack("a/b", ["bitfit"])
    for name in ("deep", "both", "lora"):
        adapters.remove(name)
    assert "lora" not in adapters.names
    adapters.close()


# One thing that a user may do next: (what, numbers that choose among what is there).
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "load", "combine", "cat", "stack", "save", "remove", "remove", "use", "close"]),
        st.integers(0, 99),
        st.integers(0, 99),
    ),
    min_size=3,
    max_size=14,
)
METHODS = [*kit.ALL, "lora+bitfit", "prefix_tuning+prompt_tuning"]
SETTINGS: dict[str, Any] = {
    "r": 4, "add_missing": True, "num_virtual_tokens": 3, "reduction_factor": 4, "prompt_ids": [5, 17],
    "token_indices": [5, 17],
}  # fmt: skip


def config_of(method: str) -> Any:
    fields = {key for name in method.split("+") for key in kit.METHODS[name].model_fields}
    return method_of(method, {key: value for key, value in SETTINGS.items() if key in fields})


class Session:
    """A model, what was done to it, and what every adapter is expected to compute."""

    def __init__(self, folder: Path, exact: bool) -> None:
        self.model, self.exact, self.folder = kit.make_model("llama", torch.float32), exact, folder
        self.fresh = picture(self.model)
        self.count = 0
        self.open()
        self.plain = hidden(self.adapters, None)

    def open(self) -> None:
        self.adapters = Adapters(self.model, describe(self.model), exact=self.exact)
        self.saved: list[Path] = []
        self.expected: dict[str, list[Tensor]] = {}

    def new_name(self) -> str:
        self.count += 1
        return f"n{self.count}"

    def do(self, what: str, first: int, second: int) -> None:
        adapters, there, name = self.adapters, self.adapters.names, self.new_name()
        chosen = [there[i % len(there)] for i in (first, second)] if there else []
        if what == "close":
            adapters.close()
            assert picture(self.model) == self.fresh
            self.open()
        elif what == "add":
            config = config_of(METHODS[first % len(METHODS)])
            kit.randomize(adapters.add(name, config, seed=second), second)
        elif what == "load" and self.saved:
            adapters.load(name, self.saved[first % len(self.saved)])
        elif what == "save" and chosen:
            self.saved.append(self.folder / name)
            adapters.save(chosen[0], self.folder / name)
        elif what == "remove" and chosen:
            used = any(
                isinstance(adapters[other], Combined) and adapters[chosen[0]] in adapters[other].parts
                for other in there
            )  # fmt: skip
            if used:
                with pytest.raises(UserError, match="part of the stack"):
                    adapters.remove(chosen[0])
            else:
                adapters.remove(chosen[0])
                del self.expected[chosen[0]]
        elif what in ("combine", "cat", "stack") and chosen:
            try:
                if what == "stack":
                    adapters.stack(name, list(dict.fromkeys(chosen)))
                else:
                    adapters.combine(name, chosen, combination_type="cat" if what == "cat" else "linear")
            except UserError:
                assert name not in adapters
        for other in adapters.names:
            if other not in self.expected:
                self.expected[other] = hidden(adapters, other)

    def check(self) -> None:
        """The base is as it was, and what is there computes what it did, and what a fresh load of it computes."""
        adapters = self.adapters
        assert kit.sha256(self.model.state_dict().values()) == self.fresh["tensors"]
        assert list(self.model.state_dict()) == self.fresh["keys"]
        assert same(hidden(adapters, None), self.plain)
        assert self.expected.keys() == set(adapters.names)
        for name in adapters.names:
            assert same(hidden(adapters, name), self.expected[name]), name
            adapters.save(name, self.folder / "check" / name)
        names = adapters.names
        adapters.close()
        assert picture(self.model) == self.fresh
        fresh = Adapters(kit.make_model("llama", torch.float32), describe(self.model), exact=self.exact)
        for name in names:
            fresh.load("it", self.folder / "check" / name)
            kit.measured(f"{name} - fresh load", kit.difference(hidden(fresh, "it"), self.expected[name]), 0.0)
            fresh.remove("it")


@pytest.mark.long
@settings(max_examples=15, derandomize=True)
@given(STEPS, st.booleans())
def test_after_any_sequence_the_base_is_the_base(steps: list[tuple[str, int, int]], exact: bool) -> None:
    check_sequence(steps, exact)


@pytest.mark.slow
@settings(max_examples=100, derandomize=True)
@given(STEPS, st.booleans())
def test_after_many_sequences_the_base_is_the_base(steps: list[tuple[str, int, int]], exact: bool) -> None:
    check_sequence(steps, exact)


def check_sequence(steps: list[tuple[str, int, int]], exact: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        session = Session(Path(folder), exact)
        for step in steps:
            session.do(*step)
        session.check()
