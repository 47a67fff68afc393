"""What says how an adapter's data was rendered: hashes that tell tokenizers apart, renderers made of it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.conftest import CHAT_TEMPLATE, make_tokenizer

from weft.data import PLAIN_TEMPLATE, Message, Renderer
from weft.data.provenance import (
    Provenance,
    TokenizerFacts,
    common,
    file_names,
    make_renderer,
    template_of,
)
from weft.data.rendering.fingerprint import tokenizer_hash
from weft.errors import UserError

OTHER = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
TALK = [Message("system", "Be kind."), Message("user", "What colour is the sky?")]


def bare() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def record_of(renderer: Renderer, **more: Any) -> Provenance:
    made = Provenance(**template_of(renderer), tokenizer=TokenizerFacts.of(renderer.tokenizer), **more)
    return Provenance.model_validate_json(made.model_dump_json())


@pytest.mark.parametrize(
    ("renderer", "origin"),
    [
        (lambda: Renderer(make_tokenizer()), "tokenizer"),
        (lambda: Renderer(make_tokenizer(), chat_template=OTHER), "configuration"),
        (lambda: Renderer(bare(), chat_template=OTHER), "configuration"),
        (lambda: Renderer(bare()), "plain"),
        (lambda: Renderer(make_tokenizer(), chat_template=PLAIN_TEMPLATE), "configuration"),
        (
            lambda: Renderer(make_tokenizer(), chat_template="{{ flag }}" + OTHER, template_kwargs={"flag": "on "}),
            "configuration",
        ),
    ],
)
@pytest.mark.parametrize("now", [make_tokenizer, bare], ids=["with a template now", "without"])
def test_the_same_prompt_again(renderer: Any, origin: str, now: Any) -> None:
    """Token by token, whatever template the tokenizer has by then; with a word if it is not the one of training."""
    trained = renderer()
    record = record_of(trained)
    assert record.template_from == origin
    again, notes = make_renderer(record, now())
    assert again.prompt_ids(TALK) == trained.prompt_ids(TALK)
    changed = origin != "configuration" and bool(now().chat_template) != (origin == "tokenizer")
    assert [note for note in notes if "template is not the one of training" in note] == notes
    assert bool(notes) == changed


def test_no_template_stays_no_template() -> None:
    """An encoder-decoder reads bare text where there is none."""
    trained = Renderer(bare())
    again, _ = make_renderer(record_of(trained), make_tokenizer())
    assert again.prompt(TALK[1:], task="seq2seq").ids == trained.prompt(TALK[1:], task="seq2seq").ids
    assert (
        Renderer(make_tokenizer()).prompt(TALK[1:], task="seq2seq").ids != trained.prompt(TALK[1:], task="seq2seq").ids
    )


def test_several_templates_by_name() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": OTHER, "tool_use": CHAT_TEMPLATE}
    trained = Renderer(tokenizer)
    again, notes = make_renderer(record_of(trained), make_tokenizer())
    assert again.prompt_ids(TALK) == trained.prompt_ids(TALK)
    assert len(notes) == 1


def test_another_template_asked_for() -> None:
    record = record_of(Renderer(make_tokenizer()))
    again, notes = make_renderer(record, make_tokenizer(), OTHER)
    assert again.prompt_ids(TALK) == Renderer(make_tokenizer(), chat_template=OTHER).prompt_ids(TALK)
    assert "given is not the one of training" in notes[0]
    assert make_renderer(record, make_tokenizer(), CHAT_TEMPLATE)[1] == []


def test_hash_and_what_differs() -> None:
    plain = make_tokenizer()
    wanted = TokenizerFacts.of(plain)
    plain(["a", "bcd e"], padding=True, truncation=True, max_length=3)  # leaves its settings behind
    plain.chat_template = OTHER
    assert TokenizerFacts.of(plain) == wanted

    added = make_tokenizer()
    added.add_tokens(["<think>"])
    ended = make_tokenizer()
    ended.eos_token = "<|pad|>"
    merged = make_tokenizer()
    merged.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    for tokenizer, said in (
        (added, f"it has {len(plain) + 1} tokens, not {len(plain)}"),
        (ended, "its eos_token is '<|pad|>', not '<|im_end|>'"),
        (merged, "its vocabulary, its merges or its rules differ"),
    ):
        assert wanted.differences(TokenizerFacts.of(tokenizer)) == [said]


@pytest.mark.long
@pytest.mark.parametrize("name", ["", "llama2", "minimind", "gpt2"])
def test_hash_survives_saving(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer()
    if name:
        tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue("shared") / "tokenizers" / name)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_hash(tokenizer)


def test_common() -> None:
    renderer = Renderer(make_tokenizer())
    settings = {"train_on": "answers", "data": "a.jsonl"}
    one = record_of(renderer, settings=settings, sha256="1", records=3, batch_size=8)
    same, notes = common({"runs/one": one, "runs/two": one})
    assert notes == []
    assert same is not None
    assert same.model_copy(update={"parents": ()}) == one
    assert [parent["adapter"] for parent in same.parents] == ["one", "two"]

    other = record_of(
        Renderer(make_tokenizer(), chat_template=OTHER),
        settings={**settings, "train_on": "all"}, sha256="2", records=4, batch_size=8,
    )  # fmt: skip
    made, notes = common({"runs/one": one, "runs/two": other})
    assert made is not None
    assert (made.chat_template, made.template_from, made.sha256, made.settings) == (
        None,
        None,
        None,
        {"data": "a.jsonl"},
    )
    assert (made.batch_size, made.tokenizer) == (8, one.tokenizer)
    assert [parent["sha256"] for parent in made.parents] == ["1", "2"]
    assert "chat_template is not the same for all" in notes
    assert "train_on: 'answers' (one), 'all' (two)" in notes
    _, said = make_renderer(made, make_tokenizer())
    assert "trained with different chat templates" in said[0]

    assert common({"one": None, "two": None}) == (None, [])
    made, notes = common({"one": None, "two": one})
    assert made is None
    assert notes == ["one: the folder does not say how its data was rendered"]


def test_paths_stay_at_home() -> None:
    told = file_names({"data": "/home/me/secret/a.jsonl", "eval_data": "org/set", "n": 3, "more": ["./b.csv", None]})
    assert told == {"data": "a.jsonl", "eval_data": "org/set", "n": 3, "more": ["b.csv", None]}
    assert file_names("0.5*/home/me/a.jsonl + .5*../b/*.csv") == "0.5*a.jsonl + .5**.csv"
    assert file_names("+0.5*/home/me/a.jsonl +\n+0.5 * /home/b.jsonl") == "+0.5*a.jsonl + +0.5*b.jsonl"
    assert file_names("2*owner/name + 3*b.txt") == "2*owner/name + 3*b.txt"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"records": "many"}, "weft.json: data.records"),
        ({"template_from": "plain"}, "template_from without a chat_template"),
        ({"template_from": "plain", "chat_template": {"default": "x"}}, "is no text"),
        ({"tokenizer": {"tokens": 3}}, "data.tokenizer.sha256"),
    ],
)
def test_a_damaged_section(section: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Provenance.read(section, "weft.json")


def test_what_a_later_version_adds_is_passed_over() -> None:
    assert Provenance.read({"records": 3, "colour": "blue"}, "weft.json") == Provenance(records=3)
