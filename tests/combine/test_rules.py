"""Trained adapters become a new one: LoRA as in peft's ``add_weighted_adapter``, the others by rules of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraModel
from peft.utils import merge_utils
from tests import kit
from torch import Tensor

from weft.api import Adapters
from weft.combine.rules import ON_PRODUCTS, Combination
from weft.core.stream import Part
from weft.errors import UserError
from weft.methods import BitFitConfig, BottleneckConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from weft.models import describe
from weft.ops.combine import agreeing_mean, drop_at_random, keep_largest, merge, truncated_svd, truncated_svd_of_product
from weft.ops.seeds import stable_seed

LIMIT = 1e-5
SEED = 7
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
# Two adapters: alike, or unlike in what the rule allows.
ALIKE: list[dict[str, Any]] = [{"r": 4, "lora_alpha": 9}, {"r": 4, "lora_alpha": 3}, {"r": 4, "lora_alpha": 16}]
UNLIKE: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 9},
    {"r": 2, "lora_alpha": 5},
    # peft's new adapter takes its scaling from the first one: rsLoRA must not stand there.
    {"r": 6, "lora_alpha": 4, "use_rslora": True},
]
WEIGHTS = [0.7, 1.3, -0.4]


def settings_of(kind: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    out |= {"density": 0.6} if "ties" in kind or "dare" in kind or "prune" in kind else {}
    return out | ({"majority_sign_method": "frequency"} if kind == "dare_ties" else {})


def their_model(base: str, configs: list[dict[str, Any]], folder: Path) -> Any:
    """A peft model with our adapters of these settings in it, named 0, 1, …; they lie in ``folder`` too."""
    model = kit.make_model(base, torch.float64)
    adapters = Adapters(model, describe(model))
    for index, settings in enumerate(configs):
        targets = TARGETS[base][index % 2 :] if len({c["r"] for c in configs}) > 1 else TARGETS[base]
        kit.randomize(adapters.add(str(index), LoraConfig(target_modules=targets, **settings)), index)
        adapters.save(str(index), folder / str(index))
    theirs = peft.PeftModel.from_pretrained(kit.make_model(base, torch.float64), folder / "0", adapter_name="0")
    for index in range(1, len(configs)):
        theirs.load_adapter(folder / str(index), adapter_name=str(index))
    return theirs.eval()


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """peft's masks are drawn from the global generator: seed it as ours is, module by module, and draw in float32.
    GPT-2's changes are stored transposed, and so drawn transposed."""
    seeded: list[str] = []
    for name in (
        "_generalized_task_arithmetic_weighted_adapter",
        "_svd_generalized_task_arithmetic_weighted_adapter",
    ):
        plain = getattr(LoraModel, name)

        def run(self: Any, kind: str, adapters: Any, weights: Any, *rest: Any, p: Any = plain, n: str = name,
                **more: Any) -> Any:  # fmt: skip
            target = rest[0] if n.startswith("_gen") else rest[1]
            (path,) = [path for path, module in self.model.named_modules() if module is target]
            torch.manual_seed(stable_seed(SEED, "combine", path))
            seeded.append(path)
            turn = n.startswith("_svd") and target.fan_in_fan_out
            pruning, bernoulli = merge_utils.random_pruning, torch.bernoulli
            with monkeypatch.context() as patch:
                patch.setattr(torch, "bernoulli", lambda share: bernoulli(share.float()).to(share))
                if turn:
                    patch.setattr(merge_utils, "random_pruning", lambda t, d, rescale: pruning(t.T, d, rescale).T)
                return p(self, kind, adapters, weights, *rest, **more)

        monkeypatch.setattr(LoraModel, name, run)
    return seeded


def their_changes(theirs: Any, name: str) -> dict[str, Tensor]:
    """Module path -> the change [out, in] of one adapter."""
    found = {}
    for path, module in theirs.base_model.model.named_modules():
        if name in getattr(module, "lora_A", {}):
            change = module.get_delta_weight(name)
            found[path] = change.T if module.fan_in_fan_out else change
    return found


def our_changes(adapters: Adapters, name: str) -> dict[str, Tensor]:
    adapter: Any = adapters[name]
    return {
        path: layer.scaling * layer.lora_B @ layer.lora_A
        for path, layer in zip(adapter.paths, adapter.layers, strict=True)
    }


