"""What reads other people's JSON, YAML and safetensors: what it takes, and what it refuses with one sentence."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from weft import foreign
from weft.errors import UserError
from weft.patterns import Pattern, check_linear

GOOD = {"a": [1, 2.5, None, True, "ü"], "limit": 1000000000000000019884624838656, "deep": {"er": {"still": []}}}


def test_json_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8")
    assert foreign.read_json(path) == GOOD
    (tmp_path / "link.json").symlink_to("a.json")
    assert foreign.read_json(tmp_path / "link.json") == GOOD


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not valid JSON"),
        ("[1]", "must hold a JSON object, not list"),
        ('{"a": NaN}', "holds NaN"),
        ('{"a": Infinity}', "holds Infinity"),
        ('{"a": 1e999}', "holds 1e999"),
        ('{"a": ' + "9" * 5000 + "}", "integer of 5000 digits"),
        ('{"a": ' * 100 + "1" + "}" * 100, "more than 64 deep"),
        ('{"a": ' * 100_000, "more than 64 deep"),
        ('{"a": [' + "[]," * 2_100_000 + "1]}", "more than 2000000 values"),
    ],
)
def test_json_that_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=expected) as caught:
        foreign.read_json(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 300


def test_infinities_where_they_are_expected(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [0.0, Infinity], "b": -Infinity, "c": 1e999}')
    found = foreign.read_json(tmp_path / "a.json", infinities=True)
    assert found == {"a": [0.0, float("inf")], "b": float("-inf"), "c": float("inf")}


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name, expected in (("fifo", "a FIFO"), ("zero", "a device"), (".", "a folder"), ("none", "missing"),
                           ("loop", "cannot be read"), ("a\0b", "cannot be read")):  # fmt: skip
        for read in (foreign.read_json, foreign.read_yaml, foreign.read_text, foreign.check_safetensors):
            with pytest.raises(UserError, match=expected):
                read(f"{tmp_path}/{name}")


def test_limits_of_bytes(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.truncate(1 << 40)
    for read in (foreign.read_json, foreign.read_yaml, foreign.read_text):
        with pytest.raises(UserError, match="longer than"):
            read(tmp_path / "a")


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"b": NaN}\n')
    assert [list(line) for line in foreign.json_lines(path)] == [["a"], ["b"]]
    for text, expected in (("[1]\n", ":1: expected an object"), ("{}\n{\n", ":2 is not valid"),
                           ("x" * (2 << 20), ":1: the line is longer")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UserError, match=expected):
            list(foreign.json_lines(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: !!python/object/apply:os.system [x]", "constructor"),
        ("a: &a [*a]", "aliases"),
        ("a: 1\na: 2", "'a' stands twice"),
        ("a: " + "[" * 5000, "64 deep"),
        ("a: " + "9" * 5000, "a number of 5000 characters"),
        ("? [a]\n: 1", "not valid YAML"),
        ("a: \0", "not valid YAML"),
    ],
)
def test_yaml_that_is_refused(text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        foreign.parse_yaml(text, "the file")
    assert str(caught.value).startswith("the file")


def test_yaml_that_is_taken() -> None:
    text = "base: &b {r: 4, lr: 1e-3}\njobs:\n- {<<: *b, name: x}\n- *b\n"
    assert foreign.parse_yaml(text, "") == {
        "base": {"r": 4, "lr": 1e-3},
        "jobs": [{"r": 4, "lr": 1e-3, "name": "x"}, {"r": 4, "lr": 1e-3}],
    }
    assert foreign.parse_yaml("", "") is None


def test_types() -> None:
    assert foreign.entry({"a": 3}, "a", int, "f") == 3
    for value, kind, expected in ((True, int, "true or false"), ([], str, "an array"), (None, dict, "null"),
                                  ("x" * 99, int, "a string"), (2.5, int, r"a number \(2.5\)")):  # fmt: skip
        with pytest.raises(UserError, match=f"f: a: expected .*, found {expected}"):
            foreign.entry({"a": value}, "a", kind, "f")
    with pytest.raises(UserError, match="'b' is missing"):
        foreign.entry({}, "b", str, "f")


HEADS = [struct.pack("<Q", 1 << 62), struct.pack("<Q", 40), b"abc", struct.pack("<Q", 2) + b"[]"]


@pytest.mark.parametrize("head", HEADS)
def test_headers_of_safetensors_that_cannot_be(head: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(head + b"{}")
    with pytest.raises(UserError):
        foreign.check_safetensors(tmp_path / "a")


# ------------------------------------------------------------------------------------------------------------- patterns

KNOWN = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "digits in threes": r"\d{1,3}(?=(?:\d{3})*\b)",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "starcoder": r"(?:\r?\n)+|[A-Za-z]+",
    "deepseek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| "
    r"?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
ENDLESS = ["(a+)+$", "(.*)*x", "([a-z]+)*!", "(.|.)*!", r"(\w+\.?)+#", "((a|b)*)*c", "(?:a|a)+$", r"(\s|\s\s)+x",
           "(a{2,})+b", r"(\p{L}|\w)+!", "(x+x+)+y", "(?:(?:a+))+$", "(a|ab|b)*$"]  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_patterns_of_tokenizers_are_taken(name: str) -> None:
    check_linear(KNOWN[name], "it")


@pytest.mark.parametrize("text", ENDLESS)
def test_patterns_that_may_not_end_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="many ways"):
        check_linear(text, "it")


def test_a_pattern_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.patterns.SECONDS", 0.2)
    slow: Any = Pattern("(.|.)*[A-Z]", "target_modules")
    for _ in range(2):
        with pytest.raises(UserError, match="takes too long"):
            slow.full("model.layers.0.self_attn.q_proj")


def test_patterns_match_as_those_of_python() -> None:
    import re

    paths = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", "a.b_c"]
    texts = (r".*\.(q|v)_proj", r"model\.layers\.(\d+)\..*proj$", "lm_head", r"(?!lm).*", "", r"(.*\.)?(q_proj)$")
    for text in texts:
        for path in paths:
            assert bool(Pattern(text, "it").full(path)) == bool(re.fullmatch(text, path))
            assert bool(Pattern(text, "it").begins(path)) == bool(re.match(text, path))
    with pytest.raises(UserError, match="no regular expression"):
        Pattern("(", "it")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, word) for word in ("off", "on", "yes", "no", "Off", "NO", "y", "n", "12:30", "1_000", "0b1", "=")),
        *((word, word) for word in ("2024-01-31", "2001-12-14t21:59:43.10-05:00", "+.inf.", "1e", "0x", "nan", "tRue")),
        *((word, True) for word in ("true", "True", "TRUE")),
        *((word, False) for word in ("false", "False", "FALSE")),
        *((word, None) for word in ("null", "Null", "NULL", "~", "")),
        *(("12", 12), ("+3", 3), ("-4", -4), ("010", 10), ("0o10", 8), ("0xfF", 255)),
        *(("1.5", 1.5), (".5", 0.5), ("5.", 5.0), ("1e-3", 0.001), ("-2.5E+1", -25.0), (".inf", math.inf)),
        *(("-.INF", -math.inf), ("'1'", "1"), ('"off"', "off"), ("!!str 1", "1")),
    ],
)
def test_yaml_has_the_words_of_its_core_schema(text: str, value: object) -> None:
    for found in (foreign.parse_yaml(text, ""), foreign.parse_yaml(f"[{text}]" if text else "[~]", "")[0]):  # type: ignore[index]
        assert (found, type(found)) == (value, type(value))
    assert foreign.parse_yaml(f"a: {text}", "") == {"a": value}
