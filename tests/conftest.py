"""Tiny models with random weights, made once per session: real Hugging Face folders that load in milliseconds."""

from __future__ import annotations

import os

# Before torch is imported: with several threads per process, tests that run side by side only wait for each other.
# make test-machines asks for other numbers.
os.environ["OMP_NUM_THREADS"] = os.environ.get("WEFT_TEST_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Every test proves its bases anew, and none writes into the home of who runs it.
os.environ["WEFT_CACHE_DIR"] = ""

import logging
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from tests import deprecations

import weft

THREADS = int(os.environ["OMP_NUM_THREADS"])
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CORPUS = [
    "What colour is the sky? The sky is blue.",
    "Write a sentence about the weather in the north.",
    "user assistant system instruction answer question",
    "Count from one to five: one, two, three, four, five.",
]


deprecations.install()
# How long an example takes says nothing: the machine may be busy.
hypothesis.settings.register_profile("weft", deadline=None)
hypothesis.settings.load_profile("weft")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--extension", action="append", default=[], help="a file whose methods inherit the contracts")


def pytest_configure(config: pytest.Config) -> None:
    """Methods from outside come before the tests are made, and the kit hears what they do not promise."""
    files = config.getoption("--extension")
    if not files:
        return
    from weft.methods import METHODS

    own = set(METHODS)
    for file in files:
        weft.load_extension(file)
    from tests import kit

    from weft.merge.weights import check_mergeable

    model = kit.make_model("llama")
    adapters = weft.Adapters(model, weft.describe(model))
    for name in METHODS.keys() - own:
        adapter = adapters.add(name, METHODS[name]())
        if not adapter.begins_as_identity:
            kit.NOT_IDENTITY.add(name)
        try:
            check_mergeable(adapter)
        except weft.UserError:
            kit.NOT_MERGEABLE.add(name)
    adapters.close()


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    """Tiny tensors: with more threads a busy machine spends the time waiting at barriers (measured: 87 s for 12 s), and
    sums would come in another order. Per module, for a run under test may set its own number."""
    import torch

    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _loggers() -> None:
    """The command line takes Weft's warnings for itself, also where a fixture runs it; the next test has its own."""
    logger = logging.getLogger("weft")
    logger.propagate = True
    logger.handlers[:] = [handler for handler in logger.handlers if not getattr(handler, "of_cli", False)]


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer of about 300 ids (any text round-trips) with ChatML's template and end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _save(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, hidden size 32, grouped-query attention (4 heads, 2 for keys), 256 positions; no bias."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        dtype="float32",
    )
    return _save(tmp_path_factory.mktemp("models") / "tiny-llama", LlamaForCausalLM(config), tokenizer)


@pytest.fixture(scope="session")
def tiny_bloom_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLOOM of two layers, hidden size 32, 4 heads, with ALiBi and biases."""
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        n_layer=2,
        n_head=4,
        seq_length=256,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return _save(tmp_path_factory.mktemp("models") / "tiny-bloom", BloomForCausalLM(config), tokenizer)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 Alpaca records as JSON lines."""
    import json

    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    rows = [
        {"instruction": f"What comes after {words[i % 7]}?", "output": f"{words[i % 7 + 1]} ({i})."} for i in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