CASES = [(kind, ALIKE) for kind in ON_PRODUCTS] + [
    (kind, UNLIKE) for kind in ON_PRODUCTS if kind == "cat" or kind.endswith("svd")
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "configs", "base"),
    kit.in_turn(
        [pytest.param(k, c, id=f"{k}-{len({x['r'] for x in c})}") for k, c in CASES],
        ["llama", "gpt2"],
    ),
)
def test_as_add_weighted_adapter(
    base: str, kind: str, configs: list[dict[str, Any]], tmp_path: Path, same_draws: list[str]
) -> None:
    theirs = their_model(base, configs, tmp_path)
    names = [str(i) for i in range(len(configs))]
    theirs.add_weighted_adapter(names, WEIGHTS, "new", combination_type=kind, **settings_of(kind))
    model = kit.make_model(base, torch.float64)
    adapters = Adapters(model, describe(model))
    for name in names:
        adapters.load(name, tmp_path / name)
    before = {name: kit.parameters(adapters[name]) for name in names}
    adapters.combine("new", names, WEIGHTS, combination_type=kind, seed=SEED, **settings_of(kind))
    wanted, found = their_changes(theirs, "new"), our_changes(adapters, "new")
    assert wanted.keys() == found.keys()
    assert max(float(change.abs().max()) for change in wanted.values()) > 0.05, "nothing to compare"
    for path, change in wanted.items():
        kit.measured(f"{base} {kind} {path}", kit.difference([change], [found[path]]), LIMIT)
    assert bool(same_draws) == (kind not in ("cat",))
    theirs.set_adapter("new")
    texts = kit.texts(3)
    ours = [adapters.logits(h, [("new", len(h))]) for h in kit.hidden_of(adapters, [Part("new", texts)])]
    logits = [theirs(input_ids=torch.tensor([ids])).logits[0] for ids in texts]
    kit.measured(f"{base} {kind} logits", kit.difference(ours, logits), LIMIT)
    for name in names:
        assert all(torch.equal(t, before[name][key]) for key, t in adapters[name].named_parameters())


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_exact_rules_are_the_weighted_sum_of_the_changes(kind: str) -> None:
    """With rank enough nothing is lost; rsLoRA first, where peft's own result would be scaled by the root of r."""
    model = kit.make_model("llama", torch.float64)
    adapters = Adapters(model, describe(model))
    configs = [
        LoraConfig(r=3, use_rslora=True, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 1}),
        LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "o_proj"], alpha_pattern={"o_proj": 3}),
    ]
    for index, config in enumerate(configs):
        kit.randomize(adapters.add(str(index), config), index)
    rank = {"svd_rank": 5} if kind == "svd" else {}
    new = adapters.combine("new", ["0", "1"], [2.0, -0.5], combination_type=kind, **rank)
    assert isinstance(new.config, LoraConfig)
    assert (new.config.r, new.config.use_rslora, new.config.rank_pattern) == (5, False, {})
    first, second, both = (our_changes(adapters, name) for name in ("0", "1", "new"))
    assert set(both) == set(first) | set(second)
    for path, change in both.items():
        wanted = 2.0 * first.get(path, torch.zeros(())) - 0.5 * second.get(path, torch.zeros(()))
        kit.measured(f"{kind} {path}", float((change - wanted).abs().max()), 1e-12)


def test_the_new_adapter_saves_and_loads(tmp_path: Path) -> None:
    model = kit.make_model("llama")
    adapters = Adapters(model, describe(model))
    for index, targets in enumerate((["q_proj"], ["q_proj", "down_proj"])):
        kit.randomize(adapters.add(str(index), LoraConfig(r=3 + index, target_modules=targets)), index)
    adapters.combine("new", ["0", "1"], combination_type="cat")
    adapters.save("new", tmp_path / "new")
    adapters.load("again", tmp_path / "new")
    texts = kit.texts(3)
    one, two = (kit.hidden_of(adapters, [Part(name, texts)]) for name in ("new", "again"))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    theirs = peft.PeftModel.from_pretrained(kit.make_model("llama"), tmp_path / "new").eval()
    logits = [theirs(input_ids=torch.tensor([ids])).logits[0] for ids in texts]
    kit.measured("combined, in peft", kit.difference([adapters.logits(h) for h in one], logits), LIMIT)


def two(config: Any, other: Any = None, base: str = "llama") -> Adapters:
    """Two randomised adapters a and b."""
    model = kit.make_model(base)
    adapters = Adapters(model, describe(model))
    for index, (name, settings) in enumerate({"a": config, "b": other or config}.items()):
        kit.randomize(adapters.add(name, settings, seed=index), index)
    return adapters


