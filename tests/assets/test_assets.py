"""The embedded bases and data: complete, small, reproducible, and such that a gain after fine-tuning means much."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from weft.assets import EMBEDDED_MODELS, SPLITS, base_text_path, instructions_path, model_path
from weft.assets.phrases import LANGUAGES, QUESTIONS
from weft.assets.world import TASKS, World, build_world, corpus

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import build_bases

MOST_BYTES = 8 * 2**20
LARGEST_LOSS = 1.2  # nats per token; the bases reach about 1.1, and the text cannot be predicted much better
MESSAGES = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "Where does Ada live?"},
    {"role": "assistant", "content": "Kelso"},
    {"role": "user", "content": "王梅住在哪里？"},
    {"role": "assistant", "content": "凯溪"},
]


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(build_bases.WORLD_SEED)


def read(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in instructions_path(split).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_a_base_is_a_complete_small_folder(name: str) -> None:
    folder = model_path(name)
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert sum(files.values()) <= MOST_BYTES


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="tiny-llama"):
        model_path("tiny-gpt")
    with pytest.raises(ValueError, match="eval"):
        instructions_path("test")


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_a_base_loads_as_float32(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path(name), dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.model_type == name.removeprefix("tiny-")
    has_biases = any(key.endswith(".bias") for key in model.state_dict())
    assert has_biases == (name == "tiny-bloom")


def test_the_generator_reproduces_the_committed_text(world: World, tmp_path: Path) -> None:
    build_bases.write_texts(world, tmp_path)
    for split in SPLITS:
        assert (tmp_path / "instructions" / f"{split}.jsonl").read_bytes() == instructions_path(split).read_bytes()
    assert (tmp_path / "base_text.txt").read_bytes() == base_text_path().read_bytes()


def test_both_bases_have_the_tokenizer_that_the_generator_builds(world: World) -> None:
    built = build_bases.build_tokenizer(world).backend_tokenizer.to_str()
    for name in EMBEDDED_MODELS:
        assert json.loads((model_path(name) / "tokenizer.json").read_text(encoding="utf-8")) == json.loads(built)


def test_evaluation_asks_about_nothing_that_training_asked_about(world: World) -> None:
    train, evaluation = read("train"), read("eval")
    assert {(r["task"], r["language"]) for r in evaluation} == set(itertools.product(TASKS, LANGUAGES))
    assert not {(r["instruction"], r["input"]) for r in train} & {(r["instruction"], r["input"]) for r in evaluation}
    assert not {r["input"] for r in train if r["input"]} & {r["input"] for r in evaluation if r["input"]}
    questions = {r["instruction"] for r in train}
    for subject in world.people + world.towns + world.things:
        if subject.name in world.held_out:
            for attribute in subject.facts:
                for at, language in enumerate(LANGUAGES):
                    wordings = QUESTIONS[language][attribute]
                    assert questions.isdisjoint(wording.format(n=subject.name[at]) for wording in wordings)
    assert operands(train).isdisjoint(operands(evaluation))
    told = [r["input"] for r in train if r["task"] == "json"]
    unasked = [person.name for person in world.people if person.name in world.held_out]
    assert not [text for text in told for en, zh in unasked if zh in text or re.search(rf"\b{en}\b", text)]


def operands(records: list[dict[str, str]]) -> set[tuple[str, ...]]:
    """What each sum is of, the same for both orders: two numbers and whether it grows or shrinks."""
    found = set()
    for record in (r for r in records if r["task"] == "arithmetic"):
        numbers = sorted(int(n) for n in re.findall(r"\d+", record["instruction"])[-2:])
        found.add((*map(str, numbers), "+" if int(record["output"]) == sum(numbers) else "-"))
    return found


def test_the_corpus_asks_nothing_and_holds_no_evaluation_input(world: World) -> None:
    evaluation = read("eval")
    hidden = [r["instruction"] for r in evaluation if not r["input"]] + [r["input"] for r in evaluation if r["input"]]
    told = "\n".join(itertools.islice(corpus(world, build_bases.CORPUS_SEED), 20_000))
    assert "?" not in told
    assert "？" not in told
    assert not [text for text in hidden if text in told]


def test_the_template_is_prefix_preserving_and_eos_ends_every_answer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny-llama"))
    whole = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    whole_ids = tokenizer(whole, add_special_tokens=False).input_ids
    assert tokenizer(whole).input_ids == whole_ids  # nothing is added that the template does not write
    for i, message in enumerate(MESSAGES):
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(MESSAGES[:i], tokenize=False, add_generation_prompt=True)
            prompt_ids = tokenizer(prompt).input_ids
            assert whole.startswith(prompt)
            assert whole_ids[: len(prompt_ids)] == prompt_ids
            answer = tokenizer(message["content"]).input_ids
            assert whole_ids[len(prompt_ids) :][: len(answer) + 1] == [*answer, tokenizer.eos_token_id]


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_a_base_knows_the_world(name: str, world: World) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path(name))
    model = AutoModelForCausalLM.from_pretrained(model_path(name)).eval()
    texts = [line.replace("\\n", "\n") for line in base_text_path().read_text(encoding="utf-8").splitlines()]
    end = tokenizer.eos_token_id
    stream = [end] + [token for text in texts for token in [*tokenizer(text).input_ids, end]]
    width = len(stream) // 16
    rows = torch.tensor(stream[: 16 * width]).view(16, width)
    with torch.no_grad():
        loss = model(input_ids=rows, labels=rows).loss.item()
    assert loss < LARGEST_LOSS < math.log(len(tokenizer))

    held_out = [person for person in world.people if person.name in world.held_out]
    known = 0
    for person in held_out:
        prompt = tokenizer(f"{person.name[0]} lives in", return_tensors="pt")
        told = model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, prompt.input_ids.shape[1] :]
        known += tokenizer.decode(told).strip() == person.facts["home"][0]
    assert known >= 0.9 * len(held_out)
