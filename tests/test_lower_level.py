"""The lower level in Python: what is given wrongly, or too late, is refused in words that name it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

import weft
from weft.data import Sample, load_samples
from weft.objectives.passes import Work, evaluate_loss, forward_losses

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def opened(tiny_llama_dir: Path) -> Iterator[weft.Target]:
    with weft.open_target(tiny_llama_dir) as target:
        target.adapters.add("a", weft.LoraConfig(r=2))
        yield target


@pytest.fixture(scope="module")
def samples(opened: weft.Target, tiny_data: Path) -> list[Sample]:
    return load_samples(tiny_data, opened.renderer, limit=2)


def test_closed_adapters_refuse_every_use(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """A closed target wrote other text, for its layout ran over a model without it."""
    base = weft.load_base(str(tiny_llama_dir), dtype="float32")
    with weft.Adapters(base.model, base.architecture) as closed:
        closed.add("a", weft.LoraConfig(r=2))
        closed.save("a", tmp_path / "a")
        stream, hidden = closed.run([weft.Part("a", [PROMPT])])
    targets = torch.tensor(PROMPT)
    uses: list[Callable[[], object]] = [
        lambda: weft.generate(closed, [weft.Request(PROMPT)], stop_ids=[]),
        lambda: weft.generate(closed, [weft.Request(PROMPT, "a")], stop_ids=[]),
        lambda: closed.stream([weft.Part(None, [PROMPT])]),
        lambda: closed.forward(stream),
        lambda: closed.run([weft.Part(None, [PROMPT])]),
        lambda: closed.logits(hidden),
        lambda: closed.losses(hidden, targets, [(None, 4)]),
        lambda: closed.losses(hidden, targets, [("a", 4)]),
        lambda: closed.add("b", weft.LoraConfig()),
        lambda: closed.load("b", tmp_path / "a"),
        lambda: closed["a"],
        lambda: closed.save("a", tmp_path / "b"),
        lambda: closed.remove("a"),
    ]
    for use in uses:
        with pytest.raises(weft.UserError, match="these adapters are closed"):
            use()
    with weft.Adapters(base.model, base.architecture) as later:
        later.add("a", weft.LoraConfig(r=2, init_lora_weights=False))
        changed = later.run([weft.Part("a", [PROMPT])])[1]
        closed.close()
        assert torch.equal(changed, later.run([weft.Part("a", [PROMPT])])[1]), "closed twice, it took another's sites"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 0}, "LoraConfig: r: Input should be greater than 0"),
        ({"r": True}, "LoraConfig: r: expected a whole number, not true"),
        ({"lora_alpah": 4}, "unknown key 'lora_alpah'. Did you mean 'lora_alpha'?"),
        ({"task_type": "CAUSAL_LM"}, "unknown key 'task_type'. It takes: .*target_modules"),
    ],
)
def test_a_configuration_is_refused_in_our_words(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(weft.UserError, match=words) as caught:
        weft.LoraConfig(**settings)
    assert "pydantic" not in str(caught.value)
    if "r" not in settings:
        with pytest.raises(ValidationError):  # with the place of every setting, for who reads files
            weft.LoraConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("sequences", "words"),
    [
        (torch.ones(2, 3, dtype=torch.int64), "its sequences must be lists of token ids, not Tensor"),
        ([1, 2, 3], r"sequences\[0\] must be a list of token ids, not int"),
        (["abc"], r"sequences\[0\] must be a list of token ids, not str"),
        ([[1], [2, "b"]], r"sequences\[1\]: 'b' at place 1 is no token id"),
        ([[1, 2, -100]], r"sequences\[0\]: -100 at place 2 is no token id; the base has 0 to"),
        ([[1, 10**6]], "1000000 at place 1"),
        ([[1, 2**70]], "at place 1"),
        ([[1.0, 2]], "1.0 at place 0"),
        ([[[1, 2]]], r"\[1, 2\] at place 0"),
        ([[1], []], r"sequences\[1\] is without a single token"),
        ([], "the batch holds no sequence"),
    ],
    ids=str,
)
def test_what_is_no_token_id_is_named(opened: weft.Target, sequences: Any, words: str) -> None:
    with pytest.raises(weft.UserError, match=words):
        opened.adapters.stream([weft.Part("a", sequences)])
    if len(sequences) == 1:
        asked = [weft.Request(PROMPT), weft.Request(sequences[0])]
        with pytest.raises(weft.UserError, match=r"requests\[1\]: its prompt"):
            weft.generate(opened.adapters, asked, stop_ids=[])


def test_names_that_are_not_there(opened: weft.Target, samples: list[Sample]) -> None:
    hidden = opened.adapters.run([weft.Part("a", [PROMPT])])[1]
    uses: list[Callable[[], object]] = [
        lambda: opened.adapters.stream([weft.Part("b", [PROMPT])]),
        lambda: forward_losses(opened.adapters, [Work("b", samples)]),
        lambda: opened.adapters.logits(hidden, [("b", 4)]),
        lambda: opened.adapters.losses(hidden, torch.tensor(PROMPT), [("b", 4)]),
        lambda: weft.generate(opened.adapters, [weft.Request(PROMPT, "b")], stop_ids=[]),
    ]
    for use in uses:
        with pytest.raises(weft.UserError, match=r"no adapter named 'b'; there are: a\. None is the base"):
            use()


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (lambda losses, batch: losses, r"'mine' must give one loss per sequence, of shape \(2,\); it gave \("),
        (lambda losses, batch: losses.mean(), r"it gave \(\). Sum the tokens"),
        (lambda losses, batch: 1.0, "it gave float"),
        (lambda losses, batch: batch.per_sequence(losses).detach(), "losses without a gradient"),
    ],
    ids=["tokens", "mean", "float", "detached"],
)
def test_one_check_of_objectives_for_every_loop(
    opened: weft.Target, samples: list[Sample], objective: Callable[[Any, Any], Any], words: str
) -> None:
    def mine(logits: torch.Tensor, batch: Any) -> Any:
        return objective(F.cross_entropy(logits.float(), batch.targets, reduction="none"), batch)

    with pytest.raises(weft.UserError, match=words):
        forward_losses(opened.adapters, [Work("a", samples, objective=mine)])


def test_messages_may_be_mappings(opened: weft.Target) -> None:
    asked: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    messages = [weft.Message("system", "Be short."), weft.Message("user", "Hi")]
    assert opened.prompt_ids(asked) == opened.prompt_ids(messages) == opened.renderer.prompt_ids(asked)
    for wrong, words in (
        (asked[0], "must be a list of messages"),
        ([{"role": "usr", "content": "Hi"}], "turn 1 has the unknown role 'usr'. Did you mean 'user'"),
        ([asked[0], "Hi"], "turn 2 must be an object with 'role' and 'content'"),
    ):
        with pytest.raises(weft.UserError, match=words):
            opened.prompt_ids(wrong)


def test_values_and_kinds(opened: weft.Target, samples: list[Sample], tiny_data: Path) -> None:
    tokenizer: Any = opened.base.tokenizer
    listed: Any = [json.loads(line) for line in tiny_data.read_text().splitlines()[:1]]
    kinds: Any = ["ia3", weft.LoraConfig, object()]
    uses: list[tuple[Callable[[], object], str]] = [
        (lambda: weft.Sampling(temperature=-1), "temperature is -1"),
        (lambda: weft.Sampling(temperature=float("nan")), "temperature is nan"),
        (lambda: weft.Sampling(top_p=2), "top_p is 2"),
        (lambda: weft.Sampling(top_k=-1), "top_k is -1"),
        (lambda: Work("a", samples, divisor=0), "the divisor of 'a' is 0"),
        (lambda: evaluate_loss(opened.adapters, "a", []), "nothing to evaluate on: 0 samples"),
        (lambda: weft.Renderer("a-folder"), "a renderer takes a tokenizer"),  # type: ignore[arg-type]
        (lambda: load_samples(tiny_data, tokenizer), "data is rendered by a weft.Renderer"),
        (lambda: load_samples(listed, opened.renderer), "records are read from a file"),
        *((lambda kind=kind: opened.adapters.add("x", kind), "one of Weft's configurations") for kind in kinds),
    ]
    for use, words in uses:
        with pytest.raises(weft.UserError, match=words):
            use()


def test_registering_needs_a_name_and_the_right_kind() -> None:
    def nameless(logits: torch.Tensor, batch: Any) -> Any: ...

    wrong: Any = nameless
    with pytest.raises(weft.UserError, match=r"nameless is registered without a name: write @weft.register_objective"):
        weft.register_objective(wrong)
    for kind in (object, nameless, 5):
        wrong = kind
        with pytest.raises(weft.UserError, match="cannot be the method 'z'"):
            weft.register_method("z")(wrong)


def test_one_adapter_of_a_run_by_its_name(tiny_llama_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    weft.train(model=tiny_llama_dir, data=tiny_data, method=["lora", "ia3"], output_dir=tmp_path / "run", steps=1,
               progress=False)  # fmt: skip
    with weft.open_target(tmp_path / "run", adapters="lora") as opened:
        assert opened.names == ("lora",)