@pytest.mark.parametrize(
    "config",
    [BitFitConfig(add_missing=True), BottleneckConfig(reduction_factor=4), PromptTuningConfig(num_virtual_tokens=3),
     PrefixTuningConfig(num_virtual_tokens=3)],
    ids=lambda config: config.method,
)  # fmt: skip
def test_other_kinds_are_summed_tensor_by_tensor(config: Any) -> None:
    adapters = two(config)
    new = adapters.combine("new", ["a", "b"], [0.25, 2.0]).tensors()
    a, b = adapters["a"].tensors(), adapters["b"].tensors()
    assert new.keys() == a.keys()
    assert kit.difference(new.values(), [0.25 * a[key] + 2.0 * b[key] for key in new]) <= 1e-6
    mean = adapters.combine("mean", ["a", "b"]).tensors()
    assert kit.difference(mean.values(), [(a[key] + b[key]) / 2 for key in mean]) <= 1e-6


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_virtual_tokens_stand_one_after_the_other(method: str) -> None:
    adapters = two(kit.METHODS[method](num_virtual_tokens=2), kit.METHODS[method](num_virtual_tokens=3))
    new = adapters.combine("new", ["b", "a"], combination_type="cat")
    assert new.num_virtual_tokens + new.num_prefix_tokens == 5
    wanted = torch.cat([adapters[name].tensors()["prompt_embeddings"] for name in ("b", "a")])
    assert torch.equal(new.tensors()["prompt_embeddings"], wanted)
    texts = kit.texts(3)
    adapters.stack("stack", ["b", "a"])
    one, other = (kit.hidden_of(adapters, [Part(name, texts)]) for name in ("new", "stack"))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    with pytest.raises(UserError, match="every weight must be 1"):
        adapters.combine("scaled", ["a", "b"], [0.5, 0.5], combination_type="cat")
    with pytest.raises(UserError, match="num_virtual_tokens is 2 in 'a' and 3 in 'b'"):
        adapters.combine("sum", ["a", "b"])


