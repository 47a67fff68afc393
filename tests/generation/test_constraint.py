"""Constrained answers: whatever the logits are, the text is what the grammar allows, and ends where it may."""

from __future__ import annotations

import json
import os
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from tests.kit.tokenizers import bert_tokenizer, byte_tokenizer, fallback_tokenizer, space_tokenizer

from weft.assets import __file__ as assets
from weft.errors import UserError
from weft.generation.constraint import Constraint, Grammars
from weft.generation.sampling import Drawing, Sampling, choose
from weft.generation.text import decode

WIDER = 37  # ids of the model that the tokenizer does not have
SHARED = Path(os.environ.get("WEFT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
FILES = {
    "tiny-llama": (Path(assets).parent / "tiny-llama" / "tokenizer.json", "<|im_end|>"),
    "llama2": (SHARED / "tokenizers" / "llama2" / "tokenizer.json", "</s>"),
    "gpt2": (SHARED / "tokenizers" / "gpt2" / "tokenizer.json", "<|endoftext|>"),
    "minimind": (SHARED / "tokenizers" / "minimind" / "tokenizer.json", "<|im_end|>"),
    "stories260K": (SHARED / "models" / "stories260K" / "tokenizer.json", "</s>"),
}


@cache
def tokenizer_of(kind: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    if kind in ("bytes", "fallback"):
        return {"bytes": byte_tokenizer, "fallback": fallback_tokenizer}[kind]()
    file, end = FILES[kind]
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=end)


@cache
def grammars_of(kind: str) -> Grammars:
    tokenizer = tokenizer_of(kind)
    return Grammars(tokenizer, len(tokenizer) + WIDER, [tokenizer.eos_token_id, len(tokenizer) + 3])


def answers(kind: str, constraint: Constraint, count: int = 4, limit: int = 400, seed: int = 0) -> list[str]:
    """Texts of random logits, which grow for what ends a text so that it ends one day."""
    tokenizer, grammars = tokenizer_of(kind), grammars_of(kind)
    ends = [tokenizer.eos_token_id, len(tokenizer) + 3]
    closing = [n for t, n in tokenizer.get_vocab().items() if set(t) <= set('"}]')]
    generator = torch.Generator().manual_seed(seed)
    rows = [Drawing(Sampling(1.0, seed=seed + row), matcher=grammars.matcher(constraint)) for row in range(count)]
    texts: list[list[int]] = [[] for _ in rows]
    for step in range(limit):
        alive = [row for row in range(count) if not rows[row].matcher.ended]
        if not alive:
            return [decode(tokenizer, ids) for ids in texts]
        logits = 2 * torch.randn(len(alive), len(tokenizer) + WIDER, generator=generator)
        logits[:, closing] += min(step, 200) / 10
        logits[:, ends] += 2 + step / 10
        choice = choose(logits, [rows[row] for row in alive])
        assert choice.failures == {}
        for row, token in zip(alive, choice.tokens, strict=True):
            texts[row] += [] if token in ends else [token]
    raise AssertionError(f"no end after {limit} tokens: {decode(tokenizer, texts[alive[0]])[:300]}")


def random_schema(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = ["integer", "number", "string", "boolean", "null", "enum", "const", "pattern", "length"]
    kind = chance.choice([*kinds, *(["object", "array", "anyOf"] * 3 if depth < 3 else [])])
    if kind == "object":
        names = chance.sample(["a", "b 1", "名字", "é", 'q"', "x_y"], chance.randint(0, 4))
        return {
            "type": "object",
            "properties": {name: random_schema(chance, depth + 1) for name in names},
            "required": chance.sample(names, chance.randint(0, len(names))),
            "additionalProperties": chance.choice([False, False, {"type": "integer"}]),
        }
    if kind == "array":
        least = chance.randint(0, 2)
        return {"type": "array", "items": random_schema(chance, depth + 1), "minItems": least, "maxItems": least + 2}
    if kind == "anyOf":
        return {"anyOf": [random_schema(chance, depth + 1) for _ in range(chance.randint(1, 3))]}
    low = chance.randint(-50, 50)
    return {
        "integer": {"type": "integer", "minimum": low, "maximum": low + chance.randint(0, 1000)},
        "number": {"type": "number", "exclusiveMinimum": low, "maximum": low + 3.5},
        "enum": {"enum": ["一", "two", 3, None, [1, {"a": "b/c"}]]},
        "const": {"const": {"名": ["织机", 1.5, True]}},
        "pattern": {"type": "string", "pattern": chance.choice(["^[a-c]{2,4}$", "^x+y", "^织(机|布)$"])},
        "length": {"type": "string", "minLength": 2, "maxLength": 4},
    }.get(kind, {"type": kind})


@pytest.mark.parametrize("kind", ["tiny-llama", "fallback", "bytes"])
def test_answers_follow_random_schemas(kind: str) -> None:
    chance, whole = random.Random(kind), 0
    for number in range(34):
        schema = random_schema(chance)
        for text in answers(kind, Constraint.json_schema(schema), 3, seed=number):
            jsonschema.validate(json.loads(text), schema)
            whole += len(text) > 20
    assert whole > 10, "short answers alone would prove little"


def test_any_object() -> None:
    found = [json.loads(text) for text in answers("tiny-llama", Constraint.json_object(), 8)]
    assert all(isinstance(one, dict) for one in found)
    assert any(found)


@pytest.mark.parametrize("kind", ["tiny-llama", "fallback", "bytes"])
@pytest.mark.parametrize(
    "pattern", [r"[a-c]{3}[0-9]+", "^ ?a b$", " a|b", r"(织机|布)+。", 'a/b\\\\|"x', r"[0-9]{4}-[0-9]{2}"]
)
def test_answers_match_expressions(kind: str, pattern: str) -> None:
    for text in answers(kind, Constraint.regex(pattern), 6):
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize("kind", ["tiny-llama", "fallback", "bytes"])
def test_answers_are_choices(kind: str) -> None:
    choices = ["yes", "yes, but", "no", " a", "织机 😀", "a.*[b]{2}\\^$|(-&~/#\n\"'", "é"]
    found = {text for seed in range(5) for text in answers(kind, Constraint.choice(choices), 20, seed=seed)}
    assert found <= set(choices)
    assert len(found) >= 5, found


@pytest.mark.parametrize("kind", ["llama2", "gpt2", "minimind", "stories260K"])
def test_tokenizers_of_real_models(kind: str) -> None:
    schema = {"type": "object", "properties": {"名": {"type": "string", "maxLength": 5}}, "required": ["名"]}
    schema |= {"additionalProperties": False}
    for text in answers(kind, Constraint.json_schema(schema)):
        jsonschema.validate(json.loads(text), schema)
    assert set(answers(kind, Constraint.choice([" a b", "a b", "织机 "]))) <= {" a b", "a b", "织机 "}


def test_end_tokens_are_allowed_where_the_grammar_may_end() -> None:
    tokenizer = tokenizer_of("tiny-llama")
    a, b, ends = *tokenizer.convert_tokens_to_ids(["a", "b"]), [tokenizer.eos_token_id, len(tokenizer) + 3]
    matcher = grammars_of("tiny-llama").matcher(Constraint.regex("ab?"))
    assert not matcher.mask()[ends].any()
    matcher.accept(a)
    assert matcher.mask().nonzero()[:, 0].tolist() == sorted([b, *ends])
    assert not matcher.ended
    other = grammars_of("tiny-llama").matcher(Constraint.regex("ab?"))
    matcher.accept(b)
    assert matcher.ended
    assert matcher.mask().nonzero()[:, 0].tolist() == sorted(ends)
    assert not other.mask()[ends].any(), "rows share a grammar, not a place in it"
    other.accept(b)
    assert other.failure is not None
    assert not other.mask().any()
    # Without an end token, the grammar's own end is the only one.
    endless = Grammars(tokenizer, len(tokenizer)).matcher(Constraint.regex("ab?"))
    endless.accept(a)
    assert endless.mask().nonzero()[:, 0].tolist() == [b]
    ended = grammars_of("tiny-llama").matcher(Constraint.regex("ab?"))
    ended.accept(a)
    ended.accept(ends[1])
    assert ended.ended


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "wat"}, "Invalid type: wat"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"if": {"type": "string"}, "then": {"minLength": 3}}, '"if", "then"'),
        ({"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]}, "oneOf is not supported; use anyOf"),
        ({"$ref": "#/$defs/x"}, "does not exist"),
        ({"$ref": "http://localhost/x"}, "not present"),
        ({"$ref": "#"}, "no text"),
        ({"type": "string", "format": "wat"}, "Unknown format: wat"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"x-guidance": {"lenient": True}}, "x-guidance"),
        ({"const": "a\x01"}, "control character"),
        ({"minimum": float("nan")}, "no JSON"),
        ({"const": {1, 2}}, "no JSON"),
        ({"const": "\ud800"}, "half of a character"),
        ("string", "expected a schema"),
        ({"enum": ["x" * 70_000]}, "at most 65,536"),
    ],
)
def test_schemas_that_cannot_be_enforced_are_refused(schema: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        grammars_of("bytes").matcher(Constraint.json_schema(schema))
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "unclosed group"),
        (r"(a)\1", "backreferences"),
        ("a\\", "lone backslash"),
        ("[^\\s\\S]", "no text"),
        ("", "no text"),
        ("x" * 70_000, "at most 65,536"),
    ],
)
def test_expressions_that_are_wrong_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        grammars_of("bytes").matcher(Constraint.regex(pattern))