@pytest.mark.parametrize("kind", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_bias_changes_take_the_rules_for_changes(kind: str) -> None:
    adapters = two(BitFitConfig(), base="gpt2")
    new = adapters.combine("new", ["a", "b"], [1.0, 0.5], combination_type=kind, density=0.5, seed=3).tensors()
    again = adapters.combine("again", ["a", "b"], [1.0, 0.5], combination_type=kind, density=0.5, seed=3).tensors()
    other = adapters.combine("other", ["a", "b"], [1.0, 0.5], combination_type=kind, density=0.5, seed=4).tensors()
    assert all(torch.equal(new[key], again[key]) for key in new)
    assert all(torch.equal(new[key], other[key]) for key in new) == ("dare" not in kind)


def test_adapters_of_several_methods_part_by_part() -> None:
    from weft.training.method_settings import method_of

    adapters = two(method_of("lora+prefix_tuning", {"r": 2, "num_virtual_tokens": 2}))
    new = adapters.combine("new", ["a", "b"], combination_type="cat")
    assert new.num_prefix_tokens == 4
    lora: Any = new.parts[0]  # type: ignore[attr-defined]
    assert lora.config.r == 4
    with pytest.raises(UserError, match="svd does not work for prefix_tuning"):
        adapters.combine("other", ["a", "b"], combination_type="svd")
    kit.randomize(adapters.add("c", method_of("prefix_tuning+lora", {"r": 2, "num_virtual_tokens": 2})))
    with pytest.raises(UserError, match="different methods"):
        adapters.combine("other", ["a", "c"])
    assert adapters.names == ["a", "b", "new", "c"]


def test_of_a_single_adapter_only_its_weight_is_left() -> None:
    """As in peft: with nothing to agree with, nothing is left out."""
    adapters = two(LoraConfig(r=2))
    for kind in ("linear", "ties", "svd"):
        density = {"density": 0.5} if kind == "ties" else {}
        adapters.combine(kind, ["a"], [2.0], combination_type=kind, **density)
        wanted, found = our_changes(adapters, "a"), our_changes(adapters, kind)
        assert max(float((found[path] - 2 * wanted[path]).abs().max()) for path in wanted) < 1e-5


@pytest.mark.parametrize("method", kit.ALL)
def test_every_method_combines_or_says_that_it_cannot(method: str) -> None:
    """One adapter with weight 1 is itself; virtual tokens put together are the stack."""
    adapters = two(kit.method_config(method))
    kinds = type(adapters["a"].config).combination_types
    texts = kit.texts(3)

    def hidden(name: str) -> list[Tensor]:
        return kit.hidden_of(adapters, [Part(name, texts, None, answers=[2] * 3)])

    if "linear" not in kinds:
        with pytest.raises(UserError, match="linear does not work"):
            adapters.combine("new", ["a", "b"])
        return
    adapters.combine("new", ["a"], [1.0])
    assert kit.difference(hidden("new"), hidden("a")) < 1e-5
    adapters.combine("mean", ["a", "b"])
    if "cat" in kinds and method != "lora":
        adapters.combine("cat", ["a", "b"], combination_type="cat")
        adapters.stack("stack", ["a", "b"])
        assert kit.difference(hidden("cat"), hidden("stack")) < 1e-5


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"weights": [1.0]}, "1 weights for 2 adapters"),
    ({"weights": [1.0, float("nan")]}, "finite"),
    ({"combination_type": "tie"}, "Did you mean 'ties'"),
    ({"combination_type": "ties"}, "ties needs density"),
    ({"combination_type": "ties", "density": 0}, "above 0 and at most 1"),
    ({"combination_type": "ties", "density": 1.5}, "above 0 and at most 1"),
    ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"}, "neither total nor frequency"),
    ({"density": 0.5}, "density means nothing to combination_type linear"),
    ({"svd_rank": 3}, "svd_rank means nothing"),
    ({"combination_type": "svd", "svd_rank": 0}, "1 or more"),
    ({"names": ["a", "c"]}, "no adapter named 'c'"),
    ({"names": []}, "nothing to combine"),
    ({"name": "a"}, "already an adapter named 'a'"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_cannot_be_combined_says_why(given: dict[str, Any], message: str) -> None:
    adapters = two(LoraConfig(r=2))
    settings = dict(given)
    name, names = settings.pop("name", "new"), settings.pop("names", ["a", "b"])
    with pytest.raises(UserError, match=message):
        adapters.combine(name, names, **settings)
    assert adapters.names == ["a", "b"]


def test_what_does_not_fit_together_says_why() -> None:
    adapters = two(LoraConfig(r=2), LoraConfig(r=3))
    with pytest.raises(UserError, match=r"ranks must be equal: at '.*q_proj.lora_A.weight' 'a' has 2 and 'b' 3"):
        adapters.combine("new", ["a", "b"])
    adapters.add("bits", BitFitConfig(add_missing=True))
    with pytest.raises(UserError, match="'a' is lora, 'bits' is bitfit"):
        adapters.combine("new", ["a", "bits"])
    with pytest.raises(UserError, match="svd does not work for bitfit; what works: linear, ties"):
        adapters.combine("new", ["bits", "bits"], combination_type="svd")
    adapters.add("some", BitFitConfig(add_missing=True, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="only 'bits' has"):
        adapters.combine("new", ["bits", "some"])
    for name, activation in (("tanh", "tanh"), ("relu", "relu")):
        adapters.add(name, BottleneckConfig(reduction_factor=4, non_linearity=activation, dropout=len(name) / 10))
    with pytest.raises(UserError, match="non_linearity is 'tanh' in 'tanh' and 'relu' in 'relu'"):
        adapters.combine("new", ["tanh", "relu"])
    assert "new" not in adapters


def test_values_that_stand_for_the_base_are_averaged_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BottleneckConfig, "whole_values", True)
    adapters = two(BottleneckConfig(reduction_factor=4))
    with pytest.raises(UserError, match="must sum to 1, not 2"):
        adapters.combine("new", ["a", "b"], [1, 1])
    adapters.combine("new", ["a", "b"], [1.5, -0.5])


def test_rules_by_hand() -> None:
    a, b, c = torch.tensor([3.0, -1.0, 0.5, 0.0]), torch.tensor([-1.0, -2.0, 4.0, 1.0]), torch.tensor([-1.0, 2.0, 0, 0])
    assert keep_largest(a, 0.5).tolist() == [3.0, -1.0, 0.0, 0.0]
    # Sums 1, -1, 4.5, 1: the signs +, -, +, +; by frequency the first is minus.
    assert agreeing_mean([a, b, c], [1, 2, 3], "total").tolist() == [3.0, (-1 - 4) / 2, (0.5 + 8) / 2, 2.0]
    assert agreeing_mean([a, b, c], [1, 2, 3], "frequency").tolist() == [(-2 - 3) / 2, -2.5, 4.25, 2.0]
    assert merge("linear", [a, b], [2.0, -1.0]).tolist() == [7.0, 0.0, -3.0, -1.0]


def test_dare_is_right_in_expectation() -> None:
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(50, generator=generator)
    draws = torch.stack([drop_at_random(t, 0.3, generator) for _ in range(4000)])
    assert float((draws.mean(0) - t).abs().max()) < 5 * float(t.abs().max()) * (0.7 / 0.3 / 4000) ** 0.5
    assert abs(float((draws != 0).float().mean()) - 0.3) < 0.01


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_svd_of_a_product_is_that_of_the_matrix(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    b = torch.randn(shape[0], 12, generator=generator, dtype=torch.float64)
    a = torch.randn(12, shape[1], generator=generator, dtype=torch.float64)
    for rank in (1, 3, 5, 8):
        x, y = truncated_svd_of_product(b, a, rank), truncated_svd(b @ a, rank)
        assert [t.shape for t in x] == [(shape[0], rank), (rank, shape[1])]
        kit.measured("svd", float((x[0] @ x[1] - y[0] @ y[1]).abs().max()), 1e-12)


def test_settings_are_checked_without_adapters() -> None:
    with pytest.raises(UserError, match="none of linear, ties"):
        Combination((1.0,), "sum")