def test_an_expression_that_explodes_ends_its_row_alone() -> None:
    grammars, tokenizer = grammars_of("bytes"), tokenizer_of("bytes")
    constraints = [Constraint.regex("((.{1,1000}){1,1000})x"), Constraint.regex("[a-z ]{1,1000}")]
    rows = [Drawing(Sampling(1.0, seed=row), matcher=grammars.matcher(one)) for row, one in enumerate(constraints)]
    for step in range(500):
        logits = torch.randn(2, len(tokenizer) + WIDER, generator=torch.Generator().manual_seed(step))
        choice = choose(logits, rows)
        assert 1 not in choice.failures
        if choice.failures:
            break
    assert "too much work" in choice.failures[0]


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"type": "string", "pattern": f".*a.{{{n}}}"} for n in range(30)]},
        {"type": "integer", "multipleOf": 10_000_019},
    ],
    ids=["intersection", "multiple"],
)
def test_what_would_never_end_is_refused_in_time(schema: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.generation.constraint._SECONDS", 2.0)
    with pytest.raises(UserError, match="takes longer than 2 seconds"):
        grammars_of("bytes").matcher(Constraint.json_schema(schema))


def test_deep_schemas_are_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(UserError, match="deeper than 64"):
        Constraint.json_schema(schema)


@pytest.mark.parametrize("choices", ["yes", [], ["a", ""], [1], {"a"}])
def test_choices_that_are_none_are_refused(choices: Any) -> None:
    with pytest.raises(UserError, match="choice"):
        Constraint.choice(choices)


def test_tokenizers_that_are_not_known_are_refused() -> None:
    for tokenizer in (bert_tokenizer(), space_tokenizer()):
        with pytest.raises(UserError, match="do not know this kind of tokenizer"):
            Grammars(tokenizer, len(tokenizer), [0])
    before = tokenizer_of("bytes").backend_tokenizer.to_str()
    Grammars(tokenizer_of("bytes"), 300, [0])
    assert tokenizer_of("bytes").backend_tokenizer.to_str() == before


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UserError, match=r"weft\[constrain\]"):
        Grammars(tokenizer_of("bytes"), 300, [0])


def test_kept_grammars_are_equal_and_few() -> None:
    grammars = Grammars(tokenizer_of("bytes"), 300, [0])
    first = Constraint.json_schema({"type": "string"})
    assert first == Constraint.json_schema({"type": "string"})
    assert hash(first) == hash(Constraint.json_schema({"type": "string"}))
    for number in range(100):
        grammars.matcher(Constraint.choice([str(number)]))
        grammars.matcher(first)
    assert len(grammars._ready) == 64
    assert first in grammars._ready
